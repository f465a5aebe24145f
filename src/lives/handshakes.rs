//! Handshakes that are not complete: of a SYN that was answered, the kernel keeps a request socket, which has a clock and
//! addresses, and no name until somebody asks for it.
//!
//! Must not know: lives, but for their names.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::{NAMELESS, SETTLED};
use crate::tcp::Flow;

/// From when on a handshake that is not complete has a life of its own. Most are complete sooner, and their life is the
/// connection's.
const LONG: Duration = Duration::from_millis(200);

/// So many that were complete a moment ago are few: of more, those are forgotten that were so before that.
const FEW: usize = 64;

/// All of them.
#[derive(Default)]
pub(super) struct Handshakes {
    requests: HashMap<Flow, Request, foldhash::quality::RandomState>,
    /// Whose clock was stopped, or has run down: it may start anew.
    stopped: Vec<Flow>,
    /// Those that were complete a moment ago, and their request if it was told of: there may have been none (SYN cookies), or
    /// it went unheard.
    completed: Vec<(Flow, Duration, Option<Request>)>,
}

/// A handshake that is not complete.
#[derive(Clone, Copy)]
pub(super) struct Request {
    /// When its SYN came, or when it was found.
    pub(super) at: Duration,
    /// How many SYN+ACKs were sent again.
    pub(super) retransmits: u32,
    /// Its life's name, once it has one.
    cookie: Option<u64>,
    stopped: Option<(Duration, bool)>,
    /// Its beginning was announced: the table shows full sockets in SYN_RECV, too, which have no clock of this kind.
    heard: bool,
    /// A reading of the table did not show it.
    unseen: bool,
}

impl Request {
    fn new(at: Duration, cookie: Option<u64>, heard: bool) -> Request {
        Request { at, cookie, stopped: None, retransmits: 0, heard, unseen: false }
    }

    fn has_no_life(&self) -> bool {
        self.cookie.is_none() && self.stopped.is_none()
    }
}

/// One that is not going to be complete.
pub(super) struct GivenUp {
    /// Its life's name, if it has one.
    pub(super) cookie: Option<u64>,
    pub(super) at: Duration,
    /// Its clock had run down.
    pub(super) expired: bool,
}

impl Handshakes {
    /// Its clock starts, or starts anew. `life` has told of it already.
    pub(super) fn begins(&mut self, flow: &Flow, at: Duration, life: Option<u64>) {
        let request = Request::new(at, life, true);
        let known = self.requests.entry(key(flow)).or_insert(request);
        // A clock that starts anew was stopped before; otherwise this is another handshake, and the end of the one before it
        // went unheard.
        if known.stopped.take().is_none() && known.at != at {
            *known = request;
        }
    }

    /// Its clock has run down, or was stopped. Returns whether that proves that its beginning went unheard.
    pub(super) fn stops(&mut self, flow: &Flow, at: Duration, expired: bool) -> bool {
        let flow = key(flow);
        if let Some(request) = self.requests.get_mut(&flow) {
            request.stopped = Some((at, expired));
            self.stopped.push(flow);
            return false;
        }
        // It had a request.
        let completed = self.completed.iter().position(|(other, ..)| *other == flow);
        completed.is_some_and(|i| self.completed.swap_remove(i).2.is_none())
    }

    /// A SYN+ACK was sent again. Returns whose life has to tell of it; where there is none yet, it is kept for it.
    pub(super) fn repeats(&mut self, flow: &Flow) -> Option<u64> {
        let request = self.requests.get_mut(&key(flow))?;
        if request.cookie.is_none() {
            request.retransmits += 1;
        }
        request.cookie
    }

    /// Whether there is one between these addresses, or was a moment ago.
    pub(super) fn has(&self, flow: &Flow) -> bool {
        let flow = key(flow);
        self.requests.contains_key(&flow) || self.completed.iter().any(|(other, ..)| *other == flow)
    }

    /// The third segment is in, and a socket made. Two segments at once may make two of one request, of which one is thrown
    /// away (inet_csk_complete_hashdance): both are of the request that was told of.
    pub(super) fn complete(&mut self, flow: &Flow, at: Duration) -> Option<Request> {
        if self.completed.len() >= FEW {
            self.completed.retain(|(_, completed, _)| at.saturating_sub(*completed) < SETTLED);
        }
        let flow = key(flow);
        let request = self.requests.remove(&flow).or_else(|| {
            let sibling =
                self.completed.iter().find(|(other, then, _)| *other == flow && at.saturating_sub(*then) < SETTLED);
            // What was sent again is told once.
            sibling.and_then(|(.., request)| *request).map(|request| Request { retransmits: 0, ..request })
        });
        self.completed.push((flow, at, request));
        request
    }

