//! What each address answers with.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY};
use hyper::{Method, Request, Response, StatusCode};

use super::Readiness;
use super::events::Events;
use super::page::{self, Asset};
use super::peers::Peer;
use crate::explain::Everything;
use crate::metrics;
use crate::source::{NoAnswer, Source, json};

/// An answer's body: whole, or a stream.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Nothing but what this process serves, and nothing that was written into the page: what a peer's data could carry into
/// it stays text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// What an answer is made of.
pub(super) struct Sources {
    pub(super) source: Arc<dyn Source>,
    pub(super) readiness: Readiness,
    pub(super) events: Arc<Events>,
}

enum Route {
    Page(&'static Asset),
    Metrics,
    Healthy,
    Ready,
    Sockets,
    Connections,
    States,
    Events,
}

pub(super) async fn answer(request: &Request<Incoming>, sources: &Sources, peer: &Arc<Peer>) -> Response<Body> {
    let route = match request.uri().path() {
        "/metrics" => Route::Metrics,
        "/healthz" | "/-/healthy" => Route::Healthy,
        "/readyz" | "/-/ready" => Route::Ready,
        "/api/sockets" => Route::Sockets,
        "/api/connections" => Route::Connections,
        "/api/states" => Route::States,
        "/events" => Route::Events,
        path => match page::asset(path) {
            Some(asset) => Route::Page(asset),
            None => return text(StatusCode::NOT_FOUND, "not found\n"),
        },
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let (source, query) = (&sources.source, request.uri().query());
    match route {
        Route::Page(asset) => with_type(asset.kind, asset.content),
        Route::Metrics => told(metrics::CONTENT_TYPE, source.metrics().await),
        Route::Healthy => text(StatusCode::OK, "healthy\n"),
        Route::Ready if sources.readiness.get() => text(StatusCode::OK, "ready\n"),
        Route::Ready => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        Route::Sockets => told("application/json", source.sockets(query).await),
        Route::Connections => told("application/json", source.connections(query).await),
        // Settings are read from files.
        Route::States => match tokio::task::spawn_blocking(|| json(&Everything::now())).await {
            Ok(states) => told("application/json", states),
            Err(_) => refusal(NoAnswer::Unavailable("shutting down\n")),
        },
        Route::Events => match sources.events.begin(request, peer) {
            Ok(stream) => with_headers("text/event-stream", stream),
            Err(no) => refusal(no),
        },
    }
}

fn told(kind: &'static str, answer: Result<Vec<u8>, NoAnswer>) -> Response<Body> {
    match answer {
        Ok(told) => with_type(kind, told),
        Err(no) => refusal(no),
    }
}

fn refusal(no: NoAnswer) -> Response<Body> {
    match no {
        NoAnswer::Question(how) => text(StatusCode::BAD_REQUEST, how),
        NoAnswer::Unavailable(what) => text(StatusCode::SERVICE_UNAVAILABLE, what),
    }
}

fn text(status: StatusCode, body: &'static str) -> Response<Body> {
    let mut response = with_type("text/plain; charset=utf-8", body);
    *response.status_mut() = status;
    response
}

fn with_type(kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    with_headers(kind, Full::new(body.into()).boxed_unsync())
}

fn with_headers(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, kind),
        // Numbers of this moment, and a page that must fit the process behind it.
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, "no-referrer"),
        (hyper::header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
