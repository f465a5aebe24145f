//! What one reading after the other says of sockets that are not ours: who is new, who is gone, since when each is where
//! it is.
//!
//! Pure: time and rows come in as arguments. Must not know: how the table is read, or how often.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{Listeners, Port, Selection, Service, Sight, Socket, Stay};
use crate::kernel::{Row, TIME_WAIT};
use crate::metrics::TOLD;
use crate::tcp::{ByCookie, Flow, Role, State};

/// For how long the kernel's word of an end may be under way.
pub(super) const LATE: Duration = Duration::from_secs(10);

/// One socket, as long as the table shows it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    service: Service,
    state: State,
    /// Since when it is in that state, as far as is known: by the kernel's word for CLOSE_WAIT and TIME_WAIT, else since it
    /// was first seen there.
    since: Duration,
    /// Whether it may have been there for longer than that.
    at_least: bool,
    /// Counted as opened, or there when we came.
    counted: bool,
    /// Its full socket is gone; what may be left is a minisocket.
    freed: bool,
    /// First and last seen.
    born: u32,
    round: u32,
    flow: Flow,
    inode: u32,
}

impl Seen {
    /// Its full socket is gone, and with it the connection, whatever stands in for it.
    fn free(&mut self, totals: &mut BTreeMap<Service, (u64, u64)>) {
        if !std::mem::replace(&mut self.freed, true) {
            let (opened, closed) = totals.entry(self.service).or_default();
            *opened += u64::from(!std::mem::replace(&mut self.counted, true));
            *closed += 1;
        }
    }
}

/// Keeps what is known from one reading to the next.
pub(super) struct Tracker {
    selection: Selection,
    listening: BTreeMap<u16, Listeners>,
    /// Ports that somebody listens on, or listened on and that have sockets left; and in which round that was seen first.
    served: BTreeMap<u16, u32>,
    seen: ByCookie<Seen>,
    sights: BTreeMap<Service, Sight>,
    /// Opened and closed since the start.
    totals: BTreeMap<Service, (u64, u64)>,
    pairs: HashMap<(IpAddr, SocketAddr), u32>,
    stays: Vec<Stay>,
    /// Those that are gone before the kernel said so, and since when: its word may come, and they are counted.
    gone: ByCookie<Duration>,
    /// Rows in CLOSE of this round. A descriptor that is still open shows as CLOSE beside its own TIME_WAIT, and before it:
    /// these rows are looked at last.
    closed: Vec<Row>,
    /// How many were freed since the last reading and were of no listener then: by their local port, on which somebody may
    /// have begun to listen, and by whose they are otherwise. There are no more of these than there are ports.
    undecided: HashMap<(u16, Service), u64>,
    round: u32,
    /// The round in which the table was read to its end for the first time: what is new since then was opened since then.
    first: u32,
    now: Duration,
    /// CLOSE_WAIT whose beginning the kernel has not told us yet.
    unaged: u64,
}

impl Tracker {
    pub(super) fn new(selection: Selection) -> Tracker {
        Tracker {
            selection,
            listening: BTreeMap::new(),
            served: BTreeMap::new(),
            seen: ByCookie::default(),
            sights: BTreeMap::new(),
            totals: BTreeMap::new(),
            pairs: HashMap::new(),
            stays: Vec::new(),
            gone: ByCookie::default(),
            closed: Vec::new(),
            undecided: HashMap::new(),
            round: 0,
            first: u32::MAX,
            now: Duration::ZERO,
            unaged: 0,
        }
    }

    /// A reading begins, of a table in which these ports are listened on.
    pub(super) fn begin(&mut self, now: Duration, listening: BTreeMap<u16, Listeners>) {
        self.now = now;
        self.round += 1;
        self.unaged = 0;
        self.closed.clear();
        self.sights.clear();
        for port in listening.keys() {
            self.served.entry(*port).or_insert(self.round);
        }
        self.listening = listening;
        for ((port, client), number) in std::mem::take(&mut self.undecided) {
            let server = Service { role: Role::Server, port: Port::Number(port) };
            self.passed(if self.served.contains_key(&port) { server } else { client }, number);
        }
        // Present at zero: whoever listens, and whoever was asked for.
        let served = self.served.keys().chain(&self.selection.only);
        let servers = served.map(|port| Service { role: Role::Server, port: Port::Number(*port) });
        let named = self.selection.remote.iter().map(|port| Port::Number(*port)).chain([Port::Other]);
        let clients = named.map(|port| Service { role: Role::Client, port });
        for service in servers.chain(clients).filter(|service| self.selection.takes(*service)) {
            self.sights.insert(service, Sight::default());
        }
        // Whoever is left out is counted all the same: only then it can be said how many are missing.
    }

    /// A socket that the table shows, and when; one that it shows twice counts once.
    pub(super) fn row(&mut self, row: &Row, at: Duration) {
        if row.state == State::Close {
            self.closed.push(*row);
        } else {
            self.place(row, at);
        }
    }

    fn place(&mut self, row: &Row, at: Duration) {
        // It listens since the list of listeners was read. The kernel shows those first: whom it accepted comes after it.
        if row.state == State::Listen && !self.served.contains_key(&row.flow.local.port()) {
            self.served.insert(row.flow.local.port(), self.round);
            let service = Service { role: Role::Server, port: Port::Number(row.flow.local.port()) };
            if self.selection.takes(service) {
                self.sights.entry(service).or_default();
            }
        }
        // Listeners were read before; one that was never bound has no port.
        let Some(service) = self.service_of(&row.flow).filter(|_| row.flow.local.port() != 0) else { return };
        let mini = row.is_minisocket();
        // Neither listeners nor what is only bound, nor the kernel's note of a SYN.
        let connection = row.flow.peer.port() != 0 && !(row.state == State::SynRecv && row.inode == 0);
        let first = self.first == u32::MAX;
        let (since, at_least) = match row.state {
            State::TimeWait => (at.saturating_sub(TIME_WAIT.saturating_sub(row.expires)), false),
            _ => (self.now, first),
        };
        let fresh = Seen {
            service,
            state: row.state,
            since,
            at_least,
            counted: first && connection,
            freed: first && mini,
            born: self.round,
            round: self.round,
            flow: row.flow.canonical(),
            inode: row.inode,
        };
        let mut entered = true;
        let seen = match self.seen.entry(key(row)) {
            Entry::Vacant(vacant) => vacant.insert(fresh),
            Entry::Occupied(occupied) => {
                let seen = occupied.into_mut();
                if row.state == State::Close && seen.round == self.round {
                    return;
                }
                entered = seen.state != row.state;
                if row.cookie.is_none() && seen.freed && !mini {
                    // The addresses are the same; the connection is another.
                    self.stays.extend(left(seen, self.now));
                    *seen = fresh;
                } else if entered {
                    self.stays.extend(left(seen, self.now));
                    (seen.state, seen.since, seen.at_least) = (fresh.state, fresh.since, false);
                }
                // It was accepted while the last reading was under way, whose list of listeners was older.
                let since = self.served.get(&row.flow.local.port());
                if seen.service != service
                    && since.is_some_and(|since| *since == seen.born + 1)
                    && self.first < seen.born
                {
                    if seen.counted {
                        self.totals.entry(seen.service).and_modify(|(opened, _)| *opened = opened.saturating_sub(1));
                        self.totals.entry(service).or_default().0 += 1;
                    }
                    seen.service = service;
                }
                (seen.round, seen.flow, seen.inode) = (fresh.round, fresh.flow, fresh.inode);
                seen
            }
        };
        if entered && row.state == State::CloseWait {
            self.unaged += 1;
        }
        if mini {
            // If it was not here before, the kernel's word of its full socket, by which it is counted, is still on its way,
            // or came. If its cookie is not that of the full socket, nobody had asked for one in time, and it was counted
            // under the other. By text there is no such word.
            if seen.counted || row.cookie.is_none() {
                seen.free(&mut self.totals);
            }
        } else if connection && !seen.counted {
            seen.counted = true;
            self.totals.entry(seen.service).or_default().0 += 1;
        }
    }

