//! What one reading after the other says of sockets that are not ours: who is new, who is gone, since when each is where
//! it is.
//!
//! Pure: time and rows come in as arguments. Must not know: how the table is read, or how often.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{Port, Queue, Selection, Service, Sight, Socket, Stay};
use crate::kernel::{Row, TIME_WAIT};
use crate::tcp::{Flow, Role, State};

/// `idiag_timer` of a minisocket: TIME_WAIT, or FIN_WAIT2 without a descriptor.
const MINISOCKET: u8 = 3;

/// The states whose stays are told: those that pile up.
const TOLD: [State; 3] = [State::CloseWait, State::FinWait2, State::TimeWait];

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
    round: u32,
    flow: Flow,
    inode: u32,
}

impl Seen {
    /// It lived between two readings only.
    fn freed_and_gone(&self) -> bool {
        self.freed && self.state == State::Close
    }
}

/// Keeps what is known from one reading to the next.
pub(super) struct Tracker {
    selection: Selection,
    listening: BTreeMap<u16, Queue>,
    /// Ports that somebody listened on and that have sockets left.
    served: BTreeSet<u16>,
    seen: HashMap<u64, Seen>,
    sights: BTreeMap<Service, Sight>,
    /// Opened and closed since the start.
    totals: BTreeMap<Service, (u64, u64)>,
    pairs: HashMap<(IpAddr, SocketAddr), u32>,
    stays: Vec<Stay>,
    round: u32,
    now: Duration,
    /// CLOSE_WAIT whose beginning the kernel has not told us yet.
    unaged: u64,
}

impl Tracker {
    pub(super) fn new(selection: Selection) -> Tracker {
        Tracker {
            selection,
            listening: BTreeMap::new(),
            served: BTreeSet::new(),
            seen: HashMap::new(),
            sights: BTreeMap::new(),
            totals: BTreeMap::new(),
            pairs: HashMap::new(),
            stays: Vec::new(),
            round: 0,
            now: Duration::ZERO,
            unaged: 0,
        }
    }

    /// A reading begins, of a table in which these ports are listened on.
    pub(super) fn begin(&mut self, now: Duration, listening: BTreeMap<u16, Queue>) {
        self.now = now;
        self.round += 1;
        self.unaged = 0;
        self.pairs.clear();
        self.sights.clear();
        self.served.extend(listening.keys());
        self.listening = listening;
        // Present at zero: whoever listens, and whoever was asked for.
        let servers = self.served.iter().map(|port| Service { role: Role::Server, port: Port::Number(*port) });
        let named = self.selection.remote.iter().map(|port| Port::Number(*port)).chain([Port::Other]);
        let clients = named.map(|port| Service { role: Role::Client, port });
        for service in servers.chain(clients).filter(|service| self.selection.takes(*service)) {
            self.sights.insert(service, Sight::default());
        }
        // Whoever is left out is counted all the same: only then it can be said how many are missing.
    }

    /// A socket that the table shows.
    pub(super) fn row(&mut self, row: &Row) {
        // Listeners were read before; one that was never bound has no port.
        let Some(service) = self.service_of(&row.flow).filter(|_| row.flow.local.port() != 0) else { return };
        let key = key(row);
        let mini = row.state == State::TimeWait || (row.state == State::FinWait2 && row.timer == MINISOCKET);
        let request = row.state == State::SynRecv && row.inode == 0;
        let first_round = self.round == 1;
        let (age, at_least) = match row.state {
            State::TimeWait => (TIME_WAIT.saturating_sub(row.expires), false),
            _ => (Duration::ZERO, first_round),
        };
        let fresh = Seen {
            service,
            state: row.state,
            since: self.now.saturating_sub(age),
            at_least,
            // A minisocket that was not here before: its full socket is gone, and the kernel's word of that, by which it is
            // counted, is still on its way. If its cookie is not that of the full socket, nobody had asked for one in
            // time, and it was counted under the other.
            counted: first_round,
            freed: first_round && mini,
            round: self.round,
            flow: row.flow.canonical(),
            inode: row.inode,
        };
        let seen = match self.seen.entry(key) {
            Entry::Vacant(vacant) => {
                if row.state == State::CloseWait {
                    self.unaged += 1;
                }
                vacant.insert(fresh)
            }
            Entry::Occupied(occupied) => {
                let seen = occupied.into_mut();
                // A descriptor that is still open shows as CLOSE beside its own TIME_WAIT.
                if row.state == State::Close && seen.round == self.round {
                    return;
                }
                if seen.state != row.state {
                    if row.state == State::CloseWait {
                        self.unaged += 1;
                    }
                    self.stays.extend(left(seen, self.now));
                    (seen.state, seen.since, seen.at_least) = (fresh.state, fresh.since, false);
                }
                (seen.round, seen.inode) = (self.round, row.inode);
                seen
            }
        };
        if !seen.counted && !request && !mini && row.state != State::Listen {
            seen.counted = true;
            self.totals.entry(service).or_default().0 += 1;
        }
        if service.role == Role::Client {
            let flow = row.flow.canonical();
            *self.pairs.entry((flow.local.ip(), flow.peer)).or_default() += 1;
        }
    }

