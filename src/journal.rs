//! The choke point: what is observed of a connection comes in once; its log line, its counters and its ledger entry
//! go out.
//!
//! Must not know: sockets, or how anything was observed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::kernel::clock;
use crate::ledger::{Ledger, Reason};
use crate::log::STATES;
use crate::metrics::Metrics;
use crate::tcp::{Identity, Role, State, Step, Transition, Transitions};

/// Where observations become public.
pub struct Journal {
    metrics: Arc<Metrics>,
    ledger: Ledger,
}

impl Journal {
    /// A journal that counts into `metrics`.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Journal {
        Journal { metrics, ledger: Ledger::default() }
    }

    /// A connection of ours has a descriptor.
    pub fn count_open(&self, role: Role) {
        let role = self.metrics.role(role);
        role.opened.inc();
        role.open.inc();
    }

    /// The descriptor is closed.
    pub fn count_close(&self, role: Role, reason: Reason) {
        let role = self.metrics.role(role);
        role.open.dec();
        role.closed(reason).inc();
    }

    /// The life of a connection of ours begins.
    pub fn open(&self, id: &Identity, state: State, at: Duration) {
        self.ledger.open(id, state, at);
    }

    /// What an observation proved.
    pub fn record(&self, id: &Identity, transitions: &Transitions) {
        for t in transitions.iter() {
            self.metrics.count(id.role, t);
            self.ledger.step(id, t);
            log(id, t);
        }
    }

    /// The descriptor is closed. The kernel may keep the connection for a while.
    pub fn close(&self, id: &Identity, reason: Reason) {
        self.count_close(id.role, reason);
        self.ledger.close(id.cookie, reason);
    }

    /// Nobody follows this connection any more, though it may go on.
    pub fn lose(&self, id: &Identity) {
        self.ledger.lose(id.cookie);
    }

    /// The counters.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Who is alive.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }
}

fn log(id: &Identity, t: &Transition) {
    if !tracing::enabled!(target: STATES, tracing::Level::INFO) {
        return;
    }
    let flow = id.flow.canonical();
    // When it happened, not when it is told: a life after close(2) is told by the follower's readings.
    let at = clock::unix().saturating_sub(clock::monotonic().saturating_sub(t.at));
    tracing::info!(
        target: STATES,
        at_us = u64::try_from(at.as_micros()).unwrap_or(u64::MAX),
        conn = %Hex(id.cookie),
        role = id.role.label(),
        local = %flow.local,
        peer = %flow.peer,
        from = t.from.name(),
        to = t.to.name(),
        after_s = t.after.map(|after| after.as_secs_f64()),
        evidence = t.evidence.label(),
        cause = t.cause.map(crate::tcp::Cause::label),
        via = match t.step {
            Step::Arrow => None,
            Step::Gap => Some("unknown"),
            Step::Unexpected => Some("unexpected"),
        },
        "state"
    );
}

struct Hex(u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}
