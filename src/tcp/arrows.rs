//! The state machine's arrows as data, and the paths that are possible between two states.
//!
//! Must not know: when anything happened, or who saw it.

use super::{Cause, Known, Role, State, StateSet};
use State::{Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait};

/// What makes the kernel walk an arrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A system call on this end: listen, connect, shutdown, close.
    Call,
    /// A SYN came in.
    Syn,
    /// A SYN+ACK came in.
    SynAck,
    /// An ACK came in, of our SYN or of our FIN.
    Ack,
    /// A FIN came in.
    Fin,
    /// An end: a RST, a timer, an abort. Which one, only the error tells.
    End,
}

/// One step that the kernel can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrow {
    /// Where it starts.
    pub from: State,
    /// Where it leads.
    pub to: State,
    /// What makes the kernel take it.
    pub trigger: Trigger,
}

impl Arrow {
    /// The cause that the arrow itself proves; `None` where it could be one of several.
    #[must_use]
    pub fn cause(self) -> Option<Cause> {
        match (self.trigger, self.to) {
            (Trigger::Call, Listen) => Some(Cause::Listen),
            (Trigger::Call, SynSent) => Some(Cause::Connect),
            (Trigger::Call, _) => Some(Cause::Shutdown),
            (Trigger::Syn, _) => Some(Cause::Syn),
            (Trigger::SynAck, _) => Some(Cause::SynAck),
            (Trigger::Ack, _) => Some(Cause::Ack),
            (Trigger::Fin, _) => Some(Cause::PeerFin),
            (Trigger::End, _) => None,
        }
    }
}

const fn arrow(from: State, trigger: Trigger, to: State) -> Arrow {
    Arrow { from, to, trigger }
}

/// Every arrow that Linux walks, as measured on 6.18, from RFC 9293 figure 5.
///
/// Where the kernel differs from the figure: LISTEN→SYN_SENT does not exist; SYN_RECV→LISTEN is a request that
/// vanishes; FIN_WAIT1→TIME_WAIT is walked as FIN_WAIT1→FIN_WAIT2→TIME_WAIT while one segment is processed
/// (`tcp_rcv_state_process` handles the ACK, then `tcp_fin` the FIN). Every synchronised state can end in CLOSE by a
/// RST, a timeout or an abort (`tcp_done`); TIME_WAIT→CLOSE is the minisocket's end.
pub const ARROWS: &[Arrow] = &[
    arrow(Close, Trigger::Call, Listen),
    arrow(Close, Trigger::Call, SynSent),
    arrow(Listen, Trigger::Syn, SynRecv),
    arrow(Listen, Trigger::End, Close),
    arrow(SynSent, Trigger::SynAck, Established),
    arrow(SynSent, Trigger::Syn, SynRecv),
    arrow(SynSent, Trigger::End, Close),
    arrow(SynRecv, Trigger::Ack, Established),
    arrow(SynRecv, Trigger::Call, FinWait1),
    arrow(SynRecv, Trigger::End, Close),
    arrow(Established, Trigger::Call, FinWait1),
    arrow(Established, Trigger::Fin, CloseWait),
    arrow(Established, Trigger::End, Close),
    arrow(FinWait1, Trigger::Ack, FinWait2),
    arrow(FinWait1, Trigger::Fin, Closing),
    arrow(FinWait1, Trigger::End, Close),
    arrow(FinWait2, Trigger::Fin, TimeWait),
    arrow(FinWait2, Trigger::End, Close),
    arrow(Closing, Trigger::Ack, TimeWait),
    arrow(Closing, Trigger::End, Close),
    arrow(CloseWait, Trigger::Call, LastAck),
    arrow(CloseWait, Trigger::End, Close),
    arrow(LastAck, Trigger::End, Close),
    arrow(TimeWait, Trigger::End, Close),
];

/// The arrow between two states, if there is one.
pub(super) fn direct(from: State, to: State) -> Option<Arrow> {
    ARROWS.iter().copied().find(|a| a.from == from && a.to == to)
}

/// The longest walk: CLOSE, SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT1, CLOSING, TIME_WAIT, CLOSE.
pub(super) const LONGEST: usize = 8;

/// One way from one state to another, both ends included.
#[derive(Clone, Copy)]
pub(super) struct Path {
    states: [State; LONGEST],
    len: usize,
}

