//! Reading and writing: as few system calls as a bare epoll loop makes, and the connection's edges noticed on the way.

use std::future::poll_fn;
use std::io::{ErrorKind, Read, Result, Write};
use std::pin::pin;
use std::task::{Context, Poll, Waker, ready};

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::task::coop;

use super::Conn;
use crate::tcp::{Known, State, StateSet};

impl Conn {
    /// Whether there may be something to read, the peer's FIN included, or our FIN was acknowledged; else wakes the task
    /// when there may be.
    ///
    /// While our own FIN is under way, also notices its acknowledgement (FIN_WAIT1 → FIN_WAIT2), which shows as an
    /// edge of writability.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.blind || self.error.is_some() {
            // Who always has more must not keep the others waiting; below, the registration sees to that.
            ready!(coop::poll_proceed(cx)).made_progress();
            return Poll::Ready(Ok(()));
        }
        while matches!(self.life.state(), State::FinWait1) && self.fin_sent && self.left.is_none() {
            let ready = ready!(self.poll_ready(Interest::READABLE | Interest::WRITABLE, cx))?;
            if ready.is_writable() {
                self.clear(Interest::WRITABLE);
                self.look(Known::default());
            }
            self.note_edge(ready);
            if ready.is_readable() || ready.is_read_closed() || self.life.state() != State::FinWait1 {
                return Poll::Ready(Ok(()));
            }
        }
        let ready = ready!(self.poll_ready(Interest::READABLE, cx))?;
        self.note_edge(ready);
        Poll::Ready(Ok(()))
    }

    /// Waits until [`poll_readable`](Self::poll_readable) says so.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn readable(&mut self) -> Result<()> {
        poll_fn(|cx| self.poll_readable(cx)).await
    }

    /// Waits until there may be room to write. The peer's FIN is noticed meanwhile, although nobody reads.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn writable(&mut self) -> Result<()> {
        loop {
            if self.heard_end || self.error.is_some() {
                self.ready(Interest::WRITABLE).await?;
                return Ok(());
            }
            // Unread data would wake us at once and for ever. Without that readiness only an edge does: more data, or
            // the FIN.
            self.clear(Interest::READABLE);
            self.blind = true;
            let ready = self.ready(Interest::READABLE | Interest::WRITABLE).await?;
            self.note_edge(ready);
            if ready.is_writable() || ready.is_write_closed() {
                return Ok(());
            }
        }
    }

    /// Waits until there may be something to read or room to write.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn writable_or_readable(&mut self) -> Result<()> {
        if self.blind || self.error.is_some() {
            return Ok(());
        }
        let ready = self.ready(Interest::READABLE | Interest::WRITABLE).await?;
        self.note_edge(ready);
        Ok(())
    }

    /// What the descriptor is ready for, of these; else wakes the task when it is.
    ///
    /// Not `TcpStream::ready` alone: its future holds a waiter of its own, 150 bytes that every idle connection would
    /// have to have. A connection belongs to one task, so the two wakers that the registration has anyway are enough.
    /// The future is used for its answer only, which it has at once.
    fn poll_ready(&self, interest: Interest, cx: &mut Context<'_>) -> Poll<Result<Ready>> {
        let stream = self.stream();
        let reading = interest.is_readable() && stream.poll_read_ready(cx).is_ready();
        let writing = interest.is_writable() && stream.poll_write_ready(cx).is_ready();
        if !reading && !writing {
            return Poll::Pending;
        }
        let answer = pin!(stream.ready(interest)).poll(&mut Context::from_waker(Waker::noop()));
        if answer.is_pending() {
            // Cleared in between; and whoever is told that it is ready is not woken.
            cx.waker().wake_by_ref();
        }
        answer
    }

    pub(super) async fn ready(&self, interest: Interest) -> Result<Ready> {
        poll_fn(|cx| self.poll_ready(interest, cx)).await
    }

    /// Reads what is there; 0 is the peer's FIN.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing; what ended the connection otherwise, once.
    pub fn try_read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.read_all && !buffer.is_empty() {
            // TCP_INFO has said so: that saves the read that would find out.
            self.note_end_of_stream();
            return Ok(0);
        }
        let mut read = 0;
        let result = if self.blind {
            let result = (&*SockRef::from(self.stream())).read(buffer).map(|n| read = n);
            // A full buffer says nothing about what is left; anything else says that it was all.
            self.blind = read == buffer.len() && !buffer.is_empty();
            result
        } else {
            self.stream().try_io(Interest::READABLE, || {
                read = (&*SockRef::from(self.stream())).read(buffer)?;
                // A short read has emptied the queue: to say so here saves the read that would find out (epoll(7),
                // EPOLLET).
                if 0 < read && read < buffer.len() { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
            })
        };
        match result {
            _ if read > 0 => {
                self.received += read as u64;
                self.afterlife.journal().metrics().role(self.life.role()).received.inc_by(read as u64);
                Ok(read)
            }
            // The error was taken from the descriptor by an earlier look; here it is owed.
            Ok(()) if self.error.is_some() => Err(self.fail(None)),
            Ok(()) => {
                self.note_end_of_stream();
                Ok(0)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if self.error.is_some() {
                    Err(self.fail(None))
                } else {
                    Err(ErrorKind::WouldBlock.into())
                }
            }
            Err(e) => Err(self.fail(Some(e))),
        }
    }

    /// Writes what fits.
    ///
    /// # Errors
    /// `WouldBlock` when nothing does; what ended the connection otherwise.
    pub fn try_write(&mut self, bytes: &[u8]) -> Result<usize> {
        match self.stream().try_io(Interest::WRITABLE, || (&*SockRef::from(self.stream())).write(bytes)) {
            Ok(written) => {
                self.sent += written as u64;
                self.afterlife.journal().metrics().role(self.life.role()).sent.inc_by(written as u64);
                Ok(written)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Err(ErrorKind::WouldBlock.into())
            }
            Err(e) => Err(self.fail(Some(e))),
        }
    }

    /// An end of stream was read: the peer's FIN is in, whatever came after it.
    fn note_end_of_stream(&mut self) {
        self.heard_end = true;
        let through = match self.life.state() {
            State::Established if !self.fin_sent => StateSet::of(&[State::CloseWait]),
            State::Established | State::FinWait1 | State::FinWait2 => StateSet::EMPTY,
            _ => return,
        };
        self.look(Known { through, ..Known::default() });
    }

    /// Takes note of what ended the connection, and of where it went.
    fn fail(&mut self, error: Option<std::io::Error>) -> std::io::Error {
        // The first one counts: a later EPIPE only says that there was one.
        self.error = self.error.take().or(error);
        self.look(Known::default());
        let told = self.error.as_ref().map_or(ErrorKind::NotConnected.into(), again);
        self.because(crate::ledger::Reason::of(&told));
        told
    }
}

/// The same error once more: `io::Error` cannot be cloned.
fn again(error: &std::io::Error) -> std::io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), std::io::Error::from_raw_os_error)
}
