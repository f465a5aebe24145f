//! The bytes of NETLINK_SOCK_DIAG: requests out, messages in (sock_diag(7), netlink(7), linux/inet_diag.h).
//!
//! Borrowing and branch-light: a dump of 90,000 sockets goes through here, and general netlink crates decode each
//! message into owned attribute lists. Must not know: sockets, errors of the transport.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use super::row::Row;
use super::tcp_info::TcpInfo;
use crate::tcp::{Flow, State};

const HEADER: usize = 16;
const DIAG_MESSAGE: usize = 72;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_PROTOCOL: u16 = 10;

/// What made a reply unreadable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end inside a message.
    #[error("message of {claimed} bytes in a reply with {left} left")]
    Truncated {
        /// The length that the message claims.
        claimed: usize,
        /// The bytes that are there.
        left: usize,
    },
    /// The message is too short for what its type must hold.
    #[error("message type {kind} with {len} bytes is too short")]
    Short {
        /// The netlink message type.
        kind: u16,
        /// Its payload's length.
        len: usize,
    },
    /// An address family, or a state, that this program does not know.
    #[error("unknown {what} {value} in a socket's row")]
    Unknown {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u8,
    },
}

/// One message of a reply.
#[derive(Debug)]
pub(super) enum Message<'a> {
    /// A socket.
    Socket(Diag<'a>),
    /// The end of a dump, with its error number (0: none).
    Done(i32),
    /// The kernel's answer to a request it did not like (or an acknowledgement, 0).
    Error(i32),
    /// The kernel lost messages.
    Overrun,
    /// Something else.
    Other,
}

/// A message's frame: what the header says beside the type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub(super) sequence: u32,
    /// The table changed while it was dumped (NLM_F_DUMP_INTR): rows may be missing or double.
    pub(super) interrupted: bool,
}

/// Splits a datagram into its messages; ends after the first error.
pub(super) struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    pub(super) fn new(datagram: &'a [u8]) -> Messages<'a> {
        Messages { rest: datagram }
    }

    fn split(&mut self) -> Result<(Frame, Message<'a>), WireError> {
        let left = self.rest.len();
        let claimed = if left < HEADER { HEADER } else { u32_at(self.rest, 0) as usize };
        if claimed < HEADER || claimed > left {
            self.rest = &[];
            return Err(WireError::Truncated { claimed, left });
        }
        let (message, _) = self.rest.split_at(claimed);
        self.rest = self.rest.get(align(claimed)..).unwrap_or(&[]);
        let kind = u16_at(message, 4);
        let frame = Frame { sequence: u32_at(message, 8), interrupted: u16_at(message, 6) & 0x10 != 0 };
        let payload = &message[HEADER..];
        let errno = |payload: &[u8]| {
            let bytes = payload.get(..4).ok_or(WireError::Short { kind, len: payload.len() })?;
            Ok(i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let message = match i32::from(kind) {
            libc::NLMSG_ERROR => Message::Error(errno(payload)?),
            // A kernel may leave the number out; the dump then ended well.
            libc::NLMSG_DONE => Message::Done(errno(payload).unwrap_or(0)),
            libc::NLMSG_OVERRUN => Message::Overrun,
            _ if kind == SOCK_DIAG_BY_FAMILY => {
                if payload.len() < DIAG_MESSAGE {
                    return Err(WireError::Short { kind, len: payload.len() });
                }
                Message::Socket(Diag { bytes: payload })
            }
            _ => Message::Other,
        };
        Ok((frame, message))
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<(Frame, Message<'a>), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = self.split();
        if item.is_err() {
            self.rest = &[];
        }
        Some(item)
    }
}

/// `struct inet_diag_msg` and its attributes.
#[derive(Debug)]
pub(super) struct Diag<'a> {
    bytes: &'a [u8],
}

impl Diag<'_> {
    pub(super) fn row(&self) -> Result<Row, WireError> {
        let b = self.bytes;
        let state = State::from_kernel(b[1]).ok_or(WireError::Unknown { what: "state", value: b[1] })?;
        let scope = u32_at(b, 40);
        Ok(Row {
            state: state.shown(),
            flow: Flow { local: address(b, b[0], 4, 8, scope)?, peer: address(b, b[0], 6, 24, scope)? },
            cookie: Some(u64::from(u32_at(b, 44)) | u64::from(u32_at(b, 48)) << 32),
            timer: b[2],
            retransmits: b[3],
            expires: Duration::from_millis(u32_at(b, 52).into()),
            receive_queue: u32_at(b, 56),
            send_queue: Some(u32_at(b, 60)),
            inode: u32_at(b, 68),
            last_ack: None,
        })
    }

    /// The last TCP_INFO, where the message carries one.
    pub(super) fn tcp_info(&self) -> Option<TcpInfo> {
        TcpInfo::parse(self.attribute(INET_DIAG_INFO)?)
    }

    /// Whether the socket is TCP; a destroy event names its protocol, a row of a dump need not.
    pub(super) fn is_tcp(&self) -> bool {
        self.attribute(INET_DIAG_PROTOCOL).is_none_or(|p| p.first() == Some(&(libc::IPPROTO_TCP as u8)))
    }

    fn attribute(&self, wanted: u16) -> Option<&[u8]> {
        let mut rest = self.bytes.get(DIAG_MESSAGE..)?;
        while rest.len() >= 4 {
            let len = usize::from(u16_at(rest, 0));
            if len < 4 || len > rest.len() {
                return None;
            }
            if u16_at(rest, 2) == wanted {
                return Some(&rest[4..len]);
            }
            rest = rest.get(align(len)..)?;
        }
        None
    }
}

fn address(b: &[u8], family: u8, port: usize, ip: usize, scope: u32) -> Result<SocketAddr, WireError> {
    let port = u16::from_be_bytes([b[port], b[port + 1]]);
    match i32::from(family) {
        libc::AF_INET => Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(b[ip], b[ip + 1], b[ip + 2], b[ip + 3])), port)),
        libc::AF_INET6 => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&b[ip..ip + 16]);
            Ok(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope)))
        }
        _ => Err(WireError::Unknown { what: "address family", value: family }),
    }
}

