//! How many sockets there are of each service in each state, and since when the oldest is there, as the kernel's
//! announcements add up: what it costs to ask does not depend on how many there are.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::kernel::Row;
use crate::kernel::tracepoints::{Counts, Event, Kind, TraceError};
use crate::scope::Scope;
use crate::tcp::{Flow, Identity, Role, State, Transitions};

/// The sum of what was there before and of what the kernel has announced since.
#[derive(Default)]
pub struct Tally(Mutex<Told>);

/// What the witness knows beside the kernel's counts.
#[derive(Default)]
struct Told {
    counts: Option<Counts>,
    before: Vec<[i64; State::SLOTS]>,
    since: Vec<[Option<Duration>; State::SLOTS]>,
    pairs: HashMap<(IpAddr, SocketAddr), u32>,
}

/// A service's sockets.
#[derive(Clone, Copy, Debug)]
pub struct Sum {
    /// How many are in each state.
    pub counts: [u64; State::SLOTS],
    /// Since when the oldest is there, on the monotonic clock.
    pub since: [Option<Duration>; State::SLOTS],
}

impl Tally {
    /// The sums of `services` services.
    ///
    /// # Errors
    /// When the kernel's counts cannot be read.
    pub fn sums(&self, services: usize) -> Result<Vec<Sum>, TraceError> {
        let told = self.told();
        (0..services)
            .map(|place| {
                let since_then = told.counts.as_ref().map(|counts| counts.since_then(place)).transpose()?;
                let since_then = since_then.unwrap_or_default();
                let before = told.before.get(place).copied().unwrap_or_default();
                let mut counts = [0; State::SLOTS];
                for (count, (n, before)) in counts.iter_mut().zip(since_then.into_iter().zip(before)) {
                    // Less than none: one CPU's news before another's, for a moment.
                    *count = u64::try_from(n + before).unwrap_or(0);
                }
                Ok(Sum { counts, since: told.since.get(place).copied().unwrap_or_default() })
            })
            .collect()
    }

    /// How many of our clients' sockets there are between a local and a remote address.
    pub fn each_pair(&self, mut pair: impl FnMut(IpAddr, SocketAddr, u32)) {
        for ((local, peer), count) in &self.told().pairs {
            pair(*local, *peer, *count);
        }
    }

    /// Takes note of what was there before the kernel began these counts.
    pub(super) fn begin(&self, before: Vec<[i64; State::SLOTS]>, counts: Counts) {
        let mut told = self.told();
        (told.before, told.counts) = (before, Some(counts));
    }

    /// Takes note that a socket of the service at `place` went from one state to another, and the kernel did not count it.
    pub(super) fn correct(&self, place: usize, from: State, to: State) {
        if let Some(before) = self.told().before.get_mut(place) {
            before[from as usize] -= 1;
            before[to as usize] += 1;
        }
    }

