//! What a reading of the kernel's socket table shows, and what it reports of itself.

use std::time::Duration;

use prometheus::{GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec};

use super::LATENCY;
use super::maker::Maker;
use crate::kernel::Observer;
use crate::tcp::State;

/// The gauges that only a reading of the kernel's table can fill.
pub struct TableGauges {
    /// By role, port, state.
    sockets: IntGaugeVec,
    /// By role, port, state; seconds.
    oldest: GaugeVec,
    /// By port.
    queue_length: IntGaugeVec,
    /// By port.
    queue_limit: IntGaugeVec,
    /// By target.
    ports_used: IntGaugeVec,
    /// By target.
    ports_limit: IntGaugeVec,
}

impl TableGauges {
    pub(super) fn new(make: &Maker<'_>) -> TableGauges {
        TableGauges {
            sockets: make.gauges(
                "tcp_sockets",
                "Sockets in the kernel's table at the time of the scrape, by state; in this network namespace.",
                &["role", "port", "state"],
            ),
            oldest: make.float_gauges(
                "tcp_oldest_seconds",
                "Age of the oldest socket in a state, of those whose age is known: own connections by what was \
                 observed of them, TIME_WAIT by the kernel's timer, CLOSE_WAIT that nobody accepted or watches by the \
                 last ACK (at least so old). 0 where there is none; absent where there are some and no age is known.",
                &["role", "port", "state"],
            ),
            queue_length: make.gauges(
                "accept_queue_length",
                "Connections that wait for accept(2) (Recv-Q of the listener in ss); of several on one port, at the fullest.",
                &["port"],
            ),
            queue_limit: make.gauges(
                "accept_queue_limit",
                "How many may wait (Send-Q of the listener in ss); absent when the observer cannot tell.",
                &["port"],
            ),
            ports_used: make.gauges(
                "local_ports_used",
                "Local ports in use towards the target, TIME_WAIT included: the most of any pair of \
                 addresses, for that is what runs out.",
                &["target"],
            ),
            ports_limit: make.gauges(
                "local_ports_limit",
                "Local ports that connect(2) may choose from for one pair of addresses (ip_local_port_range \
                 less reserved ports).",
                &["target"],
            ),
        }
    }

    /// One end of a service: of each state how many sockets, and how old the oldest is, where that is known.
    pub fn service(&self, role: &str, port: &str, of: impl Fn(State) -> (u64, Option<Duration>)) {
        for state in State::ALL {
            let (labels, (count, oldest)) = (&[role, port, state.label()], of(state));
            self.sockets.with_label_values(labels).set(count.cast_signed());
            if let Some(oldest) = oldest {
                self.oldest.with_label_values(labels).set(oldest.as_secs_f64());
            }
        }
    }

    /// The accept queue of a port, and its limit where that is known.
    pub fn queue(&self, port: &str, length: u32, limit: Option<u32>) {
        self.queue_length.with_label_values(&[port]).set(length.into());
        if let Some(limit) = limit {
            self.queue_limit.with_label_values(&[port]).set(limit.into());
        }
    }

    /// The local ports taken towards a target, and how many there are where that is known.
    pub fn ports(&self, target: &str, used: u32, limit: Option<u32>) {
        self.ports_used.with_label_values(&[target]).set(used.into());
        if let Some(limit) = limit {
            self.ports_limit.with_label_values(&[target]).set(limit.into());
        }
    }

    pub(super) fn clear(&self) {
        self.sockets.reset();
        self.oldest.reset();
        self.queue_length.reset();
        self.queue_limit.reset();
        self.ports_used.reset();
        self.ports_limit.reset();
    }
}

/// What one user of the socket table reports of itself.
pub struct ObserverMetrics {
    /// Seconds a reading took.
    pub duration: Histogram,
    /// Readings that failed.
    pub errors: IntCounter,
    /// Times that destroy events were lost.
    pub lost_events: IntCounter,
    /// Dumps under which the table changed.
    pub interrupted: IntCounter,
}

/// The families that [`ObserverMetrics`] come from.
pub(super) struct ObserverFamilies {
    duration: HistogramVec,
    errors: IntCounterVec,
    lost_events: IntCounterVec,
}

impl ObserverFamilies {
    pub(super) fn new(make: &Maker<'_>) -> ObserverFamilies {
        ObserverFamilies {
            duration: make.histograms(
                "observer_duration_seconds",
                "How long a reading of the kernel's table took.",
                &["observer", "what"],
                LATENCY,
            ),
            errors: make.counters(
                "observer_errors_total",
                "Readings of the kernel's table that failed.",
                &["observer", "what"],
            ),
            lost_events: make.counters(
                "observer_lost_events_total",
                "Times that the kernel lost events for us, or a dump changed under us; a re-sync followed.",
                &["observer", "what"],
            ),
        }
    }

    /// Those of one use of the table: `census`, `follow` or `survey`.
    pub(super) fn of(&self, observer: Observer, what: &str) -> ObserverMetrics {
        let labels = &[observer.label(), what];
        let events = if observer == Observer::Ebpf { "tracepoint" } else { "destroy" };
        ObserverMetrics {
            duration: self.duration.with_label_values(labels),
            errors: self.errors.with_label_values(labels),
            lost_events: self.lost_events.with_label_values(&[observer.label(), events]),
            interrupted: self.lost_events.with_label_values(&[observer.label(), "dump"]),
        }
    }
}