/// Asks for every socket of `family` in the states of `mask` that passes `bytecode` (empty: all), with its TCP_INFO if
/// `info`.
pub(super) fn dump_request(family: u8, mask: u32, info: bool, bytecode: &[u8], sequence: u32) -> Vec<u8> {
    let mut request = request(family, mask, (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16, sequence);
    if info {
        // idiag_ext, right after family and protocol.
        request[EXTENSIONS] = 1 << (INET_DIAG_INFO - 1);
    }
    request.extend_from_slice(&[0; 48]);
    if !bytecode.is_empty() {
        request.extend_from_slice(&((bytecode.len() + 4) as u16).to_ne_bytes());
        request.extend_from_slice(&INET_DIAG_REQ_BYTECODE.to_ne_bytes());
        request.extend_from_slice(bytecode);
    }
    finish(request)
}

/// Asks for the one socket with these addresses and this cookie. Without the right cookie the kernel would answer
/// with the listener.
pub(super) fn lookup_request(flow: &Flow, cookie: u64, sequence: u32) -> Vec<u8> {
    let (family, scope) = match flow.local {
        SocketAddr::V4(_) => (libc::AF_INET as u8, 0),
        SocketAddr::V6(local) => (libc::AF_INET6 as u8, local.scope_id()),
    };
    let mut request = request(family, u32::MAX, libc::NLM_F_REQUEST as u16, sequence);
    request.extend_from_slice(&flow.local.port().to_be_bytes());
    request.extend_from_slice(&flow.peer.port().to_be_bytes());
    for ip in [flow.local.ip(), flow.peer.ip()] {
        match ip {
            IpAddr::V4(ip) => {
                request.extend_from_slice(&ip.octets());
                request.extend_from_slice(&[0; 12]);
            }
            IpAddr::V6(ip) => request.extend_from_slice(&ip.octets()),
        }
    }
    request.extend_from_slice(&scope.to_ne_bytes());
    request.extend_from_slice(&(cookie as u32).to_ne_bytes());
    request.extend_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    finish(request)
}

fn request(family: u8, mask: u32, flags: u16, sequence: u32) -> Vec<u8> {
    let mut request = Vec::with_capacity(128);
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&sequence.to_ne_bytes());
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend_from_slice(&mask.to_ne_bytes());
    request
}

/// Where `idiag_ext` is in a request: after `struct nlmsghdr`, family and protocol.
const EXTENSIONS: usize = 18;

fn finish(mut request: Vec<u8>) -> Vec<u8> {
    let len = request.len() as u32;
    request[..4].copy_from_slice(&len.to_ne_bytes());
    request
}

const BC_JUMP: u8 = 1;
const BC_LOCAL_PORT_AT_LEAST: u8 = 2;
const BC_LOCAL_PORT_AT_MOST: u8 = 3;
const BC_REMOTE_PORT_AT_LEAST: u8 = 4;
const BC_REMOTE_PORT_AT_MOST: u8 = 5;

/// One comparison takes two operations of 4 bytes, the second only to hold the port.
const COMPARE: u8 = 8;
const CLAUSE: usize = 16;
const JUMP: usize = 4;
/// The kernel checks a program in quadratic time: 0.4 ms a dump for 300 ports, 39 ms for 3,000. Beyond this many it
/// is cheaper to pass over what comes.
pub(super) const MAX_PORTS: usize = 300;

/// The kernel's filter program (`inet_diag_bc_run`) for "local port is one of these, or remote port one of those". A
/// program is accepted where it runs to its exact end, and refused where it jumps 4 bytes past it. `None` when there
/// are too many ports for one program: the caller then filters what comes.
pub(super) fn port_filter(local: &[u16], remote: &[u16]) -> Option<Vec<u8>> {
    if local.len() + remote.len() > MAX_PORTS {
        return None;
    }
    let clauses: Vec<(u8, u8, u16)> = local
        .iter()
        .map(|port| (BC_LOCAL_PORT_AT_LEAST, BC_LOCAL_PORT_AT_MOST, *port))
        .chain(remote.iter().map(|port| (BC_REMOTE_PORT_AT_LEAST, BC_REMOTE_PORT_AT_MOST, *port)))
        .collect();
    let total = clauses.len() * (CLAUSE + JUMP) - JUMP.min(clauses.len() * JUMP);
    let mut program = Vec::with_capacity(total);
    let mut op = |code: u8, yes: u8, no: usize| {
        program.push(code);
        program.push(yes);
        program.extend_from_slice(&(no as u16).to_ne_bytes());
    };
    for (i, (at_least, at_most, port)) in clauses.iter().enumerate() {
        let start = i * (CLAUSE + JUMP);
        let last = i + 1 == clauses.len();
        // Not this port: on to the next clause, or out.
        let miss = if last { total + 4 - start } else { CLAUSE + JUMP };
        op(*at_least, COMPARE, miss);
        op(0, 0, usize::from(*port));
        op(*at_most, COMPARE, miss - usize::from(COMPARE));
        op(0, 0, usize::from(*port));
        if !last {
            op(BC_JUMP, JUMP as u8, total - (start + CLAUSE));
        }
    }
    Some(program)
}

