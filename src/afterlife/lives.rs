//! Whole lives, driven by what the kernel announces: each event is one step of somebody's.
//!
//! Pure: events and time come in as arguments, what they prove goes out through `tell`. Must not know: where events come
//! from, or what becomes of what is told.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::meaning::{self, ABORT_ON_DATA, Meaning};
use crate::kernel::tracepoints::{Event, Kind};
use crate::kernel::{Row, TIME_WAIT};
use crate::tcp::{Cause, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet, Transitions};

/// How long an event may take from one CPU to us after a later one from another: what a second event would change is
/// decided after that.
pub(super) const SETTLED: Duration = Duration::from_millis(2);

/// How long a connection may go without the local port that connect(2) finds after SYN_SENT is entered.
pub(super) const NAMELESS: Duration = Duration::from_millis(5);

/// How long it may go without one before it is given up.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// From when on a handshake that is not complete has a life of its own. Most are complete sooner, and their life is the
/// connection's.
pub(super) const LONG: Duration = Duration::from_millis(200);

/// What there is to tell of one life.
#[derive(Clone, Copy, Debug)]
pub(super) enum Said<'a> {
    /// It begins for us, in this state.
    Begins(State, Duration),
    /// It moves.
    Moves(&'a Transitions),
    /// It is over; whether its descriptor was closed before is known then.
    Ends {
        /// The descriptor is closed.
        departed: bool,
    },
}

/// Which role and port a connection is of, if it is any of ours.
pub(super) type Which = Box<dyn Fn(&Flow) -> Option<(Role, u16)> + Send>;

/// Everybody who is alive.
pub(super) struct Lives {
    which: Which,
    timers: bool,
    living: HashMap<u64, Living>,
    requests: HashMap<Flow, Request>,
    /// Who waits for a second event, or for a name.
    undecided: Vec<u64>,
    nameless: Vec<u64>,
    stopped: Vec<Flow>,
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

/// A handshake that is not complete.
struct Request {
    at: Duration,
    /// Its life's name, once it has one.
    cookie: Option<u64>,
    stopped: Option<(Duration, bool)>,
}

impl Lives {
    /// Nobody. With `timers`, minisockets and requests are told of by events.
    pub(super) fn new(which: Which, timers: bool) -> Lives {
        Lives {
            which,
            timers,
            living: HashMap::new(),
            requests: HashMap::new(),
            undecided: Vec::new(),
            nameless: Vec::new(),
            stopped: Vec::new(),
            orphans: VecDeque::new(),
        }
    }

