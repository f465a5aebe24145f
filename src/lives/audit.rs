//! Lives held against the kernel's table now and then. Whatever was not announced, and is not known to be lost, shows there:
//! some kernels run no program for what happens while certain processes are at work.

use std::collections::HashSet;
use std::time::Duration;

use super::Lives;
use super::handshakes::key;
use crate::kernel::Row;
use crate::tcp::{ByCookie, Cookies, Flow, Identity, State};

/// How often a comparison is made, at least while it takes less than one part in a hundred of the time.
const EVERY: Duration = Duration::from_secs(10);
const DUTY: u32 = 100;

/// How long who seems to be elsewhere has time to turn out to be where the table has him: an event may be on its way.
const DOUBT: Duration = Duration::from_millis(500);

/// When the next comparison is due, after one that took `spent`.
pub(crate) fn next(now: Duration, spent: Duration) -> Duration {
    now + EVERY.max(spent * DUTY)
}

/// A reading of the table that everybody is compared with.
pub(crate) struct Audit {
    began: Duration,
    shown: Cookies,
    handshakes: HashSet<Flow>,
    differing: ByCookie<Row>,
}

impl Audit {
    /// The reading begins.
    pub(crate) fn begin(now: Duration) -> Audit {
        Audit { began: now, shown: Cookies::default(), handshakes: HashSet::new(), differing: ByCookie::default() }
    }

    /// A row of it.
    pub(crate) fn row(&mut self, row: &Row, lives: &Lives) {
        if let Some(cookie) = row.cookie {
            self.shown.insert(cookie);
            if row.state.shown() == State::SynRecv {
                self.handshakes.insert(key(&row.flow));
            }
            if !lives.agrees_with(row, cookie) {
                self.differing.insert(cookie, *row);
            }
        }
    }

    /// The reading is over, and what was announced until now was heard. Returns who is elsewhere, if there is any such.
    pub(crate) fn ends(self, lives: &mut Lives, now: Duration) -> Option<Doubts> {
        let before = |at: Duration| at < self.began;
        let left_over = lives.handshakes.forget_left_over(self.began, &self.handshakes);
        let mut suspects = Vec::new();
        for (cookie, row) in &self.differing {
            let told = lives.state(*cookie);
            if !lives.agrees_with(row, *cookie)
                && told.is_none_or(|(_, since)| before(since))
                && let Some((role, port)) = (lives.which)(&row.flow, None)
            {
                suspects.push(Suspect { id: Identity { cookie: *cookie, role, port, flow: row.flow }, told });
            }
        }
        let absent = lives.settled().filter(|(id, _, since)| before(*since) && !self.shown.contains(&id.cookie));
        suspects.extend(absent.map(|(id, state, since)| Suspect { id: *id, told: Some((state, since)) }));
        (!suspects.is_empty() || left_over > 0).then(|| Doubts { due: now + DOUBT, suspects, left_over })
    }
}

/// Whoever the table showed elsewhere than he was told to be.
pub(crate) struct Doubts {
    /// When they are to be looked up.
    pub(crate) due: Duration,
    suspects: Vec<Suspect>,
    /// Handshakes whose end went unheard.
    left_over: u64,
}

/// Whom the table shows elsewhere, or not at all, and where he was told to be.
#[derive(Clone, Copy)]
struct Suspect {
    id: Identity,
    told: Option<(State, Duration)>,
}

impl Doubts {
    /// Looks up who still is told to be there; after that what was announced is to be heard once more.
    ///
    /// # Errors
    /// What `find` says.
    pub(crate) fn look_up<E>(
        self,
        lives: &Lives,
        mut find: impl FnMut(&Identity) -> Result<Option<Row>, E>,
    ) -> Result<LookedUp, E> {
        let still = self.suspects.into_iter().filter(|suspect| lives.state(suspect.id.cookie) == suspect.told);
        let rows = still.map(|suspect| Ok((suspect, find(&suspect.id)?))).collect::<Result<_, E>>()?;
        Ok(LookedUp { rows, left_over: self.left_over })
    }
}

/// What lookups say of them.
pub(crate) struct LookedUp {
    rows: Vec<(Suspect, Option<Row>)>,
    left_over: u64,
}

impl LookedUp {
    /// How many are elsewhere than they were told to be, without a doubt.
    pub(crate) fn verdict(&self, lives: &Lives) -> u64 {
        let elsewhere = |(suspect, row): &&(Suspect, Option<Row>)| {
            let cookie = suspect.id.cookie;
            lives.state(cookie) == suspect.told
                && match row {
                    Some(row) => !lives.agrees_with(row, cookie),
                    None => lives.is_settled(cookie),
                }
        };
        self.left_over + self.rows.iter().filter(elsewhere).count() as u64
    }
}

impl Lives {
    /// Whether a row shows somebody where he was told to be, or whom nobody has to tell of yet.
    fn agrees_with(&self, row: &Row, cookie: u64) -> bool {
        let state = row.state.shown();
        if matches!(state, State::Listen | State::Close) {
            return true;
        }
        match self.living.get(&cookie) {
            // That step is not always announced, and looked up by whoever minds.
            Some(living) if living.is_orphan() && state == State::TimeWait => true,
            Some(living) => living.nameless.is_some() || living.life.state() == state,
            None if state == State::SynRecv && self.handshakes.has(&row.flow) => true,
            None => (self.which)(&row.flow, None).is_none(),
        }
    }

    /// Whoever is in a state that is told, and not about to leave it.
    fn settled(&self) -> impl Iterator<Item = (&Identity, State, Duration)> {
        let settled = self.living.values().filter(|living| living.is_settled());
        settled.map(|living| (&living.id, living.life.state(), living.life.since()))
    }

