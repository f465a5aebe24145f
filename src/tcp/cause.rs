//! Why a state was left: a closed set.

/// What moved a connection from one state to the next, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cause {
    /// listen(2).
    Listen,
    /// connect(2).
    Connect,
    /// accept(2) handed it to us: the third segment came earlier.
    Accept,
    /// A SYN arrived.
    Syn,
    /// A SYN+ACK arrived.
    SynAck,
    /// The ACK of our SYN or FIN arrived.
    Ack,
    /// The peer's FIN arrived.
    PeerFin,
    /// shutdown(2) for writing.
    Shutdown,
    /// close(2).
    Close,
    /// A RST arrived.
    Reset,
    /// We sent a RST (SO_LINGER 0, or closed with unread data).
    Abort,
    /// A RST answered our SYN: nobody listens there.
    Refused,
    /// Nobody answered in time: the kernel gave up retransmitting, or we gave up waiting for a handshake.
    Timeout,
    /// The network said that the peer cannot be reached.
    Unreachable,
    /// The clock of TIME_WAIT, or of a FIN_WAIT2 without a descriptor, ran down.
    Expired,
    /// Another program ended it (`ss -K`, SOCK_DESTROY).
    Destroyed,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Cause; 16] = [
        Cause::Listen,
        Cause::Connect,
        Cause::Accept,
        Cause::Syn,
        Cause::SynAck,
        Cause::Ack,
        Cause::PeerFin,
        Cause::Shutdown,
        Cause::Close,
        Cause::Reset,
        Cause::Abort,
        Cause::Refused,
        Cause::Timeout,
        Cause::Unreachable,
        Cause::Expired,
        Cause::Destroyed,
    ];

    /// The log value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Cause::Listen => "listen",
            Cause::Connect => "connect",
            Cause::Accept => "accept",
            Cause::Syn => "syn",
            Cause::SynAck => "syn_ack",
            Cause::Ack => "ack",
            Cause::PeerFin => "peer_fin",
            Cause::Shutdown => "shutdown",
            Cause::Close => "close",
            Cause::Reset => "reset",
            Cause::Abort => "abort",
            Cause::Refused => "refused",
            Cause::Timeout => "timeout",
            Cause::Unreachable => "unreachable",
            Cause::Expired => "expired",
            Cause::Destroyed => "destroyed",
        }
    }
}
