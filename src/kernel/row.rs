//! One socket of the table, and which of them a reading is about.

use std::time::Duration;

use crate::tcp::{Flow, State, StateSet};

/// TCP_TIMEWAIT_LEN (include/net/tcp.h): what TIME_WAIT's timer starts from.
pub const TIME_WAIT: Duration = Duration::from_mins(1);

/// Which timer a socket waits for (`idiag_timer`, inet_diag.h; the same in /proc/net/tcp).
pub mod timer {
    /// Data, a FIN or a SYN is repeated.
    pub const RETRANSMIT: u8 = 1;
    /// Keepalive, or a SYN+ACK is repeated.
    pub const KEEPALIVE: u8 = 2;
    /// That of a minisocket: TIME_WAIT, or FIN_WAIT2 without a descriptor.
    pub const TIME_WAIT: u8 = 3;
    /// A zero window is probed.
    pub const PERSIST: u8 = 4;
}

/// One socket as the table shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its state; request sockets read SYN_RECV.
    pub state: State,
    /// Its addresses; a dual-stack listener's children carry IPv4-mapped ones.
    pub flow: Flow,
    /// SO_COOKIE; `None` where the way of reading does not tell it.
    pub cookie: Option<u64>,
    /// Which [`timer`] runs; 0: none.
    pub timer: u8,
    /// How often what waits for that timer was repeated already; for a handshake, our SYN+ACK.
    pub retransmits: u8,
    /// When that timer fires.
    pub expires: Duration,
    /// Bytes not yet read (a FIN counts one); for a listener, the length of its accept queue.
    pub receive_queue: u32,
    /// Bytes not yet acknowledged; for a listener, the limit of its accept queue, `None` where that is not told.
    pub send_queue: Option<u32>,
    /// The socket's inode, as `/proc/PID/fd` names it; 0 where no process holds it.
    pub inode: u32,
    /// When the last ACK came, before the reading; `None` unless [`Wanted::with_last_ack`] asked, and where it is not told.
    pub last_ack: Option<Duration>,
}

impl Row {
    /// Whether it is all that the kernel keeps of a connection that nobody holds any more: TIME_WAIT, or FIN_WAIT2 without a
    /// descriptor.
    #[must_use]
    pub fn is_minisocket(&self) -> bool {
        self.state == State::TimeWait || (self.state == State::FinWait2 && self.timer == timer::TIME_WAIT)
    }
}

#[cfg(test)]
impl Row {
    /// One of which nothing more is known; the timer is that of its state.
    pub(crate) fn plain(state: State, flow: Flow, cookie: Option<u64>) -> Row {
        Row {
            state,
            flow,
            cookie,
            timer: if state == State::TimeWait { timer::TIME_WAIT } else { 0 },
            retransmits: 0,
            expires: Duration::ZERO,
            receive_queue: 0,
            send_queue: None,
            inode: 0,
            last_ack: None,
        }
    }
}

/// Which sockets a reading is about: a set of states, and local or remote ports (none named: all).
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The states asked for.
    pub(super) states: StateSet,
    /// Sorted.
    pub(super) local: Vec<u16>,
    /// Sorted.
    pub(super) remote: Vec<u16>,
    /// Whether each row shall come with what TCP_INFO says.
    pub(super) info: bool,
}

impl Wanted {
    /// Sockets in `states` whose local port is in `local` or whose remote port is in `remote`.
    #[must_use]
    pub fn new(states: StateSet, local: &[u16], remote: &[u16]) -> Wanted {
        let sorted = |ports: &[u16]| {
            let mut ports = ports.to_vec();
            ports.sort_unstable();
            ports
        };
        Wanted { states, local: sorted(local), remote: sorted(remote), info: false }
    }

    /// The same, and when each socket last heard an ACK: it makes each row three times as dear.
    #[must_use]
    pub fn with_last_ack(self) -> Wanted {
        Wanted { info: true, ..self }
    }

    /// Whether a socket with these addresses is meant.
    pub(super) fn wants(&self, flow: &Flow) -> bool {
        let everything = self.local.is_empty() && self.remote.is_empty();
        everything
            || self.local.binary_search(&flow.local.port()).is_ok()
            || self.remote.binary_search(&flow.peer.port()).is_ok()
    }
}