    /// Whether there are sockets in CLOSE_WAIT since the last reading whose [`age`](Self::age) is wanted.
    pub(super) fn wants_ages(&self) -> bool {
        self.unaged > 0
    }

    /// A socket in CLOSE_WAIT and, at this moment, the time since its last ACK: the FIN was one, so that it is at least so old.
    pub(super) fn age(&mut self, row: &Row, at: Duration) {
        let (Some(age), Some(seen)) = (row.last_ack, self.seen.get_mut(&key(row))) else { return };
        let since = at.saturating_sub(age);
        if seen.state == State::CloseWait {
            seen.since = seen.since.min(since);
        }
    }

    /// The kernel has freed a full socket. Returns false when it may have been a connection and nobody knows whose: one that
    /// was reset by its own side (`tcp_disconnect`) has forgotten its peer.
    pub(super) fn freed(&mut self, cookie: u64, flow: &Flow) -> bool {
        if flow.peer.port() == 0 {
            // Or a listener, or one that was never connected. If a reading has shown it, the next one misses it.
            return self.first == u32::MAX || self.seen.contains_key(&cookie);
        }
        let Some(service) = self.service_of(flow) else { return true };
        match self.seen.get_mut(&cookie) {
            Some(seen) => seen.free(&mut self.totals),
            None if self.gone.remove(&cookie).is_some() => {}
            // It lived between two readings. A minisocket that goes on under its cookie is not counted again.
            None if self.first != u32::MAX && service.role == Role::Server => self.passed(service, 1),
            // Perhaps of a listener that is newer than the last reading: the next one tells.
            None if self.first != u32::MAX => {
                *self.undecided.entry((flow.local.port(), service)).or_default() += 1;
            }
            // It may have been there before us.
            None => {}
        }
        true
    }

    /// So many connections lived between two readings.
    fn passed(&mut self, service: Service, number: u64) {
        let (opened, closed) = self.totals.entry(service).or_default();
        (*opened, *closed) = (*opened + number, *closed + number);
    }

    /// The reading is complete: whoever it has not shown is gone.
    pub(super) fn finish(&mut self) -> (BTreeMap<Service, Sight>, Vec<Stay>) {
        for row in std::mem::take(&mut self.closed) {
            self.place(&row, self.now);
        }
        self.first = self.first.min(self.round);
        self.pairs.clear();
        let (now, round) = (self.now, self.round);
        let mut held = BTreeSet::new();
        self.gone.retain(|_, since| now.saturating_sub(*since) < LATE);
        self.seen.retain(|cookie, seen| {
            if seen.round != round {
                self.stays.extend(left(seen, now));
                if seen.counted && !seen.freed {
                    seen.free(&mut self.totals);
                    self.gone.insert(*cookie, now);
                }
                return false;
            }
            if let Some(sight) = self.sights.get_mut(&seen.service) {
                sight.add(seen.state, now.saturating_sub(seen.since), seen.at_least);
            }
            match seen.service {
                Service { role: Role::Client, .. } if self.selection.takes(seen.service) => {
                    *self.pairs.entry((seen.flow.local.ip(), seen.flow.peer)).or_default() += 1;
                }
                Service { port: Port::Number(port), .. } if !self.listening.contains_key(&port) => {
                    held.insert(port);
                }
                Service { .. } => {}
            }
            true
        });
        for (port, listeners) in &self.listening {
            let service = Service { role: Role::Server, port: Port::Number(*port) };
            if let Some(sight) = self.sights.get_mut(&service) {
                sight.listeners = Some(listeners.clone());
            }
        }
        for (service, sight) in &mut self.sights {
            (sight.opened, sight.closed) = self.totals.get(service).copied().unwrap_or_default();
        }
        self.served.retain(|port, _| self.listening.contains_key(port) || held.contains(port));
        self.stays.retain(|stay| self.sights.contains_key(&stay.service));
        (std::mem::take(&mut self.sights), std::mem::take(&mut self.stays))
    }

    /// The ports on which somebody listens, or did as long as connections are left.
    pub(super) fn served(&self) -> impl Iterator<Item = u16> {
        self.served.keys().copied()
    }

    /// The listening ports that were asked for by number.
    pub(super) fn named(&self) -> &[u16] {
        &self.selection.only
    }

    /// How many connections were opened since the survey began, as far as they were seen.
    pub(super) fn opened(&self) -> u64 {
        self.totals.values().map(|(opened, _)| opened).sum::<u64>() + self.undecided.values().sum::<u64>()
    }

    /// The fullest pairs of a local address and a destination, and how many local ports each has taken.
    pub(super) fn fullest(&self, most: usize) -> Vec<(IpAddr, SocketAddr, u32)> {
        let mut pairs: Vec<_> = self.pairs.iter().map(|((local, peer), used)| (*local, *peer, *used)).collect();
        pairs.sort_unstable_by_key(|(local, peer, used)| (std::cmp::Reverse(*used), *peer, *local));
        pairs.truncate(most);
        pairs
    }

    /// The sockets that have been in `state` for longest.
    pub(super) fn oldest(&self, state: State, most: usize) -> Vec<Socket> {
        let wanted = |seen: &&Seen| seen.state == state && self.selection.takes(seen.service);
        let mut found: Vec<Socket> = (self.seen.values().filter(wanted))
            .map(|seen| Socket {
                service: seen.service,
                flow: seen.flow,
                inode: seen.inode,
                age: self.now.saturating_sub(seen.since),
                at_least: seen.at_least,
            })
            .collect();
        found.sort_unstable_by_key(|socket| (std::cmp::Reverse(socket.age), socket.inode));
        found.truncate(most);
        found
    }

