//! Who is alive, in which state and since when; and the last lives that ended.
//!
//! Written at transitions only, in shards, so that connections on different threads seldom meet. Must not know: where
//! the facts come from.

mod reason;
mod selection;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::tcp::{Addresses, ByCookie, Cause, Evidence, Flow, Identity, Role, State, Step, Transition};

pub use reason::Reason;
pub use selection::{Order, Selection};

const SHARDS: usize = 16;

/// How many ended lives of each role are kept.
pub const KEPT: usize = 1000;

/// The states of one life in 8 bytes each: a life has few, but there are many lives.
const STEPS: usize = 8;

/// One life, as far as it is known.
#[derive(Clone, Debug)]
pub struct Life {
    /// SO_COOKIE.
    pub cookie: u64,
    /// Which end.
    pub role: Role,
    /// The service's port.
    pub port: u16,
    addresses: Addresses,
    began: State,
    /// Where it is now.
    pub state: State,
    /// Since when, on the monotonic clock.
    pub since: Duration,
    /// When this process first had it, on the monotonic clock.
    pub opened: Duration,
    /// Why this process closed it, if it has.
    pub reason: Option<Reason>,
    /// Whether it was followed to its end.
    pub followed: bool,
    steps: [u64; STEPS],
    taken: u8,
}

/// One step of a life, as kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The state entered.
    pub to: State,
    /// When, on the monotonic clock, to the microsecond.
    pub at: Duration,
    /// Who saw it.
    pub evidence: Evidence,
    /// Why, if known.
    pub cause: Option<Cause>,
    /// Whether the way there is known.
    pub step: Step,
}

impl Life {
    fn new(id: &Identity, state: State, at: Duration) -> Life {
        Life {
            cookie: id.cookie,
            role: id.role,
            port: id.port,
            addresses: Addresses::of(id.flow.canonical()),
            began: state,
            state,
            since: at,
            opened: at,
            reason: None,
            followed: true,
            steps: [0; STEPS],
            taken: 0,
        }
    }

    fn take(&mut self, t: &Transition) {
        self.state = t.to;
        self.since = t.at;
        if let Some(slot) = self.steps.get_mut(usize::from(self.taken)) {
            *slot = pack(t);
            self.taken += 1;
        }
    }

    /// Its addresses, mapped ones written as IPv4.
    #[must_use]
    pub fn flow(&self) -> Flow {
        self.addresses.flow()
    }

    /// The state in which it was entered here.
    #[must_use]
    pub fn began(&self) -> State {
        self.began
    }

    /// The steps taken, in order.
    pub fn steps(&self) -> impl Iterator<Item = Taken> {
        self.steps[..usize::from(self.taken)].iter().filter_map(|packed| unpack(*packed))
    }
}

/// Microseconds in the upper 48 bits (nine years), then 4 bits of state, 3 of evidence, 6 of cause, 2 of certainty.
fn pack(t: &Transition) -> u64 {
    let micros = u64::try_from(t.at.as_micros()).unwrap_or(u64::MAX) << 16;
    let cause = t.cause.map_or(0, |c| c as u64 + 1);
    micros | (t.to as u64) << 12 | (t.evidence as u64) << 9 | cause << 3 | t.step as u64
}

fn unpack(packed: u64) -> Option<Taken> {
    let field = |shift: u32, bits: u32| (packed >> shift) as usize & ((1 << bits) - 1);
    Some(Taken {
        to: State::from_kernel(field(12, 4) as u8)?,
        at: Duration::from_micros(packed >> 16),
        evidence: *Evidence::ALL.get(field(9, 3))?,
        cause: field(3, 6).checked_sub(1).and_then(|i| Cause::ALL.get(i).copied()),
        step: *Step::ALL.get(field(0, 3))?,
    })
}

/// The living, by cookie. Boxed, because a map that grows has up to twice the room that it needs.
type Living = ByCookie<Box<Life>>;

/// All lives of this process's connections.
pub struct Ledger {
    living: Vec<Mutex<Living>>,
    /// By role: many of one end at once, as when a reading finds TIME_WAITs gone, must not push out the other ends.
    ended: [Mutex<VecDeque<Life>>; 2],
    /// Whether a server's and a client's end were ever entered: only then can both ends of a connection be here.
    roles: [AtomicBool; 2],
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger {
            living: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ended: Role::ALL.map(|_| Mutex::new(VecDeque::with_capacity(KEPT))),
            roles: [AtomicBool::new(false), AtomicBool::new(false)],
        }
    }
}

impl Ledger {
    /// Enters a new life.
    pub fn open(&self, id: &Identity, state: State, at: Duration) {
        let role = &self.roles[id.role as usize];
        if !role.load(Ordering::Relaxed) {
            role.store(true, Ordering::Relaxed);
        }
        self.shard(id.cookie).insert(id.cookie, Box::new(Life::new(id, state, at)));
    }