    /// Nothing is left of it.
    pub(super) fn forget(&mut self, flow: &Flow) {
        self.requests.remove(&key(flow));
    }

    /// Those whose clock was stopped a while ago, and has not started anew.
    pub(super) fn settle(&mut self, now: Duration) -> Vec<GivenUp> {
        let due = |at: Duration| now.saturating_sub(at) >= SETTLED;
        self.completed.retain(|(_, at, _)| !due(*at));
        let mut given_up = Vec::new();
        let requests = &mut self.requests;
        self.stopped.retain(|flow| match requests.get(flow).map(|request| (request.stopped, request.cookie)) {
            Some((Some((at, expired)), cookie)) if due(at) => {
                requests.remove(flow);
                given_up.push(GivenUp { cookie, at, expired });
                false
            }
            Some((stopped, _)) => stopped.is_some(),
            None => false,
        });
        given_up
    }

    /// When to look again, although nothing happens: one is to be decided, or will be long.
    pub(super) fn next(&self, now: Duration) -> Option<Duration> {
        let decided = (!self.stopped.is_empty()).then_some(SETTLED);
        let began = self.requests.values().filter(|request| request.cookie.is_none()).map(|request| request.at).min();
        let long = began.map(|at| (at + LONG).saturating_sub(now).max(NAMELESS));
        decided.into_iter().chain(long).min()
    }

    /// Whether one takes so long that it is to have a life.
    pub(super) fn are_long(&self, now: Duration) -> bool {
        self.requests.values().any(|request| request.has_no_life() && is_long(request, now))
    }

    /// Gives one a life, by the name that the table has for it, if it takes that long.
    pub(super) fn name(&mut self, flow: &Flow, cookie: u64, now: Duration) -> Option<Request> {
        let request = self.requests.get_mut(&key(flow))?;
        if !request.has_no_life() || !is_long(request, now) {
            return None;
        }
        request.cookie = Some(cookie);
        Some(*request)
    }

    /// There is a socket before the handshake is complete: data in the SYN (RFC 7413).
    pub(super) fn belongs_to(&mut self, flow: &Flow, cookie: u64) {
        if let Some(request) = self.requests.get_mut(&key(flow)) {
            request.cookie = Some(cookie);
        }
    }

    /// The table shows one of which nobody has told: its life ends as it does.
    pub(super) fn found(&mut self, flow: &Flow, cookie: u64, now: Duration) {
        self.requests.entry(key(flow)).or_insert(Request::new(now, None, false)).cookie = Some(cookie);
    }

    /// Forgets those of which nobody would tell any more: events were lost. Who has a life is looked up.
    pub(super) fn forget_without(&mut self, has_life: impl Fn(u64) -> bool) {
        self.requests.retain(|_, request| request.cookie.is_some_and(&has_life));
        self.stopped.retain(|flow| self.requests.contains_key(flow));
    }

    /// Forgets those that began before `asked` and are not among those that the table shows, for the second time: a dump may
    /// leave somebody out. Returns how many there were of whose beginning was told; nobody would ever tell of their end.
    pub(super) fn forget_left_over(&mut self, asked: Duration, shown: &HashSet<Flow>) -> u64 {
        let mut unheard = 0;
        self.requests.retain(|flow, request| {
            let unseen = request.at < asked && request.stopped.is_none() && !shown.contains(flow);
            let left_over = std::mem::replace(&mut request.unseen, unseen) && unseen;
            unheard += u64::from(left_over && request.heard);
            !left_over
        });
        unheard
    }

    #[cfg(test)]
    pub(super) fn began(&self, flow: &Flow) -> Option<Duration> {
        self.requests.get(&key(flow)).map(|request| request.at)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }
}

fn is_long(request: &Request, now: Duration) -> bool {
    now.saturating_sub(request.at) >= LONG
}

/// A request of an IPv4 client to a dual-stack listener has IPv4 addresses, its socket mapped ones.
pub(super) fn key(flow: &Flow) -> Flow {
    flow.canonical().unscoped()
}