    fn service_of(&self, flow: &Flow) -> Option<Service> {
        let service = if self.served.contains_key(&flow.local.port()) {
            Service { role: Role::Server, port: Port::Number(flow.local.port()) }
        } else if flow.peer.port() == 0 {
            return None; // bound only
        } else {
            let named = self.selection.remote.contains(&flow.peer.port()) || self.selection.is_own(flow);
            let port = if named { Port::Number(flow.peer.port()) } else { Port::Other };
            Service { role: Role::Client, port }
        };
        Some(service)
    }
}

/// The stay that ends now, where it is one that is told and its beginning is known.
fn left(seen: &Seen, now: Duration) -> Option<Stay> {
    let told = TOLD.contains(&seen.state) && !seen.at_least;
    told.then(|| Stay { service: seen.service, state: seen.state, time: now.saturating_sub(seen.since) })
}

/// What names a socket: its cookie, or its addresses where the way of reading tells no cookie.
fn key(row: &Row) -> u64 {
    row.cookie.unwrap_or_else(|| {
        let mut hasher = DefaultHasher::new();
        // Several may listen on the same address.
        let listener = (row.state == State::Listen).then_some(row.inode);
        (row.flow, listener).hash(&mut hasher);
        hasher.finish()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{AcceptQueue, timer};
    use State::{
        Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait,
    };
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn server(port: u16) -> Service {
        Service { role: Role::Server, port: Port::Number(port) }
    }

    fn client(port: u16) -> Service {
        Service { role: Role::Client, port: Port::Number(port) }
    }

    const OTHER: Service = Service { role: Role::Client, port: Port::Other };

    fn flow(local: &str, peer: &str) -> Flow {
        Flow { local: local.parse().unwrap(), peer: peer.parse().unwrap() }
    }

    fn row(cookie: u64, state: State, local: &str, peer: &str) -> Row {
        let timer = if state == TimeWait { timer::TIME_WAIT } else { 0 };
        let inode = if state == TimeWait { 0 } else { 100 + cookie as u32 };
        let expires = if state == TimeWait { TIME_WAIT } else { Duration::ZERO };
        Row { timer, expires, send_queue: Some(0), inode, ..Row::plain(state, flow(local, peer), Some(cookie)) }
    }

    /// One of those that port 80 accepted.
    fn accepted(cookie: u64, state: State) -> Row {
        row(cookie, state, "10.0.0.1:80", &format!("10.0.0.2:{}", 1000 + cookie))
    }

    /// One that goes out to port 443.
    fn going_out(cookie: u64, state: State) -> Row {
        row(cookie, state, &format!("10.0.0.1:{}", 30_000 + cookie), "10.0.0.9:443")
    }

    fn listener(cookie: u64) -> Row {
        row(cookie, Listen, "0.0.0.0:80", "0.0.0.0:0")
    }

    /// The kernel's note of a SYN.
    fn request(cookie: u64) -> Row {
        Row { inode: 0, timer: 1, ..accepted(cookie, SynRecv) }
    }

    fn orphan(row: Row) -> Row {
        Row { inode: 0, timer: timer::TIME_WAIT, ..row }
    }

    /// As /proc/net/tcp has it.
    fn by_text(row: Row) -> Row {
        Row { cookie: None, ..row }
    }

    fn nobody_waits() -> Listeners {
        Listeners { queue: AcceptQueue::default(), inodes: vec![0] }
    }

    /// A tracker, and the time of its next reading.
    struct Readings(Tracker, Duration);

    impl Readings {
        fn new() -> Readings {
            Readings::of(Selection::default())
        }

        fn of(selection: Selection) -> Readings {
            Readings(Tracker::new(selection), Duration::from_hours(1))
        }

        /// A second later these are listened on, and these rows are there.
        fn see(&mut self, ports: &[u16], rows: &[Row]) -> (BTreeMap<Service, Sight>, Vec<Stay>) {
            self.1 += SECOND;
            self.0.begin(self.1, ports.iter().map(|port| (*port, nobody_waits())).collect());
            for row in rows {
                self.0.row(row, self.1);
            }
            self.0.finish()
        }

        /// The same, of port 80 alone: what was opened and closed.
        fn totals(&mut self, rows: &[Row]) -> (u64, u64) {
            let (sights, _) = self.see(&[80], rows);
            (sights[&server(80)].opened, sights[&server(80)].closed)
        }

        fn freed(&mut self, row: &Row) {
            self.0.freed(row.cookie.unwrap(), &row.flow);
        }
    }

    fn counts(sight: &Sight) -> Vec<(State, u64)> {
        State::ALL.iter().map(|state| (*state, sight.count(*state))).filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn known_rows_are_counted_by_service_and_state() {
        let mut readings = Readings::of(Selection { remote: vec![443, 5432], ..Selection::default() });
        let states = [Established, FinWait1, FinWait2, TimeWait, CloseWait, LastAck, Closing, SynRecv];
        let mut rows: Vec<Row> = (1..).zip(states).map(|(cookie, state)| accepted(cookie, state)).collect();
        rows.extend([listener(20), listener(21), request(22), accepted(23, CloseWait)]);
        rows.push(row(24, Established, "[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.2]:999"));
        rows.push(row(25, Established, "[2001:db8::1]:80", "[2001:db8::2]:999"));
        rows.extend([going_out(30, SynSent), going_out(31, Established), going_out(32, TimeWait)]);
        rows.push(row(40, Established, "10.0.0.1:4000", "10.0.0.9:25"));
        // Over loopback both ends are here, each its own service's.
        rows.push(row(50, Established, "127.0.0.1:80", "127.0.0.1:4001"));
        rows.push(row(51, Established, "127.0.0.1:4001", "127.0.0.1:80"));
        // Bound, and never connected: of nobody, unless somebody listens there.
        rows.push(row(60, Close, "0.0.0.0:9999", "0.0.0.0:0"));
        rows.push(row(61, Close, "0.0.0.0:80", "0.0.0.0:0"));
        // Not even bound.
        rows.push(row(62, Close, "0.0.0.0:0", "0.0.0.0:0"));
        // Has listened since the listeners were read, and accepted.
        rows.push(row(63, Listen, "0.0.0.0:81", "0.0.0.0:0"));
        rows.push(row(64, Established, "10.0.0.1:81", "10.0.0.2:5"));
        let (sights, stays) = readings.see(&[80, 8080], &rows);
        assert_eq!(
            sights.keys().copied().collect::<Vec<_>>(),
            [server(80), server(81), server(8080), client(443), client(5432), OTHER],
            "present at zero: who listens, and who was named"
        );
        let of_80 = [
            (Established, 4),
            (SynRecv, 2),
            (FinWait1, 1),
            (FinWait2, 1),
            (TimeWait, 1),
            (Close, 1),
            (CloseWait, 2),
            (LastAck, 1),
            (Listen, 2),
            (Closing, 1),
        ];
        assert_eq!(counts(&sights[&server(80)]), of_80);
        assert_eq!(counts(&sights[&client(443)]), [(Established, 1), (SynSent, 1), (TimeWait, 1)]);
        assert_eq!(counts(&sights[&OTHER]), [(Established, 2)]);
        assert_eq!(counts(&sights[&server(81)]), [(Established, 1), (Listen, 1)]);
        assert!(counts(&sights[&server(8080)]).is_empty() && counts(&sights[&client(5432)]).is_empty());
        assert!(sights[&server(80)].listeners.is_some() && sights[&client(443)].listeners.is_none());
        for sight in sights.values() {
            assert_eq!((sight.opened, sight.closed), (0, 0), "the first reading counts nothing as opened");
        }
        assert!(stays.is_empty());
        assert_eq!(readings.0.opened(), 0);
    }

    #[test]
    fn a_listener_appears_and_vanishes_and_is_no_connection() {
        let mut readings = Readings::new();
        assert!(readings.see(&[], &[]).0.keys().eq([&OTHER]));
        assert_eq!(readings.totals(&[listener(1)]), (0, 0));
        let (sights, _) = readings.see(&[], &[]);
        assert!(counts(&sights[&server(80)]).is_empty(), "the first reading without it says so");
        assert!(readings.see(&[], &[]).0.keys().eq([&OTHER]), "nothing is left of it");
        // One that was there before us neither.
        let mut readings = Readings::new();
        readings.see(&[80], &[listener(1)]);
        readings.freed(&listener(1));
        let (sights, _) = readings.see(&[80], &[listener(2)]);
        assert_eq!((sights[&server(80)].opened, sights[&server(80)].closed), (0, 0));
        assert_eq!(sights[&server(80)].count(Listen), 1);
    }

    #[test]
    fn what_a_listener_leaves_behind_stays_its_service_until_it_is_gone() {
        let leak = accepted(2, CloseWait);
        // Also where nobody asks for that port: its sockets do not go over to those that go out.
        for ignore in [vec![], vec![80]] {
            let shown = ignore.is_empty();
            let mut readings = Readings::of(Selection { ignore, ..Selection::default() });
            readings.see(&[80], &[listener(1), leak]);
            for _ in 0..3 {
                let (sights, _) = readings.see(&[], &[leak, accepted(3, TimeWait)]);
                assert!(sights[&OTHER].counts.iter().all(|count| *count == 0), "{shown}");
                assert_eq!(sights.contains_key(&server(80)), shown);
                if let Some(sight) = sights.get(&server(80)) {
                    assert_eq!(counts(sight), [(TimeWait, 1), (CloseWait, 1)]);
                    assert_eq!(sight.listeners, None);
                }
            }
            readings.freed(&leak);
            // The reading that finds nothing left still says so, with what was closed.
            let (sights, _) = readings.see(&[], &[]);
            assert_eq!(sights.get(&server(80)).map(|sight| (sight.opened, sight.closed)), shown.then_some((0, 1)));
            assert!(readings.see(&[], &[]).0.keys().eq([&OTHER]));
        }
    }

    #[test]
    fn opens_and_closes_that_readings_see() {
        let mut readings = Readings::new();
        let old = accepted(1, Established);
        assert_eq!(readings.totals(&[old]), (0, 0));
        let new = accepted(2, Established);
        assert_eq!(readings.totals(&[old, new]), (1, 0));
        assert_eq!(readings.totals(&[old, new]), (1, 0));
        assert_eq!(readings.totals(&[old, accepted(2, FinWait1)]), (1, 0));
        // Its event comes before it is missed, or not at all.
        readings.freed(&new);
        assert_eq!(readings.totals(&[old]), (1, 1));
        assert_eq!(readings.totals(&[]), (1, 2), "no event: it is gone all the same");
        assert_eq!(readings.0.opened(), 1);
    }

    #[test]
    fn what_lives_between_two_readings_is_told_by_its_event() {
        let mut readings = Readings::new();
        readings.freed(&accepted(1, Close));
        assert_eq!(readings.totals(&[]), (0, 0), "it may have been there before us");
        for cookie in 2..12 {
            readings.freed(&accepted(cookie, Close));
        }
        readings.freed(&row(90, Close, "0.0.0.0:80", "0.0.0.0:0"));
        assert_eq!(readings.totals(&[]), (10, 10), "and a listener is no connection");
        assert_eq!(readings.0.opened(), 10);
    }

    /// What happens between two readings: rows of the next one, or the event of the full socket.
    type Step<'a> = Result<&'a [Row], u64>;

    #[test]
    fn a_minisocket_is_counted_with_its_full_socket_and_once() {
        let (full, mini) = (accepted(7, Established), accepted(7, TimeWait));
        let other = Row { cookie: Some(8), ..mini };
        let fin_wait2 = orphan(accepted(7, FinWait2));
        let steps: &[(&str, &[Step<'_>])] = &[
            ("event, then its minisocket", &[Err(7), Ok(&[mini]), Ok(&[])]),
            ("event, then a minisocket of another cookie", &[Err(7), Ok(&[other]), Ok(&[])]),
            ("minisocket, then the event", &[Ok(&[mini]), Err(7), Ok(&[mini]), Ok(&[])]),
            ("minisocket of another cookie, then the event", &[Ok(&[other]), Err(7), Ok(&[other]), Ok(&[])]),
            ("seen, event, minisocket", &[Ok(&[full]), Err(7), Ok(&[mini]), Ok(&[])]),
            ("seen, minisocket, event", &[Ok(&[full]), Ok(&[mini]), Err(7), Ok(&[mini]), Ok(&[])]),
            ("seen, minisocket, the event is lost", &[Ok(&[full]), Ok(&[mini]), Ok(&[])]),
            (
                "seen, minisocket beside its open descriptor",
                &[Ok(&[full]), Ok(&[mini, accepted(7, Close)]), Err(7), Ok(&[])],
            ),
            ("the same, the other way round", &[Ok(&[full]), Ok(&[accepted(7, Close), mini]), Err(7), Ok(&[])]),
            ("orphan, then TIME_WAIT", &[Ok(&[full]), Err(7), Ok(&[fin_wait2]), Ok(&[mini]), Ok(&[])]),
            ("orphan that nobody saw before", &[Err(7), Ok(&[fin_wait2]), Ok(&[])]),
            ("seen, gone, and then the event", &[Ok(&[full]), Ok(&[]), Err(7), Ok(&[])]),
            ("the event comes twice", &[Ok(&[full]), Err(7), Err(7), Ok(&[])]),
        ];
        for (what, steps) in steps {
            let mut readings = Readings::new();
            let mut told = readings.totals(&[]);
            for step in *steps {
                match step {
                    Ok(rows) => told = readings.totals(rows),
                    Err(cookie) => assert!(readings.0.freed(*cookie, &full.flow)),
                }
            }
            assert_eq!(told, (1, 1), "{what}");
            assert_eq!(readings.totals(&[]), (1, 1), "{what}");
        }
        // And one that was there before us was neither opened nor closed since.
        for first in [mini, fin_wait2] {
            let mut readings = Readings::new();
            assert_eq!([readings.totals(&[first]), readings.totals(&[first]), readings.totals(&[])], [(0, 0); 3]);
        }
    }

    #[test]
    fn a_descriptor_that_is_open_in_time_wait_is_one_socket_and_one_stay() {
        let (closed, mini) = (accepted(1, Close), accepted(1, TimeWait));
        for both in [[closed, mini], [mini, closed]] {
            let mut readings = Readings::new();
            readings.see(&[80], &[accepted(1, Established)]);
            for _ in 0..5 {
                let (sights, stays) = readings.see(&[80], &both);
                assert_eq!(counts(&sights[&server(80)]), [(TimeWait, 1)]);
                assert_eq!(stays, [], "it goes on");
            }
            // The minute is over, the descriptor is not.
            let (sights, stays) = readings.see(&[80], &[closed]);
            assert_eq!(counts(&sights[&server(80)]), [(Close, 1)]);
            assert_eq!(stays.len(), 1);
            readings.freed(&closed);
            let (sights, stays) = readings.see(&[80], &[]);
            assert_eq!((sights[&server(80)].closed, stays.len()), (1, 0));
        }
    }

    #[test]
    fn a_request_becomes_a_connection_or_nothing() {
        for there_before in [false, true] {
            let mut readings = Readings::new();
            if !there_before {
                readings.totals(&[]);
            }
            assert_eq!(readings.totals(&[request(1), request(2), request(3)]), (0, 0));
            // One is accepted, one gives up, one is accepted and closed before anybody looks.
            readings.freed(&accepted(3, Close));
            assert_eq!(readings.totals(&[accepted(1, Established)]), (2, 1), "{there_before}");
            assert_eq!(readings.totals(&[]), (2, 2));
        }
        // A simultaneous open has a descriptor: no request.
        let mut readings = Readings::new();
        readings.totals(&[]);
        assert_eq!(readings.totals(&[accepted(1, SynRecv)]), (1, 0));
    }

    #[test]
    fn a_service_is_that_of_the_first_sight() {
        let mut readings = Readings::new();
        readings.see(&[], &[]);
        let bound = row(1, Established, "10.0.0.1:80", "10.0.0.9:443");
        assert_eq!(readings.see(&[], &[bound]).0[&OTHER].opened, 1);
        readings.see(&[], &[bound]);
        // Somebody begins to listen on that port, on another address.
        let (sights, _) = readings.see(&[80], &[bound, row(2, Listen, "10.0.0.2:80", "0.0.0.0:0")]);
        assert_eq!(
            (counts(&sights[&OTHER]), counts(&sights[&server(80)])),
            (vec![(Established, 1)], vec![(Listen, 1)])
        );
        readings.freed(&bound);
        let (sights, _) = readings.see(&[80], &[]);
        let told = |service| (sights[&service].opened, sights[&service].closed);
        assert_eq!((told(OTHER), told(server(80))), ((1, 1), (0, 0)), "opened and closed are of the same service");
    }

    #[test]
    fn whom_a_new_listener_accepted_while_the_table_was_read_is_its_own() {
        let mut readings = Readings::new();
        readings.see(&[], &[]);
        let early = accepted(1, Established);
        let (sights, _) = readings.see(&[], &[early]);
        assert_eq!((sights[&OTHER].count(Established), sights[&OTHER].opened), (1, 1), "nobody listens there yet");
        let (sights, _) = readings.see(&[80], &[listener(2), early]);
        let told = |service| (sights[&service].count(Established), sights[&service].opened);
        assert_eq!((told(OTHER), told(server(80))), ((0, 0), (1, 1)));
        readings.freed(&early);
        assert_eq!(readings.totals(&[listener(2)]), (1, 1));
    }

    #[test]
    fn what_was_bound_before_it_connected_is_opened_when_it_connects() {
        let mut readings = Readings::new();
        readings.see(&[], &[row(1, Close, "10.0.0.1:4000", "0.0.0.0:0")]);
        assert_eq!(readings.0.opened(), 0);
        readings.see(&[], &[row(1, SynSent, "10.0.0.1:4000", "10.0.0.9:443")]);
        assert_eq!((readings.0.opened(), readings.0.fullest(9)[0].1.port()), (1, 443));
    }

    #[test]
    fn an_interrupted_reading_that_is_read_again_counts_nothing_twice() {
        let mut readings = Readings::of(Selection { remote: vec![443], ..Selection::default() });
        let rows =
            [listener(1), accepted(2, Established), accepted(3, CloseWait), request(4), going_out(5, Established)];
        let again: Vec<Row> = rows.iter().chain(&rows).copied().collect();
        for reading in 0..3 {
            let (sights, stays) = readings.see(&[80], &again);
            assert_eq!(
                counts(&sights[&server(80)]),
                [(Established, 1), (SynRecv, 1), (CloseWait, 1), (Listen, 1)],
                "{reading}"
            );
            assert_eq!(counts(&sights[&client(443)]), [(Established, 1)]);
            assert_eq!((sights[&server(80)].opened, sights[&server(80)].closed, stays.len()), (0, 0, 0));
            assert_eq!(readings.0.fullest(9).len(), 1);
            assert_eq!(readings.0.fullest(9)[0].2, 1, "one local port");
        }
        let new = accepted(6, Established);
        let left_meanwhile = accepted(6, CloseWait);
        let (sights, _) = readings.see(&[80], &[rows.as_slice(), &[new], rows.as_slice(), &[left_meanwhile]].concat());
        assert_eq!((sights[&server(80)].opened, sights[&server(80)].count(CloseWait)), (1, 2));
    }

    #[test]
    fn a_first_reading_that_fails_is_none() {
        let mut readings = Readings::new();
        readings.0.begin(SECOND, BTreeMap::from([(80, nobody_waits())]));
        readings.0.row(&accepted(1, Established), SECOND);
        // What comes next is read to the end: all of it was there before us.
        assert_eq!(
            readings.totals(&[accepted(1, Established), accepted(2, Established), accepted(3, TimeWait)]),
            (0, 0)
        );
        // A later one that fails takes nothing away.
        readings.0.begin(readings.1, BTreeMap::from([(80, nobody_waits())]));
        readings.0.row(&accepted(1, Established), SECOND);
        assert_eq!(
            readings.totals(&[accepted(1, Established), accepted(2, Established), accepted(4, Established)]),
            (1, 0)
        );
    }

    #[test]
    fn ages_count_from_the_first_sight() {
        let mut readings = Readings::new();
        let (old, new) = (accepted(1, Established), accepted(2, Established));
        let oldest = |sights: &BTreeMap<Service, Sight>, state| sights[&server(80)].oldest(state);
        assert_eq!(oldest(&readings.see(&[80], &[old]).0, Established), (Duration::ZERO, true));
        assert_eq!(oldest(&readings.see(&[80], &[old, new]).0, Established), (SECOND, true), "at least");
        assert_eq!(
            oldest(&readings.see(&[80], &[new]).0, Established),
            (SECOND, false),
            "it was opened before our eyes"
        );
        assert_eq!(oldest(&readings.see(&[80], &[accepted(2, FinWait2)]).0, FinWait2), (Duration::ZERO, false));
        let (sights, _) = readings.see(&[80], &[accepted(2, FinWait2)]);
        assert_eq!(
            (oldest(&sights, FinWait2), oldest(&sights, Established)),
            ((SECOND, false), (Duration::ZERO, false))
        );
        assert_eq!(sights[&OTHER].oldest(Established), (Duration::ZERO, false));
    }

    #[test]
    fn close_wait_is_as_old_as_its_last_ack() {
        let heard = |row: Row, ago: u64| Row { last_ack: Some(Duration::from_secs(ago)), ..row };
        let see = |readings: &mut Readings, rows: &[Row], acks: &[Row]| {
            readings.1 += SECOND;
            readings.0.begin(readings.1, BTreeMap::from([(80, nobody_waits())]));
            for row in rows {
                readings.0.row(row, readings.1);
            }
            let wanted = readings.0.wants_ages();
            if wanted {
                for row in acks {
                    readings.0.age(row, readings.1);
                }
            }
            (wanted, readings.0.finish().0[&server(80)].oldest(CloseWait))
        };
        let leak = accepted(1, CloseWait);
        // Found.
        let mut readings = Readings::new();
        let hour = Duration::from_hours(1);
        assert_eq!(
            see(&mut readings, &[leak], &[heard(leak, 3600)]),
            (true, (hour, true)),
            "an ACK may have come later"
        );
        assert_eq!(see(&mut readings, &[leak], &[]), (false, (hour + SECOND, true)), "asked for once");
        // A later ACK makes it no younger, and what the table no longer shows is passed over.
        let new = accepted(2, CloseWait);
        let acks = [heard(leak, 1), heard(new, 0), heard(accepted(3, CloseWait), 9999), new];
        assert_eq!(see(&mut readings, &[leak, new], &acks), (true, (hour + 2 * SECOND, true)));
        // Watched: the FIN came between two readings.
        let mut readings = Readings::new();
        see(&mut readings, &[accepted(1, Established)], &[]);
        let ago = Duration::from_millis(400);
        let acks = [Row { last_ack: Some(ago), ..leak }];
        assert_eq!(see(&mut readings, &[leak], &acks), (true, (ago, false)));
        // By text there is no such word.
        let mut readings = Readings::new();
        assert_eq!(see(&mut readings, &[by_text(leak)], &[by_text(leak)]), (true, (Duration::ZERO, true)));
        assert_eq!(see(&mut readings, &[by_text(leak)], &[]).1, (SECOND, true));
        // Longer ago than the clock reaches.
        let mut readings = Readings::new();
        let (_, (age, _)) = see(&mut readings, &[leak], &[heard(leak, u64::MAX)]);
        assert_eq!(age, readings.1);
        // It has gone on since: an ACK of LAST_ACK is not that of the FIN.
        let mut readings = Readings::new();
        see(&mut readings, &[accepted(1, LastAck), accepted(2, CloseWait)], &[heard(accepted(1, LastAck), 50)]);
        assert_eq!(readings.0.oldest(LastAck, 9)[0].age, Duration::ZERO);
    }

    #[test]
    fn a_reading_that_takes_long_makes_nobody_older() {
        let mut readings = Readings::new();
        readings.1 += SECOND;
        readings.0.begin(readings.1, BTreeMap::from([(80, nobody_waits())]));
        // Read 300 ms after the beginning: what the kernel says is of then.
        let at = readings.1 + Duration::from_millis(300);
        let (waiting, leak) = (Row { expires: 50 * SECOND, ..accepted(1, TimeWait) }, accepted(2, CloseWait));
        readings.0.row(&waiting, at);
        readings.0.row(&leak, at);
        readings.0.age(&Row { last_ack: Some(20 * SECOND), ..leak }, at);
        let (sights, _) = readings.0.finish();
        let oldest = |state| sights[&server(80)].oldest(state).0;
        assert_eq!([oldest(TimeWait), oldest(CloseWait)], [9700, 19_700].map(Duration::from_millis));
    }

    #[test]
    fn time_wait_is_as_old_as_its_timer() {
        let mut readings = Readings::new();
        let waiting = |left: u64| Row { expires: Duration::from_secs(left), ..accepted(1, TimeWait) };
        assert_eq!(readings.see(&[80], &[waiting(20)]).0[&server(80)].oldest(TimeWait), (40 * SECOND, false));
        assert_eq!(readings.see(&[80], &[waiting(19)]).0[&server(80)].oldest(TimeWait), (41 * SECOND, false));
        // It is over, and known since when it was.
        let (_, stays) = readings.see(&[80], &[]);
        assert_eq!(stays, [Stay { service: server(80), state: TimeWait, time: 42 * SECOND }]);
        // A timer that fires late, or that says more than a minute.
        let (sights, _) = readings.see(&[80], &[waiting(u64::MAX)]);
        assert_eq!(sights[&server(80)].oldest(TimeWait), (Duration::ZERO, false));
    }

    #[test]
    fn stays_are_told_where_they_pile_up_and_their_beginning_is_known() {
        let mut readings = Readings::new();
        let there_before = accepted(1, CloseWait);
        readings.see(&[80], &[there_before, accepted(2, Established)]);
        assert_eq!(readings.see(&[80], &[there_before, accepted(2, CloseWait)]).1, []);
        assert_eq!(readings.see(&[80], &[there_before, accepted(2, CloseWait)]).1, []);
        let stay = |state, seconds: u32| Stay { service: server(80), state, time: seconds * SECOND };
        assert_eq!(readings.see(&[80], &[there_before, accepted(2, LastAck)]).1, [stay(CloseWait, 2)]);
        assert_eq!(readings.see(&[80], &[accepted(2, LastAck)]).1, [], "nobody knows since when");
        // Neither LAST_ACK nor ESTABLISHED is told; FIN_WAIT2 and TIME_WAIT are.
        assert_eq!(readings.see(&[80], &[accepted(3, Established)]).1, []);
        assert_eq!(readings.see(&[80], &[accepted(3, FinWait2)]).1, []);
        assert_eq!(readings.see(&[80], &[accepted(3, TimeWait)]).1, [stay(FinWait2, 1)]);
        assert_eq!(readings.see(&[80], &[]).1, [stay(TimeWait, 1)]);
    }

    #[test]
    fn stays_of_whom_nobody_asked_for_are_not_told() {
        let mut readings = Readings::of(Selection { ignore: vec![80], ..Selection::default() });
        readings.see(&[80], &[accepted(1, Established)]);
        readings.see(&[80], &[accepted(1, FinWait2)]);
        assert_eq!(readings.see(&[80], &[accepted(1, TimeWait)]).1, []);
        assert_eq!(readings.0.oldest(TimeWait, 9).len(), 0, "nor named");
        assert_eq!(readings.see(&[80], &[]).1, []);
    }

    #[test]
    fn by_text_sockets_are_known_by_their_addresses() {
        let mut readings = Readings::new();
        let listeners = [by_text(listener(1)), by_text(listener(2))];
        let see = |readings: &mut Readings, rows: &[Row]| {
            let rows: Vec<Row> = rows.iter().copied().map(by_text).chain(listeners).collect();
            let (sights, _) = readings.see(&[80], &rows);
            let sight = &sights[&server(80)];
            assert_eq!(sight.count(Listen), 2, "two on one address");
            (
                counts(sight).into_iter().filter(|(state, _)| *state != Listen).collect::<Vec<_>>(),
                sight.opened,
                sight.closed,
            )
        };
        assert_eq!(see(&mut readings, &[accepted(1, Established)]), (vec![(Established, 1)], 0, 0));
        let rows = [accepted(1, Established), accepted(2, Established), request(3)];
        assert_eq!(see(&mut readings, &rows), (vec![(Established, 2), (SynRecv, 1)], 1, 0));
        // The request is accepted, and its inode comes with that; one closes.
        let rows = [Row { inode: 0, ..accepted(3, Established) }, accepted(2, TimeWait)];
        assert_eq!(see(&mut readings, &rows), (vec![(Established, 1), (TimeWait, 1)], 2, 2));
        // No event tells of one that was opened and closed between two readings, but its TIME_WAIT does.
        let rows = [accepted(3, Established), accepted(2, TimeWait), accepted(4, TimeWait)];
        assert_eq!(see(&mut readings, &rows), (vec![(Established, 1), (TimeWait, 2)], 3, 3));
        // Its addresses are taken by the next connection.
        let rows = [accepted(3, Established), accepted(2, TimeWait), accepted(4, Established)];
        assert_eq!(see(&mut readings, &rows), (vec![(Established, 2), (TimeWait, 1)], 4, 3));
        assert_eq!(see(&mut readings, &[]), (vec![], 4, 5));
    }

    #[test]
    fn only_what_is_selected_is_shown() {
        let rows = [
            accepted(1, Established),
            row(2, CloseWait, "10.0.0.1:8080", "10.0.0.2:1"),
            going_out(3, Established),
            row(4, Established, "10.0.0.1:4000", "10.0.0.9:25"),
        ];
        let shown = |only: &[u16], ignore: &[u16], remote: &[u16]| {
            let selection = Selection { only: only.into(), ignore: ignore.into(), remote: remote.into(), own: None };
            let mut readings = Readings::of(selection);
            readings.see(&[80, 8080], &[]);
            let (sights, _) = readings.see(&[80, 8080], &rows);
            assert_eq!(readings.0.opened(), 4, "counted all the same: else some would seem to be missing");
            let named = readings.0.oldest(CloseWait, 9).len();
            assert_eq!(named, usize::from(sights.contains_key(&server(8080))));
            sights.iter().map(|(service, sight)| (*service, sight.opened)).collect::<Vec<_>>()
        };
        let (a, b) = ((server(80), 1), (server(8080), 1));
        assert_eq!(shown(&[], &[], &[]), [a, b, (OTHER, 2)]);
        assert_eq!(shown(&[80], &[], &[]), [a]);
        assert_eq!(shown(&[80, 8080], &[80], &[]), [b]);
        assert_eq!(shown(&[], &[8080], &[]), [a, (OTHER, 2)]);
        assert_eq!(shown(&[], &[], &[443]), [a, b, (client(443), 1), (OTHER, 1)]);
        assert_eq!(shown(&[80], &[], &[443]), [a, (client(443), 1), (OTHER, 1)]);
        assert_eq!(shown(&[1], &[], &[]), [(server(1), 0)], "nobody listens there, which is told");
        assert_eq!(shown(&[1, 80], &[1], &[]), [a]);
    }

    #[test]
    fn a_port_that_was_named_is_there_at_zero_before_and_after_its_listener() {
        let mut readings = Readings::of(Selection { only: vec![80], ..Selection::default() });
        for ports in [&[][..], &[80], &[], &[]] {
            let (sights, _) = readings.see(ports, &[]);
            assert!(sights.keys().eq([&server(80)]), "{ports:?}: {sights:?}");
            assert!(counts(&sights[&server(80)]).is_empty());
            assert_eq!(sights[&server(80)].listeners.is_some(), !ports.is_empty());
        }
    }

    #[test]
    fn what_passes_between_two_readings_takes_no_more_room_than_there_are_ports() {
        let mut readings = Readings::of(Selection { remote: vec![443], ..Selection::default() });
        readings.see(&[80], &[]);
        for cookie in 0..300_000_u64 {
            let port = 30_000 + cookie % 10_000;
            readings.freed(&row(cookie, Close, &format!("10.0.0.1:{port}"), "10.0.0.9:443"));
        }
        assert_eq!((readings.0.undecided.len(), readings.0.opened()), (10_000, 300_000));
        // Somebody has begun to listen on one of these ports meanwhile.
        let (sights, _) = readings.see(&[80, 30_000], &[]);
        let totals = |service| (sights[&service].opened, sights[&service].closed);
        assert_eq!((totals(client(443)), totals(server(30_000))), ((299_970, 299_970), (30, 30)));
        assert!(readings.0.undecided.is_empty());
    }

    #[test]
    fn what_passed_before_its_listener_was_known_is_the_listeners() {
        let mut readings = Readings::new();
        readings.see(&[80], &[]);
        readings.freed(&row(1, Close, "10.0.0.1:8080", "10.0.0.2:1"));
        readings.freed(&going_out(2, Close));
        let (sights, _) = readings.see(&[80, 8080], &[]);
        let totals = |service| (sights[&service].opened, sights[&service].closed);
        assert_eq!((totals(server(8080)), totals(OTHER)), ((1, 1), (1, 1)));
        assert_eq!(readings.0.opened(), 2);
    }

    #[test]
    fn who_asks_us_from_this_host_is_not_told_of() {
        let mut readings = Readings::of(Selection { own: Some(9907), ..Selection::default() });
        readings.see(&[80, 9907], &[]);
        let rows = [
            row(1, TimeWait, "127.0.0.1:4000", "127.0.0.1:9907"),
            row(2, Established, "10.0.0.1:4000", "10.0.0.1:9907"),
            row(3, Established, "10.0.0.1:9907", "10.0.0.2:1"),
            // That is another's, elsewhere.
            row(4, Established, "10.0.0.1:4001", "10.0.0.9:9907"),
        ];
        let (sights, _) = readings.see(&[80, 9907], &rows);
        assert_eq!(sights.keys().copied().collect::<Vec<_>>(), [server(80), OTHER]);
        assert_eq!(counts(&sights[&OTHER]), [(Established, 1)]);
        assert_eq!(readings.0.fullest(9).len(), 1);
    }

    #[test]
    fn the_fullest_pairs_come_first() {
        let mut readings = Readings::new();
        let to = |cookie: u64, peer: &str| row(cookie, TimeWait, &format!("10.0.0.1:{}", 30_000 + cookie), peer);
        let mut rows: Vec<Row> = (0..5).map(|cookie| to(cookie, "10.0.0.8:443")).collect();
        rows.extend((5..12).map(|cookie| to(cookie, "10.0.0.9:443")));
        rows.extend((12..14).map(|cookie| to(cookie, "10.0.0.9:444")));
        rows.push(accepted(99, Established));
        readings.see(&[80], &rows);
        let fullest: Vec<_> =
            readings.0.fullest(2).into_iter().map(|(_, peer, used)| (peer.to_string(), used)).collect();
        assert_eq!(fullest, [("10.0.0.9:443".to_owned(), 7), ("10.0.0.8:443".to_owned(), 5)]);
        readings.see(&[80], &[]);
        assert!(readings.0.fullest(9).is_empty());
    }

    #[test]
    fn the_oldest_are_named_first() {
        let mut readings = Readings::new();
        let mut rows = Vec::new();
        for cookie in 0..30 {
            rows.push(accepted(cookie, CloseWait));
            readings.see(&[80], &rows);
        }
        let oldest = readings.0.oldest(CloseWait, 20);
        assert_eq!(oldest.len(), 20);
        assert!(oldest.is_sorted_by_key(|socket| std::cmp::Reverse(socket.age)));
        let first = oldest[0];
        assert_eq!((first.age, first.at_least, first.inode, first.flow.peer.port()), (29 * SECOND, true, 100, 1000));
        assert!(readings.0.oldest(LastAck, 20).is_empty());
    }

    #[test]
    fn nothing_is_remembered_but_what_is_there() {
        let mut readings = Readings::new();
        let there = [listener(1), accepted(2, Established)];
        readings.see(&[80], &there);
        for turn in 0..100_u64 {
            let cookies = (turn + 1) * 1000..(turn + 2) * 1000;
            // Half of them are seen, the rest live between two readings; a tenth leave a minisocket with a new cookie.
            for cookie in cookies.clone() {
                readings.freed(&Row { cookie: Some(cookie), ..accepted(cookie % 50_000, Close) });
            }
            assert!(readings.0.seen.len() <= 602, "{}: an event alone is not remembered", readings.0.seen.len());
            let short = cookies
                .clone()
                .step_by(2)
                .map(|cookie| Row { cookie: Some(cookie + 1_000_000), ..accepted(cookie % 50_000, Established) });
            let minis = cookies
                .step_by(10)
                .map(|cookie| Row { cookie: Some(cookie + 2_000_000), ..accepted(cookie % 50_000, TimeWait) });
            let rows: Vec<Row> = there.into_iter().chain(short).chain(minis).collect();
            readings.see(&[80], &rows);
        }
        let (sights, _) = readings.see(&[80], &there);
        assert_eq!((sights[&server(80)].opened, sights[&server(80)].closed), (150_000, 150_000));
        for _ in 0..10 {
            readings.see(&[80], &there);
        }
        assert!(readings.0.gone.is_empty(), "their events would have come by now");
        let Tracker { seen, stays, closed, pairs, served, totals, .. } = &readings.0;
        assert_eq!(
            (seen.len(), stays.len(), closed.len(), pairs.len(), served.len(), totals.len()),
            (2, 0, 0, 0, 1, 1)
        );
    }

    proptest! {
        /// Whatever the kernel shows: no panic, and every socket that it shows is counted once.
        #[test]
        fn odd_rows(
            rounds in prop::collection::vec(
                prop::collection::vec(
                    (0..6_u64, 0..11_usize, 0..3_u16, 0..3_u16, any::<bool>(), any::<bool>(), any::<u64>(), 0..4_u32),
                    0..20,
                ),
                1..8,
            ),
        ) {
            let mut readings = Readings::new();
            for round in rounds {
                let mut shown = BTreeSet::new();
                let ports = [0, 80, 81];
                let mut rows = Vec::new();
                for (cookie, state, local, peer, mini, text, time, inode) in round {
                    let (local, peer) = (ports[usize::from(local)], ports[usize::from(peer)]);
                    let row = Row {
                        state: State::ALL[state],
                        flow: flow(&format!("10.0.0.1:{local}"), &format!("[::ffff:10.0.0.2]:{peer}")),
                        cookie: (!text).then_some(cookie),
                        timer: if mini { timer::TIME_WAIT } else { 0 },
                        retransmits: u8::MAX,
                        expires: Duration::from_millis(time),
                        receive_queue: u32::MAX,
                        send_queue: None,
                        inode,
                        last_ack: mini.then_some(Duration::from_millis(time)),
                    };
                    if state % 3 == 0 && !text {
                        readings.freed(&row);
                    }
                    if local != 0 && (local == 80 || peer != 0) {
                        shown.insert(key(&row));
                    }
                    rows.push(row);
                }
                let (sights, _) = readings.see(&[80], &rows);
                for row in &rows {
                    readings.0.age(row, readings.1);
                }
                let counted: u64 = sights.values().flat_map(|sight| sight.counts).sum();
                prop_assert!(counted >= shown.len() as u64, "{counted} of {}", shown.len());
                prop_assert_eq!(counted, readings.0.seen.len() as u64);
                for sight in sights.values() {
                    prop_assert!(sight.closed <= sight.opened + 200);
                }
            }
        }
    }
}
