//! How a connection begins: accepted, or connected.

use std::io::{Error, ErrorKind, Result};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Conn;
use crate::afterlife::Afterlife;
use crate::kernel::{TcpInfo, clock, sockopt};
use crate::ledger::Reason;
use crate::tcp::{Cause, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet};

impl Conn {
    /// A connection that accept(2) returned; `local` is its own address where the listener's says it.
    ///
    /// # Errors
    /// When the kernel refuses to say anything about the socket.
    pub fn accepted(
        stream: TcpStream,
        peer: SocketAddr,
        local: Option<SocketAddr>,
        port: u16,
        afterlife: Afterlife,
    ) -> Result<Conn> {
        let at = clock::monotonic();
        let cookie = sockopt::cookie(stream.as_fd())?;
        let local = match local {
            Some(local) => local,
            None => stream.local_addr()?,
        };
        let id = Identity { cookie, role: Role::Server, port, flow: Flow { local, peer } };
        let mut conn = Conn::new(stream, id, Lifecycle::accepted(at), afterlife, at);
        conn.note_accept();
        Ok(conn)
    }

    /// A connection that accept(2) returned and that nobody watches: it is served and counted, and nothing is known of
    /// its states.
    #[must_use]
    pub fn unwatched(stream: TcpStream, peer: SocketAddr, port: u16, afterlife: Afterlife) -> Conn {
        let id = Identity { cookie: 0, role: Role::Server, port, flow: Flow { local: unspecified(peer), peer } };
        let life = Lifecycle::accepted(Duration::ZERO);
        let mut conn = Conn::bare(stream, id, life, afterlife);
        conn.watched = false;
        conn
    }

