//! What the live page reports of itself, whatever it shows.

use prometheus::{IntCounter, IntGauge};

use super::maker::Maker;

/// Who looks, and what they were not told.
#[derive(Clone)]
pub struct LiveMetrics {
    /// Open streams of events.
    pub viewers: IntGauge,
    /// State changes that a viewer was not told of one by one because it read too slowly.
    pub skipped: IntCounter,
}

impl LiveMetrics {
    pub(super) fn new(make: &Maker<'_>) -> LiveMetrics {
        LiveMetrics {
            viewers: make.gauge("viewers", "Who looks at the live page: open streams of /events."),
            skipped: make.counter(
                "viewers_skipped_total",
                "State changes that viewers of the live page were not told of because they read too slowly.",
            ),
        }
    }
}
