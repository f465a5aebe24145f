//! The kernel's settings that bear on a connection's life, and what each does.
//!
//! Each network namespace has its own, except where the unit says host. What is under net/ipv4 holds for IPv6 too.

use serde::Serialize;

/// One setting of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sysctl {
    /// Where it is, under /proc/sys.
    pub path: &'static str,
    /// What its number counts.
    pub unit: &'static str,
    /// What it does to a connection.
    pub does: &'static str,
}

impl Sysctl {
    /// The name that sysctl(8) takes.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.replace('/', ".")
    }
}

const fn sysctl(path: &'static str, unit: &'static str, does: &'static str) -> Sysctl {
    Sysctl { path, unit, does }
}

pub(super) const SYN_RETRIES: Sysctl = sysctl(
    "net/ipv4/tcp_syn_retries",
    "repetitions",
    "How often a SYN is repeated after ever longer pauses (1, 2, 4, 8 s and so on), besides the linear ones. \
     TCP_SYNCNT sets it for one socket.",
);
pub(super) const SYN_LINEAR_TIMEOUTS: Sysctl = sysctl(
    "net/ipv4/tcp_syn_linear_timeouts",
    "repetitions",
    "How many repetitions of a SYN come before those, a second apart (since Linux 6.5).",
);
pub(super) const SYNACK_RETRIES: Sysctl = sysctl(
    "net/ipv4/tcp_synack_retries",
    "repetitions",
    "How often a SYN+ACK is repeated before the request is dropped.",
);
pub(super) const SYNCOOKIES: Sysctl = sysctl(
    "net/ipv4/tcp_syncookies",
    "0 never, 1 when full, 2 always",
    "Answer SYNs without remembering them when a listener has as many requests as its backlog. 0: such SYNs are \
     dropped.",
);
pub(super) const MAX_SYN_BACKLOG: Sysctl = sysctl(
    "net/ipv4/tcp_max_syn_backlog",
    "requests a listener",
    "Counts with tcp_syncookies=0 only: from three quarters of it on, SYNs of strangers are dropped. With cookies \
     the backlog of the listener is the limit.",
);
pub(super) const SOMAXCONN: Sysctl = sysctl(
    "net/core/somaxconn",
    "connections",
    "The most that listen(2) grants as backlog, read at listen(2). The accept queue holds one more.",
);
pub(super) const ABORT_ON_OVERFLOW: Sysctl = sysctl(
    "net/ipv4/tcp_abort_on_overflow",
    "0 no, 1 yes",
    "What becomes of the client's ACK when the accept queue is full. 0: it is dropped, and the SYN+ACK repeated; 1: \
     a RST.",
);
pub(super) const MIGRATE_REQ: Sysctl = sysctl(
    "net/ipv4/tcp_migrate_req",
    "0 no, 1 yes",
    "1: who waits at a listener that closes is given to another one on the same port (SO_REUSEPORT), not reset.",
);
pub(super) const KEEPALIVE_TIME: Sysctl = sysctl(
    "net/ipv4/tcp_keepalive_time",
    "seconds",
    "With SO_KEEPALIVE: how long nothing comes before the first probe. TCP_KEEPIDLE sets it for one socket.",
);
pub(super) const KEEPALIVE_INTVL: Sysctl = sysctl(
    "net/ipv4/tcp_keepalive_intvl",
    "seconds",
    "With SO_KEEPALIVE: the time between two probes that nobody answers. TCP_KEEPINTVL sets it for one socket.",
);
pub(super) const KEEPALIVE_PROBES: Sysctl = sysctl(
    "net/ipv4/tcp_keepalive_probes",
    "probes",
    "With SO_KEEPALIVE: after so many without an answer the peer is dead. TCP_KEEPCNT sets it for one socket.",
);
pub(super) const RETRIES2: Sysctl = sysctl(
    "net/ipv4/tcp_retries2",
    "repetitions",
    "How long a segment is repeated without an answer while a descriptor is open, counted in repetitions from 0.2 s, \
     each pause twice the last. TCP_USER_TIMEOUT sets a time for one socket.",
);
pub(super) const RTO_MAX_MS: Sysctl = sysctl(
    "net/ipv4/tcp_rto_max_ms",
    "milliseconds",
    "The longest pause between two repetitions (since Linux 6.15; before: always 120000).",
);
pub(super) const ORPHAN_RETRIES: Sysctl = sysctl(
    "net/ipv4/tcp_orphan_retries",
    "repetitions",
    "As tcp_retries2, for a connection whose descriptor is closed. 0 counts as 8.",
);
pub(super) const MAX_ORPHANS: Sysctl = sysctl(
    "net/ipv4/tcp_max_orphans",
    "sockets of the host",
    "More connections without a descriptor than this, and they are reset. Raise it rather than lower it. Shown in the \
     host's own network namespace only.",
);
pub(super) const FIN_TIMEOUT: Sysctl = sysctl(
    "net/ipv4/tcp_fin_timeout",
    "seconds",
    "How long FIN_WAIT2 lasts once the descriptor is closed, and nothing else. TCP_LINGER2 sets it for one socket.",
);
pub(super) const LOCAL_PORT_RANGE: Sysctl = sysctl(
    "net/ipv4/ip_local_port_range",
    "first and last port",
    "The ports that connect(2) chooses from, for each pair of local address and remote address and port.",
);
pub(super) const LOCAL_RESERVED_PORTS: Sysctl = sysctl(
    "net/ipv4/ip_local_reserved_ports",
    "ports",
    "Ports of that range that are not chosen: put there what something listens on.",
);
pub(super) const TW_REUSE: Sysctl = sysctl(
    "net/ipv4/tcp_tw_reuse",
    "0 no, 1 yes, 2 over loopback",
    "Whether connect(2) may take over the port of a TIME_WAIT that had timestamps. Does nothing for a listener.",
);
pub(super) const TW_REUSE_DELAY: Sysctl = sysctl(
    "net/ipv4/tcp_tw_reuse_delay",
    "milliseconds",
    "How old that TIME_WAIT must be (since Linux 6.14; before: 1 s).",
);
pub(super) const TIMESTAMPS: Sysctl = sysctl(
    "net/ipv4/tcp_timestamps",
    "0 no, 1 yes, 2 without offsets",
    "TCP timestamps (RFC 7323), at both ends or not at all. Without them no port is taken over.",
);
pub(super) const MAX_TW_BUCKETS: Sysctl = sysctl(
    "net/ipv4/tcp_max_tw_buckets",
    "sockets",
    "More than so many, and a connection ends without TIME_WAIT. A limit against attacks: never lower it.",
);
pub(super) const RFC1337: Sysctl = sysctl(
    "net/ipv4/tcp_rfc1337",
    "0 no, 1 yes",
    "0: a RST ends TIME_WAIT early. 1: it is ignored, as RFC 1337 advises.",
);
pub(super) const NR_OPEN: Sysctl = sysctl(
    "fs/nr_open",
    "descriptors a process",
    "The most that RLIMIT_NOFILE can be raised to: how many sockets one process can hold.",
);
pub(super) const FILE_MAX: Sysctl =
    sysctl("fs/file-max", "descriptors of the host", "The most that all processes together may hold.");