    /// A connection that accept(2) returned and whose life the kernel announces: it is served, counted and named, and its
    /// states are looked at by nobody here.
    ///
    /// # Errors
    /// When the kernel refuses to say anything about the socket.
    pub fn announced(stream: TcpStream, peer: SocketAddr, port: u16, afterlife: Afterlife) -> Result<Conn> {
        let cookie = sockopt::cookie(stream.as_fd())?;
        let mut conn = Conn::unwatched(stream, peer, port, afterlife);
        conn.cookie = cookie;
        Ok(conn)
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// What connect(2) says. A failed attempt is narrated too, and counted with its reason.
    pub async fn connect(address: SocketAddr, timeout: Duration, afterlife: Afterlife) -> Result<Conn> {
        let conn = Conn::connect_prepared(address, timeout, afterlife, |_| Ok(())).await?;
        // A port of our own choosing that happens to be the target's: two SYNs crossed and we are connected to
        // ourselves (RFC 9293 section 3.5, simultaneous open). Nobody listens there, and an echo would prove nothing.
        if conn.flow().local == conn.flow().peer {
            let mut conn = conn;
            conn.abort(Reason::Refused);
            return Err(ErrorKind::ConnectionRefused.into());
        }
        Ok(conn)
    }

    /// Opens a connection by a socket that `prepare` has bound, filtered or tuned; to itself too, if it is bound so.
    ///
    /// # Errors
    /// What `prepare` or connect(2) says. A failed attempt is narrated too, and counted with its reason.
    pub async fn connect_prepared(
        address: SocketAddr,
        timeout: Duration,
        afterlife: Afterlife,
        prepare: impl FnOnce(&Socket) -> Result<()>,
    ) -> Result<Conn> {
        // Not TcpSocket::connect: between SYN and answer the descriptor must stay ours to look at.
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        let cookie = sockopt::cookie(socket.as_fd())?;
        socket.set_tcp_nodelay(true)?;
        prepare(&socket)?;
        let began = clock::monotonic();
        let connecting = socket.connect(&address.into());
        let at = clock::monotonic();
        let local = socket.local_addr().ok().and_then(|a| a.as_socket()).unwrap_or_else(|| unspecified(address));
        let id = Identity { cookie, role: Role::Client, port: address.port(), flow: Flow { local, peer: address } };
        let failed = match connecting {
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => None,
            // No SYN was sent: no local port, no route, not permitted. The life never began, but the attempt counts.
            Err(e) if !answers_a_syn(&e) => {
                let journal = afterlife.journal();
                journal.count_open(id.role);
                if afterlife.hears_the_kernel() {
                    journal.count_close(id.role, Reason::of(&e));
                } else {
                    journal.open(&id, State::Close, began);
                    journal.close(&id, Reason::of(&e));
                    journal.lose(&id);
                }
                return Err(e);
            }
            done => done.err(),
        };
        let stream = TcpStream::from_std(socket.into())?;
        let mut conn = Conn::new(stream, id, Lifecycle::client(began), afterlife, began);
        conn.error = failed;
        conn.note_connect(began, at);
        if matches!(conn.life.state(), State::Close | State::SynSent | State::SynRecv) && !conn.life.is_over() {
            match tokio::time::timeout(timeout, conn.established()).await {
                Ok(()) => {}
                Err(_elapsed) => conn.give_up(),
            }
        }
        let ended = || Error::from(ErrorKind::NotConnected);
        match conn.error.take().or_else(|| conn.life.is_over().then(ended)) {
            None => Ok(conn),
            Some(e) => {
                conn.reason = Some(Reason::of(&e));
                Err(e)
            }
        }
    }

    fn note_accept(&mut self) {
        let known = Known { cause: Some(Cause::Accept), ..Known::default() };
        match TcpInfo::of(self.stream().as_fd()) {
            Ok(info) if info.state == State::Established => self.record(&info, State::Established, &known),
            Ok(info) => {
                // accept(2) returns connections that were established, whatever has become of them.
                let at = clock::monotonic();
                let transitions = self.life.observe_knowing(at, State::Established, Evidence::Inferred, &known);
                self.publish(&transitions);
                self.see(&info, Known::default());
            }
            Err(error) => tracing::debug!(%error, "TCP_INFO after accept"),
        }
    }

    fn note_connect(&mut self, began: Duration, called: Duration) {
        let known = Known { call: Some((Cause::Connect, began)), ..Known::default() };
        let Ok(info) = TcpInfo::of(self.stream().as_fd()) else { return };
        if info.state == State::Close {
            // Refused within the call: the SYN was sent, or the call had failed otherwise.
            let transitions = self.life.observe_knowing(called, State::SynSent, Evidence::Inferred, &known);
            self.publish(&transitions);
        }
        self.see(&info, known);
    }

    /// Waits until the handshake is over, well or not.
    async fn established(&mut self) {
        loop {
            let ready = self.ready(Interest::WRITABLE).await;
            self.look(Known::default());
            match (self.life.state(), ready) {
                (State::SynSent | State::SynRecv, Ok(_)) => self.clear(Interest::WRITABLE),
                (State::SynSent | State::SynRecv, Err(e)) => return self.error = Some(e),
                _ => return,
            }
        }
    }

    /// Takes the SYN back: shutdown(2) of both directions ends a handshake at once (`inet_shutdown`), and only a
    /// handshake.
    fn give_up(&mut self) {
        let taken_back = SockRef::from(self.stream()).shutdown(Shutdown::Both).is_ok();
        match TcpInfo::of(self.stream().as_fd()) {
            // ENOTCONN: the answer came at this very moment, and it was a no.
            Ok(info) if !taken_back => self.see(&info, Known::default()),
            Ok(info) if info.state == State::Close => {
                let never = StateSet::of(&[State::Established, State::SynRecv]);
                let known = Known { never, cause: Some(Cause::Timeout), ..Known::default() };
                self.record(&info, State::Close, &known);
            }
            // The answer came at this very moment, and it is a connection now; our FIN is out.
            Ok(info) => {
                self.fin_sent = true;
                self.see(&info, Known::default());
            }
            Err(error) => tracing::debug!(%error, "TCP_INFO"),
        }
        self.error.get_or_insert_with(|| ErrorKind::TimedOut.into());
    }
}

/// Whether an error of connect(2) itself can be the answer to a SYN. Every other one came before anything was sent.
fn answers_a_syn(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::ETIMEDOUT))
}

fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], 0)),
    }
}
