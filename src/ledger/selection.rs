//! Asking the ledger: which lives, in which order, and both ends of one.

use std::collections::HashSet;
use std::time::Duration;

use super::{Ledger, Life, Reason, lock};
use crate::tcp::{Flow, Role, State};

/// Which come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Those that began last.
    #[default]
    Youngest,
    /// Those that last, or lasted, for longest.
    Longest,
}

/// Which lives are asked for; what is `None` is not asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Which end.
    pub role: Option<Role>,
    /// Where they are now.
    pub state: Option<State>,
    /// Why this process closed them; `Some(None)`: it has not.
    pub outcome: Option<Option<Reason>>,
    /// Which come first.
    pub order: Order,
}

impl Selection {
    fn takes(self, life: &Life) -> bool {
        self.role.is_none_or(|role| life.role == role)
            && self.state.is_none_or(|state| life.state == state)
            && self.outcome.is_none_or(|reason| life.reason == reason)
    }

    /// The greater, the sooner; the cookie decides between equals.
    fn rank(self, life: &Life, now: Duration) -> (Duration, u64) {
        match self.order {
            Order::Youngest => (life.opened, life.cookie),
            // Of one that nobody follows any more, what is known.
            Order::Longest if life.state == State::Close || !life.followed => {
                (life.since.saturating_sub(life.opened), life.cookie)
            }
            Order::Longest => (now.saturating_sub(life.opened), life.cookie),
        }
    }
}

/// The first so many of any number, in little room.
struct First {
    limit: usize,
    lives: Vec<((Duration, u64), Life)>,
    /// Who ranks lower has no chance.
    least: (Duration, u64),
}

impl First {
    fn offer(&mut self, rank: (Duration, u64), life: &Life) {
        if rank < self.least {
            return;
        }
        if self.lives.len() >= self.limit.saturating_mul(2) {
            self.cut();
        }
        self.lives.push((rank, life.clone()));
    }

    fn cut(&mut self) {
        self.lives.sort_unstable_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        self.lives.truncate(self.limit);
        self.least = self.lives.last().map_or(self.least, |(rank, _)| *rank);
    }
}

impl Ledger {
    /// At most `limit` lives, the youngest first: those that go on and those that ended.
    #[must_use]
    pub fn recent(&self, limit: usize) -> Vec<Life> {
        self.select(Selection::default(), limit, Duration::ZERO)
    }

    /// At most `limit` lives of those that go on and those that ended.
    #[must_use]
    pub fn select(&self, wanted: Selection, limit: usize, now: Duration) -> Vec<Life> {
        let mut first = First { limit: limit.max(1), lives: Vec::new(), least: (Duration::ZERO, 0) };
        self.each(|life| {
            if wanted.takes(life) {
                first.offer(wanted.rank(life, now), life);
            }
        });
        // One that ended between the two looks is in both.
        let mut seen = HashSet::new();
        first.lives.sort_unstable_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        let once = first.lives.into_iter().map(|(_, life)| life).filter(|life| seen.insert(life.cookie));
        once.take(limit).collect()
    }

    /// The life of `cookie`, and that of its other end if that is ours too.
    ///
    /// Addresses and ports may have served one connection after the other: a server's end begins after its client's, and
    /// before the next client's.
    #[must_use]
    pub fn both_ends(&self, cookie: u64) -> Option<(Life, Option<Life>)> {
        let living = self.shard(cookie).get(&cookie).map(|life| Life::clone(life));
        let this = living.or_else(|| {
            self.ended.iter().find_map(|ended| lock(ended).iter().rev().find(|life| life.cookie == cookie).cloned())
        })?;
        let flow = this.flow();
        let mirrored = Flow { local: flow.peer, peer: flow.local };
        let (mut clients, mut servers): (Vec<Life>, Vec<Life>) = Default::default();
        let of_this = |life: &Life| life.flow() == if life.role == this.role { flow } else { mirrored };
        self.each(|life| {
            if of_this(life) {
                let ends = if life.role == Role::Client { &mut clients } else { &mut servers };
                ends.push(life.clone());
            }
        });
        let other = match this.role {
            Role::Client => {
                let next = clients.iter().map(|life| life.opened).filter(|at| *at > this.opened).min();
                let before_next = |life: &Life| next.is_none_or(|next| life.opened < next);
                let after = servers.into_iter().filter(|life| life.opened >= this.opened && before_next(life));
                after.min_by_key(|life| life.opened)
            }
            Role::Server => {
                let last = clients.into_iter().filter(|life| life.opened <= this.opened).max_by_key(|life| life.opened);
                let taken = |client: &Life| {
                    servers.iter().any(|s| s.cookie != cookie && s.opened >= client.opened && s.opened < this.opened)
                };
                last.filter(|client| !taken(client))
            }
        };
        Some((this, other))
    }