    /// The table is read once more in this round: rows may have been missing.
    pub(super) fn again(&mut self) {
        self.pairs.clear();
    }

    /// Whether there are sockets in CLOSE_WAIT since the last reading whose [`age`](Self::age) is wanted.
    pub(super) fn wants_ages(&self) -> bool {
        self.unaged > 0
    }

    /// A socket in CLOSE_WAIT and the time since its last ACK: the FIN was one, so that it is at least so old.
    pub(super) fn age(&mut self, row: &Row) {
        let (Some(age), Some(seen)) = (row.last_ack, self.seen.get_mut(&key(row))) else { return };
        let since = self.now.saturating_sub(age);
        if seen.state == State::CloseWait {
            seen.since = seen.since.min(since);
        }
    }

    /// The kernel has freed a full socket.
    pub(super) fn freed(&mut self, cookie: u64, flow: &Flow) {
        if flow.peer.port() == 0 {
            return; // a listener, or one that was never connected
        }
        let Some(service) = self.service_of(flow) else { return };
        let (now, round) = (self.now, self.round);
        match self.seen.entry(cookie) {
            Entry::Occupied(occupied) => {
                let seen = occupied.into_mut();
                if !std::mem::replace(&mut seen.freed, true) {
                    let totals = self.totals.entry(service).or_default();
                    totals.0 += u64::from(!std::mem::replace(&mut seen.counted, true));
                    totals.1 += 1;
                }
            }
            // It lived between two readings.
            Entry::Vacant(vacant) => {
                let totals = self.totals.entry(service).or_default();
                (totals.0, totals.1) = (totals.0 + 1, totals.1 + 1);
                let (state, at_least, counted, freed) = (State::Close, true, true, true);
                let (flow, inode) = (flow.canonical(), 0);
                vacant.insert(Seen { service, state, since: now, at_least, counted, freed, round, flow, inode });
            }
        }
    }

    /// The reading is complete: whoever it has not shown is gone.
    pub(super) fn finish(&mut self) -> (BTreeMap<Service, Sight>, Vec<Stay>) {
        let (now, round) = (self.now, self.round);
        let (totals, stays, sights) = (&mut self.totals, &mut self.stays, &mut self.sights);
        self.seen.retain(|_, seen| {
            if seen.round == round && !seen.freed_and_gone() {
                if let Some(sight) = sights.get_mut(&seen.service) {
                    sight.add(seen.state, now.saturating_sub(seen.since), seen.at_least);
                }
                return true;
            }
            stays.extend(left(seen, now).filter(|stay| sights.contains_key(&stay.service)));
            if seen.counted && !seen.freed {
                totals.entry(seen.service).or_default().1 += 1;
            }
            false
        });
        for (port, queue) in &self.listening {
            let service = Service { role: Role::Server, port: Port::Number(*port) };
            if let Some(sight) = self.sights.get_mut(&service) {
                sight.queue = Some(*queue);
            }
        }
        for (service, sight) in &mut self.sights {
            (sight.opened, sight.closed) = self.totals.get(service).copied().unwrap_or_default();
        }
        let (listening, sights) = (&self.listening, &self.sights);
        self.served.retain(|port| {
            let service = Service { role: Role::Server, port: Port::Number(*port) };
            listening.contains_key(port) || sights.get(&service).is_some_and(|sight| !sight.is_empty())
        });
        (std::mem::take(&mut self.sights), std::mem::take(&mut self.stays))
    }

    /// How many connections were opened since the survey began, as far as they were seen.
    pub(super) fn opened(&self) -> u64 {
        self.totals.values().map(|(opened, _)| opened).sum()
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
        let mut found: Vec<Socket> = (self.seen.values().filter(|seen| seen.state == state && !seen.freed_and_gone()))
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
        let service = if self.served.contains(&flow.local.port()) {
            Service { role: Role::Server, port: Port::Number(flow.local.port()) }
        } else if flow.peer.port() == 0 {
            return None; // listens since the list of listeners was read
        } else {
            let named = self.selection.remote.contains(&flow.peer.port());
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
        row.flow.hash(&mut hasher);
        hasher.finish()
    })
}
