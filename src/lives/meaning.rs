//! What one announcement of the kernel means: which state follows, and why.
//!
//! Pure. `inet_sock_set_state` says CLOSE whenever a full socket ends, also when a minisocket goes on in its place, and
//! never why; what tells them apart was measured on Linux 6.18.

use crate::kernel::tracepoints::Event;
use crate::tcp::{Cause, State};

/// SK_RST_REASON_TCP_ABORT_ON_DATA (include/net/rstreason.h): data came for an application that had closed, and we sent a
/// RST. The kernel takes its own socket through `tcp_reset` then, as if one had come in.
pub(crate) const ABORT_ON_DATA: u8 = 8;

/// Where a full socket's change leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// To this state, for this reason, where there is something to say beyond what the arrow itself says.
    Is(State, Option<Cause>),
    /// To CLOSED, by a RST; whether it came in or went out shows a moment later.
    Reset,
}

/// What it means that a full socket went from `from` to `to`, and was not seen to go on as a minisocket. Without `timers`
/// nobody sees that, and the socket's own marks must tell.
pub(crate) fn of(event: &Event, from: State, to: State, timers: bool) -> Meaning {
    match to {
        State::Close => end(event, from, timers),
        // close(2) and shutdown(2) take the same arrow.
        State::FinWait1 | State::LastAck => {
            Meaning::Is(to, Some(if event.closing { Cause::Close } else { Cause::Shutdown }))
        }
        _ => Meaning::Is(to, None),
    }
}

fn end(event: &Event, from: State, timers: bool) -> Meaning {
    if !timers && event.error == 0 {
        match from {
            // `tcp_time_wait` leaves no other mark than that the peer's FIN is in.
            State::FinWait2 if event.done => return Meaning::Is(State::TimeWait, None),
            State::FinWait2 if event.orphan => return Meaning::Is(State::FinWait2, None),
            State::Closing if !event.lingers_not => return Meaning::Is(State::TimeWait, None),
            _ => {}
        }
    }
    let closed = |cause| Meaning::Is(State::Close, Some(cause));
    match i32::from(event.error) {
        libc::ETIMEDOUT => closed(Cause::Timeout),
        // What ICMP and ICMPv6 errors become (`icmp_err_convert`, `tab_unreach`): a firewall that forbids is EACCES.
        libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EACCES | libc::EHOSTDOWN | libc::ENONET => {
            closed(Cause::Unreachable)
        }
        libc::ECONNABORTED => closed(Cause::Destroyed),
        libc::ECONNREFUSED if from == State::SynSent => closed(Cause::Refused),
        // `tcp_reset` always leaves an error; a mark without one was left by a socket that had this one's memory before.
        error if event.reset && error != 0 => Meaning::Reset,
        libc::ECONNRESET | libc::EPIPE => closed(Cause::Reset),
        error if error != 0 => Meaning::Is(State::Close, None),
        _ => match from {
            State::LastAck => closed(Cause::Ack),
            // Taken back: no RST goes out for a SYN.
            State::SynSent => closed(if event.closing { Cause::Close } else { Cause::Shutdown }),
            State::Listen => closed(Cause::Close),
            // No minisocket took its place although it should: too many there are (net.ipv4.tcp_max_tw_buckets).
            State::FinWait2 if event.done => Meaning::Is(State::Close, None),
            State::Closing if !event.lingers_not => Meaning::Is(State::Close, None),
            _ => closed(Cause::Abort),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tracepoints::Kind;
    use crate::tcp::Flow;
    use State::{Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, SynRecv, SynSent, TimeWait};
    use std::time::Duration;

    fn event(from: State, to: State) -> Event {
        let address = "127.0.0.1:7007".parse().unwrap();
        Event::plain(1, Duration::ZERO, Flow { local: address, peer: address }, Kind::Changed { from, to })
    }

    fn end_of(from: State, change: impl FnOnce(&mut Event)) -> Meaning {
        let mut event = event(from, Close);
        change(&mut event);
        of(&event, from, Close, true)
    }

    #[test]
    fn an_end_is_what_its_marks_say() {
        let is = |cause| Meaning::Is(Close, Some(cause));
        for (from, error, reset, means) in [
            (LastAck, 0, false, is(Cause::Ack)),
            (SynSent, 111, true, is(Cause::Refused)),
            (SynSent, 110, false, is(Cause::Timeout)),
            (SynSent, 0, false, is(Cause::Shutdown)),
            (Established, 104, true, Meaning::Reset),
            (Established, 104, false, is(Cause::Reset)),
            (CloseWait, 32, true, Meaning::Reset),
            (SynRecv, 104, true, Meaning::Reset),
            (Established, 110, false, is(Cause::Timeout)),
            (FinWait1, 110, false, is(Cause::Timeout)),
            (Established, 113, false, is(Cause::Unreachable)),
            (Established, 103, false, is(Cause::Destroyed)),
            (Established, 0, false, is(Cause::Abort)),
            (CloseWait, 0, false, is(Cause::Abort)),
            (LastAck, 0, true, is(Cause::Ack)),
            (SynSent, 13, false, is(Cause::Unreachable)),
            (Established, 71, false, Meaning::Is(Close, None)),
        ] {
            let told = end_of(from, |e| (e.error, e.reset) = (error, reset));
            assert_eq!(told, means, "{from} {error} {reset}");
        }
    }

    #[test]
    fn without_room_for_one_more_time_wait_it_just_ends() {
        assert_eq!(end_of(FinWait2, |e| e.done = true), Meaning::Is(Close, None));
        assert_eq!(end_of(Closing, |_| ()), Meaning::Is(Close, None));
        assert_eq!(end_of(FinWait2, |_| ()), Meaning::Is(Close, Some(Cause::Abort)));
    }

    #[test]
    fn without_timers_the_sockets_own_marks_tell() {
        let told = |from, change: fn(&mut Event)| {
            let mut e = event(from, Close);
            change(&mut e);
            of(&e, from, Close, false)
        };
        assert_eq!(told(FinWait2, |e| e.done = true), Meaning::Is(TimeWait, None));
        assert_eq!(told(FinWait2, |e| e.orphan = true), Meaning::Is(FinWait2, None));
        assert_eq!(told(Closing, |_| ()), Meaning::Is(TimeWait, None));
        assert_eq!(told(Closing, |e| e.lingers_not = true), Meaning::Is(Close, Some(Cause::Abort)));
        assert_eq!(told(FinWait2, |e| (e.done, e.error) = (true, 110)), Meaning::Is(Close, Some(Cause::Timeout)));
    }

    #[test]
    fn who_called_is_known_where_a_fin_goes_out() {
        for (closing, cause) in [(true, Cause::Close), (false, Cause::Shutdown)] {
            for (from, to) in [(Established, FinWait1), (CloseWait, LastAck)] {
                let e = Event { closing, ..event(from, to) };
                assert_eq!(of(&e, from, to, true), Meaning::Is(to, Some(cause)));
            }
        }
    }
}