    /// Every life, those that go on first.
    fn each(&self, mut told: impl FnMut(&Life)) {
        for shard in &self.living {
            lock(shard).values().for_each(|life| told(life));
        }
        for ended in &self.ended {
            lock(ended).iter().for_each(&mut told);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::KEPT;
    use super::*;
    use crate::tcp::{Evidence, Identity, Lifecycle};

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn id(cookie: u64, role: Role, port: u16) -> Identity {
        let (here, there) = (([127, 0, 0, 1], port).into(), "127.0.0.1:7007".parse().unwrap());
        let flow = match role {
            Role::Client => Flow { local: here, peer: there },
            Role::Server => Flow { local: there, peer: here },
        };
        Identity { cookie, role, port: 7007, flow }
    }

    fn cookies(lives: &[Life]) -> Vec<u64> {
        lives.iter().map(|life| life.cookie).collect()
    }

    /// Walks a life to `state` at `when`.
    fn walk(ledger: &Ledger, id: &Identity, life: &mut Lifecycle, state: State, when: Duration) {
        ledger.steps(id, life.observe(when, state, Evidence::TcpInfo).iter());
    }

    #[test]
    fn lives_are_found_by_end_state_and_outcome_and_come_in_order() {
        let ledger = Ledger::default();
        for cookie in 1..=6 {
            let role = if cookie % 2 == 0 { Role::Server } else { Role::Client };
            let id = id(cookie, role, 40_000 + cookie as u16);
            let mut life =
                if role == Role::Client { Lifecycle::client(at(cookie)) } else { Lifecycle::accepted(at(cookie)) };
            ledger.open(&id, life.state(), at(cookie));
            walk(&ledger, &id, &mut life, State::Established, at(cookie));
            if cookie >= 5 {
                ledger.close(role, cookie, Reason::Reset);
                walk(&ledger, &id, &mut life, State::Close, at(100));
            }
        }
        let ask = |selection: Selection, limit| cookies(&ledger.select(selection, limit, at(50)));
        let all = Selection::default();
        assert_eq!(ask(all, 10), [6, 5, 4, 3, 2, 1]);
        assert_eq!(ask(all, 2), [6, 5]);
        assert_eq!(ask(Selection { role: Some(Role::Server), ..all }, 10), [6, 4, 2]);
        assert_eq!(ask(Selection { state: Some(State::Established), ..all }, 10), [4, 3, 2, 1]);
        assert_eq!(ask(Selection { outcome: Some(Some(Reason::Reset)), ..all }, 10), [6, 5]);
        assert_eq!(ask(Selection { outcome: Some(None), order: Order::Longest, ..all }, 3), [1, 2, 3]);
        // 5 and 6 lasted until 100, the others go on since 1 to 4.
        assert_eq!(ask(Selection { order: Order::Longest, ..all }, 10), [5, 6, 1, 2, 3, 4]);
    }

    #[test]
    fn a_few_of_many_are_the_right_ones() {
        let ledger = Ledger::default();
        let mut random = fastrand::Rng::with_seed(7);
        let mut all: Vec<(u64, u64)> = (0..5_000).map(|cookie| (random.u64(0..1_000), cookie)).collect();
        for (opened, cookie) in &all {
            ledger.open(&id(*cookie, Role::Client, 40_000), State::Close, at(*opened));
        }
        all.sort_unstable();
        let youngest: Vec<u64> = all.iter().rev().map(|(_, cookie)| *cookie).take(70).collect();
        assert_eq!(cookies(&ledger.select(Selection::default(), 70, at(1_000))), youngest);
        assert_eq!(ledger.select(Selection::default(), 10_000, at(1_000)).len(), 5_000);
    }

    #[test]
    fn what_ended_is_bounded_and_found_too() {
        let ledger = Ledger::default();
        for cookie in 0..KEPT as u64 + 10 {
            ledger.open(&id(cookie, Role::Client, 40_000), State::Close, at(cookie));
            ledger.lose(cookie);
        }
        let lives = ledger.select(Selection::default(), KEPT * 2, at(9_999));
        assert_eq!((lives.len(), lives[0].cookie, lives[0].followed), (KEPT, KEPT as u64 + 9, false));
    }

    #[test]
    fn each_end_finds_the_other_though_the_addresses_were_used_before_and_after() {
        let ledger = Ledger::default();
        // A client and its server, three times over the same addresses; of the second connection only the client is ours.
        for (cookie, opened) in [(1, 10), (3, 20), (5, 30)] {
            ledger.open(&id(cookie, Role::Client, 40_000), State::Close, at(opened));
            if cookie != 3 {
                ledger.open(&id(cookie + 1, Role::Server, 40_000), State::Listen, at(opened + 1));
            }
            ledger.lose(cookie);
        }
        ledger.open(&id(9, Role::Client, 40_001), State::Close, at(10));
        let other = |cookie| ledger.both_ends(cookie).unwrap().1.map(|life| life.cookie);
        let found: Vec<_> = [1, 2, 3, 5, 6, 9].map(other).into();
        assert_eq!(found, [Some(2), Some(1), None, Some(6), Some(5), None]);
        assert!(ledger.both_ends(77).is_none());
        // A server's end whose client is not ours, though an earlier one had the same addresses.
        ledger.open(&id(8, Role::Server, 40_000), State::Listen, at(40));
        assert_eq!(other(8), None);
        assert_eq!(other(6), Some(5));
    }
}
