//! Whole lives, driven by what the kernel announces: each event is one step of somebody's.
//!
//! Pure: events and time come in as arguments, what they prove goes out through `tell`. Must not know: where events come
//! from, or what becomes of what is told.

pub(crate) mod audit;
mod handshakes;
mod losses;
mod meaning;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::kernel::tracepoints::{Event, Kind};
use crate::kernel::{Row, TIME_WAIT};
use crate::tcp::{
    ByCookie, Cause, Cookies, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet, Transitions,
};
use handshakes::{GivenUp, Handshakes, Request};
pub(crate) use losses::KnownLosses;
use meaning::{ABORT_ON_DATA, Meaning};

/// How long an event may take from one CPU to us after a later one from another: what a second event would change is
/// decided after that.
pub(crate) const SETTLED: Duration = Duration::from_millis(2);

/// How long a connection may go without the local port that connect(2) finds after SYN_SENT is entered.
pub(crate) const NAMELESS: Duration = Duration::from_millis(5);

/// How long it may go without one before it is given up.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// What there is to tell of one life.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Said<'a> {
    /// It begins for us, in this state.
    Begins(State, Duration),
    /// It moves.
    Moves(&'a Transitions),
    /// Its full socket is at its end: what the way was like.
    Path {
        /// Smoothed round-trip time in microseconds; 0 where none was measured.
        rtt_us: u32,
        /// How many segments were sent again.
        retransmits: u32,
    },
    /// It is over; whether its descriptor was closed before is known then.
    Ends {
        /// The descriptor is closed.
        departed: bool,
    },
}

/// Which role and port a connection is of, if it is any of ours; the role is given where its birth tells it.
pub(crate) type Which = Box<dyn Fn(&Flow, Option<Role>) -> Option<(Role, u16)> + Send>;

/// Everybody who is alive.
pub(crate) struct Lives {
    which: Which,
    timers: bool,
    /// Boxed, because a map that grows moves what is in it, and has up to twice the room that it needs.
    living: ByCookie<Box<Living>>,
    handshakes: Handshakes,
    /// Who waits for a second event, or for a name.
    undecided: Vec<u64>,
    nameless: Vec<u64>,
    /// How many events are missing by what others say.
    gaps: u64,
    /// Minisockets in FIN_WAIT2: not every one that goes on to TIME_WAIT is announced.
    orphans: VecDeque<u64>,
}

/// One life.
struct Living {
    id: Identity,
    life: Lifecycle,
    /// What goes on, or will in a moment, in its place.
    mini: Option<State>,
    ending: Option<Ending>,
    /// How many segments were sent again in the present state.
    retransmits: u32,
    /// Since when it is in SYN_SENT without a local port: nothing is told of it yet.
    nameless: Option<Duration>,
    departed: bool,
}

/// An end of which the next event may say more.
#[derive(Clone, Copy)]
struct Ending {
    at: Duration,
    cause: Option<Cause>,
}

impl Lives {
    /// Nobody. With `timers`, minisockets and requests are told of by events.
    pub(crate) fn new(which: Which, timers: bool) -> Lives {
        Lives {
            which,
            timers,
            living: HashMap::default(),
            handshakes: Handshakes::default(),
            undecided: Vec::new(),
            nameless: Vec::new(),
            gaps: 0,
            orphans: VecDeque::new(),
        }
    }

    /// Takes note of an event.
    pub(crate) fn hear(&mut self, event: &Event, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        match event.kind {
            Kind::Changed { from, to } => self.changed(event, from, to, tell),
            Kind::Armed(state) => {
                let Some(living) = self.of(event, state, tell) else { return };
                living.ending = None;
                let is_orphan = state == State::FinWait2 && living.mini != Some(state);
                // A minisocket goes on in FIN_WAIT2's place, in CLOSING's, or is there: out of any other the step between is missing.
                let went_unheard = !matches!(living.life.state(), State::FinWait2 | State::Closing | State::TimeWait);
                living.mini = Some(state);
                living.observe(event.at, state, None, tell);
                self.gaps += u64::from(went_unheard);
                if is_orphan {
                    self.orphans.push_back(event.cookie);
                }
            }
            Kind::Disarmed { state, expired } => {
                let Some(living) = self.of(event, state, tell) else { return };
                // Stopped to be started anew, or for good; the same when it has run down: the timer is late by up to two
                // seconds, and a FIN that is repeated then starts it anew, too.
                let cause = expired.then_some(Cause::Expired);
                living.ending = Some(Ending { at: event.at, cause });
                self.undecided.push(event.cookie);
            }
            Kind::Requested => {
                let life = self.living.contains_key(&event.cookie).then_some(event.cookie);
                self.handshakes.begins(&event.flow, event.at, life);
            }
            Kind::Unrequested { expired } => {
                self.gaps += u64::from(self.handshakes.stops(&event.flow, event.at, expired));
            }
            Kind::ResetSent(reason) => {
                if let Some(living) = self.living.get_mut(&event.cookie)
                    && let Some(ending) = &mut living.ending
                    && reason == ABORT_ON_DATA
                {
                    ending.cause = Some(Cause::Abort);
                }
            }
            Kind::Retransmitted(state) => {
                if let Some(living) = self.of(event, state, tell) {
                    living.retransmits += 1;
                }
            }
            Kind::SynAckRetransmitted => {
                let life = self.handshakes.repeats(&event.flow);
                if let Some(living) = life.and_then(|cookie| self.living.get_mut(&cookie)) {
                    living.retransmits += 1;
                }
            }
        }
    }

