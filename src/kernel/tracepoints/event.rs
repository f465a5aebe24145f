//! What the program in the kernel tells, byte by byte as it lays it out (`struct event`, lifecycle.bpf.c).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use crate::tcp::{Flow, State};

/// How long one event is.
pub(super) const SIZE: usize = 72;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A full socket went from one state to another (`inet_sock_set_state`).
    Changed {
        /// The state that it left.
        from: State,
        /// The state that it entered.
        to: State,
    },
    /// The clock of a minisocket starts, or starts anew: TIME_WAIT, or FIN_WAIT2 without a descriptor.
    Armed(State),
    /// That clock has run down (`expired`), or was stopped, to be started anew or because the minisocket is gone.
    Disarmed {
        /// The state that it was in.
        state: State,
        /// It ran down.
        expired: bool,
    },
    /// A SYN was answered: the clock of a request socket starts, or starts anew.
    Requested,
    /// That clock has run down (`expired`), or was stopped, because the handshake is complete or given up.
    Unrequested {
        /// It ran down.
        expired: bool,
    },
    /// A RST went out, for this reason (`enum sk_rst_reason`, include/net/rstreason.h, Linux 6.10).
    ResetSent(u8),
    /// A full socket, in this state, sent a segment again (`__tcp_retransmit_skb`).
    Retransmitted(State),
    /// A SYN+ACK was sent again (`tcp_rtx_synack`).
    SynAckRetransmitted,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "five independent marks of the socket")]
pub struct Event {
    /// SO_COOKIE; 0 for a request or a minisocket that nobody has asked for it yet.
    pub cookie: u64,
    /// When, on the monotonic clock: the kernel's own reading of it.
    pub at: Duration,
    /// The addresses. A client's local port is 0 when it enters SYN_SENT: it is chosen after that.
    pub flow: Flow,
    /// What happened.
    pub kind: Kind,
    /// Which counts it is in.
    pub era: u8,
    /// `sk_err`: what went wrong, an errno; 0: nothing.
    pub error: u16,
    /// SOCK_DONE: the peer's FIN is in.
    pub done: bool,
    /// SOCK_DEAD: nobody holds a descriptor.
    pub orphan: bool,
    /// SO_LINGER 0.
    pub lingers_not: bool,
    /// The kernel has just taken it through `tcp_reset`.
    pub reset: bool,
    /// Within close(2): no reference to the file is left. Otherwise within shutdown(2), or in no call at all.
    pub closing: bool,
    /// At the end of a full socket: its smoothed round-trip time (`srtt_us`), in microseconds; 0 where none was measured.
    pub rtt_us: u32,
    /// At the end of a full socket: how many segments it sent again (`total_retrans`).
    pub retransmits: u32,
}

const DONE: u8 = 1;
const ORPHAN: u8 = 2;
const LINGER0: u8 = 4;
const RESET: u8 = 8;
const CLOSING: u8 = 16;
const EXPIRED: u8 = 32;
const IPV6: u8 = 64;

impl Event {
    /// Reads one; `None` for what this program does not know.
    pub(super) fn read(bytes: &[u8]) -> Option<Event> {
        let bytes: &[u8; SIZE] = bytes.try_into().ok()?;
        let u64_at = |i: usize| u64::from_ne_bytes(bytes[i..i + 8].try_into().expect("eight bytes"));
        let u16_at = |i: usize| u16::from_ne_bytes([bytes[i], bytes[i + 1]]);
        let u32_at = |i: usize| u32::from_ne_bytes(bytes[i..i + 4].try_into().expect("four bytes"));
        let interface = u32_at(52);
        let [kind, from, to, flags, era, reason] = bytes[58..64] else { return None };
        let state = State::from_kernel;
        let has = |flag| flags & flag != 0;
        let address = |i: usize, port| {
            let octets: [u8; 16] = bytes[i..i + 16].try_into().expect("sixteen bytes");
            if !has(IPV6) {
                let [a, b, c, d, ..] = octets;
                return SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port);
            }
            let ip = Ipv6Addr::from(octets);
            // The kernel names the interface with addresses that mean nothing without it (RFC 4007).
            let scope = if ip.is_unicast_link_local() { interface } else { 0 };
            SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope))
        };
        Some(Event {
            cookie: u64_at(0),
            at: Duration::from_nanos(u64_at(8)),
            flow: Flow { local: address(16, u16_at(48)), peer: address(32, u16_at(50)) },
            kind: match kind {
                1 => Kind::Changed { from: state(from)?, to: state(to)? },
                2 => Kind::Armed(state(to)?),
                3 => Kind::Disarmed { state: state(from)?, expired: has(EXPIRED) },
                4 => Kind::Requested,
                5 => Kind::Unrequested { expired: has(EXPIRED) },
                6 => Kind::ResetSent(reason),
                7 => Kind::Retransmitted(state(from)?),
                8 => Kind::SynAckRetransmitted,
                _ => return None,
            },
            era,
            error: u16_at(56),
            done: has(DONE),
            orphan: has(ORPHAN),
            lingers_not: has(LINGER0),
            reset: has(RESET),
            closing: has(CLOSING),
            rtt_us: u32_at(64),
            retransmits: u32_at(68),
        })
    }
}

