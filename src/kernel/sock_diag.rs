//! The socket table by netlink (sock_diag(7)): lookups by cookie, filtered dumps, and the kernel's destroy events.
//!
//! No privilege needed; the own network namespace only. Blocking: not for an async thread.

use std::io;

use tokio::io::unix::AsyncFd;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::error::TableError;
use super::row::{Row, Wanted};
use super::tcp_info::TcpInfo;
use super::wire::{self, Message, Messages};
use crate::tcp::{Flow, State};

/// Holds what one recv(2) of a dump can return (32 KiB), with room; one buffer serves any number of sockets.
const BUFFER: usize = 64 * 1024;

/// SKNLGRP_INET_TCP_DESTROY and SKNLGRP_INET6_TCP_DESTROY (linux/sock_diag.h). What a dual-stack listener accepts over
/// IPv4 is announced on the second.
const TCP_DESTROY_GROUPS: [u32; 2] = [1, 3];

/// A netlink socket that answers questions about TCP sockets.
pub(super) struct SockDiag {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
    families: Vec<u8>,
}

impl SockDiag {
    /// Opens it and asks one question, so that a refusal (seccomp, a kernel without inet_diag) shows now and not at
    /// the first scrape.
    pub(super) fn open() -> Result<SockDiag, TableError> {
        let socket = connect().map_err(|source| TableError::Io { what: "open netlink sock_diag socket", source })?;
        let mut diag = SockDiag { socket, buffer: vec![0; BUFFER], sequence: 0, families: Vec::new() };
        let listening = Wanted::new(crate::tcp::StateSet::of(&[State::Listen]), &[], &[]);
        diag.families.push(libc::AF_INET as u8);
        diag.each(&listening, &mut |_| ())?;
        // A kernel without IPv6 has no table for it; that is not an error, and any other answer is.
        match diag.dump(libc::AF_INET6 as u8, &listening, &mut |_| ()) {
            Ok(_) => diag.families.push(libc::AF_INET6 as u8),
            Err(TableError::Answer(e)) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EAFNOSUPPORT)) => {
                tracing::info!("this kernel has no IPv6 socket table");
            }
            Err(other) => return Err(other),
        }
        Ok(diag)
    }

    /// Calls `row` with every socket that is wanted. Returns whether the table changed under the dump.
    pub(super) fn each(&mut self, wanted: &Wanted, row: &mut impl FnMut(&Row)) -> Result<bool, TableError> {
        let mut interrupted = false;
        for i in 0..self.families.len() {
            interrupted |= self.dump(self.families[i], wanted, row)?;
        }
        Ok(interrupted)
    }

    fn dump(&mut self, family: u8, wanted: &Wanted, row: &mut impl FnMut(&Row)) -> Result<bool, TableError> {
        // Too many ports for the kernel to filter by: it passes all, and we pass over.
        let bytecode = wire::port_filter(&wanted.local, &wanted.remote);
        let (mask, program) = (wanted.states.kernel_mask(), bytecode.as_deref().unwrap_or(&[]));
        self.ask(|sequence| wire::dump_request(family, mask, wanted.info, program, sequence))?;
        let mut interrupted = false;
        loop {
            let len = self.receive()?;
            for message in Messages::new(&self.buffer[..len]) {
                let (frame, message) = message?;
                if frame.sequence != self.sequence {
                    continue; // what an earlier, failed dump left behind
                }
                interrupted |= frame.interrupted;
                match message {
                    Message::Socket(diag) => {
                        let mut found = diag.row()?;
                        if wanted.info {
                            found.last_ack = diag.tcp_info().map(|info| info.last_ack);
                        }
                        if bytecode.is_some() || wanted.wants(&found.flow) {
                            row(&found);
                        }
                    }
                    Message::Done(0) => return Ok(interrupted),
                    Message::Done(errno) | Message::Error(errno) => return Err(TableError::answer(errno)),
                    Message::Overrun => return Err(TableError::Overrun),
                    Message::Other => {}
                }
            }
        }
    }

    /// The socket with these addresses and this cookie, whatever its state; `None` when the kernel has it no more.
    pub(super) fn find(&mut self, flow: &Flow, cookie: u64) -> Result<Option<Row>, TableError> {
        self.ask(|sequence| wire::lookup_request(flow, cookie, sequence))?;
        loop {
            let len = self.receive()?;
            for message in Messages::new(&self.buffer[..len]) {
                let (frame, message) = message?;
                if frame.sequence != self.sequence {
                    continue;
                }
                match message {
                    Message::Socket(diag) => return Ok(Some(diag.row()?)),
                    Message::Error(errno) if errno == -libc::ENOENT => return Ok(None),
                    Message::Error(errno) | Message::Done(errno) => return Err(TableError::answer(errno)),
                    Message::Overrun => return Err(TableError::Overrun),
                    Message::Other => {}
                }
            }
        }
    }

    fn ask(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<(), TableError> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(self.sequence);
        let sent = retry(|| self.socket.send(&request, 0))
            .map_err(|source| TableError::Io { what: "send sock_diag request", source })?;
        if sent == request.len() {
            Ok(())
        } else {
            Err(TableError::Io { what: "send sock_diag request", source: io::ErrorKind::WriteZero.into() })
        }
    }

    fn receive(&mut self) -> Result<usize, TableError> {
        let buffer = &mut self.buffer;
        // MSG_TRUNC: the true length, even when the buffer was too small.
        let len = retry(|| self.socket.recv(&mut &mut buffer[..], libc::MSG_TRUNC))
            .map_err(|source| TableError::Io { what: "receive sock_diag reply", source })?;
        if len > buffer.len() { Err(TableError::Overrun) } else { Ok(len) }
    }
}

fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// A full socket that the kernel has just freed. Not the end of its life: a TIME_WAIT or FIN_WAIT2 minisocket may go
/// on under the same cookie.
#[derive(Clone, Copy, Debug)]
pub struct Destroyed {
    /// SO_COOKIE.
    pub cookie: u64,
    /// Its addresses.
    pub flow: Flow,
    /// The last TCP_INFO.
    pub info: Option<TcpInfo>,
}

/// The kernel's announcements that TCP sockets of this namespace are freed (`sock_diag_broadcast_destroy`).
///
/// Every socket of the namespace is announced while anybody listens, and each announcement costs the kernel a
/// message: listen only while there is something to hear.
pub struct DestroyEvents {
    socket: AsyncFd<Socket>,
    joined: bool,
    buffer: Vec<u8>,
}

impl DestroyEvents {
    /// Opens the socket; nothing is announced before [`join`](Self::join).
    ///
    /// # Errors
    /// When netlink is refused.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O.
    pub fn open() -> io::Result<DestroyEvents> {
        let socket = connect()?;
        socket.set_non_blocking(true)?;
        // A burst of closes must fit: 4 MiB hold about 5,000 events. More than net.core.rmem_max is cut, silently and
        // harmlessly.
        socket.set_rx_buf_sz(4 * 1024 * 1024)?;
        #[allow(unsafe_code)]
        // SAFETY: the descriptor that `as_raw_fd` returns is the one that `socket` owns; it stays the same and open
        // until `AsyncFd` drops it.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(DestroyEvents { socket, joined: false, buffer: vec![0; BUFFER] })
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// What setsockopt(2) says.
    pub fn join(&mut self) -> io::Result<()> {
        if !self.joined {
            // Said first: if the second group is refused, leave() still leaves the first.
            self.joined = true;
            TCP_DESTROY_GROUPS.into_iter().try_for_each(|group| self.socket.get_ref().add_membership(group))?;
        }
        Ok(())
    }

    /// Stops listening.
    ///
    /// # Errors
    /// What setsockopt(2) says.
    pub fn leave(&mut self) -> io::Result<()> {
        if self.joined {
            self.joined = false;
            TCP_DESTROY_GROUPS.into_iter().try_for_each(|group| self.socket.get_ref().drop_membership(group))?;
        }
        Ok(())
    }

    /// Whether events are being announced to us.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.joined
    }

