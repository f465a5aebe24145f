//! What was lost of the kernel's announcements: counted and said, once for each.

use super::Lives;
use super::audit::LookedUp;
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
    /// Whether anything is missing that was not known before: then whatever was told may be out of date, and everybody is to be
    /// looked up. While that is to be done already (`due`), what later events say is missing is no news.
    pub(crate) fn look(
        &mut self,
        tracepoints: &Tracepoints,
        lives: &mut Lives,
        due: bool,
        metrics: &ObserverMetrics,
    ) -> bool {
        let lost = self.have_grown(tracepoints, metrics);
        let gaps = lives.take_gaps();
        let news = gaps > 0 && !due;
        if lost {
            lives.forget_requests();
        } else if news {
            self.went_unheard(gaps, metrics);
        }
        lost || news
    }

    fn have_grown(&mut self, tracepoints: &Tracepoints, metrics: &ObserverMetrics) -> bool {
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

    /// Whether lookups have found anybody elsewhere than was announced: then everybody is to be looked up.
    pub(crate) fn found(&mut self, looked_up: &LookedUp, lives: &Lives, metrics: &ObserverMetrics) -> bool {
        let unheard = looked_up.verdict(lives);
        if unheard > 0 {
            self.went_unheard(unheard, metrics);
        }
        unheard > 0
    }

    /// Takes note that so many connections are elsewhere, by the table or by a later event, than was announced, although
    /// nothing is known to be lost. At least one event of each went unheard.
    fn went_unheard(&mut self, connections: u64, metrics: &ObserverMetrics) {
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