    fn is_settled(&self, cookie: u64) -> bool {
        self.living.get(&cookie).is_some_and(|living| living.is_settled())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tracepoints::{Event, Kind};
    use crate::tcp::Role;
    use State::{Close, CloseWait, Established, FinWait1, FinWait2, LastAck, SynRecv, SynSent, TimeWait};

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn flow(cookie: u64) -> Flow {
        let ours = format!("127.0.0.1:{}", 40_000 + cookie).parse().unwrap();
        Flow { local: ours, peer: "127.0.0.1:7007".parse().unwrap() }
    }

    fn hear(lives: &mut Lives, cookie: u64, at: u64, kind: Kind) {
        lives.hear(&Event::plain(cookie, ms(at), flow(cookie), kind), &mut |_, _| ());
    }

    /// One client, in the last of these states since `at`.
    fn client(lives: &mut Lives, cookie: u64, at: u64, states: &[State]) {
        for pair in states.windows(2) {
            hear(lives, cookie, at, Kind::Changed { from: pair[0], to: pair[1] });
        }
    }

    fn row(cookie: u64, state: State) -> Row {
        Row::plain(state, flow(cookie), Some(cookie))
    }

    /// What a comparison with these rows comes to, when lookups find the same and `between` is heard before them.
    fn verdict(lives: &mut Lives, rows: &[Row], between: impl FnOnce(&mut Lives)) -> u64 {
        let mut audit = Audit::begin(ms(100));
        for row in rows {
            audit.row(row, lives);
        }
        let Some(doubts) = audit.ends(lives, ms(101)) else { return 0 };
        between(lives);
        let find = |id: &Identity| Ok::<_, ()>(rows.iter().find(|row| row.cookie == Some(id.cookie)).copied());
        doubts.look_up(lives, find).unwrap().verdict(lives)
    }

    fn lives() -> Lives {
        Lives::new(Box::new(|flow, _| Some((Role::Client, flow.peer.port()))), true)
    }

    const OPEN: &[State] = &[Close, SynSent, Established];

    #[test]
    fn who_is_where_he_was_told_to_be_is_no_loss() {
        let mut lives = lives();
        client(&mut lives, 1, 1, OPEN);
        client(&mut lives, 2, 1, &[Close, SynSent]);
        assert_eq!(verdict(&mut lives, &[row(1, Established), row(2, SynSent), row(3, Close)], |_| ()), 0);
    }

    #[test]
    fn who_is_elsewhere_or_gone_or_was_never_told_of_went_unheard() {
        let mut lives = lives();
        client(&mut lives, 1, 1, &[Close, SynSent, Established, FinWait1]);
        client(&mut lives, 2, 1, OPEN);
        assert_eq!(verdict(&mut lives, &[row(1, TimeWait), row(3, CloseWait)], |_| ()), 3);
    }

    #[test]
    fn what_was_on_its_way_is_no_loss() {
        let mut lives = lives();
        client(&mut lives, 1, 1, OPEN);
        client(&mut lives, 2, 1, OPEN);
        let later = |lives: &mut Lives| {
            hear(lives, 1, 99, Kind::Changed { from: Established, to: CloseWait });
            hear(lives, 2, 99, Kind::Changed { from: Established, to: Close });
            client(lives, 3, 99, OPEN);
        };
        assert_eq!(verdict(&mut lives, &[row(1, CloseWait), row(3, Established)], later), 0);
    }

    #[test]
    fn what_happened_since_the_reading_began_is_no_loss() {
        let mut lives = lives();
        client(&mut lives, 1, 1, OPEN);
        let mut audit = Audit::begin(ms(100));
        audit.row(&row(1, Established), &lives);
        client(&mut lives, 1, 101, &[Established, CloseWait, LastAck]);
        client(&mut lives, 2, 101, OPEN);
        assert!(audit.ends(&mut lives, ms(102)).is_none());
    }

    #[test]
    fn a_handshake_whose_end_went_unheard_is_forgotten_and_counted() {
        let mut lives = lives();
        hear(&mut lives, 0, 1, Kind::Requested);
        hear(&mut lives, 5, 1, Kind::Requested);
        let open = Row { cookie: Some(9), ..row(0, SynRecv) };
        let done = row(5, Established);
        // What became of it was never told of; the request is given one more reading.
        assert_eq!(verdict(&mut lives, &[open, done], |_| ()), 1);
        assert_eq!(verdict(&mut lives, &[open, done], |_| ()), 2);
        assert_eq!(lives.handshakes.len(), 1);
        // The next handshake at the same addresses begins when it begins.
        hear(&mut lives, 5, 200, Kind::Requested);
        assert_eq!(lives.handshakes.began(&flow(5)), Some(ms(200)));
    }

    #[test]
    fn who_waits_for_his_end_or_for_a_name_is_no_loss() {
        let mut lives = lives();
        client(&mut lives, 1, 1, OPEN);
        hear(&mut lives, 1, 2, Kind::Armed(TimeWait));
        hear(&mut lives, 1, 90, Kind::Disarmed { state: TimeWait, expired: true });
        hear(&mut lives, 4, 1, Kind::Armed(FinWait2));
        let nameless = Flow { local: "127.0.0.1:0".parse().unwrap(), ..flow(2) };
        lives.hear(&Event::plain(2, ms(1), nameless, Kind::Changed { from: Close, to: SynSent }), &mut |_, _| ());
        hear(&mut lives, 0, 1, Kind::Requested);
        let request = Row { cookie: Some(9), ..row(0, SynRecv) };
        assert_eq!(verdict(&mut lives, &[row(2, SynSent), row(4, TimeWait), request], |_| ()), 0);
    }
}