    /// Notes steps; one to CLOSED ends the life.
    pub fn steps<'a>(&self, id: &Identity, steps: impl IntoIterator<Item = &'a Transition>) {
        let mut shard = self.shard(id.cookie);
        let Some(life) = shard.get_mut(&id.cookie) else { return };
        if life.role == Role::Client && matches!(life.state, State::Close | State::SynSent) {
            // Bound by connect(2) only after the life began.
            life.addresses = Addresses::of(id.flow.canonical());
        }
        steps.into_iter().for_each(|t| life.take(t));
        if life.state == State::Close
            && life.taken > 0
            && let Some(life) = shard.remove(&id.cookie)
        {
            // Under the shard's lock: a life is never nowhere.
            self.keep(*life);
        }
    }

    /// Notes why the descriptor was closed. The life may go on in the kernel. Returns whether there is such a life.
    pub fn close(&self, role: Role, cookie: u64, reason: Reason) -> bool {
        if let Some(life) = self.shard(cookie).get_mut(&cookie) {
            life.reason = Some(reason);
            return true;
        }
        // Its end was seen a moment ago: it is among the last that ended.
        let mut ended = lock(&self.ended[role as usize]);
        let life = ended.iter_mut().rev().find(|life| life.cookie == cookie);
        life.map(|life| life.reason = Some(reason)).is_some()
    }

    /// Gives a life up: it goes on, but nobody follows it.
    pub fn lose(&self, cookie: u64) {
        let lost = self.shard(cookie).remove(&cookie);
        if let Some(life) = lost {
            self.keep(Life { followed: false, ..*life });
        }
    }

    /// The longest that any living connection has been in its state, and how many are in it, by (role, port, state).
    #[must_use]
    pub fn oldest(&self, now: Duration) -> HashMap<(Role, u16, State), (Duration, u64)> {
        let mut oldest: HashMap<_, (Duration, u64)> = HashMap::new();
        for shard in &self.living {
            for life in lock(shard).values() {
                let age = now.saturating_sub(life.since);
                let (longest, count) = oldest.entry((life.role, life.port, life.state)).or_default();
                *longest = (*longest).max(age);
                *count += 1;
            }
        }
        oldest
    }

    /// Whether the other end of this connection is ours too, and was seen to enter `state`. Walks the ledger, the latest
    /// ends first: for rare questions.
    #[must_use]
    pub fn other_end_entered(&self, id: &Identity, state: State) -> bool {
        if !self.roles.iter().all(|role| role.load(Ordering::Relaxed)) {
            return false;
        }
        let Some(opened) = self.shard(id.cookie).get(&id.cookie).map(|life| life.opened) else { return false };
        let flow = id.flow.canonical();
        let other = Flow { local: flow.peer, peer: flow.local };
        // An earlier connection may have had the same addresses: its end says nothing of this one. A server's end begins
        // after its client's; of a server's possible clients the youngest is the one.
        let in_order = |life: &Life| match id.role {
            Role::Client => life.opened >= opened,
            Role::Server => life.opened <= opened,
        };
        let is_other = |life: &&Life| life.role != id.role && life.flow() == other && in_order(life);
        let answer = |life: &Life| {
            let seen = |s: Taken| s.to == state && s.evidence != Evidence::Inferred && s.step == Step::Arrow;
            (life.opened, life.steps().any(seen))
        };
        let others = &self.ended[1 - id.role as usize];
        let ended = || lock(others).iter().rev().find(is_other).map(answer);
        let living = || {
            let of =
                |shard: &Mutex<Living>| lock(shard).values().map(|life| &**life).filter(is_other).map(answer).max();
            self.living.iter().filter_map(of).max()
        };
        let youngest = match id.role {
            // No second one can have begun after this client did.
            Role::Client => ended().or_else(living),
            Role::Server => ended().max(living()),
        };
        // Lives move from the living to the ended, and may do so between the two looks.
        youngest.or_else(ended).is_some_and(|(_, did)| did)
    }

    /// How many of the connections that this process has closed are still in each state. States without any are left out.
    #[must_use]
    pub fn states(&self) -> Vec<(State, u64)> {
        let mut counts = State::ALL.map(|state| (state, 0));
        for shard in &self.living {
            for life in lock(shard).values().filter(|life| life.reason.is_some()) {
                if let Some((_, count)) = counts.iter_mut().find(|(state, _)| *state == life.state) {
                    *count += 1;
                }
            }
        }
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    /// How many lives go on.
    #[must_use]
    pub fn len(&self) -> usize {
        self.living.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether none does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn keep(&self, life: Life) {
        let mut ended = lock(&self.ended[life.role as usize]);
        if ended.len() == KEPT {
            ended.pop_front();
        }
        ended.push_back(life);
    }

    fn shard(&self, cookie: u64) -> MutexGuard<'_, Living> {
        lock(&self.living[cookie as usize % SHARDS])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::Lifecycle;

    fn id(cookie: u64) -> Identity {
        let address = "127.0.0.1:7007".parse().unwrap();
        Identity { cookie, role: Role::Client, port: 7007, flow: Flow { local: address, peer: address } }
    }

    #[test]
    fn every_kind_of_step_survives_packing() {
        for to in State::ALL {
            for evidence in Evidence::ALL {
                for cause in Cause::ALL.into_iter().map(Some).chain([None]) {
                    for step in Step::ALL {
                        let at = Duration::from_micros(86_400_000_123);
                        let from = State::Close;
                        let t = Transition { from, to, at, after: None, evidence, cause, step, retransmits: 0 };
                        assert_eq!(unpack(pack(&t)), Some(Taken { to, at, evidence, cause, step }));
                    }
                }
            }
        }
    }

    #[test]
    fn a_life_is_living_until_closed_and_then_kept() {
        let ledger = Ledger::default();
        let mut life = Lifecycle::client(Duration::ZERO);
        ledger.open(&id(1), life.state(), Duration::ZERO);
        for (i, state) in [State::SynSent, State::Established].into_iter().enumerate() {
            for t in life.observe(Duration::from_secs(i as u64 + 1), state, Evidence::TcpInfo).iter() {
                ledger.steps(&id(1), [t]);
            }
        }
        let oldest = ledger.oldest(Duration::from_secs(10));
        assert_eq!(oldest[&(Role::Client, 7007, State::Established)], (Duration::from_secs(8), 1));
        for t in life.observe(Duration::from_secs(11), State::Close, Evidence::TcpInfo).iter() {
            ledger.steps(&id(1), [t]);
        }
        assert!(ledger.is_empty());
        let kept = ledger.recent(10);
        assert_eq!(
            kept[0].steps().map(|s| s.to).collect::<Vec<_>>(),
            [State::SynSent, State::Established, State::Close]
        );
    }

    #[test]
    fn an_earlier_connection_with_the_same_addresses_does_not_vouch() {
        let ledger = Ledger::default();
        let (a, b) = ("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:7007".parse().unwrap());
        let client = |cookie| Identity { cookie, role: Role::Client, port: 7007, flow: Flow { local: a, peer: b } };
        let server = |cookie| Identity { cookie, role: Role::Server, port: 7007, flow: Flow { local: b, peer: a } };
        let at = Duration::from_secs;
        let close_wait = |cookie, when| {
            ledger.open(&server(cookie), State::Listen, when);
            let mut life = Lifecycle::accepted(when);
            for state in [State::Established, State::CloseWait] {
                life.observe(when, state, Evidence::TcpInfo).iter().for_each(|t| ledger.steps(&server(cookie), [t]));
            }
            life
        };
        ledger.open(&client(1), State::Close, at(1));
        let mut earlier = close_wait(2, at(2));
        assert!(ledger.other_end_entered(&client(1), State::CloseWait));
        earlier.observe(at(3), State::Close, Evidence::TcpInfo).iter().for_each(|t| ledger.steps(&server(2), [t]));
        assert!(ledger.other_end_entered(&client(1), State::CloseWait), "also when it has ended");
        for cookie in 0..KEPT as u64 + 10 {
            ledger.open(&id(1000 + cookie), State::Close, at(3));
            ledger.lose(1000 + cookie);
        }
        assert!(ledger.other_end_entered(&client(1), State::CloseWait), "however many clients have ended since");
        ledger.open(&client(3), State::Close, at(4));
        ledger.open(&server(4), State::Listen, at(5));
        assert!(!ledger.other_end_entered(&client(3), State::CloseWait), "that was the connection before");
        close_wait(4, at(5));
        assert!(ledger.other_end_entered(&client(3), State::CloseWait));
        assert!(!ledger.other_end_entered(&server(4), State::CloseWait), "of its client nothing was seen");
    }

    #[test]
    fn what_is_kept_is_bounded_and_youngest_first() {
        let ledger = Ledger::default();
        for cookie in 0..KEPT as u64 + 10 {
            ledger.open(&id(cookie), State::Close, Duration::from_secs(cookie));
            ledger.lose(cookie);
        }
        let recent = ledger.recent(KEPT * 2);
        assert_eq!((recent.len(), recent[0].cookie), (KEPT, KEPT as u64 + 9));
        assert!(!recent[0].followed);
    }
}
