//! One connection's service: what comes in goes out, until the peer's FIN, ours follows.
//!
//! One read buffer serves all connections of a thread; what does not fit into the socket is copied, so that an idle
//! connection holds no buffer and a slow one at most one (back-pressure: nothing more is read until it is written).

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{ErrorKind, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::config::ServerConfig;
use crate::conn::Conn;
use crate::ledger::Reason;
use crate::shutdown::Stop;

/// Large enough that streaming costs little more than the copies themselves; twice as much gains nothing.
const BUFFER: usize = 128 * 1024;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// What one read and its write came to.
enum Moved {
    /// All of it was written; there may be more to read.
    All,
    /// This much could not be written yet.
    Part(Vec<u8>),
    /// There is nothing to read now.
    Nothing,
    /// The peer has sent its FIN.
    End,
}

/// How the service of one connection ended.
pub(super) enum Served {
    /// With FINs, or as it was told to.
    Well,
    /// The peer reset it, or the network failed.
    Lost,
    /// It was reset because the server's time was up.
    Aborted,
}

/// Serves one connection to its end. What only few connections need at a time is boxed: an idle connection's task has
/// room for nothing but waiting.
pub(super) fn echo<'a>(
    conn: &'a mut Conn,
    config: &'a ServerConfig,
    stop: &'a Stop,
) -> impl Future<Output = Served> + use<'a> {
    let idle = config.idle_timeout.map(|timeout| Box::new(Idle::new(timeout)));
    // Not an async function: that would keep its arguments beside what it makes of them.
    let mut service = Service { conn, config, stop, idle };
    async move { service.run().await }
}

/// What the service of one connection works with, in one place, so that the futures below hold one reference each.
struct Service<'a> {
    conn: &'a mut Conn,
    config: &'a ServerConfig,
    stop: &'a Stop,
    idle: Idleness,
}

/// How the service of a connection goes on.
enum Next {
    /// The peer's FIN came, everything was echoed, ours is sent.
    Ended,
    /// We end it, and still owe these bytes.
    CloseFirst(Reason, Vec<u8>),
    /// The peer has taken nothing for the idle timeout.
    Silent,
}

/// Why a connection that waits goes on.
enum Wake {
    Readable(Result<()>),
    Stop,
    Silence,
}

impl Service<'_> {
    async fn run(&mut self) -> Served {
        let served = match self.serve().await {
            Ok(Next::Ended) => Ok(Reason::Graceful),
            Ok(Next::Silent) => {
                // A peer that takes nothing: what it is owed cannot be delivered, so there is no clean end.
                self.conn.abort(Reason::Idle);
                Ok(Reason::Idle)
            }
            Ok(Next::CloseFirst(reason, rest)) => match Box::pin(self.end_it(reason, rest)).await {
                Some(ended) => ended.map(|()| reason),
                None => return Served::Aborted,
            },
            Err(error) => Err(error),
        };
        let lost = served.is_err() || self.conn.failure().is_some();
        self.conn.because(served.unwrap_or_else(|error| Reason::of(&error)));
        if lost { Served::Lost } else { Served::Well }
    }

    async fn serve(&mut self) -> Result<Next> {
        let stopping = self.stop.begun();
        tokio::pin!(stopping);
        let mut will_hear = false;
        // A peer that always has more never lets us wait, so the stop is looked at too, not only waited for.
        while !self.stop.has_begun() {
            // By hand, not by select!, which keeps a future of each kind beside what it waits for.
            let wake = poll_fn(|cx| {
                if let Poll::Ready(readable) = self.conn.poll_readable(cx) {
                    return Poll::Ready(Wake::Readable(readable));
                }
                // Asking the future takes a lock. A task's waker stays the same, so once is enough to be woken by the
                // stop.
                if self.stop.has_begun() || (!will_hear && stopping.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Wake::Stop);
                }
                will_hear = true;
                poll_silence(&mut self.idle, cx).map(|()| Wake::Silence)
            });
            match wake.await {
                Wake::Readable(readable) => readable?,
                Wake::Stop => break,
                Wake::Silence => return Ok(Next::CloseFirst(Reason::Idle, Vec::new())),
            }
            match move_once(self.conn)? {
                Moved::All => touch(&mut self.idle),
                Moved::Nothing => {}
                Moved::Part(rest) => {
                    if let Some(next) = Box::pin(self.write_all(rest)).await? {
                        return Ok(next);
                    }
                }
                Moved::End => {
                    if !self.config.close_delay.is_zero() {
                        Box::pin(self.delay()).await;
                    }
                    self.conn.shutdown();
                    return Ok(Next::Ended);
                }
            }
        }
        Ok(Next::CloseFirst(Reason::Drained, Vec::new()))
    }

    /// Stays in CLOSE_WAIT for a while, to be seen.
    async fn delay(&self) {
        tokio::select! {
            () = tokio::time::sleep(self.config.close_delay) => {}
            () = self.stop.begun() => {}
        }
    }

    /// Writes what the socket did not take at once; nothing is read meanwhile. Returns what comes next, if not more of
    /// the same.
    async fn write_all(&mut self, mut rest: Vec<u8>) -> Result<Option<Next>> {
        while !rest.is_empty() {
            tokio::select! {
                biased;
                writable = self.conn.writable() => writable?,
                () = self.stop.begun() => return Ok(Some(Next::CloseFirst(Reason::Drained, rest))),
                () = poll_fn(|cx| poll_silence(&mut self.idle, cx)) => return Ok(Some(Next::Silent)),
            }
            let written = write_some(self.conn, &rest)?;
            rest.drain(..written);
            touch(&mut self.idle);
        }
        Ok(None)
    }

    /// Ends the connection from our side, in time; `None` when it had to be reset because the server's time was up.
    async fn end_it(&mut self, reason: Reason, rest: Vec<u8>) -> Option<Result<()>> {
        // An idle peer is given as long again as it was silent; a drain is ended by its deadline.
        let patience = self.config.idle_timeout.filter(|_| reason == Reason::Idle);
        tokio::select! {
            biased;
            closed = within(patience, close_first(self.conn, rest)) => {
                // Once our FIN is out and theirs does not come, the kernel waits for it. Who does not take what it is
                // owed is reset.
                if closed.is_none() && !self.conn.sent_end() {
                    self.conn.abort(reason);
                }
                Some(closed.unwrap_or(Ok(())))
            }
            () = self.stop.was_cut() => {
                self.conn.abort(Reason::DrainAborted);
                None
            }
        }
    }
}

