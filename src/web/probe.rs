//! Asking another echoscope whether it is ready: a container made from scratch has no curl.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use hyper::header::{HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A probe that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks `url`; succeeds when the answer is 200.
///
/// # Errors
/// When nobody answers in time, or the answer is another.
pub async fn ready(url: &str) -> anyhow::Result<()> {
    tokio::time::timeout(PATIENCE, ask(url)).await.with_context(|| format!("{url}: no answer within {PATIENCE:?}"))?
}

async fn ask(url: &str) -> anyhow::Result<()> {
    let uri: hyper::Uri = url.parse().with_context(|| format!("{url}: not a URL"))?;
    let authority = uri.authority().with_context(|| format!("{url}: no host in the URL"))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80)))
        .await
        .with_context(|| format!("connect to {authority}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(uri.path_and_query().map_or("/", |p| p.as_str()))
        .header(HOST, authority.as_str())
        .header(USER_AGENT, concat!("echoscope/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())?;
    let status = sender.send_request(request).await.with_context(|| format!("ask {url}"))?.status();
    ensure!(status == hyper::StatusCode::OK, "{url} answered {status}");
    Ok(())
}
