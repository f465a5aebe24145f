//! The web side: metrics, health, the census and recent lives as JSON, over HTTP/1.1.
//!
//! Must not know: the roles. Its own connections are not narrated and never hold up a drain.

mod api;
mod own;
mod page;
mod peers;
pub mod probe;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::IntGauge;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::listener::{AcceptFaults, ListenConfig, accept, listen};
use crate::metrics;
use crate::shutdown::Stop;
use crate::source::{NoAnswer, Source};
pub use own::Own;
use peers::{Peer, Peers};

/// A request's headers must be there within this time, also on a connection kept alive: longer than the usual scrape
/// interval of 15 s, so that a scraper keeps its connection, and short enough that a slow one cannot hold it.
const HEADERS: Duration = Duration::from_secs(20);

/// At the end, answers under way may take so long.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

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
    let sources = Arc::new(Sources { source, readiness });
    let peers = Arc::new(Peers::default());
    let tasks = TaskTracker::new();
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

/// What an answer is made of.
struct Sources {
    source: Arc<dyn Source>,
    readiness: Readiness,
}

/// One connection: any number of requests, each in time.
async fn connection(stream: TcpStream, sources: Arc<Sources>, peers: Arc<Peers>, peer: Arc<Peer>, stop: Stop) {
    let asking = Arc::clone(&peer);
    let service = service_fn(move |request| {
        let (sources, peer) = (Arc::clone(&sources), Arc::clone(&asking));
        async move {
            peer.asked();
            Ok::<_, Infallible>(answer(&request, &sources).await)
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

async fn answer(request: &Request<Incoming>, sources: &Sources) -> Response<Full<Bytes>> {
    let route = match request.uri().path() {
        "/" => Route::Page,
        "/metrics" => Route::Metrics,
        "/healthz" | "/-/healthy" => Route::Healthy,
        "/readyz" | "/-/ready" => Route::Ready,
        "/api/sockets" => Route::Sockets,
        "/api/connections" => Route::Connections,
        _ => return text(StatusCode::NOT_FOUND, "not found\n"),
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match route {
        Route::Page => with_type("text/html; charset=utf-8", page::landing(sources.readiness.get())),
        Route::Metrics => match sources.source.metrics().await {
            Ok(page) => with_type(metrics::CONTENT_TYPE, page),
            Err(no) => refusal(no),
        },
        Route::Healthy => text(StatusCode::OK, "healthy\n"),
        Route::Ready if sources.readiness.get() => text(StatusCode::OK, "ready\n"),
        Route::Ready => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        Route::Sockets => match sources.source.sockets(request.uri().query()).await {
            Ok(told) => with_type("application/json", told),
            Err(no) => refusal(no),
        },
        Route::Connections => match sources.source.connections(request.uri().query()).await {
            Ok(told) => with_type("application/json", told),
            Err(no) => refusal(no),
        },
    }
}

fn refusal(no: NoAnswer) -> Response<Full<Bytes>> {
    match no {
        NoAnswer::Question(how) => text(StatusCode::BAD_REQUEST, how),
        NoAnswer::Unavailable(what) => text(StatusCode::SERVICE_UNAVAILABLE, what),
    }
}

enum Route {
    Page,
    Metrics,
    Healthy,
    Ready,
    Sockets,
    Connections,
}

fn with_type(content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers
        .insert("content-security-policy", HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"));
    response
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = with_type("text/plain; charset=utf-8", body);
    *response.status_mut() = status;
    response
}
