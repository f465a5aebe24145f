//! What a web side tells of, whatever it is that is looked at. Must not know: HTTP, or who asks.

use std::pin::Pin;
use std::sync::Arc;

use prometheus::IntCounter;
use serde::Serialize;

use crate::live::Live;
use crate::metrics::ACCEPT_ERRORS;

/// An answer that takes a moment.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// The question cannot be understood: how it should be put.
    Question(&'static str),
    /// Not now: what cannot be had.
    Unavailable(&'static str),
}

/// What there is to say when the table cannot be read.
pub const UNREADABLE: NoAnswer = NoAnswer::Unavailable("the kernel's socket table cannot be read\n");

/// Something that can tell of itself.
pub trait Source: Send + Sync + 'static {
    /// The page for `/metrics`.
    fn metrics(&self) -> Answer<'_, Result<Vec<u8>, NoAnswer>>;

    /// `/api/sockets` as JSON, with the query.
    fn sockets<'a>(&'a self, query: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>>;

    /// `/api/connections` as JSON, with the query.
    fn connections<'a>(&'a self, query: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>>;

    /// What happens, for the live page.
    fn live(&self) -> &Arc<Live>;

    /// What was lost so far, by what it is.
    fn lost(&self) -> Vec<(&'static str, u64)>;

    /// Where errors of accept(2) of the web side are counted.
    fn accept_errors(&self) -> [IntCounter; ACCEPT_ERRORS.len()];
}

/// The page for Prometheus.
///
/// # Errors
/// When it could not be encoded, which is logged.
pub fn page(rendered: prometheus::Result<Vec<u8>>) -> Result<Vec<u8>, NoAnswer> {
    rendered.map_err(|error| {
        tracing::error!(%error, "cannot encode metrics");
        NoAnswer::Unavailable("metrics cannot be encoded\n")
    })
}

/// As JSON.
///
/// # Errors
/// When it cannot be encoded, which is logged.
pub fn json(told: &impl Serialize) -> Result<Vec<u8>, NoAnswer> {
    serde_json::to_vec(told).map_err(|error| {
        tracing::error!(%error, "cannot encode JSON");
        NoAnswer::Unavailable("cannot be encoded\n")
    })
}