impl Path {
    pub(super) fn states(&self) -> &[State] {
        &self.states[..self.len]
    }

    fn set(&self) -> StateSet {
        self.states().iter().fold(StateSet::EMPTY, |set, s| set.with(*s))
    }

    fn arrows(&self) -> impl Iterator<Item = Arrow> {
        self.states().windows(2).filter_map(|pair| direct(pair[0], pair[1]))
    }

    /// The fewest segments that can move the kernel along this path. The ACK of our FIN and the peer's FIN may come
    /// as one segment, and are processed in that order; every other step needs a segment of its own. A RST is one too.
    fn segments(&self, cause: Option<Cause>) -> u32 {
        let mut count = 0;
        let mut last = None;
        for arrow in self.arrows() {
            let own = match arrow.trigger {
                Trigger::Call => 0,
                Trigger::Fin if last == Some(Trigger::Ack) => 0,
                Trigger::Syn | Trigger::SynAck | Trigger::Ack | Trigger::Fin => 1,
                Trigger::End => u32::from(matches!(cause, Some(Cause::Reset | Cause::Refused))),
            };
            count += own;
            last = Some(arrow.trigger);
        }
        count
    }
}

/// Calls `found` with every way from `from` to `to` that `role` can walk and that does not contradict what is `known`.
///
/// CLOSE is never passed through: a life ends there.
pub(super) fn each_path(from: State, to: State, role: Role, known: &Known, mut found: impl FnMut(&Path)) {
    let mut path = Path { states: [from; LONGEST], len: 1 };
    walk(&mut path, to, role, known, &mut found);
}

fn walk(path: &mut Path, to: State, role: Role, known: &Known, found: &mut impl FnMut(&Path)) {
    let here = path.states[path.len - 1];
    if path.len == LONGEST {
        return;
    }
    for arrow in ARROWS.iter().filter(|a| a.from == here) {
        let next = arrow.to;
        path.states[path.len] = next;
        path.len += 1;
        if next == to {
            let possible = path.set().contains_all(known.through)
                && known.segments.is_none_or(|n| path.segments(known.cause) <= n);
            if possible {
                found(path);
            }
        } else if next != Close && !known.never.contains(next) && open_to(role, next) {
            walk(path, to, role, known, found);
        }
        path.len -= 1;
    }
}

/// Whether a life in this role can pass through `state` unseen: a client never listens, an accepted socket never
/// sends the first SYN.
fn open_to(role: Role, state: State) -> bool {
    match role {
        Role::Server => state != SynSent,
        Role::Client => state != Listen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arrow_is_listed_once_and_joins_two_states_users_see() {
        for (i, a) in ARROWS.iter().enumerate() {
            assert_ne!(a.from, a.to);
            assert_eq!((a.from.shown(), a.to.shown()), (a.from, a.to));
            assert!(!ARROWS[..i].iter().any(|b| (a.from, a.to) == (b.from, b.to)), "{a:?} twice");
        }
        assert!(direct(Listen, SynSent).is_none(), "Linux has no such call");
        assert!(direct(SynRecv, Listen).is_none(), "a request vanishes without an event");
        assert!(direct(FinWait1, TimeWait).is_none(), "walked through FIN_WAIT2");
    }

    #[test]
    fn no_path_is_longer_than_the_buffer() {
        for role in Role::ALL {
            for from in State::ALL {
                for to in State::ALL {
                    each_path(from, to, role, &Known::default(), |p| assert!(p.len <= LONGEST));
                }
            }
        }
    }

    #[test]
    fn segments_needed() {
        let needed = |states: &[State], cause| {
            let mut path = Path { states: [Close; LONGEST], len: states.len() };
            path.states[..states.len()].copy_from_slice(states);
            path.segments(cause)
        };
        assert_eq!(needed(&[FinWait1, FinWait2, TimeWait], None), 1, "ACK and FIN in one");
        assert_eq!(needed(&[FinWait1, Closing, TimeWait], None), 2, "a FIN that does not acknowledge, then the ACK");
        assert_eq!(needed(&[SynSent, Established], None), 1);
        assert_eq!(needed(&[SynSent, SynRecv, Established], None), 2);
        assert_eq!(needed(&[FinWait1, FinWait2, Close], Some(Cause::Reset)), 2);
        assert_eq!(needed(&[FinWait1, Close], Some(Cause::Timeout)), 0);
    }
}
