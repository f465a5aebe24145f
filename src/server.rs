//! The echo service (RFC 862): accept, echo, half-close, drain.
//!
//! Must not know: the client, the web side.

mod drain;
mod echo;

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tokio_util::task::TaskTracker;

use crate::afterlife::Afterlife;
use crate::census::Census;
use crate::config::{RuntimeShape, ServerConfig};
use crate::conn::Conn;
use crate::kernel::clock;
use crate::listener::{AcceptFaults, ListenConfig, ListenerLife, accept, listen};
use crate::shutdown::{Stop, Verdict};
use crate::tcp::Role;
use echo::Served;

/// A server whose address is known and taken; connections already queue.
pub struct Bound {
    config: ServerConfig,
    listeners: Vec<StdListener>,
    /// Since when.
    at: Duration,
    address: SocketAddr,
}

/// Binds the listening sockets: one, or one for each worker of a per-core server.
///
/// # Errors
/// When the address cannot be had.
pub fn bind(config: ServerConfig) -> anyhow::Result<Bound> {
    let at = clock::monotonic();
    let shared = config.shape == RuntimeShape::Shared;
    // A worker that may serve nobody would leave its share of the connections waiting for ever.
    let sockets = if shared { 1 } else { config.workers.min(config.max_connections.unwrap_or(usize::MAX)) };
    let mut how = ListenConfig { address: config.listen, backlog: config.backlog, share_port: !shared };
    let named = |how: &ListenConfig| format!("bind echo listener on {}", how.address);
    let first = match listen(&how) {
        Err(e) if config.listen_is_default && no_ipv6(&e) => {
            how.address = SocketAddr::from(([0, 0, 0, 0], how.address.port()));
            tracing::warn!(error = %e, address = %how.address, "no IPv6 here: listening on IPv4 only");
            listen(&how)
        }
        other => other,
    }
    .with_context(|| named(&how))?;
    let address = first.local_addr().with_context(|| named(&how))?;
    how.address = address;
    let mut listeners = vec![first];
    for _ in 1..sockets {
        listeners.push(listen(&how).with_context(|| named(&how))?);
    }
    Ok(Bound { config, listeners, at, address })
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

impl Bound {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it was told to serve at once, if it was.
    #[must_use]
    pub fn max_connections(&self) -> Option<usize> {
        self.config.max_connections
    }
}

/// What all connections of a server share.
struct Shared {
    config: ServerConfig,
    address: SocketAddr,
    afterlife: Afterlife,
    faults: AcceptFaults,
    census: Arc<Census>,
    drained: AtomicU64,
    aborted: AtomicU64,
    /// Connections that a peer ended by a RST, or the network, since the end began.
    lost: AtomicU64,
    /// Handshakes that the end left unfinished.
    unfinished: AtomicU64,
}

/// Serves until `stop`, then drains: what waits in the accept queue is still served, every byte that was acknowledged
/// is echoed, every connection ends with FINs, until the stop's deadline resets what is left.
///
/// # Errors
/// When a worker's thread or event loop cannot be made, or a worker fails.
pub async fn run(
    bound: Bound,
    limit: usize,
    afterlife: Afterlife,
    census: Arc<Census>,
    stop: Stop,
) -> anyhow::Result<Verdict> {
    let Bound { config, listeners, at, address } = bound;
    let shape = config.shape;
    let shared = Arc::new(Shared {
        faults: AcceptFaults::new("echo", afterlife.journal().metrics().accept_errors("echo")),
        drained: AtomicU64::new(0),
        aborted: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        unfinished: AtomicU64::new(0),
        config,
        address,
        afterlife,
        census,
    });
    tracing::info!(%address, max_connections = limit, "echo server listening");
    // What the connections see: it is cut at the deadline too.
    let accepting = Stop::new();
    let mut workers = JoinSet::new();
    let count = listeners.len();
    for (i, listener) in listeners.into_iter().enumerate() {
        // Each listening socket has its own queue, so each has its own share: a common pot would be held by those who
        // wait.
        let share = limit / count + usize::from(i < limit % count);
        let permits = Arc::new(Semaphore::new(share.clamp(1, Semaphore::MAX_PERMITS)));
        let life = ListenerLife::open(&listener, address, at, shared.afterlife.journal());
        let worker = serve(listener, life, permits, Arc::clone(&shared), accepting.clone());
        match shape {
            RuntimeShape::Shared => workers.spawn(worker),
            RuntimeShape::PerCore => workers.spawn(on_own_thread(i, worker)),
        };
    }
    let failed = tokio::select! {
        () = stop.begun() => None,
        // None ends before it is told to, unless it failed; then the others end at once too.
        ended = workers.join_next() => {
            accepting.cut();
            let error = ended.and_then(|ended| worked(ended).err());
            Some(error.unwrap_or_else(|| anyhow!("an echo worker ended before its time")))
        }
    };
    let open = shared.afterlife.journal().metrics().role(Role::Server).open.get();
    shared.drained.store(u64::try_from(open).unwrap_or(0), Ordering::Relaxed);
    accepting.begin();
    let deadline = async {
        tokio::select! {
            () = stop.deadline() => {}
            () = stop.was_cut() => {}
        }
        accepting.cut();
    };
    tokio::pin!(deadline);
    // The others are waited for whatever befalls one of them.
    let all = async {
        let mut all = Ok(());
        while let Some(ended) = workers.join_next().await {
            all = all.and(worked(ended));
        }
        all
    };
    tokio::pin!(all);
    tokio::select! {
        done = &mut all => done?,
        () = &mut deadline => all.await?,
    }
    failed.map_or_else(|| Ok(shared.verdict()), Err)
}

fn worked(ended: Result<anyhow::Result<()>, JoinError>) -> anyhow::Result<()> {
    ended.context("echo worker")?.context("echo worker")
}

/// Runs a worker with a runtime of its own on a thread of its own.
async fn on_own_thread(
    index: usize,
    worker: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> anyhow::Result<()> {
    let (done, wait) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(format!("echo-{index}"))
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let worked = runtime.context("make a worker's runtime").and_then(|runtime| runtime.block_on(worker));
            let _ = done.send(worked);
        })
        .context("start a worker's thread")?;
    wait.await.context("a worker's thread failed")?
}