    /// Takes note of an event.
    pub(super) fn hear(&mut self, event: &Event, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        match event.kind {
            Kind::Changed { from, to } => self.changed(event, from, to, tell),
            Kind::Armed(state) => {
                let Some(living) = self.of(event, state, tell) else { return };
                living.ending = None;
                let is_orphan = state == State::FinWait2 && living.mini != Some(state);
                living.mini = Some(state);
                living.observe(event.at, state, None, tell);
                if is_orphan {
                    self.orphans.push_back(event.cookie);
                }
            }
            Kind::Disarmed { expired } => {
                let Some(living) = self.of(event, State::TimeWait, tell) else { return };
                let cause = expired.then_some(Cause::Expired);
                if expired {
                    living.observe(event.at, State::Close, cause, tell);
                    return self.bury(event.cookie, tell);
                }
                // Stopped to be started anew, or for good.
                living.ending = Some(Ending { at: event.at, cause });
                self.undecided.push(event.cookie);
            }
            Kind::Requested => {
                let request = Request { at: event.at, cookie: None, stopped: None };
                self.requests.entry(key(&event.flow)).or_insert(request).stopped = None;
            }
            Kind::Unrequested { expired } => {
                if let Some(request) = self.requests.get_mut(&key(&event.flow)) {
                    request.stopped = Some((event.at, expired));
                    self.stopped.push(key(&event.flow));
                }
            }
            Kind::ResetSent(reason) => {
                if let Some(living) = self.living.get_mut(&event.cookie)
                    && let Some(ending) = &mut living.ending
                    && reason == ABORT_ON_DATA
                {
                    ending.cause = Some(Cause::Abort);
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
        let timers = self.timers;
        let Some(living) = self.of(event, from, tell) else { return };
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
        let Some((role, port)) = (self.which)(&event.flow) else { return };
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
        let request = self.requests.remove(&key(&event.flow));
        if self.living.contains_key(&event.cookie) {
            return;
        }
        let Some((role, port)) = (self.which)(&event.flow) else { return };
        let id = Identity { cookie: event.cookie, role, port, flow: event.flow };
        let at = request.map_or(event.at, |request| request.at);
        let mut living = Living::new(id, Lifecycle::accepted(at));
        tell(&living.id, Said::Begins(State::Listen, at));
        living.observe(at, State::SynRecv, None, tell);
        self.living.insert(event.cookie, living);
    }

    /// Whose event it is. Who is not known was there before, in `state`.
    fn of(&mut self, event: &Event, state: State, tell: &mut impl FnMut(&Identity, Said<'_>)) -> Option<&mut Living> {
        if event.cookie == 0 {
            return None;
        }
        let known = self.living.contains_key(&event.cookie);
        if !known {
            // Its end, and we have told of it already.
            if matches!(event.kind, Kind::Disarmed { .. }) {
                return None;
            }
            let (role, port) = (self.which)(&event.flow)?;
            let id = Identity { cookie: event.cookie, role, port, flow: event.flow };
            tell(&id, Said::Begins(state, event.at));
            self.living.insert(event.cookie, Living::new(id, Lifecycle::found(role, state, None, event.at)));
        }
        let living = self.living.get_mut(&event.cookie)?;
        if let Some(since) = living.nameless
            && event.flow.local.port() != 0
        {
            living.name(event.flow, since, tell);
        }
        // What was lost on the way: the kernel says where it came from.
        if known && living.mini.is_none() && matches!(event.kind, Kind::Changed { .. }) {
            living.see(event.at, state, Evidence::Tracepoint, &Known::default(), tell);
        }
        Some(living)
    }

    /// Decides what waited for a second event that has not come.
    pub(super) fn settle(&mut self, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
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
        for flow in std::mem::take(&mut self.stopped) {
            let Some(request) = self.requests.get(&flow) else { continue };
            match request.stopped {
                Some((at, expired)) if due(at) => {
                    let cookie = request.cookie;
                    self.requests.remove(&flow);
                    if let Some(cookie) = cookie
                        && let Some(living) = self.living.get_mut(&cookie)
                        && living.life.state() == State::SynRecv
                    {
                        living.observe(at, State::Close, expired.then_some(Cause::Timeout), tell);
                        self.bury(cookie, tell);
                    }
                }
                Some(_) => self.stopped.push(flow),
                None => {}
            }
        }
    }

    /// When to look again, although nothing happens: something waits to be decided, or to be named.
    pub(super) fn next(&self, now: Duration) -> Option<Duration> {
        let decided = (!self.undecided.is_empty() || !self.stopped.is_empty()).then_some(SETTLED);
        let named = (!self.nameless.is_empty()).then_some(NAMELESS);
        let long = self.requests.values().filter(|r| r.cookie.is_none()).map(|r| r.at).min();
        let long = long.map(|at| (at + LONG).saturating_sub(now).max(NAMELESS));
        decided.into_iter().chain(named).chain(long).min()
    }

    /// Whether the kernel's table must be asked for names: of connections without a local port, and of long handshakes.
    pub(super) fn wants_names(&mut self, now: Duration) -> bool {
        let old = |at: Duration, limit| now.saturating_sub(at) >= limit;
        let living = &mut self.living;
        self.nameless.retain(|cookie| match living.get(cookie).map(|l| l.nameless) {
            // The table does not show it either: its end was lost.
            Some(Some(since)) if old(since, GIVEN_UP) => living.remove(cookie).is_none(),
            Some(since) => since.is_some(),
            None => false,
        });
        self.nameless.iter().filter_map(|c| living.get(c)?.nameless).any(|at| old(at, NAMELESS))
            || self.requests.values().any(|r| r.cookie.is_none() && r.stopped.is_none() && old(r.at, LONG))
    }

    /// What the table says of a connection in SYN_SENT or SYN_RECV.
    pub(super) fn named(&mut self, row: &Row, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        let Some(cookie) = row.cookie else { return };
        if let Some(living) = self.living.get_mut(&cookie) {
            if let Some(since) = living.nameless
                && row.flow.local.port() != 0
            {
                living.name(row.flow, since, tell);
            }
            return;
        }
        let Some(request) = self.requests.get_mut(&key(&row.flow)) else { return };
        if request.cookie.is_some() || request.stopped.is_some() || now.saturating_sub(request.at) < LONG {
            return;
        }
        let Some((role, port)) = (self.which)(&row.flow) else { return };
        let at = request.at;
        request.cookie = Some(cookie);
        let id = Identity { cookie, role, port, flow: row.flow };
        let mut living = Living::new(id, Lifecycle::accepted(at));
        tell(&living.id, Said::Begins(State::Listen, at));
        living.observe(at, State::SynRecv, None, tell);
        self.living.insert(cookie, living);
    }

    /// Takes in a socket that the table shows and that no event has told of: it was there before us, or its events were
    /// lost.
    pub(super) fn found(&mut self, row: &Row, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
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
        let Some((role, port)) = (self.which)(&row.flow) else { return };
        // TIME_WAIT's clock tells when it began; nothing else does.
        let since = (state == State::TimeWait).then(|| now.saturating_sub(TIME_WAIT.saturating_sub(row.expires)));
        let id = Identity { cookie, role, port, flow: row.flow };
        let mut living = Living::new(id, Lifecycle::found(role, state, since, now));
        living.mini = row.is_minisocket().then_some(state);
        if living.mini == Some(State::FinWait2) {
            self.orphans.push_back(cookie);
        }
        tell(&living.id, Said::Begins(state, since.unwrap_or(now)));
        self.living.insert(cookie, living);
    }

    /// The next `most` minisockets in FIN_WAIT2 that are to be looked up; whoever still is one then is to be kept.
    pub(super) fn orphans(&mut self, most: usize) -> Vec<Identity> {
        let due = self.orphans.drain(..most.min(self.orphans.len()));
        let living = &self.living;
        let still = due.filter_map(|cookie| living.get(&cookie).filter(|l| l.mini == Some(State::FinWait2)));
        still.map(|living| living.id).collect()
    }

    pub(super) fn keep_orphan(&mut self, cookie: u64) {
        self.orphans.push_back(cookie);
    }

    /// Takes note that the kernel has this one no more.
    pub(super) fn vanished(&mut self, cookie: u64, now: Duration, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        if let Some(living) = self.living.get_mut(&cookie) {
            let expired =
                living.life.state() == State::TimeWait && now.saturating_sub(living.life.since()) >= TIME_WAIT;
            let known = Known { cause: expired.then_some(Cause::Expired), ..Known::default() };
            living.see(now, State::Close, Evidence::SockDiag, &known, tell);
            self.bury(cookie, tell);
        }
    }

    /// The descriptor is closed. Returns whether the connection goes on in the kernel.
    pub(super) fn departs(&mut self, cookie: u64) -> bool {
        let Some(living) = self.living.get_mut(&cookie) else { return false };
        living.departed = true;
        true
    }

    /// Where somebody is, and since when.
    pub(super) fn state(&self, cookie: u64) -> Option<(State, Duration)> {
        let living = self.living.get(&cookie)?;
        Some((living.life.state(), living.life.since()))
    }

    /// The name and state of everybody who has a name.
    pub(super) fn each(&self) -> impl Iterator<Item = (&Identity, State)> {
        self.living.values().filter(|l| l.nameless.is_none()).map(|living| (&living.id, living.life.state()))
    }

    /// Forgets handshakes of which nobody would tell any more: events were lost.
    pub(super) fn forget_requests(&mut self) {
        self.requests.clear();
        self.stopped.clear();
    }

    fn bury(&mut self, cookie: u64, tell: &mut impl FnMut(&Identity, Said<'_>)) {
        if let Some(living) = self.living.remove(&cookie) {
            tell(&living.id, Said::Ends { departed: living.departed });
        }
    }
}

impl Living {
    fn new(id: Identity, life: Lifecycle) -> Living {
        Living { id, life, mini: None, ending: None, nameless: None, departed: false }
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
        let transitions = self.life.observe_knowing(at, state, evidence, known);
        if !transitions.is_empty() {
            tell(&self.id, Said::Moves(&transitions));
        }
    }
}

/// A request of an IPv4 client to a dual-stack listener has IPv4 addresses, its socket mapped ones.
fn key(flow: &Flow) -> Flow {
    flow.canonical().unscoped()
}