    fn changed(&mut self, event: &Event, from: State, to: State, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        match (from, to) {
            // A listener's own life is told by whoever listens.
            (_, State::Listen) | (State::Listen, State::Close) => return,
            (State::Close, State::SynSent) => return self.sends_syn(event, tell),
            (State::Listen, State::SynRecv) => return self.completes(event, tell),
            _ => {}
        }
        // Older kernels tell of a child only when it leaves SYN_RECV. Without a request it was there before.
        if from == State::SynRecv && !self.living.contains_key(&event.cookie) && self.handshakes.has(&event.flow) {
            self.completes(event, tell);
        }
        let timers = self.timers;
        let Some(living) = self.of(event, from, tell) else { return };
        // Of two sockets of one request, the one that is thrown away has what the request had, too. No round trip was measured
        // by it; a sole one that ends in SYN_RECV is taken for such a one.
        let is_spare = from == State::SynRecv && event.rtt_us == 0;
        if to == State::Close && living.nameless.is_none() && !is_spare {
            tell(&living.id, Said::Path { rtt_us: event.rtt_us, retransmits: event.retransmits });
        }
        if living.mini.is_some() {
            // What goes on in its place was told of already.
            return;
        }
        if living.nameless.is_some() {
            // No local port was found: no SYN went out, and nothing was ever told.
            self.living.remove(&event.cookie);
            return;
        }
        match meaning::of(event, from, to, timers) {
            Meaning::Is(state, cause) => {
                living.observe(event.at, state, cause, tell);
                if state == State::Close {
                    self.bury(event.cookie, tell);
                }
            }
            Meaning::Reset => {
                living.ending = Some(Ending { at: event.at, cause: Some(Cause::Reset) });
                self.undecided.push(event.cookie);
            }
        }
    }

    fn sends_syn(&mut self, event: &Event, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let Some((role, port)) = (self.which)(&event.flow, Some(Role::Client)) else { return };
        let id = Identity { cookie: event.cookie, role, port, flow: event.flow };
        let mut living = Living::new(id, Lifecycle::client(event.at));
        if event.flow.local.port() == 0 {
            living.nameless = Some(event.at);
            self.nameless.push(event.cookie);
        } else {
            living.introduce(event.at, tell);
        }
        self.living.insert(event.cookie, living);
    }

    /// The third segment is in: a socket is made of the request.
    fn completes(&mut self, event: &Event, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let which = (self.which)(&event.flow, Some(Role::Server));
        let Some((role, port)) = which.filter(|_| !self.living.contains_key(&event.cookie)) else {
            return self.handshakes.forget(&event.flow);
        };
        let request = self.handshakes.complete(&event.flow, event.at);
        let id = Identity { cookie: event.cookie, role, port, flow: event.flow };
        self.begins_by_request(id, request.as_ref(), event.at, tell);
    }