/// Ends the connection from our side: what is owed and what the peer has had acknowledged is echoed, then our FIN,
/// then its FIN is awaited. To close with unread data would send a RST (RFC 9293 section 3.6.1, SHLD-3), and the peer might
/// lose what it has not yet read.
async fn close_first(conn: &mut Conn, mut owed: Vec<u8>) -> Result<()> {
    let mut waiting = conn.hold_payload();
    loop {
        while !owed.is_empty() {
            conn.writable().await?;
            let written = write_some(conn, &owed)?;
            owed.drain(..written);
        }
        if waiting == 0 {
            break;
        }
        conn.doubt_readiness();
        let before = conn.received();
        match move_once(conn)? {
            Moved::All => {}
            Moved::Part(rest) => owed = rest,
            Moved::Nothing => break,
            Moved::End => {
                conn.shutdown();
                return Ok(());
            }
        }
        waiting = waiting.saturating_sub(conn.received() - before);
        tokio::task::coop::consume_budget().await;
    }
    conn.shutdown();
    until_end(conn).await
}

/// Waits for `work`, for so long at most, if there is a limit.
async fn within<T>(patience: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match patience {
        Some(patience) => tokio::time::timeout(patience, work).await.ok(),
        None => Some(work.await),
    }
}

/// Reads and throws away what a peer still sends after our FIN, until its own.
async fn until_end(conn: &mut Conn) -> Result<()> {
    loop {
        conn.release_payload();
        conn.readable().await?;
        let read = SHARED.with_borrow_mut(|buffer| conn.try_read(buffer));
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// One read, and the write of what it brought.
fn move_once(conn: &mut Conn) -> Result<Moved> {
    SHARED.with_borrow_mut(|buffer| {
        let read = match conn.try_read(buffer) {
            Ok(0) => return Ok(Moved::End),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Moved::Nothing),
            Err(e) => return Err(e),
        };
        let written = write_some(conn, &buffer[..read])?;
        Ok(if written == read { Moved::All } else { Moved::Part(buffer[written..read].to_vec()) })
    })
}

/// Writes what fits now; that may be nothing.
fn write_some(conn: &mut Conn, bytes: &[u8]) -> Result<usize> {
    match conn.try_write(bytes) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

/// When the peer was last heard. One timer for the whole connection, moved only when it fires: a timer per read would
/// cost 2 to 4 % of the throughput.
struct Idle {
    timeout: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Idle {
    fn new(timeout: Duration) -> Idle {
        Idle { timeout, last: Instant::now(), timer: Box::pin(tokio::time::sleep(timeout)) }
    }
}

/// Boxed: most connections have none.
type Idleness = Option<Box<Idle>>;

fn touch(idle: &mut Idleness) {
    if let Some(idle) = idle {
        idle.last = Instant::now();
    }
}

/// Whether the peer has been silent for the whole timeout; without one, never.
fn poll_silence(idle: &mut Idleness, cx: &mut Context<'_>) -> Poll<()> {
    let Some(idle) = idle else { return Poll::Pending };
    loop {
        ready!(idle.timer.as_mut().poll(cx));
        let until = idle.last + idle.timeout;
        if until <= Instant::now() {
            return Poll::Ready(());
        }
        idle.timer.as_mut().reset(until);
    }
}