/// Accepts until `stop`, then serves what still waits, closes the listener, and waits for its connections.
async fn serve(
    listener: StdListener,
    life: Option<ListenerLife>,
    permits: Arc<Semaphore>,
    shared: Arc<Shared>,
    stop: Stop,
) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    let listener = TcpListener::from_std(listener).context("watch the echo listener")?;
    loop {
        let next = async {
            let permit = permit(&permits).await;
            (permit, accept(&listener, &shared.faults).await)
        };
        tokio::select! {
            biased;
            () = stop.begun() => break,
            (permit, (stream, peer)) = next => start(&tasks, stream, peer, permit, &shared, &stop),
        }
    }
    let listener = listener.into_std().context("empty the accept queue")?;
    drain::serve_queued(listener, &tasks, &permits, &shared, &stop).await;
    if let Some(life) = life {
        life.close(shared.afterlife.journal());
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

async fn permit(permits: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    Arc::clone(permits).acquire_owned().await.expect("the semaphore is never closed")
}

fn start(
    tasks: &TaskTracker,
    stream: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
    shared: &Arc<Shared>,
    stop: &Stop,
) {
    if stop.has_begun() {
        shared.drained.fetch_add(1, Ordering::Relaxed);
    }
    if let Some(mut conn) = accepted(stream, peer, shared) {
        let (shared, stop) = (Arc::clone(shared), stop.clone());
        tasks.spawn(async move {
            let failure = CountPanic(&shared);
            match echo::echo(&mut conn, &shared.config, &stop).await {
                Served::Well => {}
                Served::Lost => drop(stop.has_begun().then(|| shared.lost.fetch_add(1, Ordering::Relaxed))),
                Served::Aborted => count_aborted(&shared, 1),
            }
            // The descriptor first: whoever takes the place may need it.
            drop(conn);
            drop((failure, permit));
        });
    }
}

fn accepted(stream: TcpStream, peer: SocketAddr, shared: &Shared) -> Option<Conn> {
    let local = (!shared.address.ip().is_unspecified()).then_some(shared.address);
    let port = shared.address.port();
    if !shared.config.lifecycles {
        return Some(Conn::unwatched(stream, peer, port, shared.afterlife.clone()));
    }
    let afterlife = shared.afterlife.clone();
    let conn = if afterlife.hears_the_kernel() {
        Conn::announced(stream, peer, port, afterlife)
    } else {
        Conn::accepted(stream, peer, local, port, afterlife)
    };
    conn.inspect_err(|error| tracing::debug!(%error, %peer, "connection gone before it could be looked at")).ok()
}

/// A connection whose task panics was not served: it counts as aborted, and so does the run.
struct CountPanic<'a>(&'a Shared);

impl Drop for CountPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a connection's task failed");
            count_aborted(self.0, 1);
        }
    }
}

fn count_aborted(shared: &Shared, count: u64) {
    shared.aborted.fetch_add(count, Ordering::Relaxed);
    shared.afterlife.journal().metrics().drain_aborted.inc_by(count);
}

impl Shared {
    fn verdict(&self) -> Verdict {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Verdict {
            open: read(&self.drained),
            lost: read(&self.lost),
            aborted: read(&self.aborted),
            unfinished: read(&self.unfinished),
        }
    }
}