    /// Whose event it is. Who is not known was there before, in `state`.
    fn of(&mut self, event: &Event, state: State, tell: &mut impl FnMut(&Identity, Said<'_>)) -> Option<&mut Living> {
        if event.cookie == 0 {
            return None;
        }
        let (living, known) = match self.living.entry(event.cookie) {
            Entry::Occupied(known) => (known.into_mut(), true),
            // Its end, and we have told of it already.
            Entry::Vacant(_) if matches!(event.kind, Kind::Disarmed { .. }) => return None,
            Entry::Vacant(place) => {
                let (role, port) = (self.which)(&event.flow, None)?;
                let id = Identity { cookie: event.cookie, role, port, flow: event.flow };
                tell(&id, Said::Begins(state, event.at));
                (place.insert(Living::new(id, Lifecycle::found(role, state, None, event.at))), false)
            }
        };
        if let Some(since) = living.nameless
            && event.flow.local.port() != 0
        {
            living.name(event.flow, since, tell);
        }
        // What went unheard on the way: the kernel says where it came from, but not since when it was there.
        if known
            && living.nameless.is_none()
            && living.mini.is_none()
            && living.life.state() != state.shown()
            && matches!(event.kind, Kind::Changed { .. })
        {
            self.gaps += 1;
            living.see(event.at, state, Evidence::Inferred, &Known::default(), tell);
        }
        Some(living)
    }

    /// How many events are missing by what others say, since this was asked last.
    fn take_gaps(&mut self) -> u64 {
        std::mem::take(&mut self.gaps)
    }

    /// Decides what waited for a second event that has not come.
    pub(crate) fn settle(&mut self, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let due = |at: Duration| now.saturating_sub(at) >= SETTLED;
        for cookie in std::mem::take(&mut self.undecided) {
            let Some(living) = self.living.get_mut(&cookie) else { continue };
            match living.ending {
                Some(ending) if due(ending.at) => {
                    living.observe(ending.at, State::Close, ending.cause, tell);
                    self.bury(cookie, tell);
                }
                Some(_) => self.undecided.push(cookie),
                None => {}
            }
        }
        for GivenUp { cookie, at, expired } in self.handshakes.settle(now) {
            if let Some(cookie) = cookie
                && let Some(living) = self.living.get_mut(&cookie)
                && living.life.state() == State::SynRecv
            {
                living.observe(at, State::Close, expired.then_some(Cause::Timeout), tell);
                self.bury(cookie, tell);
            }
        }
    }

    /// When to look again, although nothing happens: something waits to be decided, or to be named.
    pub(crate) fn next(&self, now: Duration) -> Option<Duration> {
        let decided = (!self.undecided.is_empty()).then_some(SETTLED);
        let named = (!self.nameless.is_empty()).then_some(NAMELESS);
        decided.into_iter().chain(named).chain(self.handshakes.next(now)).min()
    }

    /// Whether the kernel's table must be asked for names: of connections without a local port, and of long handshakes.
    pub(crate) fn wants_names(&mut self, now: Duration) -> bool {
        let old = |at: Duration, limit| now.saturating_sub(at) >= limit;
        let living = &mut self.living;
        self.nameless.retain(|cookie| match living.get(cookie).map(|l| l.nameless) {
            // The table does not show it either: its end was lost.
            Some(Some(since)) if old(since, GIVEN_UP) => living.remove(cookie).is_none(),
            Some(since) => since.is_some(),
            None => false,
        });
        self.nameless.iter().filter_map(|c| living.get(c)?.nameless).any(|at| old(at, NAMELESS))
            || self.handshakes.are_long(now)
    }

    /// What the table says of a connection in SYN_SENT or SYN_RECV.
    pub(crate) fn named(&mut self, row: &Row, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let Some(cookie) = row.cookie else { return };
        if let Some(living) = self.living.get_mut(&cookie) {
            self.handshakes.belongs_to(&row.flow, cookie);
            if let Some(since) = living.nameless
                && row.flow.local.port() != 0
            {
                living.name(row.flow, since, tell);
            }
            return;
        }
        let Some((role, port)) = (self.which)(&row.flow, Some(Role::Server)) else { return };
        let Some(request) = self.handshakes.name(&row.flow, cookie, now) else { return };
        let id = Identity { cookie, role, port, flow: row.flow };
        self.begins_by_request(id, Some(&request), now, tell);
    }

    /// A server's life begins with its SYN; without a request that was heard of, nobody knows when: before `at`.
    fn begins_by_request(
        &mut self,
        id: Identity,
        request: Option<&Request>,
        at: Duration,
        tell: &mut impl FnMut(&Identity, Said<'_>),
    ) {
        let at = request.map_or(at, |request| request.at);
        let mut living = Living::new(id, Lifecycle::accepted(at));
        tell(&living.id, Said::Begins(State::Listen, at));
        match request {
            Some(_) => living.observe(at, State::SynRecv, None, tell),
            None => living.see(at, State::SynRecv, Evidence::Inferred, &Known::default(), tell),
        }
        living.retransmits = request.map_or(0, |request| request.retransmits);
        self.living.insert(id.cookie, living);
    }

    /// Takes in a socket that the table shows and that no event has told of: it was there before us, or its events were
    /// lost.
    pub(crate) fn found(&mut self, row: &Row, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let (Some(cookie), state) = (row.cookie, row.state.shown()) else { return };
        if matches!(state, State::Listen | State::Close) {
            return;
        }
        if let Some(living) = self.living.get_mut(&cookie) {
            if row.is_minisocket() {
                if state == State::FinWait2 && living.mini != Some(state) {
                    self.orphans.push_back(cookie);
                }
                living.mini = Some(state);
            }
            living.ending = None;
            return living.see(now, state, Evidence::SockDiag, &Known::default(), tell);
        }
        let Some((role, port)) = (self.which)(&row.flow, None) else { return };
        // TIME_WAIT's clock tells when it began; nothing else does.
        let since = (state == State::TimeWait).then(|| now.saturating_sub(TIME_WAIT.saturating_sub(row.expires)));
        let id = Identity { cookie, role, port, flow: row.flow };
        let mut living = Living::new(id, Lifecycle::found(role, state, since, now));
        living.mini = row.is_minisocket().then_some(state);
        if living.mini == Some(State::FinWait2) {
            self.orphans.push_back(cookie);
        }
        if state == State::SynRecv {
            self.handshakes.found(&row.flow, cookie, now);
        }
        tell(&living.id, Said::Begins(state, since.unwrap_or(now)));
        self.living.insert(cookie, living);
    }

    /// Whether there are minisockets in FIN_WAIT2.
    pub(crate) fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    /// Keeps of the minisockets in FIN_WAIT2 those that still are: for whoever does not look them up.
    pub(crate) fn forget_orphans(&mut self) {
        let living = &self.living;
        self.orphans.retain(|cookie| living.get(cookie).is_some_and(|living| living.is_orphan()));
    }

    /// The next `most` minisockets in FIN_WAIT2 that are to be looked up; whoever still is one then is to be kept.
    pub(crate) fn orphans(&mut self, most: usize) -> Vec<Identity> {
        let due = self.orphans.drain(..most.min(self.orphans.len()));
        let living = &self.living;
        let still = due.filter_map(|cookie| living.get(&cookie).filter(|l| l.is_orphan()));
        still.map(|living| living.id).collect()
    }

    pub(crate) fn keep_orphan(&mut self, cookie: u64) {
        self.orphans.push_back(cookie);
    }

    /// Takes note that the kernel has this one no more.
    pub(crate) fn vanished(&mut self, cookie: u64, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        if let Some(living) = self.living.get_mut(&cookie) {
            let expired =
                living.life.state() == State::TimeWait && now.saturating_sub(living.life.since()) >= TIME_WAIT;
            let known = Known { cause: expired.then_some(Cause::Expired), ..Known::default() };
            let handshake = (living.life.state() == State::SynRecv).then_some(living.id.flow);
            living.see(now, State::Close, Evidence::SockDiag, &known, tell);
            self.bury(cookie, tell);
            if let Some(flow) = handshake {
                self.handshakes.forget(&flow);
            }
        }
    }

    /// Holds everybody against a reading of the table for which was `asked` after the kernel began to tell, or after it had no
    /// room to; `events` are all that it has told until after the reading. Those from before it, after a loss a whole ring of
    /// them, are older than what it shows, the others newer. Who is not in it is looked up by `find`: absence is only believed
    /// of a lookup.
    ///
    /// # Errors
    /// What `find` says.
    pub(crate) fn reconcile<E>(
        &mut self,
        asked: Duration,
        rows: &[Row],
        events: &[Event],
        now: Duration,
        mut find: impl FnMut(&Identity) -> Result<Option<Row>, E>,
        tell: &mut impl FnMut(&Identity, Said<'_>),
    ) -> Result<(), E> {
        let (newer, older): (Vec<&Event>, Vec<&Event>) = events.iter().partition(|event| event.at >= asked);
        for event in older {
            self.hear(event, tell);
        }
        let known: Vec<Identity> = self.each().map(|(id, _)| *id).collect();
        for event in &newer {
            self.hear(event, tell);
        }
        // What only adds to a state does not tell where anybody is.
        let moves =
            |event: &&&Event| matches!(event.kind, Kind::Changed { .. } | Kind::Armed(_) | Kind::Disarmed { .. });
        let newer: Cookies = newer.iter().filter(moves).map(|event| event.cookie).collect();
        let mut open: Vec<&Row> = rows.iter().filter(|row| row.state != State::Close && row.cookie.is_some()).collect();
        // The oldest TIME_WAIT first: so that they are entered in their order.
        open.sort_by_key(|row| row.expires);
        let shown: Cookies = open.iter().filter_map(|row| row.cookie).collect();
        for row in open.iter().filter(|row| row.cookie.is_some_and(|cookie| !newer.contains(&cookie))) {
            self.found(row, now, tell);
        }
        for id in known.iter().filter(|id| !shown.contains(&id.cookie) && !newer.contains(&id.cookie)) {
            // Its end was announced, and is told as soon as it is decided.
            if self.living.get(&id.cookie).is_some_and(|living| living.ending.is_some()) {
                continue;
            }
            match find(id)? {
                Some(row) => self.found(&row, now, tell),
                None => self.vanished(id.cookie, now, tell),
            }
        }
        // Whatever was missing is made good.
        self.gaps = 0;
        Ok(())
    }

    /// The descriptor is closed. Returns whether it is of somebody who was told of and is alive; who has no name yet was not.
    pub(crate) fn departs(&mut self, cookie: u64) -> bool {
        let Some(living) = self.living.get_mut(&cookie).filter(|living| living.nameless.is_none()) else {
            return false;
        };
        living.departed = true;
        true
    }

    /// Where somebody is, and since when.
    pub(crate) fn state(&self, cookie: u64) -> Option<(State, Duration)> {
        let living = self.living.get(&cookie)?;
        Some((living.life.state(), living.life.since()))
    }

    /// The name and state of everybody who has a name.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&Identity, State)> {
        self.living.values().filter(|l| l.nameless.is_none()).map(|living| (&living.id, living.life.state()))
    }

    /// Forgets handshakes of which nobody would tell any more: events were lost.
    fn forget_requests(&mut self) {
        let living = &self.living;
        self.handshakes.forget_without(|cookie| living.contains_key(&cookie));
    }

    fn bury(&mut self, cookie: u64, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        if let Some(living) = self.living.remove(&cookie) {
            tell(&living.id, Said::Ends { departed: living.departed });
        }
    }
}

impl Living {
    fn new(id: Identity, life: Lifecycle) -> Box<Living> {
        Box::new(Living { id, life, mini: None, ending: None, retransmits: 0, nameless: None, departed: false })
    }

    /// Whether it is told of, and nothing yet to be decided.
    fn is_settled(&self) -> bool {
        self.nameless.is_none() && self.ending.is_none()
    }

    fn is_orphan(&self) -> bool {
        self.mini == Some(State::FinWait2)
    }

    /// A client's first step is told when its name is known.
    fn introduce(&mut self, since: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        tell(&self.id, Said::Begins(State::Close, since));
        self.observe(since, State::SynSent, None, tell);
    }

    fn name(&mut self, flow: Flow, since: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        self.id.flow = flow;
        self.nameless = None;
        self.introduce(since, tell);
    }

    fn observe(
        &mut self,
        at: Duration,
        state: State,
        cause: Option<Cause>,
        tell: &mut impl FnMut(&Identity, Said<'_>),
    ) {
        // Every change is announced: there was nothing between.
        let known = Known { never: StateSet::of(&State::ALL), cause, ..Known::default() };
        self.see(at, state, Evidence::Tracepoint, &known, tell);
    }

    fn see(
        &mut self,
        at: Duration,
        state: State,
        evidence: Evidence,
        known: &Known,
        tell: &mut impl FnMut(&Identity, Said<'_>),
    ) {
        if self.nameless.is_some() {
            return;
        }
        let known = Known { retransmits: self.retransmits, ..*known };
        let transitions = self.life.observe_knowing(at, state, evidence, &known);
        if !transitions.is_empty() {
            self.retransmits = 0;
            tell(&self.id, Said::Moves(&transitions));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{
        Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait,
    };

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// What was told, a line for each thing.
    #[derive(Default)]
    struct Heard(Vec<String>);

    impl Heard {
        fn tell(&mut self, id: &Identity, said: Said<'_>) {
            let name = format!("{}{}", if id.role == Role::Client { 'c' } else { 's' }, id.cookie);
            match said {
                Said::Begins(state, at) => self.0.push(format!("{name} begins {state} {}", at.as_millis())),
                Said::Moves(transitions) => self.0.extend(transitions.iter().map(|t| {
                    let cause = t.cause.map_or(String::new(), |cause| format!(" {}", cause.label()));
                    let stay = t.after.map_or(String::new(), |after| format!(" after {}", after.as_millis()));
                    let evidence = if t.evidence == Evidence::Tracepoint { "" } else { t.evidence.label() };
                    format!("{name} {} → {}{cause}{stay} {evidence}", t.from, t.to).trim_end().to_owned()
                })),
                Said::Path { rtt_us: 0, retransmits: 0 } => {}
                Said::Path { rtt_us, retransmits } => {
                    self.0.push(format!("{name}'s way: {rtt_us} µs, {retransmits} again"));
                }
                Said::Ends { departed } => self.0.push(format!("{name} ends, departed {departed}")),
            }
        }

        fn take(&mut self) -> Vec<String> {
            std::mem::take(&mut self.0)
        }
    }

    fn lives(timers: bool) -> Lives {
        let which = |flow: &Flow, _| {
            let server = flow.local.port() == 7007;
            Some(if server { (Role::Server, 7007) } else { (Role::Client, flow.peer.port()) })
        };
        Lives::new(Box::new(which), timers)
    }

    fn flow(server: bool, port: u16) -> Flow {
        let (ours, theirs) = (format!("127.0.0.1:{port}").parse().unwrap(), "127.0.0.1:7007".parse().unwrap());
        if server { Flow { local: theirs, peer: ours } } else { Flow { local: ours, peer: theirs } }
    }

    fn event(cookie: u64, at: u64, flow: Flow, kind: Kind) -> Event {
        Event::plain(cookie, ms(at), flow, kind)
    }

    fn changed(cookie: u64, at: u64, from: State, to: State) -> Event {
        event(cookie, at, flow(cookie >= 100, 40_000), Kind::Changed { from, to })
    }

    fn row(cookie: u64, state: State, expires: u64) -> Row {
        Row { expires: ms(expires), ..Row::plain(state, flow(cookie >= 100, 40_000), Some(cookie)) }
    }

    fn hear(lives: &mut Lives, events: &[Event]) -> Vec<String> {
        let mut heard = Heard::default();
        for event in events {
            lives.hear(event, &mut |id, said| heard.tell(id, said));
        }
        heard.take()
    }

    fn settle(lives: &mut Lives, now: u64) -> Vec<String> {
        let mut heard = Heard::default();
        lives.settle(ms(now), &mut |id, said| heard.tell(id, said));
        heard.take()
    }

    #[test]
    fn a_clients_first_step_is_told_when_its_port_is_known() {
        let mut lives = lives(true);
        let nameless = event(1, 10, flow(false, 0), Kind::Changed { from: Close, to: SynSent });
        assert!(hear(&mut lives, &[nameless]).is_empty());
        assert_eq!(
            hear(&mut lives, &[changed(1, 12, SynSent, Established)]),
            ["c1 begins CLOSED 10", "c1 CLOSED → SYN_SENT connect", "c1 SYN_SENT → ESTABLISHED syn_ack after 2"]
        );
        // The other way: the table tells it.
        let nameless = event(2, 20, flow(false, 0), Kind::Changed { from: Close, to: SynSent });
        hear(&mut lives, &[nameless]);
        assert!(!lives.wants_names(ms(21)) && lives.wants_names(ms(30)));
        let mut heard = Heard::default();
        lives.named(&row(2, SynSent, 0), ms(30), &mut |id, said| heard.tell(id, said));
        assert_eq!(heard.take(), ["c2 begins CLOSED 20", "c2 CLOSED → SYN_SENT connect"]);
        assert!(!lives.wants_names(ms(40)));
    }

    #[test]
    fn what_the_way_was_like_is_told_at_the_end_of_the_full_socket() {
        let mut lives = lives(true);
        hear(&mut lives, &[event(1, 1, flow(false, 40_000), Kind::Armed(TimeWait))]);
        let end = |cookie, from| Event { rtt_us: 250, retransmits: 3, ..changed(cookie, 2, from, Close) };
        assert_eq!(hear(&mut lives, &[end(1, FinWait2)]), ["c1's way: 250 µs, 3 again"], "it goes on in TIME_WAIT");
        assert_eq!(
            hear(&mut lives, &[end(101, LastAck)]),
            [
                "s101 begins LAST_ACK 2",
                "s101's way: 250 µs, 3 again",
                "s101 LAST_ACK → CLOSED ack",
                "s101 ends, departed false"
            ]
        );
    }

    #[test]
    fn who_departs_without_a_name_does_so_again_when_he_has_one() {
        let mut lives = lives(true);
        let nameless = event(1, 10, flow(false, 0), Kind::Changed { from: Close, to: SynSent });
        hear(&mut lives, &[nameless]);
        assert!(!lives.departs(1), "nobody was told of him");
        hear(&mut lives, &[changed(1, 12, SynSent, Established)]);
        assert!(lives.departs(1));
        let end = Event { rtt_us: 0, ..changed(1, 13, Established, Close) };
        assert_eq!(hear(&mut lives, &[end]), ["c1 ESTABLISHED → CLOSED abort after 1", "c1 ends, departed true"]);
    }

    #[test]
    fn without_a_port_nothing_was_sent_and_nothing_is_told() {
        let mut lives = lives(true);
        let without = |from, to| event(1, 10, flow(false, 0), Kind::Changed { from, to });
        assert!(hear(&mut lives, &[without(Close, SynSent), without(SynSent, Close)]).is_empty());
        assert_eq!(lives.each().count(), 0);
        // Its end was lost: it is not asked for for ever.
        hear(&mut lives, &[without(Close, SynSent)]);
        assert!(!lives.wants_names(ms(5000)) && lives.living.is_empty());
    }

    #[test]
    fn an_end_that_was_announced_is_not_told_by_the_table() {
        let mut lives = lives(true);
        hear(&mut lives, &[event(1, 1, flow(false, 40_000), Kind::Armed(TimeWait))]);
        let mut heard = Heard::default();
        let stopped = event(1, 61_000, flow(false, 40_000), Kind::Disarmed { state: TimeWait, expired: true });
        let gone = |_: &Identity| Ok::<_, ()>(None);
        lives.reconcile(ms(61_001), &[], &[stopped], ms(61_001), gone, &mut |id, said| heard.tell(id, said)).unwrap();
        assert!(heard.take().is_empty());
        assert_eq!(settle(&mut lives, 61_010), ["c1 TIME_WAIT → CLOSED expired", "c1 ends, departed false"]);
    }

    #[test]
    fn what_a_later_event_says_is_missing_is_counted_and_has_no_time() {
        let mut lives = lives(true);
        hear(&mut lives, &[changed(1, 1, Close, SynSent), changed(1, 2, SynSent, Established)]);
        assert_eq!(lives.take_gaps(), 0);
        let mut steps = Vec::new();
        lives.hear(&changed(1, 900, CloseWait, LastAck), &mut |_, said| {
            if let Said::Moves(transitions) = said {
                steps.extend(transitions.iter().map(|t| (t.to, t.evidence, t.after)));
            }
        });
        assert_eq!(steps, [(CloseWait, Evidence::Inferred, None), (LastAck, Evidence::Tracepoint, None)]);
        assert_eq!((lives.take_gaps(), lives.take_gaps()), (1, 0));
    }

    #[test]
    fn time_wait_without_the_state_before_it_is_a_gap() {
        for (before, gaps) in [(vec![], 1), (vec![FinWait2], 0), (vec![Closing], 0)] {
            let mut lives = lives(true);
            let mut states = vec![Close, SynSent, Established, FinWait1];
            states.extend(before);
            for pair in states.windows(2) {
                hear(&mut lives, &[changed(1, 1, pair[0], pair[1])]);
            }
            let armed = |at| event(1, at, flow(false, 40_000), Kind::Armed(TimeWait));
            // Also when its clock starts anew.
            hear(&mut lives, &[armed(5), changed(1, 5, *states.last().unwrap(), Close), armed(9)]);
            assert_eq!(lives.take_gaps(), gaps, "{states:?}");
        }
    }

    #[test]
    fn a_request_that_went_unheard_shows_when_its_clock_is_stopped() {
        let mut lives = lives(true);
        let stopped = |at| event(0, at, flow(true, 40_000), Kind::Unrequested { expired: false });
        // With a SYN cookie there is no request, and no clock.
        hear(&mut lives, &[changed(100, 1, Listen, SynRecv), changed(100, 1, SynRecv, Established)]);
        settle(&mut lives, 10);
        hear(&mut lives, &[stopped(11)]);
        assert_eq!(lives.take_gaps(), 0);
        let mut steps = Vec::new();
        for event in [changed(101, 20, Listen, SynRecv), stopped(20), changed(101, 20, SynRecv, Established)] {
            lives.hear(&event, &mut |_, said| {
                if let Said::Moves(transitions) = said {
                    steps.extend(transitions.iter().map(|t| (t.to, t.evidence, t.after)));
                }
            });
        }
        assert_eq!(lives.take_gaps(), 1);
        let unknown = [(SynRecv, Evidence::Inferred, None), (Established, Evidence::Tracepoint, None)];
        assert_eq!(steps, unknown, "since when it was there, nobody knows");
    }

    #[test]
    fn of_two_sockets_of_one_request_both_were_told_of() {
        let mut lives = lives(true);
        let request = |kind| event(0, 29, flow(true, 40_000), kind);
        let mut steps = Vec::new();
        for event in [
            request(Kind::Requested),
            request(Kind::SynAckRetransmitted),
            changed(102, 30, Listen, SynRecv),
            changed(103, 30, Listen, SynRecv),
            event(0, 30, flow(true, 40_000), Kind::Unrequested { expired: false }),
            changed(102, 31, SynRecv, Established),
            changed(103, 31, SynRecv, Close),
        ] {
            lives.hear(&event, &mut |id, said| {
                if let Said::Moves(transitions) = said {
                    steps.extend(transitions.iter().map(|t| (id.cookie, t.to, t.evidence, t.after, t.retransmits)));
                }
            });
        }
        let told = |cookie, to, after, retransmits| (cookie, to, Evidence::Tracepoint, after, retransmits);
        let expected = [
            told(102, SynRecv, None, 0),
            told(103, SynRecv, None, 0),
            told(102, Established, Some(ms(2)), 1),
            // The one that is thrown away; what was sent again is told once.
            told(103, Close, Some(ms(2)), 0),
        ];
        assert_eq!((steps, lives.take_gaps()), (expected.to_vec(), 0));
    }

    #[test]
    fn what_was_sent_again_is_told_with_the_step_after_it() {
        let mut lives = lives(true);
        let mut steps = Vec::new();
        let again = |cookie, kind| event(cookie, 5, flow(cookie >= 100, 40_000), kind);
        for event in [
            changed(1, 1, Close, SynSent),
            again(1, Kind::Retransmitted(SynSent)),
            again(1, Kind::Retransmitted(SynSent)),
            again(100, Kind::Requested),
            event(0, 5, flow(true, 40_000), Kind::SynAckRetransmitted),
            changed(100, 6, Listen, SynRecv),
            changed(100, 6, SynRecv, Established),
            changed(1, 7, SynSent, Established),
            changed(1, 8, Established, FinWait1),
        ] {
            lives.hear(&event, &mut |id, said| {
                if let Said::Moves(transitions) = said {
                    steps.extend(transitions.iter().map(|t| (id.cookie, t.from, t.retransmits)));
                }
            });
        }
        let expected = [(1, Close, 0), (100, Listen, 0), (100, SynRecv, 1), (1, SynSent, 2), (1, Established, 0)];
        assert_eq!(steps, expected);
    }

    #[test]
    fn time_wait_is_told_by_its_timer_and_ends_by_it() {
        let mut lives = lives(true);
        hear(&mut lives, &[changed(1, 1, Close, SynSent), changed(1, 2, SynSent, Established)]);
        hear(&mut lives, &[changed(1, 3, Established, FinWait1), changed(1, 4, FinWait1, FinWait2)]);
        let stopped = |expired| Kind::Disarmed { state: TimeWait, expired };
        let timer = |at, kind| event(1, at, flow(false, 40_000), kind);
        assert_eq!(
            hear(&mut lives, &[timer(6, Kind::Armed(TimeWait)), changed(1, 6, FinWait2, Close)]),
            ["c1 FIN_WAIT2 → TIME_WAIT peer_fin after 2"]
        );
        assert!(lives.departs(1));
        // A repeated FIN: its clock starts anew.
        assert!(hear(&mut lives, &[timer(50, stopped(false)), timer(50, Kind::Armed(TimeWait))]).is_empty());
        assert!(settle(&mut lives, 60).is_empty());
        assert_eq!(
            {
                // Also when it has run down, and its handler has not had its turn.
                assert!(hear(&mut lives, &[timer(70, stopped(true)), timer(71, Kind::Armed(TimeWait))]).is_empty());
                assert!(settle(&mut lives, 80).is_empty());
                hear(&mut lives, &[timer(60_006, stopped(true))]);
                settle(&mut lives, 60_010)
            },
            ["c1 TIME_WAIT → CLOSED expired after 60000", "c1 ends, departed true"]
        );
    }

    #[test]
    fn a_time_wait_that_is_stopped_and_not_started_anew_is_gone() {
        let mut lives = lives(true);
        let mut heard = Heard::default();
        lives.found(&row(1, TimeWait, 20_000), ms(100_000), &mut |id, said| heard.tell(id, said));
        assert_eq!(heard.take(), ["c1 begins TIME_WAIT 60000"]);
        hear(&mut lives, &[event(1, 100_010, flow(false, 40_000), Kind::Disarmed { state: TimeWait, expired: false })]);
        assert!(settle(&mut lives, 100_011).is_empty(), "the next event may start it anew");
        assert_eq!(settle(&mut lives, 100_012), ["c1 TIME_WAIT → CLOSED after 40010", "c1 ends, departed false"]);
    }

    #[test]
    fn a_servers_syn_recv_lasts_from_its_request_on() {
        let mut lives = lives(true);
        let request = |at, kind| event(0, at, flow(true, 40_000), kind);
        let told = hear(
            &mut lives,
            &[
                request(10, Kind::Requested),
                changed(100, 30, Listen, SynRecv),
                request(30, Kind::Unrequested { expired: false }),
                changed(100, 31, SynRecv, Established),
                changed(100, 40, Established, CloseWait),
                changed(100, 50, CloseWait, LastAck),
                changed(100, 51, LastAck, Close),
            ],
        );
        assert_eq!(
            told,
            [
                "s100 begins LISTEN 10",
                "s100 LISTEN → SYN_RECV syn",
                "s100 SYN_RECV → ESTABLISHED ack after 21",
                "s100 ESTABLISHED → CLOSE_WAIT peer_fin after 9",
                "s100 CLOSE_WAIT → LAST_ACK shutdown after 10",
                "s100 LAST_ACK → CLOSED ack after 1",
                "s100 ends, departed false",
            ]
        );
        assert!(settle(&mut lives, 100).is_empty() && lives.handshakes.len() == 0);
    }

    #[test]
    fn a_handshake_that_takes_long_has_a_life_and_an_end() {
        let mut lives = lives(true);
        let request = |at, kind| event(0, at, flow(true, 40_000), kind);
        hear(&mut lives, &[request(10, Kind::Requested)]);
        assert!(!lives.wants_names(ms(100)) && lives.wants_names(ms(300)));
        let mut heard = Heard::default();
        lives.named(&row(100, SynRecv, 0), ms(300), &mut |id, said| heard.tell(id, said));
        assert_eq!(heard.take(), ["s100 begins LISTEN 10", "s100 LISTEN → SYN_RECV syn"]);
        // The SYN+ACK is repeated: the clock has run down and starts anew.
        hear(&mut lives, &[request(1000, Kind::Unrequested { expired: true }), request(1000, Kind::Requested)]);
        assert!(settle(&mut lives, 2000).is_empty());
        hear(&mut lives, &[request(60_000, Kind::Unrequested { expired: true })]);
        assert_eq!(
            settle(&mut lives, 60_100),
            ["s100 SYN_RECV → CLOSED timeout after 59990", "s100 ends, departed false"]
        );
    }

    #[test]
    fn a_reset_that_we_sent_ourselves_is_ours() {
        for (reason, cause) in [(None, "reset"), (Some(ABORT_ON_DATA), "abort"), (Some(11), "reset")] {
            let mut lives = lives(true);
            hear(&mut lives, &[changed(1, 1, Close, SynSent), changed(1, 2, SynSent, Established)]);
            hear(&mut lives, &[changed(1, 3, Established, FinWait1)]);
            let end = Event { error: 104, reset: true, orphan: true, ..changed(1, 5, FinWait1, Close) };
            assert!(hear(&mut lives, &[end]).is_empty(), "the next event may say more");
            if let Some(reason) = reason {
                hear(&mut lives, &[event(1, 5, flow(false, 40_000), Kind::ResetSent(reason))]);
            }
            assert_eq!(
                settle(&mut lives, 8),
                [format!("c1 FIN_WAIT1 → CLOSED {cause} after 2"), "c1 ends, departed false".to_owned()]
            );
        }
    }

    #[test]
    fn an_older_kernel_tells_of_a_child_when_it_leaves_syn_recv() {
        let mut lives = lives(true);
        hear(&mut lives, &[event(0, 10, flow(true, 40_000), Kind::Requested)]);
        assert_eq!(
            hear(&mut lives, &[changed(100, 31, SynRecv, Established)]),
            ["s100 begins LISTEN 10", "s100 LISTEN → SYN_RECV syn", "s100 SYN_RECV → ESTABLISHED ack after 21"]
        );
        assert_eq!(lives.handshakes.len(), 0);
    }

    #[test]
    fn a_handshake_from_before_ends_as_its_request_does() {
        let mut lives = lives(true);
        let mut heard = Heard::default();
        lives.found(&row(100, SynRecv, 0), ms(50), &mut |id, said| heard.tell(id, said));
        let request = |at, kind| event(100, at, flow(true, 40_000), kind);
        hear(&mut lives, &[request(900, Kind::Unrequested { expired: true }), request(900, Kind::Requested)]);
        assert!(settle(&mut lives, 1000).is_empty());
        assert!(!lives.wants_names(ms(5000)), "it has one");
        hear(&mut lives, &[request(6000, Kind::Unrequested { expired: false })]);
        assert_eq!(settle(&mut lives, 6100), ["s100 SYN_RECV → CLOSED", "s100 ends, departed false"]);
    }

    #[test]
    fn who_was_there_before_is_where_his_first_event_says() {
        let mut lives = lives(true);
        let told = hear(&mut lives, &[changed(100, 10, Established, CloseWait)]);
        assert_eq!(told, ["s100 begins ESTABLISHED 10", "s100 ESTABLISHED → CLOSE_WAIT peer_fin"]);
    }

    #[test]
    fn what_was_lost_is_looked_up() {
        let mut lives = lives(true);
        let mut heard = Heard::default();
        for cookie in 1..=3 {
            hear(&mut lives, &[changed(cookie, 1, Close, SynSent), changed(cookie, 2, SynSent, Established)]);
        }
        // 1 has moved on, 2 is gone, of 3 there is later news, and 4 is new. Of 5 the ring had what came before the loss.
        let rows = [row(1, FinWait2, 0), row(3, FinWait1, 0), row(4, Established, 0)];
        let gone = |_: &Identity| Ok::<_, ()>(None);
        let events = [changed(5, 3, Close, SynSent), changed(3, 45, Established, CloseWait)];
        lives.reconcile(ms(40), &rows, &events, ms(50), gone, &mut |id, said| heard.tell(id, said)).unwrap();
        let mut told = heard.take();
        told.sort();
        assert_eq!(
            told,
            [
                "c1 ESTABLISHED → FIN_WAIT1 shutdown inferred",
                "c1 FIN_WAIT1 → FIN_WAIT2 ack sock_diag",
                "c2 ESTABLISHED → CLOSED sock_diag",
                "c2 ends, departed false",
                "c3 ESTABLISHED → CLOSE_WAIT peer_fin after 43",
                "c4 begins ESTABLISHED 50",
                "c5 CLOSED → SYN_SENT connect",
                "c5 SYN_SENT → CLOSED sock_diag",
                "c5 begins CLOSED 3",
                "c5 ends, departed false",
            ]
        );
    }

    #[test]
    fn without_timers_the_sockets_own_marks_say_time_wait() {
        let mut lives = lives(false);
        hear(&mut lives, &[changed(1, 1, Close, SynSent), changed(1, 2, SynSent, Established)]);
        hear(&mut lives, &[changed(1, 3, Established, FinWait1), changed(1, 4, FinWait1, FinWait2)]);
        let end = Event { done: true, ..changed(1, 5, FinWait2, Close) };
        assert_eq!(hear(&mut lives, &[end]), ["c1 FIN_WAIT2 → TIME_WAIT peer_fin after 1"]);
        assert_eq!(lives.state(1).map(|(state, _)| state), Some(TimeWait));
    }
}
