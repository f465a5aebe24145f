//! Classic BPF filters on our own sockets (SO_ATTACH_FILTER, socket(7)); they concern no other socket. A filter on a
//! TCP socket sees each segment from the TCP header on; a verdict of 0 drops it, as if the network had lost it.
//!
//! Newer kernels allow them on TCP sockets to CAP_NET_ADMIN only (EPERM otherwise, seen on 6.18): whoever calls these
//! must have something second best.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};

const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
const LOAD_LENGTH: u16 = 0x80; // BPF_LD | BPF_W | BPF_LEN
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u16 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const COPY_TO_X: u16 = 0x07; // BPF_MISC | BPF_TAX
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const JUMP_IF_EQUAL_X: u16 = 0x1d; // BPF_JMP | BPF_JEQ | BPF_X
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const DROP: SockFilter = SockFilter::new(RETURN, 0, 0, 0);
const PASS: SockFilter = SockFilter::new(RETURN, 0, 0, u32::MAX);

/// Offsets in the TCP header (RFC 9293 section 3.1).
const DATA_OFFSET: u32 = 12;
const FLAGS: u32 = 13;
const FIN: u32 = 0x01;
const SYN: u32 = 0x02;
const RST: u32 = 0x04;
const ACK: u32 = 0x10;

/// Which of the segments that arrive at a socket are lost on the way, for a demonstration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// The second of the handshake.
    SynAck,
    /// An ACK without anything else: the third of the handshake, or the answer to a FIN or to data.
    BareAck,
    /// Whatever carries a FIN.
    Fin,
    /// Everything.
    Any,
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Segment::SynAck => "SYN+ACK",
            Segment::BareAck => "bare ACK",
            Segment::Fin => "FIN",
            Segment::Any => "segment",
        })
    }
}

/// Loses these segments on their way to the socket, and to what a listener accepts from now on, which inherits it.
///
/// # Errors
/// What setsockopt(2) says: EPERM without CAP_NET_ADMIN on newer kernels.
pub fn lose(socket: BorrowedFd<'_>, segment: Segment) -> io::Result<()> {
    let flags = SockFilter::new(LOAD_BYTE, 0, 0, FLAGS);
    let only = |mask| SockFilter::new(AND, 0, 0, mask);
    let is = |value| SockFilter::new(JUMP_IF_EQUAL, 0, 1, value);
    let program = match segment {
        Segment::SynAck => vec![flags, only(SYN | ACK), is(SYN | ACK), DROP, PASS],
        Segment::Fin => vec![flags, only(FIN), is(FIN), DROP, PASS],
        Segment::Any => vec![DROP],
        Segment::BareAck => {
            let mut program = vec![flags, only(FIN | SYN | RST | ACK), SockFilter::new(JUMP_IF_EQUAL, 1, 0, ACK), PASS];
            program.extend(without_payload(DROP, PASS));
            program
        }
    };
    SockRef::from(&socket).attach_filter(&program)
}

/// Returns `bare` for segments without payload, whose header is as long as they are, and `loaded` for others.
fn without_payload(bare: SockFilter, loaded: SockFilter) -> [SockFilter; 8] {
    [
        SockFilter::new(LOAD_BYTE, 0, 0, DATA_OFFSET),
        SockFilter::new(AND, 0, 0, 0xf0),
        SockFilter::new(SHIFT_RIGHT, 0, 0, 2),
        SockFilter::new(COPY_TO_X, 0, 0, 0),
        SockFilter::new(LOAD_LENGTH, 0, 0, 0),
        SockFilter::new(JUMP_IF_EQUAL_X, 0, 1, 0),
        bare,
        loaded,
    ]
}

/// Whether filters are permitted here.
///
/// # Errors
/// Why not: EPERM without CAP_NET_ADMIN on newer kernels.
pub fn permitted() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    lose(socket.as_fd(), Segment::Any)
}

/// Lets a listener finish the handshakes it began, and begin no new ones: SYNs are dropped unanswered, so that a peer
/// retries elsewhere or later instead of being accepted by a queue that is about to close.
///
/// # Errors
/// What setsockopt(2) says: EPERM without CAP_NET_ADMIN on newer kernels.
pub fn refuse_new_handshakes(listener: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&listener).attach_filter(&[
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(JUMP_IF_SET, 0, 1, SYN),
        DROP,
        PASS,
    ])
}

/// Takes in no more payload: segments that carry data are dropped unacknowledged, so that the peer keeps and repeats
/// them, while ACKs and FINs still pass. What was acknowledged before is then all that there is to answer.
///
/// # Errors
/// What setsockopt(2) says: EPERM without CAP_NET_ADMIN on newer kernels.
pub fn hold_payload(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).attach_filter(&without_payload(PASS, DROP))
}

/// Takes the filter off again.
///
/// # Errors
/// What setsockopt(2) says.
pub fn remove(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).detach_filter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    #[ignore = "needs CAP_NET_ADMIN"]
    fn held_payload_arrives_after_the_filter_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"before").unwrap();
        hold_payload(server.as_fd()).unwrap();
        client.write_all(b"after").unwrap();
        let mut buf = [0; 64];
        let n = server.read(&mut buf).unwrap();
        assert_eq!(&buf[..n], b"before");
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.read(&mut buf).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        remove(server.as_fd()).unwrap();
        server.set_nonblocking(false).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let n = server.read(&mut buf).unwrap();
        assert_eq!(&buf[..n], b"after", "the peer repeated what was not acknowledged");
    }

    #[test]
    #[ignore = "needs CAP_NET_ADMIN"]
    fn a_closing_listener_keeps_its_queue_and_takes_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let early = TcpStream::connect(address).unwrap();
        refuse_new_handshakes(listener.as_fd()).unwrap();
        let late = TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (_, peer) = listener.accept().unwrap();
        assert_eq!(peer, early.local_addr().unwrap());
    }
}