    /// Waits until something is announced.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await.map(|mut guard| guard.clear_ready())
    }

    /// Calls `event` for what is announced by now. Returns whether announcements were lost (the receive buffer was
    /// full): what they said must then be looked up.
    ///
    /// # Errors
    /// When the socket fails, or what came cannot be read.
    pub fn drain(&mut self, mut event: impl FnMut(Destroyed)) -> Result<bool, TableError> {
        let mut lost = false;
        loop {
            let buffer = &mut self.buffer;
            match retry(|| self.socket.get_ref().recv(&mut &mut buffer[..], libc::MSG_TRUNC)) {
                Ok(len) if len > buffer.len() => lost = true,
                Ok(len) => {
                    for message in Messages::new(&buffer[..len]) {
                        match message?.1 {
                            Message::Socket(diag) if diag.is_tcp() => {
                                let row = diag.row()?;
                                let cookie = row.cookie.unwrap_or(0);
                                event(Destroyed { cookie, flow: row.flow, info: diag.tcp_info() });
                            }
                            Message::Overrun => lost = true,
                            _ => {}
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(lost),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(source) => return Err(TableError::Io { what: "receive destroy events", source }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sockopt;
    use crate::tcp::StateSet;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    fn pair(address: &str) -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(("localhost", listener.local_addr().unwrap().port()))
            .or_else(|_| TcpStream::connect(listener.local_addr().unwrap()))
            .unwrap();
        let server = listener.accept().unwrap().0;
        (listener, client, server)
    }

    fn flow(stream: &TcpStream) -> Flow {
        Flow { local: stream.local_addr().unwrap(), peer: stream.peer_addr().unwrap() }
    }

    #[test]
    fn a_dump_with_a_port_filter_shows_both_ends_and_the_listener_and_nothing_else() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let others = pair("127.0.0.1:0");
            let (listener, client, server) = pair(address);
            let port = listener.local_addr().unwrap().port();
            let mut rows = Vec::new();
            let wanted = Wanted::new(StateSet::of(&State::ALL), &[port], &[port]);
            SockDiag::open().unwrap().each(&wanted, &mut |row| rows.push(*row)).unwrap();
            let ours = |row: &&Row| row.flow.local.port() == port || row.flow.peer.port() == port;
            assert_eq!(rows.iter().filter(ours).count(), rows.len(), "{address}: nothing else");
            // An older TIME_WAIT may have had the same port: only what we opened is counted.
            let state = |flow: Flow| rows.iter().find(|row| row.flow == flow).map(|row| row.state);
            assert_eq!(state(flow(&client)), Some(State::Established), "{address}");
            assert_eq!(state(flow(&server)), Some(State::Established), "{address}");
            assert_eq!(rows.iter().filter(|row| row.state == State::Listen).count(), 1, "{address}");
            drop((client, server, others));
        }
    }

    #[test]
    fn many_ports_are_filtered_by_the_kernel_and_too_many_by_us() {
        let (listener, _client, _server) = pair("127.0.0.1:0");
        let port = listener.local_addr().unwrap().port();
        for count in [100, wire::MAX_PORTS, 2000] {
            let many: Vec<u16> = (1..count as u16).chain([port]).collect();
            let wanted = Wanted::new(StateSet::of(&[State::Listen]), &many, &[]);
            assert_eq!(wire::port_filter(&many, &[]).is_some(), count <= wire::MAX_PORTS);
            let mut seen = Vec::new();
            SockDiag::open().unwrap().each(&wanted, &mut |row| seen.push(row.flow.local.port())).unwrap();
            assert!(seen.contains(&port) && seen.iter().all(|p| many.contains(p)), "{count}: {seen:?}");
        }
    }

    #[test]
    fn a_lookup_finds_by_cookie_until_the_kernel_lets_go() {
        let mut diag = SockDiag::open().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let (_listener, client, server) = pair(address);
            let (c, s) = (sockopt::cookie(client.as_fd()).unwrap(), sockopt::cookie(server.as_fd()).unwrap());
            let (client_flow, server_flow) = (flow(&client), flow(&server));
            assert_eq!(diag.find(&client_flow, c).unwrap().unwrap().state, State::Established, "{address}");
            assert_eq!(diag.find(&server_flow, s).unwrap().unwrap().state, State::Established, "{address}");
            assert_eq!(diag.find(&client_flow, c + 1_000_000).unwrap(), None, "another cookie is another socket");
            drop(client);
            assert_eq!(diag.find(&server_flow, s).unwrap().unwrap().state, State::CloseWait, "{address}");
            drop(server);
            let gone = diag.find(&client_flow, c).unwrap().unwrap();
            assert_eq!((gone.state, gone.cookie), (State::TimeWait, Some(c)), "{address}");
            assert!(gone.expires.as_secs() > 50);
            assert_eq!(diag.find(&server_flow, s).unwrap(), None, "{address}");
        }
    }

    #[tokio::test]
    async fn destroy_events_name_the_cookie() {
        let mut events = DestroyEvents::open().unwrap();
        events.join().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let (_listener, client, server) = pair(address);
            let cookies = [&client, &server].map(|end| sockopt::cookie(end.as_fd()).unwrap());
            drop(client);
            drop(server);
            let mut heard = [None; 2];
            while heard.iter().any(Option::is_none) {
                let heard = &mut heard;
                let more = tokio::time::timeout(std::time::Duration::from_secs(30), events.readable()).await;
                more.unwrap_or_else(|_| panic!("{address}: heard {heard:?}")).unwrap();
                let note = |e: Destroyed| {
                    if let Some(end) = cookies.iter().position(|cookie| *cookie == e.cookie) {
                        heard[end] = e.info.map(|info| info.state);
                    }
                };
                events.drain(note).unwrap();
            }
            assert_eq!(heard, [Some(State::Close); 2], "{address}: both ends are freed, whatever stands in for them");
        }
        events.leave().unwrap();
        assert!(!events.is_joined());
    }

    #[tokio::test]
    async fn events_that_do_not_fit_are_known_to_be_lost() {
        let mut events = DestroyEvents::open().unwrap();
        events.socket.get_mut().set_rx_buf_sz(1).unwrap();
        events.join().unwrap();
        for _ in 0..100 {
            pair("127.0.0.1:0");
        }
        let mut heard = 0;
        assert!(events.drain(|_| heard += 1).unwrap(), "200 ends do not fit into the smallest buffer; {heard} heard");
    }
}