    /// Takes note of what one round of events came to.
    pub(super) fn update(&self, ages: &mut Ages, state: impl Fn(u64) -> Option<(State, Duration)>) {
        let mut told = self.told();
        told.since = ages.oldest(state);
        for (pair, change) in ages.pairs.drain() {
            let count = told.pairs.entry(pair).or_default();
            *count = count.saturating_add_signed(change);
            if *count == 0 {
                told.pairs.remove(&pair);
            }
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who entered which state in which order, so that the oldest is always the first.
pub(super) struct Ages {
    services: Vec<(Role, u16)>,
    entered: Vec<[VecDeque<(Duration, u64)>; State::SLOTS]>,
    /// The length from which on those that have left are thrown out.
    full: Vec<[usize; State::SLOTS]>,
    pairs: HashMap<(IpAddr, SocketAddr), i32>,
}

/// Fewer are not worth to be thrown out.
const FEW: usize = 1024;

impl Ages {
    pub(super) fn new(scope: &Scope) -> Ages {
        let services = scope.services().to_vec();
        let entered = services.iter().map(|_| std::array::from_fn(|_| VecDeque::new())).collect();
        let full = vec![[FEW; State::SLOTS]; services.len()];
        Ages { services, entered, full, pairs: HashMap::new() }
    }

    /// A life begins in `state`, or moves.
    pub(super) fn begins(&mut self, id: &Identity, state: State, at: Duration) {
        self.enter(id, state, at);
        self.count_pair(id, 1);
    }

    pub(super) fn moves(&mut self, id: &Identity, transitions: &Transitions) {
        if let Some(last) = transitions.iter().last() {
            self.enter(id, last.to, last.at);
        }
    }

    pub(super) fn ends(&mut self, id: &Identity) {
        self.count_pair(id, -1);
    }

    fn enter(&mut self, id: &Identity, state: State, at: Duration) {
        if matches!(state, State::Close | State::Listen) {
            return;
        }
        if let Ok(place) = self.services.binary_search(&(id.role, id.port)) {
            self.entered[place][state as usize].push_back((at, id.cookie));
        }
    }

    fn count_pair(&mut self, id: &Identity, change: i32) {
        if id.role == Role::Client {
            let Flow { local, peer } = id.flow.canonical().unscoped();
            *self.pairs.entry((local.ip(), peer)).or_default() += change;
        }
    }

    /// Since when the oldest is where it is, by service and state.
    fn oldest(&mut self, state: impl Fn(u64) -> Option<(State, Duration)>) -> Vec<[Option<Duration>; State::SLOTS]> {
        let mut oldest = vec![[None; State::SLOTS]; self.entered.len()];
        for (place, states) in self.entered.iter_mut().enumerate() {
            for (slot, queue) in states.iter_mut().enumerate() {
                let stays = |&(at, cookie): &(Duration, u64)| {
                    state(cookie).is_some_and(|(s, since)| s as usize == slot && since == at)
                };
                while queue.front().is_some_and(|first| !stays(first)) {
                    queue.pop_front();
                }
                // One that stays for long must not keep all that came and went after it.
                let full = &mut self.full[place][slot];
                if queue.len() > *full {
                    queue.retain(stays);
                    queue.shrink_to(queue.len() * 2);
                    *full = (queue.len() * 2).max(FEW);
                }
                oldest[place][slot] = queue.front().map(|first| first.0);
            }
        }
        oldest
    }
}

/// How many sockets were in each state when `era` began: from a dump that was made after that, and from every event of it
/// until after the dump. A socket's first event says where it was before; one without an event is where the
/// dump shows it; one whose first event is its birth was not there.
pub(super) fn before(scope: &Scope, era: u8, rows: &[Row], events: &[Event]) -> Vec<[i64; State::SLOTS]> {
    let mut before = vec![[0; State::SLOTS]; scope.services().len()];
    let mut add = |flow: &Flow, state: State| {
        if let Some(place) = scope.service_of(flow) {
            before[place][state as usize] += 1;
        }
    };
    // A minisocket from before has no cookie until somebody asks for it: its addresses must do.
    let name = |cookie: u64, flow: &Flow| (cookie, (cookie == 0).then(|| flow.canonical().unscoped()));
    let (mut full, mut mini, mut requests) = (HashSet::new(), HashSet::new(), HashSet::new());
    for event in events.iter().filter(|event| event.era == era) {
        match event.kind {
            Kind::Changed { from, to } => {
                let born = from == State::Close || (from, to) == (State::Listen, State::SynRecv);
                if full.insert(event.cookie) && !born {
                    add(&event.flow, from);
                }
            }
            Kind::Armed(_) => {
                mini.insert(name(event.cookie, &event.flow));
            }
            Kind::Disarmed { state, .. } => {
                if mini.insert(name(event.cookie, &event.flow)) {
                    add(&event.flow, state);
                }
            }
            Kind::Requested => {
                requests.insert(event.flow.canonical().unscoped());
            }
            Kind::Unrequested { .. } => {
                if requests.insert(event.flow.canonical().unscoped()) {
                    add(&event.flow, State::SynRecv);
                }
            }
            Kind::ResetSent(_) | Kind::Retransmitted(_) | Kind::SynAckRetransmitted => {}
        }
    }
    for row in rows {
        let told_of = match row.state.shown() {
            State::Close => true,
            _ if row.is_minisocket() => {
                let cookie = row.cookie.unwrap_or(0);
                mini.contains(&name(cookie, &row.flow)) || mini.contains(&name(0, &row.flow))
            }
            State::SynRecv => requests.contains(&row.flow.canonical().unscoped()),
            _ => row.cookie.is_some_and(|cookie| full.contains(&cookie)),
        };
        if !told_of {
            add(&row.flow, row.state.shown());
        }
    }
    before
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::Target;
    use State::{Close, CloseWait, Established, FinWait1, FinWait2, SynRecv, SynSent, TimeWait};
    use std::sync::Arc;

    fn scope() -> Scope {
        Scope::new(&[], vec![Arc::new(Target::new("127.0.0.1:7007".into(), 7007))])
    }

    fn flow(cookie: u64) -> Flow {
        Flow {
            local: format!("127.0.0.1:{}", 40_000 + cookie).parse().unwrap(),
            peer: "127.0.0.1:7007".parse().unwrap(),
        }
    }

    fn row(cookie: u64, state: State) -> Row {
        Row::plain(state, flow(cookie), Some(cookie))
    }

    fn event(era: u8, cookie: u64, kind: Kind) -> Event {
        Event { era, ..Event::plain(cookie, Duration::ZERO, flow(cookie), kind) }
    }

    #[test]
    fn who_was_there_before_is_counted_where_he_was_then() {
        let changed = |cookie, from, to| event(2, cookie, Kind::Changed { from, to });
        let rows = [
            row(1, Established),
            // Moved before its row was read, and after.
            row(2, CloseWait),
            row(3, Established),
            // Born since.
            row(4, Established),
            row(5, TimeWait),
            // Its full socket moved on since.
            row(6, TimeWait),
            row(7, Close),
        ];
        let events = [
            event(1, 1, Kind::Changed { from: SynSent, to: Established }),
            changed(2, Established, CloseWait),
            changed(3, Established, FinWait1),
            changed(4, Close, SynSent),
            changed(4, SynSent, Established),
            event(2, 6, Kind::Armed(TimeWait)),
            changed(6, FinWait2, Close),
            // Gone before the reading: a TIME_WAIT, a connection, a handshake.
            event(2, 8, Kind::Disarmed { state: TimeWait, expired: true }),
            event(2, 0, Kind::Disarmed { state: FinWait2, expired: true }),
            changed(9, CloseWait, Close),
            event(2, 10, Kind::Unrequested { expired: true }),
            // Came and went.
            event(2, 11, Kind::Armed(TimeWait)),
            event(2, 11, Kind::Disarmed { state: TimeWait, expired: false }),
        ];
        let before = before(&scope(), 2, &rows, &events)[0];
        let found: Vec<(State, i64)> =
            State::ALL.into_iter().map(|state| (state, before[state as usize])).filter(|(_, n)| *n != 0).collect();
        assert_eq!(found, [(Established, 3), (SynRecv, 1), (FinWait2, 2), (TimeWait, 2), (CloseWait, 1)]);
    }

    #[test]
    fn the_oldest_is_found_without_those_that_left() {
        let mut ages = Ages::new(&scope());
        let id = |cookie| Identity { cookie, role: Role::Client, port: 7007, flow: flow(cookie) };
        let at = |cookie| Duration::from_secs(cookie);
        for cookie in 1..=5000 {
            ages.begins(&id(cookie), Established, at(cookie));
        }
        // 1 stays, the others have left but for the last.
        let state = |cookie| (cookie == 1 || cookie == 5000).then_some((Established, at(cookie)));
        assert_eq!(ages.oldest(state)[0][Established as usize], Some(at(1)));
        assert_eq!(ages.entered[0][Established as usize].len(), 2, "the rest is thrown out");
        assert_eq!(
            ages.oldest(|cookie| state(cookie).filter(|_| cookie != 1))[0][Established as usize],
            Some(at(5000))
        );
        assert_eq!(ages.oldest(|_| None)[0][Established as usize], None);
    }
}
