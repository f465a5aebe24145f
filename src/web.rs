//! The web side: metrics, health, the census and lives as JSON, the live page and its events, over HTTP/1.1.
//!
//! Must not know: the roles. Its own connections are not narrated and never hold up a drain.

mod api;
mod events;
mod own;
mod page;
mod peers;
pub mod probe;
mod routes;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::IntGauge;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::listener::{AcceptFaults, ListenConfig, accept, listen};
use crate::shutdown::Stop;
use crate::source::Source;
use events::Events;
pub use own::Own;
use peers::{Peer, Peers};
use routes::{Sources, answer};

/// A request's headers must be there within this time, also on a connection kept alive: longer than the usual scrape
/// interval of 15 s, so that a scraper keeps its connection, and short enough that a slow one cannot hold it.
const HEADERS: Duration = Duration::from_secs(20);

/// At the end, answers under way may take so long.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// No more than this waits in the kernel for a peer that does not read: a viewer who is slow skips, rather than see what
/// was long ago.
const UNSENT: u32 = 64 * 1024;

/// Whether this process takes work: one truth for the probe and for `echoscope_ready`.
#[derive(Clone)]
pub struct Readiness(IntGauge);

impl Readiness {
    /// Not ready yet; shown by `shown`.
    #[must_use]
    pub fn new(shown: IntGauge) -> Readiness {
        shown.set(0);
        Readiness(shown)
    }

    /// Says so.
    pub fn set(&self, ready: bool) {
        self.0.set(i64::from(ready));
    }

    fn get(&self) -> bool {
        self.0.get() == 1
    }
}

/// A web side whose address is known and taken.
pub struct Bound {
    listener: StdListener,
    address: SocketAddr,
}

/// Binds the listener.
///
/// # Errors
/// When the address cannot be had.
pub fn bind(address: SocketAddr) -> anyhow::Result<Bound> {
    let context = || format!("bind web listener on {address}");
    let listener = listen(&ListenConfig { address, backlog: 1024, share_port: false }).with_context(context)?;
    let address = listener.local_addr().with_context(context)?;
    Ok(Bound { listener, address })
}

impl Bound {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Serves until `stop`.
///
/// # Errors
/// When the listener cannot be watched.
pub async fn run(bound: Bound, source: Arc<dyn Source>, readiness: Readiness, stop: Stop) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(bound.listener).context("watch the web listener")?;
    tracing::info!(address = %bound.address, "web side listening");
    let faults = AcceptFaults::new("web", source.accept_errors());
    let events = Arc::new(Events::new(Arc::clone(&source), readiness.clone(), stop.clone()));
    let sources = Arc::new(Sources { source, readiness, events: Arc::clone(&events) });
    let peers = Arc::new(Peers::default());
    let tasks = TaskTracker::new();
    tasks.spawn(async move { events.feed().await });
    loop {
        let stream = tokio::select! {
            biased;
            () = stop.begun() => break,
            (stream, _) = accept(&listener, &faults) => stream,
        };
        let peer = tokio::select! {
            biased;
            () = stop.begun() => break,
            peer = peers.enter() => peer,
        };
        tasks.spawn(connection(stream, Arc::clone(&sources), Arc::clone(&peers), peer, stop.clone()));
    }
    tasks.close();
    let _ = tokio::time::timeout(LAST_ANSWERS, tasks.wait()).await;
    Ok(())
}

/// One connection: any number of requests, each in time.
async fn connection(stream: TcpStream, sources: Arc<Sources>, peers: Arc<Peers>, peer: Arc<Peer>, stop: Stop) {
    // Without it: more memory of the kernel, and the same answers.
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
    let asking = Arc::clone(&peer);
    let service = service_fn(move |request| {
        let (sources, peer) = (Arc::clone(&sources), Arc::clone(&asking));
        async move {
            peer.stirs();
            Ok::<_, Infallible>(answer(&request, &sources, &peer).await)
        }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = peer.overdue(HEADERS) => Ok(()),
        () = peer.shown_out() => Ok(()),
        () = stop.begun() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    peers.leave(&peer);
    if let Err(error) = served {
        tracing::debug!(%error, "web connection");
    }
}