fn align(len: usize) -> usize {
    (len + 3) & !3
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::StateSet;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::ops::RangeInclusive;

    // What Linux 6.18 on x86_64 answered (netlink speaks the machine's byte order) to a program without privileges in a
    // network namespace of its own. A file holds the datagrams of one reply, one after the other.
    const DUMP_V4: &[u8] = include_bytes!("recorded/dump_v4.bin");
    const DUMP_V6: &[u8] = include_bytes!("recorded/dump_v6.bin");
    const LOOKUP: &[u8] = include_bytes!("recorded/lookup.bin");
    const GONE: &[u8] = include_bytes!("recorded/gone.bin");
    const DESTROYED: &[u8] = include_bytes!("recorded/destroyed.bin");
    const DESTROYED_UDP: &[u8] = include_bytes!("recorded/destroyed_udp.bin");
    /// TCP_INFO in the first event of `DESTROYED`, which ends with it.
    const INFO: std::ops::Range<usize> = 16 + 72 + 8 + 4..380;
    const RECORDINGS: [&[u8]; 6] = [DUMP_V4, DUMP_V6, LOOKUP, GONE, DESTROYED, DESTROYED_UDP];

    /// All that a caller can learn from one message.
    #[derive(Debug, PartialEq)]
    struct Fact {
        sequence: u32,
        interrupted: bool,
        said: Said,
    }

    #[derive(Debug, PartialEq)]
    #[expect(clippy::large_enum_variant, reason = "in tests only")]
    enum Said {
        Socket { row: Result<Row, WireError>, info: Option<TcpInfo>, is_tcp: bool },
        Done(i32),
        Error(i32),
        Overrun,
        Other,
    }

    /// Reads everything in `bytes` and checks what must hold whatever the bytes are. Bounded: an endless reply fails.
    fn facts(bytes: &[u8]) -> Vec<Result<Fact, WireError>> {
        let most = bytes.len() / 16 + 1;
        let facts: Vec<_> = Messages::new(bytes).take(most + 1).map(|item| item.map(fact)).collect();
        assert!(facts.len() <= most, "more than {most} messages in {} bytes", bytes.len());
        for (i, fact) in facts.iter().enumerate() {
            match fact {
                Ok(Fact { said: Said::Socket { row: Ok(row), .. }, .. }) => {
                    assert_ne!(row.state, State::NewSynRecv, "users see SYN_RECV");
                    assert_eq!(row.flow.local.is_ipv4(), row.flow.peer.is_ipv4());
                }
                Ok(Fact { said: Said::Socket { row: Err(e), .. }, .. }) => match e {
                    WireError::Unknown { what: "state", value } => assert!(!(1..=12).contains(value), "{e}"),
                    WireError::Unknown { what: "address family", value } => assert!(![2, 10].contains(value), "{e}"),
                    _ => panic!("a row's error is {e:?}"),
                },
                Ok(_) => {}
                Err(e) => {
                    assert_eq!(i + 1, facts.len(), "nothing is read after {e}");
                    match *e {
                        WireError::Truncated { claimed, left } => {
                            assert!(left <= bytes.len() && (claimed > left || claimed < 16), "{e}");
                        }
                        WireError::Short { kind: 20, len } => assert!(len < 72, "{e}"),
                        WireError::Short { kind: 2, len } => assert!(len < 4, "{e}"),
                        _ => panic!("a message's error is {e:?}"),
                    }
                }
            }
        }
        facts
    }

    fn fact((frame, message): (Frame, Message<'_>)) -> Fact {
        let said = match message {
            Message::Socket(diag) => Said::Socket { row: diag.row(), info: diag.tcp_info(), is_tcp: diag.is_tcp() },
            Message::Done(errno) => Said::Done(errno),
            Message::Error(errno) => Said::Error(errno),
            Message::Overrun => Said::Overrun,
            Message::Other => Said::Other,
        };
        Fact { sequence: frame.sequence, interrupted: frame.interrupted, said }
    }

    /// The one thing that is said in `bytes`.
    fn only(bytes: &[u8]) -> Said {
        let mut facts = facts(bytes);
        assert_eq!(facts.len(), 1, "{facts:?}");
        facts.remove(0).unwrap().said
    }

    fn only_row(bytes: &[u8]) -> Result<Row, WireError> {
        match only(bytes) {
            Said::Socket { row, .. } => row,
            other => panic!("no socket but {other:?}"),
        }
    }

    fn flow(local: &str, peer: &str) -> Flow {
        Flow { local: local.parse().unwrap(), peer: peer.parse().unwrap() }
    }

    fn patched(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    }

    /// State, addresses, cookie, timer, its milliseconds, receive queue, send queue.
    type Expected<'a> = (State, &'a str, &'a str, u64, u8, RangeInclusive<u64>, u32, u32);

    const NEVER: RangeInclusive<u64> = 0..=0;
    const A_MINUTE: RangeInclusive<u64> = 59_000..=60_000;
    /// The first timeout of a SYN+ACK (RFC 6298 section 2.1).
    const A_SECOND: RangeInclusive<u64> = 900..=1_000;
    /// The shortest timeout of a retransmission, TCP_RTO_MIN.
    const A_FIFTH: RangeInclusive<u64> = 100..=200;

    fn assert_dump(recording: &[u8], sequence: u32, expected: &[Expected<'_>]) {
        let mut facts = facts(recording);
        assert_eq!(facts.pop(), Some(Ok(Fact { sequence, interrupted: false, said: Said::Done(0) })));
        assert_eq!(facts.len(), expected.len());
        for (fact, expected) in facts.into_iter().zip(expected) {
            let fact = fact.unwrap();
            assert_eq!((fact.sequence, fact.interrupted), (sequence, false));
            let Said::Socket { row, info, is_tcp } = fact.said else { panic!("{fact:?}") };
            assert_eq!((info, is_tcp), (None, true), "a dump's rows carry no TCP_INFO and need not name TCP");
            assert_row(&row.unwrap(), expected);
        }
    }

    fn assert_row(row: &Row, (state, local, peer, cookie, timer, expires, receive, send): &Expected<'_>) {
        assert_eq!((row.state, row.flow), (*state, flow(local, peer)));
        assert_eq!((row.cookie, row.timer), (Some(*cookie), *timer), "{row:?}");
        assert!(expires.contains(&(row.expires.as_millis() as u64)), "{row:?}");
        assert_eq!((row.receive_queue, row.send_queue), (*receive, Some(*send)), "{row:?}");
    }

    #[test]
    fn a_recorded_ipv4_dump() {
        use State::*;
        // The filter named local ports 7007 and 7008 and remote port 7007; port 7009 had connections, too.
        let (server, deferring, anybody) = ("127.0.0.1:7007", "127.0.0.1:7008", "0.0.0.0:0");
        assert_dump(
            DUMP_V4,
            1,
            &[
                // Two connections wait for accept(2) in a queue of 128.
                (Listen, server, anybody, 4126, 0, NEVER, 2, 128),
                (Listen, deferring, anybody, 4127, 0, NEVER, 0, 16),
                // The third segment was lost; the client does not know.
                (SynRecv, server, "127.0.0.1:40009", 4128, 1, A_SECOND, 0, 0),
                // 5 bytes not read; then 7 that the network lost.
                (Established, server, "127.0.0.1:40001", 4129, 0, NEVER, 5, 0),
                (Established, "127.0.0.1:40001", server, 4130, 1, A_FIFTH, 0, 7),
                // After shutdown(2) the socket stays; after close(2) a minisocket stands in for it.
                (FinWait2, "127.0.0.1:40002", server, 4131, 0, NEVER, 0, 0),
                (FinWait2, "127.0.0.1:40003", server, 4132, 3, A_MINUTE, 0, 0),
                (TimeWait, "127.0.0.1:40004", server, 4133, 3, A_MINUTE, 0, 0),
                (Established, "127.0.0.1:40005", server, 4134, 0, NEVER, 0, 0),
                (Established, "127.0.0.1:40006", server, 4135, 0, NEVER, 0, 0),
                (Established, "127.0.0.1:40009", server, 4136, 0, NEVER, 0, 0),
                // TCP_DEFER_ACCEPT: the third segment came and was put aside. The client's own row is filtered out.
                (SynRecv, deferring, "127.0.0.1:40008", 4137, 1, A_SECOND, 0, 0),
                (Established, server, "127.0.0.1:40006", 4138, 0, NEVER, 0, 0),
                // The FIN counts one.
                (CloseWait, server, "127.0.0.1:40003", 4139, 0, NEVER, 1, 0),
                (CloseWait, server, "127.0.0.1:40002", 4140, 0, NEVER, 1, 0),
                (Established, server, "127.0.0.1:40005", 4141, 0, NEVER, 0, 0),
            ],
        );
    }

    #[test]
    fn a_recorded_ipv6_dump_has_mapped_addresses_and_scopes() {
        use State::*;
        let mapped = "[::ffff:127.0.0.1]:7007";
        assert_dump(
            DUMP_V6,
            4,
            &[
                (Listen, "[::]:7007", "[::]:0", 4142, 0, NEVER, 0, 128),
                (SynRecv, mapped, "[::ffff:127.0.0.1]:41005", 4148, 1, A_SECOND, 0, 0),
                (Established, "[fe80::7%3]:41004", "[fe80::7%3]:7007", 4146, 0, NEVER, 0, 0),
                (Established, "[fe80::7%3]:7007", "[fe80::7%3]:41004", 4147, 0, NEVER, 0, 0),
                (Established, mapped, "[::ffff:127.0.0.1]:41001", 4143, 0, NEVER, 3, 0),
                (CloseWait, "[::1]:7007", "[::1]:41003", 4145, 0, NEVER, 1, 0),
                (TimeWait, mapped, "[::ffff:127.0.0.1]:41002", 4149, 3, A_MINUTE, 0, 0),
                (FinWait2, "[::1]:41003", "[::1]:7007", 4144, 0, NEVER, 0, 0),
            ],
        );
    }

    #[test]
    fn a_recorded_lookup_is_one_row_without_an_end() {
        let expected = (State::CloseWait, "127.0.0.1:7007", "127.0.0.1:40002", 4140, 0, NEVER, 1, 0);
        assert_row(&only_row(LOOKUP).unwrap(), &expected);
        assert_eq!(facts(LOOKUP)[0].as_ref().unwrap().sequence, 2);
    }

    #[test]
    fn a_recorded_lookup_with_another_cookie_is_enoent() {
        let gone = Fact { sequence: 3, interrupted: false, said: Said::Error(-libc::ENOENT) };
        assert_eq!(facts(GONE), [Ok(gone)]);
    }

    #[test]
    fn recorded_destroy_events_carry_the_last_tcp_info() {
        let ends = [
            // The end that closed first, freed when a TIME_WAIT minisocket took over. Its SYN was acknowledged, too.
            (("127.0.0.1:42001", "127.0.0.1:7010", 4151), (2551, 12, 14, 4)),
            (("127.0.0.1:7010", "127.0.0.1:42001", 4150), (20, 14, 11, 6)),
        ];
        let facts = facts(DESTROYED);
        assert_eq!(facts.len(), ends.len());
        for (fact, ((local, peer, cookie), (rtt, acked, received, segments))) in facts.into_iter().zip(ends) {
            let Said::Socket { row, info, is_tcp } = fact.unwrap().said else { panic!("no socket") };
            assert_row(&row.unwrap(), &(State::Close, local, peer, cookie, 0, NEVER, 1, 0));
            assert!(is_tcp);
            let info = info.unwrap();
            assert_eq!((info.state, info.rtt), (State::Close, Duration::from_micros(rtt)));
            assert_eq!((info.retransmits, info.bytes_acked, info.bytes_received), (0, acked, received));
            assert_eq!((info.segments_in, info.data_segments_in), (Some(segments), Some(1)));
        }
    }

    #[test]
    fn a_recorded_destroy_event_of_udp_is_not_tcp() {
        let Said::Socket { row, info, is_tcp } = only(DESTROYED_UDP) else { panic!("no socket") };
        assert_eq!((row.unwrap().cookie, info, is_tcp), (Some(4152), None, false));
    }

    #[test]
    fn a_cookie_is_two_words() {
        let cookie = 0x0123_4567_89ab_cdef_u64;
        let row = only_row(&patched(LOOKUP, 16 + 44, &cookie.to_ne_bytes())).unwrap();
        assert_eq!(row, Row { cookie: Some(cookie), ..only_row(LOOKUP).unwrap() });
    }

    #[test]
    fn states_and_families_that_are_not_known_are_errors() {
        for value in 0..=u8::MAX {
            let state = only_row(&patched(LOOKUP, 16 + 1, &[value])).map(|row| row.state);
            let expected = State::from_kernel(value).map(State::shown);
            assert_eq!(state, expected.ok_or(WireError::Unknown { what: "state", value }));
            let v4 = only_row(&patched(LOOKUP, 16, &[value])).map(|row| row.flow.local.is_ipv4());
            assert_eq!(
                v4,
                match value {
                    2 => Ok(true),
                    10 => Ok(false),
                    _ => Err(WireError::Unknown { what: "address family", value }),
                }
            );
        }
    }

    #[test]
    fn the_other_messages() {
        let of_kind = |kind: i32| patched(GONE, 4, &(kind as u16).to_ne_bytes());
        assert_eq!(only(&of_kind(libc::NLMSG_OVERRUN)), Said::Overrun);
        assert_eq!(only(&of_kind(libc::NLMSG_NOOP)), Said::Other);
        assert_eq!(only(&of_kind(libc::NLMSG_DONE)), Said::Done(-libc::ENOENT), "a dump may fail at its end");
        assert_eq!(only(&message(3, 1, &[], None)), Said::Done(0), "a kernel may leave the number out");
        let interrupted = facts(&patched(LOOKUP, 6, &[libc::NLM_F_DUMP_INTR as u8]));
        assert!(interrupted[0].as_ref().unwrap().interrupted);
    }

    #[test]
    fn a_message_begins_where_the_one_before_it_is_padded_to() {
        for len in 0..=8 {
            let two = [message(1, 0, &vec![0xff; len], None), message(3, 7, &[], None)].concat();
            let last = Fact { sequence: 7, interrupted: false, said: Said::Done(0) };
            assert_eq!(facts(&two)[1..], [Ok(last)], "{len}");
        }
    }

    #[test]
    fn truncated_at_every_length_is_the_messages_before_and_a_typed_error() {
        for recording in RECORDINGS {
            let whole = facts(recording);
            let starts = starts(recording);
            for len in 0..recording.len() {
                let mut cut = facts(&recording[..len]);
                // A cut between two messages cannot be noticed.
                if !starts.contains(&len) {
                    let start = starts.iter().rfind(|start| **start < len).unwrap();
                    let left = len - start;
                    let e = cut.pop().unwrap().unwrap_err();
                    assert!(matches!(e, WireError::Truncated { left: l, .. } if l == left), "{len}: {e:?}");
                }
                let complete = starts.iter().filter(|start| **start <= len).count() - 1;
                assert_eq!(cut, whole[..complete], "{len}");
            }
        }
    }

    #[test]
    fn a_message_that_is_honestly_short_is_what_it_holds_or_a_typed_error() {
        for recording in RECORDINGS {
            let starts = starts(recording);
            for whole in starts.windows(2).map(|ends| &recording[ends[0]..ends[1]]) {
                let kind = whole[4];
                for len in 16..whole.len() {
                    let shorter = patched(&whole[..len], 0, &(len as u32).to_ne_bytes());
                    let short = Err(WireError::Short { kind: kind.into(), len: len - 16 });
                    match (kind, facts(&shorter).remove(0)) {
                        (20, fact) if len < 88 => assert_eq!(fact, short),
                        (2, fact) if len < 20 => assert_eq!(fact, short),
                        (20, fact) => {
                            let Said::Socket { row, info, .. } = fact.unwrap().said else { panic!("no socket") };
                            assert_eq!(row, only_row(whole));
                            assert_eq!(info, None, "the last attribute is cut");
                        }
                        (_, fact) => assert_eq!(fact.unwrap().said, only(whole)),
                    }
                }
            }
        }
    }

    #[test]
    fn a_message_of_impossible_length_ends_the_reply() {
        let honest = message(3, 0, &[], None);
        for claimed in (0..16).chain([17 + honest.len() as u32, u32::MAX]) {
            let reply = [honest.clone(), message(3, 0, &[], Some(claimed)), honest.clone()].concat();
            let facts = facts(&reply);
            assert_eq!(facts.len(), 2, "{claimed}");
            let left = 2 * honest.len();
            assert_eq!(facts[1], Err(WireError::Truncated { claimed: claimed as usize, left }));
        }
    }

    #[test]
    fn an_attribute_of_impossible_length_ends_the_search() {
        let event = &DESTROYED[..INFO.end];
        let found = |lie| {
            let attributes = [attribute(99, &[1], lie), attribute(INET_DIAG_INFO, &event[INFO], None)].concat();
            match only(&message(20, 0, &[&event[16..16 + 72], &attributes].concat(), None)) {
                Said::Socket { row, info, .. } => (row == only_row(event), info.is_some()),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(found(None), (true, true));
        for lie in [0, 1, 2, 3, 1000, u16::MAX] {
            assert_eq!(found(Some(lie)), (true, false), "{lie}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_a_typed_error(bytes in vec(any::<u8>(), 0..600)) {
            facts(&bytes);
        }

        #[test]
        fn any_change_to_a_recorded_byte_is_messages_or_a_typed_error(
            recording in 0..RECORDINGS.len(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let recording = RECORDINGS[recording];
            facts(&patched(recording, at.index(recording.len()), &[byte]));
        }

        #[test]
        fn any_lengths_are_messages_or_a_typed_error(messages in vec(any_message(true), 1..6)) {
            facts(&messages.iter().map(Built::bytes).collect::<Vec<_>>().concat());
        }

        #[test]
        fn any_sockets_read_as_they_were_written(messages in vec(any_message(false), 1..6)) {
            let facts = facts(&messages.iter().map(Built::bytes).collect::<Vec<_>>().concat());
            prop_assert_eq!(facts, messages.iter().map(|message| Ok(message.fact())).collect::<Vec<_>>());
        }
    }

    /// A socket's message that the kernel could send; or, with lies in it, could not.
    #[derive(Debug)]
    struct Built {
        sequence: u32,
        row: Row,
        kernel_state: u8,
        scope: u32,
        attributes: Vec<(u16, Vec<u8>, Option<u16>)>,
        lie: Option<u32>,
    }

    impl Built {
        fn bytes(&self) -> Vec<u8> {
            let Flow { local, peer } = self.row.flow;
            let family = if local.is_ipv4() { 2 } else { 10 };
            let mut body = vec![family, self.kernel_state, self.row.timer, self.row.retransmits];
            body.extend(local.port().to_be_bytes());
            body.extend(peer.port().to_be_bytes());
            for ip in [local.ip(), peer.ip()] {
                match ip {
                    IpAddr::V4(ip) => body.extend([&ip.octets()[..], &[0; 12]].concat()),
                    IpAddr::V6(ip) => body.extend(ip.octets()),
                }
            }
            body.extend(self.scope.to_ne_bytes());
            body.extend(self.row.cookie.unwrap().to_ne_bytes());
            let millis = self.row.expires.as_millis() as u32;
            for word in [millis, self.row.receive_queue, self.row.send_queue.unwrap(), 0, self.row.inode] {
                body.extend(word.to_ne_bytes());
            }
            for (kind, value, lie) in &self.attributes {
                body.extend(attribute(*kind, value, *lie));
            }
            message(20, self.sequence, &body, self.lie)
        }

        fn fact(&self) -> Fact {
            let value = |wanted| self.attributes.iter().find(|a| a.0 == wanted).map(|a| &a.1[..]);
            let said = Said::Socket {
                row: Ok(self.row),
                info: value(INET_DIAG_INFO).and_then(TcpInfo::parse),
                is_tcp: value(INET_DIAG_PROTOCOL).is_none_or(|protocol| protocol.first() == Some(&6)),
            };
            Fact { sequence: self.sequence, interrupted: false, said }
        }
    }

    fn any_message(lying: bool) -> impl Strategy<Value = Built> {
        let kind = prop_oneof![Just(INET_DIAG_INFO), Just(INET_DIAG_PROTOCOL), any::<u16>()];
        let value = prop_oneof![vec(any::<u8>(), 0..12), Just(DESTROYED[INFO].to_vec())];
        let lie = move |up_to: u32| {
            let lie = prop_oneof![0..up_to, any::<u32>()];
            if lying { prop::option::of(lie).boxed() } else { Just(None).boxed() }
        };
        let attribute = (kind, value, lie(32)).prop_map(|(kind, value, lie)| (kind, value, lie.map(|lie| lie as u16)));
        let id = (any::<bool>(), any::<[[u8; 16]; 2]>(), any::<[u16; 2]>(), any::<u32>());
        let rest = (1..=12_u8, any::<u64>(), any::<[u8; 2]>(), any::<[u32; 4]>());
        (any::<u32>(), id, rest, vec(attribute, 0..4), lie(400)).prop_map(
            |(
                sequence,
                (v4, ips, ports, scope),
                (kernel_state, cookie, [timer, retransmits], words),
                attributes,
                lie,
            )| {
                let [local, peer] = [0, 1].map(|end| {
                    let (ip, port): ([u8; 16], u16) = (ips[end], ports[end]);
                    if v4 {
                        SocketAddr::from(([ip[0], ip[1], ip[2], ip[3]], port))
                    } else {
                        SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope))
                    }
                });
                let row = Row {
                    state: State::from_kernel(kernel_state).unwrap().shown(),
                    flow: Flow { local, peer },
                    cookie: Some(cookie),
                    timer,
                    retransmits,
                    expires: Duration::from_millis(words[0].into()),
                    receive_queue: words[1],
                    send_queue: Some(words[2]),
                    inode: words[3],
                    last_ack: None,
                };
                Built { sequence, row, kernel_state, scope, attributes, lie }
            },
        )
    }

    /// `struct nlmsghdr`, the body, and padding; the lie takes the place of the true length.
    fn message(kind: u16, sequence: u32, body: &[u8], lie: Option<u32>) -> Vec<u8> {
        let mut bytes = lie.unwrap_or(16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// `struct nlattr`, the value, and padding.
    fn attribute(kind: u16, value: &[u8], lie: Option<u16>) -> Vec<u8> {
        let mut bytes = lie.unwrap_or(4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// Where the messages of a recording begin, and where the last one ends.
    fn starts(recording: &[u8]) -> Vec<usize> {
        let mut starts = vec![0];
        while *starts.last().unwrap() < recording.len() {
            let start = *starts.last().unwrap();
            let len = u32::from_ne_bytes(recording[start..start + 4].try_into().unwrap()) as usize;
            assert_eq!(len % 4, 0, "the kernel pads the last attribute within the message");
            starts.push(start + len);
        }
        starts
    }

    #[test]
    fn a_dump_request_to_the_byte() {
        let golden = [
            "5c000000 1400 0103 07000000 00000000", // 92 bytes, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP
            "02 06 00 00 40040000",                 // AF_INET, IPPROTO_TCP, LISTEN and TIME_WAIT
            "00000000 00000000 00000000 00000000 00000000 00000000", // any ports and addresses,
            "00000000 00000000 00000000 00000000 00000000 00000000", // any interface, any cookie
            "1400 0100",                            // 20 bytes, INET_DIAG_REQ_BYTECODE
            "02 08 1400  00 00 5f1b  03 08 0c00  00 00 5f1b", // local port >= 7007 and <= 7007
        ];
        let mask = StateSet::of(&[State::Listen, State::TimeWait]).kernel_mask();
        assert_eq!(dump_request(2, mask, false, &port_filter(&[7007], &[]).unwrap(), 7), hex(&golden));
    }

    #[test]
    fn a_dump_request_without_a_filter_has_no_attribute() {
        let golden = [
            "48000000 1400 0103 ffffffff 00000000",
            "0a 06 00 00 fe0f0000", // AF_INET6, every state
            "00000000 00000000 00000000 00000000 00000000 00000000",
            "00000000 00000000 00000000 00000000 00000000 00000000",
        ];
        assert_eq!(dump_request(10, 0xffe, false, &port_filter(&[], &[]).unwrap(), u32::MAX), hex(&golden));
    }

    #[test]
    fn a_lookup_request_to_the_byte() {
        let golden = [
            "48000000 1400 0100 09000000 00000000", // 72 bytes, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST
            "02 06 00 00 ffffffff",                 // AF_INET, IPPROTO_TCP, whatever state
            "1b5f 9c42",                            // ports 7007 and 40002, in network byte order
            "7f000001 00000000 00000000 00000000",
            "0a010203 00000000 00000000 00000000",
            "00000000",
            "efcdab89 67452301", // the cookie, its low word first
        ];
        let flow = flow("127.0.0.1:7007", "10.1.2.3:40002");
        assert_eq!(lookup_request(&flow, 0x0123_4567_89ab_cdef, 9), hex(&golden));
    }

    #[test]
    fn an_ipv6_lookup_request_to_the_byte() {
        let golden = [
            "48000000 1400 0100 0a000000 00000000",
            "0a 06 00 00 ffffffff",
            "a02c 1b5f",
            "fe800000 00000000 00000000 00000007",
            "fe800000 00000000 0102fffe 03040506",
            "03000000", // the scope is the interface
            "efcdab89 67452301",
        ];
        let flow = flow("[fe80::7%3]:41004", "[fe80::102:fffe:304:506%3]:7007");
        assert_eq!(lookup_request(&flow, 0x0123_4567_89ab_cdef, 10), hex(&golden));
    }

    #[test]
    fn a_refusal_repeats_the_request_as_it_was_understood() {
        let flow = flow("127.0.0.1:7007", "127.0.0.1:40002");
        assert_eq!(lookup_request(&flow, 4141, 3), GONE[20..]);
    }

    fn hex(lines: &[&str]) -> Vec<u8> {
        let digits: String = lines.concat().split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn no_ports_are_no_program() {
        assert_eq!(port_filter(&[], &[]), Some(Vec::new()));
    }

    #[test]
    fn as_many_ports_as_fit_are_a_program_and_one_more_is_none() {
        let ports: Vec<u16> = (1..=MAX_PORTS as u16 + 1).map(|n| n * 20).collect();
        let (most, more) = (&ports[..MAX_PORTS], &ports[..]);
        for (local, remote) in [(most, &[][..]), (&[], most), most.split_at(1)] {
            let program = port_filter(local, remote).unwrap();
            assert!(audit(&program));
            for port in [most[0], most[1], most[MAX_PORTS / 2], most[MAX_PORTS - 1]] {
                assert_eq!(accepts(&program, port, 1), local.contains(&port), "{port}");
                assert_eq!(accepts(&program, 1, port), remote.contains(&port), "{port}");
            }
            assert!(!accepts(&program, 1, 1));
            let request = dump_request(2, 0, false, &program, 0);
            assert_eq!(request[72..74], (4 + program.len() as u16).to_ne_bytes(), "the attribute's length fits");
        }
        for (local, remote) in [(more, &[][..]), (&[], more), more.split_at(MAX_PORTS)] {
            assert_eq!(port_filter(local, remote), None);
        }
    }

    proptest! {
        #[test]
        fn a_program_accepts_the_ports_that_are_named_and_no_other(
            local in vec(any_port(), 0..12),
            remote in vec(any_port(), 0..12),
            other in any::<[u16; 2]>(),
        ) {
            let program = port_filter(&local, &remote).unwrap();
            prop_assert_eq!(program.is_empty(), local.is_empty() && remote.is_empty());
            prop_assume!(!program.is_empty());
            prop_assert!(audit(&program));
            let near = local.iter().chain(&remote).flat_map(|p| [p.wrapping_sub(1), *p, p.wrapping_add(1)]);
            let probes: Vec<u16> = near.chain(other).collect();
            for l in &probes {
                for r in &probes {
                    let wanted = local.contains(l) || remote.contains(r);
                    prop_assert_eq!(accepts(&program, *l, *r), wanted, "local {} remote {}", l, r);
                }
            }
        }
    }

    /// Ports near each other and at both ends, so that comparisons meet their neighbours.
    fn any_port() -> impl Strategy<Value = u16> {
        prop_oneof![any::<u16>(), 7000..7010_u16, Just(0), Just(1), Just(u16::MAX)]
    }

    #[test]
    fn the_audit_refuses_what_the_kernel_refuses() {
        let program = port_filter(&[7007], &[80]).unwrap();
        assert!(audit(&program));
        let refused: [(&str, usize, &[u8]); 9] = [
            ("an operation that is none", 0, &[200]),
            ("a comparison without its port", 1, &[4]),
            ("a hit that is not aligned", 1, &[9]),
            ("a hit beyond the end", 1, &[200]),
            ("a miss that skips nothing", 2, &[4]),
            ("a miss that is not aligned", 2, &[22]),
            ("a miss into the middle of a comparison", 2, &[24]),
            ("a miss 8 bytes beyond the end", 2, &[44]),
            ("a jump back", 18, &[0]),
        ];
        for (what, at, with) in refused {
            assert!(!audit(&patched(&program, at, with)), "{what}");
        }
        assert!(!audit(&program[..program.len() - 4]), "a comparison cut in two");
        assert!(!audit(&[]), "no operation at all");
    }

    /// One `struct inet_diag_bc_op`: code, yes, no; and the port that a comparison keeps in the next one's `no`.
    fn operation(program: &[u8], at: usize) -> (u8, usize, usize, u16) {
        let half = |at: usize| program.get(at..at + 2).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
        (program[at], usize::from(program[at + 1]), usize::from(half(at + 2)), half(at + 6))
    }

    /// `inet_diag_bc_audit` for the operations on ports, from the kernel's rules and not from the code above.
    fn audit(program: &[u8]) -> bool {
        let mut at = 0;
        let mut starts = std::collections::HashSet::new();
        let mut misses = Vec::new();
        while at < program.len() {
            let left = program.len() - at;
            let (code, yes, no, _) = operation(program, at);
            let least = match code {
                0 | 1 => 4, // NOP, JMP
                2..=5 => 8, // S_GE, S_LE, D_GE, D_LE
                _ => return false,
            };
            let fits = |offset: usize| (least..=left + 4).contains(&offset) && offset.is_multiple_of(4);
            if left < least || !fits(yes) || (code != 0 && !fits(no)) {
                return false;
            }
            if code != 0 && no < left {
                misses.push(at + no);
            }
            starts.insert(at);
            at += yes;
        }
        // `valid_cc`: within the program, a miss leads to an operation that hits from the beginning lead to.
        at == program.len() && at > 0 && misses.iter().all(|miss| starts.contains(miss))
    }

    /// `inet_diag_bc_run` for the operations on ports.
    fn accepts(program: &[u8], local: u16, remote: u16) -> bool {
        let mut at = 0;
        while at < program.len() {
            let (code, yes, no, port) = operation(program, at);
            let hit = match code {
                0 => true,
                1 => false,
                2 => local >= port,
                3 => local <= port,
                4 => remote >= port,
                5 => remote <= port,
                _ => panic!("operation {code}"),
            };
            at += if hit { yes } else { no };
        }
        at == program.len()
    }
}
