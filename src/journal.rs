//! The choke point: what is observed of a connection comes in once; its log line, its counters, its ledger entry
//! and its place in the live feed go out.
//!
//! Must not know: sockets, or how anything was observed.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayString;

use crate::kernel::clock;
use crate::ledger::{Ledger, Reason};
use crate::live::Live;
use crate::log::STATES;
use crate::metrics::Metrics;
use crate::tcp::{Identity, Role, State, Transitions};

/// One log line for each step. A macro, because a level is part of where a line is written.
macro_rules! lines {
    ($level:expr, $id:expr, $transitions:expr) => {
        let flow = $id.flow.canonical();
        let (conn, local, peer) = (short(format_args!("{:x}", $id.cookie)), short(flow.local), short(flow.peer));
        // When it happened, not when it is told: a life after close(2) is told by the follower's readings.
        let offset = clock::unix_offset();
        for t in $transitions.iter() {
            tracing::event!(
                target: STATES,
                $level,
                at_us = u64::try_from((offset + t.at).as_micros()).unwrap_or(u64::MAX),
                conn = conn.as_str(),
                role = $id.role.label(),
                local = local.as_str(),
                peer = peer.as_str(),
                from = t.from.name(),
                to = t.to.name(),
                after_s = t.after.map(|after| after.as_secs_f64()),
                evidence = t.evidence.label(),
                cause = t.cause.map(crate::tcp::Cause::label),
                via = t.step.via(),
                retransmits = (t.retransmits > 0).then_some(t.retransmits),
                "state"
            );
        }
    };
}

/// Where observations become public.
pub struct Journal {
    metrics: Arc<Metrics>,
    ledger: Ledger,
    live: Arc<Live>,
}

impl Journal {
    /// A journal that counts into `metrics`.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Journal {
        let live = Arc::new(Live::of(&metrics));
        Journal { metrics, ledger: Ledger::default(), live }
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

    /// What the way of a connection was like, at its end: a smoothed round-trip time of 0 was never measured.
    pub fn note_path(&self, role: Role, rtt_us: u32, retransmits: u32) {
        let metrics = self.metrics.role(role);
        if rtt_us > 0 {
            metrics.rtt.observe(f64::from(rtt_us) / 1e6);
        }
        metrics.retransmits.inc_by(retransmits.into());
    }

    /// The life of a connection of ours begins.
    pub fn open(&self, id: &Identity, state: State, at: Duration) {
        self.ledger.open(id, state, at);
    }

    /// What an observation proved.
    pub fn record(&self, id: &Identity, transitions: &Transitions) {
        if transitions.is_empty() {
            return;
        }
        for t in transitions.iter() {
            self.metrics.count(id.role, t);
        }
        self.ledger.steps(id, transitions.iter());
        self.live.note(id, transitions);
        if tracing::enabled!(target: STATES, tracing::Level::INFO) {
            log(id, transitions);
        }
    }

    /// The descriptor is closed. The kernel may keep the connection for a while.
    pub fn close(&self, id: &Identity, reason: Reason) {
        self.count_close(id.role, reason);
        self.ledger.close(id.role, id.cookie, reason);
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

    /// What happens, for whoever looks.
    #[must_use]
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Who is alive.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }
}

/// Tells of somebody else's connection, to whoever wants to know all of it: one log line for each step, at DEBUG.
pub fn whisper(id: &Identity, transitions: &Transitions) {
    if tracing::enabled!(target: STATES, tracing::Level::DEBUG) {
        lines!(tracing::Level::DEBUG, id, transitions);
    }
}

fn log(id: &Identity, transitions: &Transitions) {
    lines!(tracing::Level::INFO, id, transitions);
}

/// Text without an allocation: an IPv6 address with its scope and port takes up to 58 characters.
fn short(value: impl fmt::Display) -> ArrayString<64> {
    let mut text = ArrayString::new();
    // What does not fit is cut off.
    let _ = write!(text, "{value}");
    text
}
