//! TCP's states as Linux numbers them, and one connection's walk through them.
//!
//! Pure: no clock, no I/O. Time comes in as an argument, as does every fact about the kernel.
//! Must not know: sockets, metrics, logs.

mod addresses;
mod arrows;
mod cause;
mod evidence;
mod lifecycle;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;

pub use addresses::Addresses;
pub use arrows::{ARROWS, Arrow, Trigger};
pub use cause::Cause;
pub use evidence::Evidence;
pub use lifecycle::{Known, Lifecycle, Step, Transition, Transitions};

/// What is known of each socket, by its cookie (SO_COOKIE): a number that the kernel counts up, which nobody can choose to
/// collide with others, so that a quick hash will do.
pub type ByCookie<T> = HashMap<u64, T, foldhash::fast::RandomState>;

/// Cookies, hashed as in [`ByCookie`].
pub type Cookies = HashSet<u64, foldhash::fast::RandomState>;

/// A TCP state, with the kernel's own number (`include/net/tcp_states.h`; RFC 9293 section 3.3.2 for the meaning).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Open: data flows both ways.
    Established = 1,
    /// Our SYN is out, the answer is not in.
    SynSent = 2,
    /// A SYN came in and was answered; the third segment is missing.
    SynRecv = 3,
    /// Our FIN is out and not acknowledged.
    FinWait1 = 4,
    /// Our FIN is acknowledged; the peer may still send.
    FinWait2 = 5,
    /// Both FINs are done; this end waits 2 MSL in case its last ACK was lost (RFC 9293 section 3.6.1).
    TimeWait = 6,
    /// No connection.
    Close = 7,
    /// The peer's FIN is in; our application has not closed yet.
    CloseWait = 8,
    /// The peer's FIN is in, ours is out and not acknowledged.
    LastAck = 9,
    /// Waiting for SYNs.
    Listen = 10,
    /// Both FINs crossed; ours is not acknowledged.
    Closing = 11,
    /// A request socket: the kernel's light form of SYN_RECV before the third segment. Shown to users as SYN_RECV.
    NewSynRecv = 12,
}

impl State {
    /// Every state that a user sees, in kernel order. `NewSynRecv` is not among them: it shows as `SynRecv`.
    pub const ALL: [State; 11] = [
        State::Established,
        State::SynSent,
        State::SynRecv,
        State::FinWait1,
        State::FinWait2,
        State::TimeWait,
        State::Close,
        State::CloseWait,
        State::LastAck,
        State::Listen,
        State::Closing,
    ];

    /// How long an array indexed by `state as usize` is: the kernel's numbers run from 1 to 12.
    pub const SLOTS: usize = 13;

    /// The state with the kernel's number `n`; `None` for numbers this program does not know.
    #[must_use]
    pub const fn from_kernel(n: u8) -> Option<State> {
        Some(match n {
            1 => State::Established,
            2 => State::SynSent,
            3 => State::SynRecv,
            4 => State::FinWait1,
            5 => State::FinWait2,
            6 => State::TimeWait,
            7 => State::Close,
            8 => State::CloseWait,
            9 => State::LastAck,
            10 => State::Listen,
            11 => State::Closing,
            12 => State::NewSynRecv,
            _ => return None,
        })
    }

    /// The state as users see it: a request socket is SYN_RECV.
    #[must_use]
    pub const fn shown(self) -> State {
        match self {
            State::NewSynRecv => State::SynRecv,
            other => other,
        }
    }

    /// The state that people mean by `name`: any usual spelling of it (TIME_WAIT, time-wait, timewait; ss's, netstat's,
    /// the RFC's, the kernel's).
    #[must_use]
    pub fn named(name: &str) -> Option<State> {
        let letters = name.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).map(|c| c.to_ascii_lowercase());
        let letters: String = letters.collect();
        Some(match letters.strip_prefix("tcp").unwrap_or(&letters) {
            "established" | "estab" => State::Established,
            "synsent" => State::SynSent,
            "synrecv" | "synreceived" | "synrcvd" | "newsynrecv" => State::SynRecv,
            "finwait1" => State::FinWait1,
            "finwait2" => State::FinWait2,
            "timewait" => State::TimeWait,
            "closed" | "close" | "unconn" => State::Close,
            "closewait" => State::CloseWait,
            "lastack" => State::LastAck,
            "listen" | "listening" => State::Listen,
            "closing" => State::Closing,
            _ => return None,
        })
    }

    /// The metric label, spelled as node_exporter spells it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            State::Established => "established",
            State::SynSent => "syn_sent",
            State::SynRecv | State::NewSynRecv => "syn_recv",
            State::FinWait1 => "fin_wait1",
            State::FinWait2 => "fin_wait2",
            State::TimeWait => "time_wait",
            State::Close => "close",
            State::CloseWait => "close_wait",
            State::LastAck => "last_ack",
            State::Listen => "listen",
            State::Closing => "closing",
        }
    }

    /// The name in logs: the kernel's, except that the end of a life reads `CLOSED` as in RFC 9293.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            State::Established => "ESTABLISHED",
            State::SynSent => "SYN_SENT",
            State::SynRecv | State::NewSynRecv => "SYN_RECV",
            State::FinWait1 => "FIN_WAIT1",
            State::FinWait2 => "FIN_WAIT2",
            State::TimeWait => "TIME_WAIT",
            State::Close => "CLOSED",
            State::CloseWait => "CLOSE_WAIT",
            State::LastAck => "LAST_ACK",
            State::Listen => "LISTEN",
            State::Closing => "CLOSING",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of states, one bit each at the kernel's number, so that it doubles as a `TCPF_…` mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateSet(u16);

