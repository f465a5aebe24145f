//! Who saw a state: a closed set.

/// Who saw a state, strongest first. The weaker never passes for the stronger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Evidence {
    /// The kernel's own event, with the kernel's time.
    Tracepoint = 0,
    /// TCP_INFO read on our own descriptor (tcp(7)).
    TcpInfo = 1,
    /// The kernel's socket table by netlink, the socket identified by its cookie (sock_diag(7)).
    SockDiag = 2,
    /// The kernel's socket table as text, the socket identified by its addresses only (proc(5)).
    Procfs = 3,
    /// Nobody saw it: no other path leads from one state that was seen to the next.
    Inferred = 4,
}

impl Evidence {
    /// Every kind, strongest first.
    pub const ALL: [Evidence; 5] =
        [Evidence::Tracepoint, Evidence::TcpInfo, Evidence::SockDiag, Evidence::Procfs, Evidence::Inferred];

    /// The metric label and log value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Evidence::Tracepoint => "tracepoint",
            Evidence::TcpInfo => "tcp_info",
            Evidence::SockDiag => "sock_diag",
            Evidence::Procfs => "procfs",
            Evidence::Inferred => "inferred",
        }
    }
}