#[cfg(test)]
impl Event {
    /// One with no mark set.
    pub(crate) fn plain(cookie: u64, at: Duration, flow: Flow, kind: Kind) -> Event {
        Event {
            cookie,
            at,
            flow,
            kind,
            era: 0,
            error: 0,
            done: false,
            orphan: false,
            lingers_not: false,
            reset: false,
            closing: false,
            rtt_us: 0,
            retransmits: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(kind: u8, from: u8, to: u8, flags: u8) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[0..8].copy_from_slice(&0x1234u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&1_500_000_000u64.to_ne_bytes());
        bytes[16..20].copy_from_slice(&[127, 0, 0, 1]);
        bytes[32..36].copy_from_slice(&[10, 0, 0, 9]);
        bytes[48..50].copy_from_slice(&7007u16.to_ne_bytes());
        bytes[50..52].copy_from_slice(&40000u16.to_ne_bytes());
        bytes[56..58].copy_from_slice(&104u16.to_ne_bytes());
        bytes[58..62].copy_from_slice(&[kind, from, to, flags]);
        bytes
    }

    #[test]
    fn an_event_reads_as_the_kernel_lays_it_out() {
        let event = Event::read(&bytes(1, 5, 7, DONE | RESET)).unwrap();
        assert_eq!((event.cookie, event.at, event.error), (0x1234, Duration::from_millis(1500), 104));
        assert_eq!(event.kind, Kind::Changed { from: State::FinWait2, to: State::Close });
        assert_eq!(
            (event.flow.local.to_string(), event.flow.peer.to_string()),
            ("127.0.0.1:7007".into(), "10.0.0.9:40000".into())
        );
        assert_eq!((event.done, event.orphan, event.reset, event.closing), (true, false, true, false));
        let ended = Event::read(&bytes(3, 6, 6, EXPIRED)).unwrap().kind;
        assert_eq!(ended, Kind::Disarmed { state: State::TimeWait, expired: true });
    }

    #[test]
    fn a_scope_comes_with_addresses_that_need_one() {
        let mut raw = bytes(4, 0, 0, 0);
        raw[52..56].copy_from_slice(&3u32.to_ne_bytes());
        raw[61] = IPV6;
        raw[16..32].copy_from_slice(&"fe80::1".parse::<Ipv6Addr>().unwrap().octets());
        raw[32..48].copy_from_slice(&"2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
        let flow = Event::read(&raw).unwrap().flow;
        assert_eq!(
            (flow.local.to_string(), flow.peer.to_string()),
            ("[fe80::1%3]:7007".into(), "[2001:db8::2]:40000".into())
        );
    }

    #[test]
    fn what_is_not_known_is_nothing() {
        for length in 0..SIZE {
            assert_eq!(Event::read(&bytes(1, 1, 4, 0)[..length]), None);
        }
        for wrong in [
            bytes(0, 1, 4, 0),
            bytes(9, 1, 4, 0),
            bytes(1, 0, 4, 0),
            bytes(7, 0, 0, 0),
            bytes(1, 1, 13, 0),
            bytes(2, 0, 0, 0),
        ] {
            assert_eq!(Event::read(&wrong), None);
        }
    }
}
