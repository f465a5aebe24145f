//! How a connection ends: what a descriptor that reads CLOSE means, and what is left to others when it is closed.

use std::io::Error;
use std::os::fd::AsFd;

use super::Conn;
use crate::afterlife::Departed;
use crate::kernel::{TcpInfo, clock, sockopt};
use crate::ledger::Reason;
use crate::tcp::{Cause, Known, State};

impl Conn {
    /// The descriptor reads CLOSE: the connection failed, or it ended well and may live on as TIME_WAIT, which no
    /// descriptor shows.
    pub(super) fn see_close(&mut self, info: &TcpInfo, mut known: Known) {
        let before = self.life.state();
        // `bytes_acked` counts our FIN: it was acknowledged, so the way led through LAST_ACK, and nothing went wrong.
        let acked = matches!(before, State::CloseWait | State::LastAck)
            && self.fin_sent
            && info.bytes_acked >= self.all_acked();
        if self.error.is_none() && !acked {
            self.error = sockopt::take_error(self.stream().as_fd()).ok().flatten();
        }
        if let Some(error) = &self.error {
            let (cause, came_after_fin) = cause_of(error);
            known.cause = cause;
            // `tcp_reset` leaves EPIPE where the peer's FIN had come before, and ECONNRESET where not.
            match came_after_fin {
                Some(true) => known.through = known.through.with(State::CloseWait),
                Some(false) if !self.fin_sent => known.never = known.never.with(State::CloseWait),
                _ => {}
            }
            return self.record(info, State::Close, &known);
        }
        if matches!(before, State::CloseWait | State::LastAck) {
            known.cause = acked.then_some(Cause::Ack);
            return self.record(info, State::Close, &known);
        }
        if self.fin_sent {
            self.note_path(info);
            let several_ways = matches!(before, State::Established | State::FinWait1) && known.segments != Some(1);
            if several_ways && self.afterlife.journal().ledger().other_end_entered(&self.id(), State::CloseWait) {
                // Both ends are ours, and the other one had our FIN before it sent its own: its FIN acknowledged ours.
                known.never = known.never.with(State::Closing);
            }
            self.left = Some(Box::new((clock::monotonic(), known)));
            return;
        }
        self.record(info, State::Close, &known);
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let announced = self.afterlife.hears_the_kernel() && self.cookie != 0;
        let reason = self.reason.unwrap_or(Reason::Cancelled);
        if announced || !self.watched {
            // Whatever there is to tell, the kernel tells, or nobody.
            self.afterlife.journal().count_close(self.role(), reason);
            drop(self.stream.take());
            if announced {
                self.afterlife.closed(self.role(), self.cookie, reason);
            }
            return;
        }
        if !self.aborted {
            // The follower begins where the descriptor ends.
            self.look(Known::default());
        }
        let (id, journal) = (self.id(), self.afterlife.journal());
        journal.note_path(id.role, self.rtt_us, self.retransmits);
        journal.close(&id, reason);
        let closed = clock::monotonic();
        drop(self.stream.take());
        if self.life.is_over() {
            return;
        }
        let call = (!self.fin_sent && !self.aborted).then_some((Cause::Close, closed));
        self.afterlife.follow(Departed {
            id,
            life: self.life,
            left: self.left.take().map(|left| *left),
            known: Known { call, ..Known::default() },
            all_acked: self.all_acked(),
            cause_if_gone: self.aborted.then_some(Cause::Abort),
            reason: Some(reason),
        });
    }
}

/// What an error says of its cause, and whether it proves that the peer's FIN had (`true`) or had not (`false`) come
/// before.
fn cause_of(error: &Error) -> (Option<Cause>, Option<bool>) {
    match error.raw_os_error() {
        // `tcp_reset` says ECONNREFUSED in SYN_SENT only: with ECONNRESET the handshake was over.
        Some(libc::ECONNREFUSED) => (Some(Cause::Refused), Some(false)),
        Some(libc::ECONNRESET) => (Some(Cause::Reset), Some(false)),
        Some(libc::EPIPE) => (Some(Cause::Reset), Some(true)),
        Some(libc::ETIMEDOUT) => (Some(Cause::Timeout), None),
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => (Some(Cause::Unreachable), None),
        Some(libc::ECONNABORTED) => (Some(Cause::Destroyed), None),
        _ => (None, None),
    }
}
