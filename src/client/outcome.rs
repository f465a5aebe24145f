//! How one turn of the client ended: a closed set.

/// How one turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// Everything came back and the connection was closed as asked.
    Ok,
    /// A RST answered the SYN.
    Refused,
    /// Nothing answered the SYN in time.
    ConnectTimeout,
    /// The network says that there is no way.
    Unreachable,
    /// No local port was left.
    NoLocalPort,
    /// The name has no address.
    Unresolved,
    /// The connection was reset.
    Reset,
    /// An echo took too long.
    EchoTimeout,
    /// Something else came back.
    Mismatch,
    /// The peer ended its stream before everything was back.
    Short,
    /// The peer's FIN did not come in time.
    CloseTimeout,
    /// No descriptor was left in this process.
    NoDescriptor,
    /// Anything else.
    Error,
    /// The drain's deadline ended it: told apart from the rest, it is nobody's failure but the clock's.
    CutShort,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 14] = [
        Outcome::Ok,
        Outcome::Refused,
        Outcome::ConnectTimeout,
        Outcome::Unreachable,
        Outcome::NoLocalPort,
        Outcome::Unresolved,
        Outcome::Reset,
        Outcome::EchoTimeout,
        Outcome::Mismatch,
        Outcome::Short,
        Outcome::CloseTimeout,
        Outcome::NoDescriptor,
        Outcome::Error,
        Outcome::CutShort,
    ];

    /// The name in the summary.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Refused => "refused",
            Outcome::ConnectTimeout => "connect_timeout",
            Outcome::Unreachable => "unreachable",
            Outcome::NoLocalPort => "no_local_port",
            Outcome::Unresolved => "unresolved",
            Outcome::Reset => "reset",
            Outcome::EchoTimeout => "echo_timeout",
            Outcome::Mismatch => "mismatch",
            Outcome::Short => "short",
            Outcome::CloseTimeout => "close_timeout",
            Outcome::NoDescriptor => "no_descriptor",
            Outcome::Error => "error",
            Outcome::CutShort => "cut_short",
        }
    }

    /// What an error of connect(2) means.
    #[must_use]
    pub(super) fn of_connect(error: &std::io::Error) -> Outcome {
        use std::io::ErrorKind::{
            AddrNotAvailable, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
        };
        match error.kind() {
            _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Outcome::NoDescriptor,
            ConnectionRefused => Outcome::Refused,
            // The handshake was over when the RST came: in SYN_SENT it is told as a refusal.
            ConnectionReset => Outcome::Reset,
            TimedOut => Outcome::ConnectTimeout,
            HostUnreachable | NetworkUnreachable => Outcome::Unreachable,
            AddrNotAvailable => Outcome::NoLocalPort,
            _ => Outcome::Error,
        }
    }

    /// What an error of an open connection means.
    #[must_use]
    pub(super) fn of_echo(error: &std::io::Error) -> Outcome {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut};
        match error.kind() {
            ConnectionReset | BrokenPipe => Outcome::Reset,
            TimedOut => Outcome::EchoTimeout,
            _ => Outcome::Error,
        }
    }

    /// Whether another try may go better: nobody listened yet, the name was not there yet, or the ports were all in
    /// use.
    pub(super) fn may_be_tried_again(self) -> bool {
        matches!(
            self,
            Outcome::Refused
                | Outcome::Unresolved
                | Outcome::NoLocalPort
                | Outcome::NoDescriptor
                | Outcome::Unreachable
        )
    }

    /// Whether something failed to echo.
    #[must_use]
    pub fn is_failure(self) -> bool {
        self != Outcome::Ok
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_indexed_by_their_place() {
        for (i, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, i);
        }
    }
}