impl StateSet {
    /// No state.
    pub const EMPTY: StateSet = StateSet(0);

    /// The set of `states`.
    #[must_use]
    pub const fn of(states: &[State]) -> StateSet {
        let mut bits = 0;
        let mut i = 0;
        while i < states.len() {
            bits |= 1 << states[i] as u16;
            i += 1;
        }
        StateSet(bits)
    }

    /// This set and `state`.
    #[must_use]
    pub const fn with(self, state: State) -> StateSet {
        StateSet(self.0 | 1 << state as u16)
    }

    /// Whether `state` is in the set.
    #[must_use]
    pub const fn contains(self, state: State) -> bool {
        self.0 & (1 << state as u16) != 0
    }

    /// What both sets hold.
    #[must_use]
    pub const fn and(self, other: StateSet) -> StateSet {
        StateSet(self.0 & other.0)
    }

    /// Whether every state of `other` is in this set.
    #[must_use]
    pub const fn contains_all(self, other: StateSet) -> bool {
        self.0 & other.0 == other.0
    }

    /// The kernel's mask (`1 << TCP_…`), where SYN_RECV includes request sockets.
    #[must_use]
    pub const fn kernel_mask(self) -> u32 {
        let mask = self.0 as u32;
        if self.contains(State::SynRecv) { mask | 1 << State::NewSynRecv as u32 } else { mask }
    }
}

/// Which end of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Role {
    /// The local port is a listening port.
    Server = 0,
    /// This side opened the connection.
    Client = 1,
}

impl Role {
    /// Both roles, in label order.
    pub const ALL: [Role; 2] = [Role::Server, Role::Client];

    /// The metric label and log value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.label())
    }
}

/// The two addresses of a connection, as its own end sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Our address.
    pub local: SocketAddr,
    /// The other end's address.
    pub peer: SocketAddr,
}

impl Flow {
    /// The flow with IPv4-mapped IPv6 addresses (a dual-stack listener's) written as IPv4.
    #[must_use]
    pub fn canonical(self) -> Flow {
        Flow { local: canonical(self.local), peer: canonical(self.peer) }
    }

    /// The flow without IPv6 scopes, which /proc/net/tcp6 does not print.
    #[must_use]
    pub fn unscoped(self) -> Flow {
        Flow { local: unscoped(self.local), peer: unscoped(self.peer) }
    }
}

/// The address without its IPv6 scope and flow label.
#[must_use]
pub fn unscoped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ std::net::IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        std::net::IpAddr::V6(_) => address,
    }
}

/// Which connection, and which end of it.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// SO_COOKIE: the kernel's own name for this end.
    pub cookie: u64,
    /// Which end.
    pub role: Role,
    /// The service's port: local for a server, remote for a client.
    pub port: u16,
    /// The addresses as the kernel has them.
    pub flow: Flow,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_numbers_round_trip_and_the_rest_is_unknown() {
        for n in 0..=255u8 {
            match State::from_kernel(n) {
                Some(state) => assert_eq!(state as u8, n),
                None => assert!(n == 0 || n > 12, "{n} is a state"),
            }
        }
    }

    #[test]
    fn labels_are_node_exporters_and_unique() {
        let mut labels: Vec<_> = State::ALL.iter().map(|s| s.label()).collect();
        labels.sort_unstable();
        assert_eq!(
            labels.join(" "),
            "close close_wait closing established fin_wait1 fin_wait2 last_ack listen syn_recv syn_sent time_wait"
        );
    }

    #[test]
    fn every_spelling_names_its_state() {
        for state in State::ALL {
            let (name, label) = (state.name(), state.label());
            for spelling in [name, label, &name.replace('_', "-"), &label.replace('_', ""), &format!("TCP_{name}")] {
                assert_eq!(State::named(spelling), Some(state), "{spelling}");
            }
        }
        for (spelling, state) in [
            ("FIN-WAIT-1", State::FinWait1),
            ("fin-wait-2", State::FinWait2),
            ("SYN-RECEIVED", State::SynRecv),
            ("SYN_RCVD", State::SynRecv),
            ("ESTAB", State::Established),
            ("UNCONN", State::Close),
            ("listening", State::Listen),
            ("TCP_NEW_SYN_RECV", State::SynRecv),
        ] {
            assert_eq!(State::named(spelling), Some(state), "{spelling}");
        }
        for wrong in ["", "-", "tcp", "FIN_WAIT", "FIN_WAIT3", "OPEN", "6", "time.wait", "zustand", "тime_wait"] {
            assert_eq!(State::named(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_mask_for_syn_recv_includes_request_sockets() {
        assert_eq!(StateSet::of(&[State::SynRecv]).kernel_mask(), 1 << 3 | 1 << 12);
        assert_eq!(StateSet::of(&[State::TimeWait]).kernel_mask(), 1 << 6);
    }

    #[test]
    fn mapped_addresses_read_as_ipv4() {
        let flow = Flow { local: "[::ffff:127.0.0.1]:7007".parse().unwrap(), peer: "[::1]:9".parse().unwrap() };
        assert_eq!(flow.canonical().local.to_string(), "127.0.0.1:7007");
        assert_eq!(flow.canonical().peer.to_string(), "[::1]:9");
    }
}
