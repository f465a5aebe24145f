//! Why a connection of ours was closed: one closed set for both roles.

/// Why an own connection was closed. One closed set for both roles, so that a sum is a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Both sides sent their FIN.
    Graceful,
    /// The peer sent a RST.
    Reset,
    /// We sent a RST, as we were told to.
    Aborted,
    /// A RST answered our SYN.
    Refused,
    /// The peer did not answer in time.
    Timeout,
    /// The network says that there is no way to the peer.
    Unreachable,
    /// No local port or address was left to connect from.
    NoLocalPort,
    /// The peer was silent for `--idle-timeout`.
    Idle,
    /// Closed by us because we are shutting down.
    Drained,
    /// Still open at `--drain-timeout`: reset.
    DrainAborted,
    /// What came back was not what was sent.
    Mismatch,
    /// Another program ended it (`ss -K`).
    Destroyed,
    /// The task was cancelled.
    Cancelled,
    /// Anything else that the kernel refused.
    Error,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 14] = [
        Reason::Graceful,
        Reason::Reset,
        Reason::Aborted,
        Reason::Refused,
        Reason::Timeout,
        Reason::Unreachable,
        Reason::NoLocalPort,
        Reason::Idle,
        Reason::Drained,
        Reason::DrainAborted,
        Reason::Mismatch,
        Reason::Destroyed,
        Reason::Cancelled,
        Reason::Error,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Reason::Graceful => "graceful",
            Reason::Reset => "reset",
            Reason::Aborted => "aborted",
            Reason::Refused => "refused",
            Reason::Timeout => "timeout",
            Reason::Unreachable => "unreachable",
            Reason::NoLocalPort => "no_local_port",
            Reason::Idle => "idle",
            Reason::Drained => "drained",
            Reason::DrainAborted => "drain_aborted",
            Reason::Mismatch => "mismatch",
            Reason::Destroyed => "destroyed",
            Reason::Cancelled => "cancelled",
            Reason::Error => "error",
        }
    }

    /// The reason behind an error of a connection.
    #[must_use]
    pub fn of(error: &std::io::Error) -> Reason {
        use std::io::ErrorKind::{
            AddrNotAvailable, BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            NetworkUnreachable, TimedOut,
        };
        match error.kind() {
            ConnectionReset | BrokenPipe => Reason::Reset,
            ConnectionRefused => Reason::Refused,
            TimedOut => Reason::Timeout,
            HostUnreachable | NetworkUnreachable => Reason::Unreachable,
            AddrNotAvailable => Reason::NoLocalPort,
            ConnectionAborted => Reason::Destroyed,
            _ => Reason::Error,
        }
    }
}
