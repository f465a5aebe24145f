//! A listening socket, and accepting from it whatever happens.

mod life;

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::time::Duration;

use prometheus::IntCounter;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::kernel::{clock, filter};
use crate::log::OnceAMinute;
use crate::metrics::ACCEPT_ERRORS;
pub use life::ListenerLife;

/// How a listening socket is made.
#[derive(Clone, Copy, Debug)]
pub struct ListenConfig {
    /// Where.
    pub address: SocketAddr,
    /// How many connections may wait for accept(2); the kernel caps it at `net.core.somaxconn`.
    pub backlog: u32,
    /// Whether several sockets share the port, each with a queue of its own (SO_REUSEPORT).
    pub share_port: bool,
}

/// Binds and listens, without blocking.
///
/// # Errors
/// What the kernel says: the address is in use, not ours, or not permitted.
pub fn listen(config: &ListenConfig) -> io::Result<StdListener> {
    let address = config.address;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // As every server: connections of an earlier run in TIME_WAIT must not keep us from the port (socket(7)).
    socket.set_reuse_address(true)?;
    if config.share_port {
        socket.set_reuse_port(true)?;
    }
    // What is accepted inherits it (`inet_csk_clone_lock` copies the socket), which saves a system call for each.
    // Without it a small answer waits for the ACK of the one before (RFC 896, tcp(7)).
    socket.set_tcp_nodelay(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // One socket for both protocols, whatever net.ipv6.bindv6only says (ipv6(7)).
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(config.backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// Lets a listener that is about to close finish the handshakes it began and begin no new ones: SYNs go unanswered, and
/// their peers try again elsewhere or later. Returns whether that is permitted (CAP_NET_ADMIN).
#[must_use]
pub fn refuse_new(listener: &StdListener) -> bool {
    filter::refuse_new_handshakes(listener.as_fd()).is_ok()
}

/// Counts what accept(2) refuses, and says it once a minute.
pub struct AcceptFaults {
    what: &'static str,
    descriptors: IntCounter,
    memory: IntCounter,
    connection: IntCounter,
    other: IntCounter,
    warned: OnceAMinute,
}

impl AcceptFaults {
    /// For the service called `what`.
    #[must_use]
    pub fn new(what: &'static str, counted: [IntCounter; ACCEPT_ERRORS.len()]) -> AcceptFaults {
        let [descriptors, memory, connection, other] = counted;
        AcceptFaults { what, descriptors, memory, connection, other, warned: OnceAMinute::default() }
    }

    /// Counts an error; returns whether the next try should wait.
    fn note(&self, error: &io::Error) -> bool {
        let (counter, wait) = match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => (&self.descriptors, true),
            Some(libc::ENOBUFS | libc::ENOMEM) => (&self.memory, true),
            // accept(2): errors of the new connection are passed on as accept's own; the next one may be well.
            Some(
                libc::ECONNABORTED
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
                | libc::EPERM,
            ) => (&self.connection, false),
            _ => (&self.other, true),
        };
        counter.inc();
        if let Some(times) = self.warned.due(clock::monotonic()) {
            tracing::warn!(service = self.what, %error, times, "cannot accept; connections wait in the backlog");
        }
        wait
    }
}

/// The next connection. Errors never end it: they are counted, and what could exhaust the machine is waited for,
/// longer each time up to a second.
pub async fn accept(listener: &TcpListener, faults: &AcceptFaults) -> (TcpStream, SocketAddr) {
    let mut pause = Duration::from_millis(10);
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if faults.note(&error) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            Err(_) => {}
        }
    }
}

/// What is left in the accept queue, without waiting; `None` when it is empty. Asks the kernel itself: a readiness
/// flag may lag behind.
///
/// # Errors
/// When accept(2) fails for want of descriptors or memory: those that wait cannot be had now.
pub fn accept_queued(listener: &StdListener, faults: &AcceptFaults) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(true)?;
                return Ok(Some((TcpStream::from_std(stream)?, peer)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if faults.note(&error) => return Err(error),
            Err(_) => {}
        }
    }
}
