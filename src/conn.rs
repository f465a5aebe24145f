//! `Conn`: a TCP stream that narrates its own life. Both roles use it.
//!
//! It reads TCP_INFO when something can have changed (an edge of the descriptor, an own system call, an error), never
//! per message. When it is dropped, the descriptor is closed, counted, and what goes on in the kernel is handed to
//! the follower. Must not know: what the bytes mean.

mod end;
mod io;
mod open;

use std::io::{Error, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::afterlife::Afterlife;
use crate::kernel::{TcpInfo, clock, filter, sockopt};
use crate::ledger::Reason;
use crate::tcp::{Addresses, Cause, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet, Transitions};

/// A TCP connection that narrates its own life.
#[expect(clippy::struct_excessive_bools, reason = "seven independent facts, each of which can be true of any state")]
pub struct Conn {
    stream: Option<TcpStream>,
    afterlife: Afterlife,
    /// SO_COOKIE.
    cookie: u64,
    /// The service's port.
    port: u16,
    addresses: Addresses,
    life: Lifecycle,
    /// `tcpi_segs_in` at the last reading, if every segment counted there had also been processed. The kernel counts
    /// a segment before it takes the socket's lock (`tcp_segs_in`), so a reading may be ahead of the state that it
    /// shows.
    segments_in: Option<u32>,
    /// Payload bytes handed to the kernel, and taken from it.
    sent: u64,
    received: u64,
    /// Smoothed RTT in microseconds, as the kernel has it, and retransmits, at the last reading.
    rtt_us: u32,
    retransmits: u32,
    /// What ended it, read from SO_ERROR before the application asked: reading consumes it.
    error: Option<Error>,
    /// When the descriptor was first seen to read CLOSE after a good end, and what was known then. Boxed, because few
    /// connections at a time have it and all would have to have room for it.
    left: Option<Box<(Duration, Known)>>,
    reason: Option<Reason>,
    fin_sent: bool,
    /// The descriptor reported that the peer sends no more.
    heard_end: bool,
    /// All that the peer sent is read, its FIN included: a read would say 0.
    read_all: bool,
    /// Readiness was cleared although there may be data: the next read asks the kernel itself.
    blind: bool,
    aborted: bool,
    /// A filter keeps payload out.
    held: bool,
    /// Whether its states are observed at all.
    watched: bool,
}

impl Conn {
    fn new(stream: TcpStream, id: Identity, life: Lifecycle, afterlife: Afterlife, at: Duration) -> Conn {
        if !afterlife.hears_the_kernel() {
            afterlife.journal().open(&id, life.state(), at);
        }
        Conn::bare(stream, id, life, afterlife)
    }

    /// Counted, and not entered anywhere.
    fn bare(stream: TcpStream, id: Identity, life: Lifecycle, afterlife: Afterlife) -> Conn {
        afterlife.journal().count_open(id.role);
        Conn {
            stream: Some(stream),
            afterlife,
            cookie: id.cookie,
            port: id.port,
            addresses: Addresses::of(id.flow),
            life,
            segments_in: None,
            sent: 0,
            received: 0,
            rtt_us: 0,
            retransmits: 0,
            error: None,
            left: None,
            reason: None,
            fin_sent: false,
            heard_end: false,
            read_all: false,
            blind: false,
            aborted: false,
            held: false,
            watched: true,
        }
    }

    /// Looks where it is now, whether or not anything said that it moved.
    pub fn observe(&mut self) -> State {
        self.look(Known::default());
        self.life.state()
    }

    /// The socket, to be tuned or filtered while it is open.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream().as_fd()
    }

    /// Whether our FIN is out.
    #[must_use]
    pub fn sent_end(&self) -> bool {
        self.fin_sent
    }

    /// Payload bytes read so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Which end it is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.life.role()
    }

    /// The addresses.
    #[must_use]
    pub fn flow(&self) -> Flow {
        self.addresses.flow()
    }

    /// Sends our FIN (shutdown(2)) and looks where that leads. A connection that has ended meanwhile is no error.
    pub fn shutdown(&mut self) {
        // Unwatched, whatever a passive close passes through, close(2) sends the FIN as well.
        if self.fin_sent || (!self.watched && self.heard_end) {
            return;
        }
        let passive = self.life.state() == State::CloseWait;
        let began = clock::monotonic();
        let sent = SockRef::from(self.stream()).shutdown(Shutdown::Write);
        // ENOTCONN: the kernel has already closed it.
        self.fin_sent = sent.is_ok();
        // In CLOSE_WAIT a FIN that was sent has led through LAST_ACK (`tcp_close_state`), however soon it was
        // acknowledged.
        let through = if passive && self.fin_sent { StateSet::of(&[State::LastAck]) } else { StateSet::EMPTY };
        let call = self.fin_sent.then_some((Cause::Shutdown, began));
        if self.fin_sent && !passive {
            // From here on an edge means that the FIN was acknowledged: what comes after this is not missed.
            self.clear(Interest::WRITABLE);
        }
        self.look(Known { through, call, ..Known::default() });
        if self.life.state() == State::FinWait1 {
            self.settle_count();
        }
        if let Some(error) = &self.error {
            // It was not ours to end any more.
            self.reason.get_or_insert(Reason::of(error));
        }
    }

    /// What ended it before its time, as far as that was noticed.
    #[must_use]
    pub fn failure(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// Finds a reading of the segment count that is not ahead of the state: what is counted waits for the socket's
    /// lock, which is handed over in order, so a second reading that counts no more comes after whatever the first
    /// had counted.
    fn settle_count(&mut self) {
        let mut last = None;
        for _ in 0..4 {
            match TcpInfo::of(self.stream().as_fd()) {
                Ok(info) if info.state == State::FinWait1 => {
                    if last.is_some() && last == info.segments_in {
                        self.segments_in = last;
                        return;
                    }
                    last = info.segments_in;
                }
                Ok(info) => return self.see(&info, Known::default()),
                Err(_) => return,
            }
        }
    }

    /// Takes in no more payload until [`release_payload`](Self::release_payload), and returns how many bytes may
    /// still be read: what the peer has had acknowledged is then all that is owed to it.
    ///
    /// Where the kernel refuses the filter (it wants CAP_NET_ADMIN), a peer that never pauses would be owed more for
    /// ever: then the bytes are limited to what waits now and a little more, and what arrives beyond that, or in the
    /// last instant before our FIN, stays unanswered.
    pub fn hold_payload(&mut self) -> u64 {
        const A_LITTLE: u64 = 1024 * 1024;
        if self.heard_end {
            return u64::MAX;
        }
        if filter::hold_payload(self.stream().as_fd()).is_ok() {
            self.held = true;
            return u64::MAX;
        }
        sockopt::unread(self.stream().as_fd()).unwrap_or(0) + A_LITTLE
    }

    /// Lets the next read ask the kernel itself: data may wait that no edge has told of yet, and a short read may have
    /// let in what stood behind the socket's lock.
    pub fn doubt_readiness(&mut self) {
        self.blind = true;
    }

    /// Takes payload in again, once our FIN is out and acknowledged: it may wait behind what the peer has not read yet, and would
    /// acknowledge whatever was let in before it goes.
    pub fn release_payload(&mut self) {
        if !self.held {
            return;
        }
        // Only of a watched connection the state is known without asking.
        let asked = if self.watched { None } else { TcpInfo::of(self.stream().as_fd()).ok() };
        if asked.map_or(self.life.state(), |info| info.state) != State::FinWait1 {
            self.held = filter::remove(self.stream().as_fd()).is_err();
        }
    }

    /// Says why the descriptor will be closed; the first reason counts.
    pub fn because(&mut self, reason: Reason) {
        self.reason.get_or_insert(reason);
    }

    /// Ends it with a RST when dropped (SO_LINGER 0).
    pub fn abort(&mut self, reason: Reason) {
        self.because(reason);
        self.look(Known::default());
        self.aborted = sockopt::reset_on_close(self.stream().as_fd()).is_ok();
    }

    fn id(&self) -> Identity {
        Identity { cookie: self.cookie, role: self.life.role(), port: self.port, flow: self.flow() }
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("the stream is taken in drop only")
    }

    /// Reads TCP_INFO and takes note of what it proves.
    fn look(&mut self, known: Known) {
        if self.life.is_over() || self.left.is_some() || !self.watched {
            return;
        }
        match TcpInfo::of(self.stream().as_fd()) {
            Ok(info) => self.see(&info, known),
            Err(error) => tracing::debug!(%error, "TCP_INFO"),
        }
    }

    fn see(&mut self, info: &TcpInfo, mut known: Known) {
        known.segments = self.segments_since(info);
        if !self.fin_sent {
            known.never = known.never.with(State::FinWait1).with(State::LastAck);
        }
        match info.state {
            State::Close => self.see_close(info, known),
            state => {
                // `bytes_received` counts the FIN. In the order of the stream, so nothing can be left to read.
                self.read_all = state == State::CloseWait && info.bytes_received == self.received + 1;
                self.record(info, state, &known);
            }
        }
    }

    /// The segments that arrived since the last reading, as far as they bear on a change of state.
    fn segments_since(&self, info: &TcpInfo) -> Option<u32> {
        match (self.life.state(), self.segments_in) {
            // Before data flows: segments with payload change no state of a handshake.
            (State::Close | State::SynSent | State::SynRecv, _) if self.life.role() == Role::Client => {
                Some(info.segments_in?.wrapping_sub(info.data_segments_in?))
            }
            (_, Some(before)) => Some(info.segments_in?.wrapping_sub(before)),
            _ => None,
        }
    }

    fn record(&mut self, info: &TcpInfo, state: State, known: &Known) {
        let transitions = self.life.observe_knowing(clock::monotonic(), state, Evidence::TcpInfo, known);
        // One segment made a client ESTABLISHED: none that was counted can be waiting.
        self.segments_in = info.segments_in.filter(|n| *n == 1 && state == State::Established);
        self.note_path(info);
        self.publish(&transitions);
    }

    /// Tells what was observed, unless the kernel announces it itself: then what is known here is for our own use.
    fn publish(&self, transitions: &Transitions) {
        if !self.afterlife.hears_the_kernel() {
            self.afterlife.journal().record(&self.id(), transitions);
        }
    }

    fn note_path(&mut self, info: &TcpInfo) {
        self.rtt_us = u32::try_from(info.rtt.as_micros()).unwrap_or(u32::MAX);
        self.retransmits = info.retransmits;
    }

    /// What `bytes_acked` reads when everything is acknowledged: the payload, our FIN, and our SYN if we sent the
    /// first.
    fn all_acked(&self) -> u64 {
        self.sent + 1 + u64::from(self.life.role() == Role::Client)
    }

    /// Forgets a readiness, so that only its next edge wakes us.
    fn clear(&self, interest: Interest) {
        let _ = self.stream().try_io(interest, || Err::<(), _>(ErrorKind::WouldBlock.into()));
    }

    /// What the descriptor's readiness says of the connection.
    fn note_edge(&mut self, ready: Ready) {
        if ready.is_read_closed() && !self.heard_end {
            self.heard_end = true;
            self.look(Known::default());
        }
    }
}
