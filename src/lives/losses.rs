//! What was lost of the kernel's announcements: counted and said, once for each.

use crate::kernel::clock;
use crate::kernel::tracepoints::{Losses, Tracepoints};
use crate::log::OnceAMinute;
use crate::metrics::ObserverMetrics;

/// The losses that are known so far.
#[derive(Default)]
pub(crate) struct KnownLosses {
    known: Losses,
    warned: OnceAMinute,
    warned_of_unheard: OnceAMinute,
}

impl KnownLosses {
    /// Whether there are new ones: then whatever was told may be out of date, and everybody is to be looked up.
    pub(crate) fn have_grown(&mut self, tracepoints: &Tracepoints, metrics: &ObserverMetrics) -> bool {
        let now = match tracepoints.losses() {
            Ok(losses) => losses,
            Err(error) => {
                metrics.errors.inc();
                tracing::debug!(%error, "lost events");
                return false;
            }
        };
        let new = (now.ring + now.missed).saturating_sub(self.known.ring + self.known.missed);
        if new == 0 {
            return false;
        }
        self.known = now;
        metrics.lost_events.inc_by(new);
        if let Some(times) = self.warned.due(clock::monotonic()) {
            let Losses { ring, missed } = now;
            tracing::warn!(ring, missed, times, "kernel events were lost; every connection is looked up");
        }
        true
    }

    /// Takes note that so many connections are elsewhere, by the table or by a later event, than was announced, although
    /// nothing is known to be lost. At least one event of each went unheard.
    pub(crate) fn went_unheard(&mut self, connections: u64, metrics: &ObserverMetrics) {
        metrics.lost_events.inc_by(connections);
        if let Some(times) = self.warned_of_unheard.due(clock::monotonic()) {
            tracing::warn!(
                connections,
                times,
                "connections are elsewhere than the kernel has announced; every connection is looked up"
            );
        }
    }
}
