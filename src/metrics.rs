//! Every metric, made once against its own registry; label children are resolved once, not per event.
//!
//! Must not know: how any number is found.

mod live;
mod maker;
mod survey;
mod table;
mod transitions;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::proto::MetricFamily;
use prometheus::{Encoder, Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder};

use crate::kernel::{Observer, WhyNot};
use crate::ledger::Reason;
use crate::scope::Scope;
use crate::tcp::{Role, State, Transition};
pub use live::LiveMetrics;
use maker::{Maker, opts};
pub use survey::{ServiceRow, SurveyMetrics, TOLD};
use table::ObserverFamilies;
pub use table::{ObserverMetrics, TableGauges};
use transitions::Transitions;
pub use transitions::Walk;

/// The value of `Content-Type` for [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Seconds, from a loopback handshake to a stuck one.
const LATENCY: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
];

/// Seconds in a state: from a handshake's to TIME_WAIT's minute and a leak's days.
const STAY: &[f64] =
    &[0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 65.0, 120.0, 600.0, 3600.0, 86400.0, 604_800.0];

/// The counters that one role's connections write to.
pub struct RoleMetrics {
    /// Connections opened.
    pub opened: IntCounter,
    /// Descriptors open now.
    pub open: IntGauge,
    /// Connections closed, by [`Reason`].
    closed: Vec<IntCounter>,
    /// Payload written.
    pub sent: IntCounter,
    /// Payload read.
    pub received: IntCounter,
    /// Smoothed round-trip time at the end of each connection.
    pub rtt: Histogram,
    /// Segments retransmitted.
    pub retransmits: IntCounter,
    stay: Vec<Histogram>,
}

impl RoleMetrics {
    /// The counter of connections closed for `reason`.
    #[must_use]
    pub fn closed(&self, reason: Reason) -> &IntCounter {
        &self.closed[reason as usize]
    }
}

/// What the client measures of one target.
pub struct TargetMetrics {
    /// From when the open was due to ESTABLISHED.
    pub connect: Histogram,
    /// From the first byte written to the last byte back.
    pub echo: Histogram,
    /// From our FIN to the peer's.
    pub close: Histogram,
}

/// Who asks for the page.
#[derive(Default)]
struct Scrapes {
    count: u64,
    last: Option<Instant>,
}

/// What accept(2) may want for, as a label.
pub const ACCEPT_ERRORS: [&str; 4] = ["descriptors", "memory", "connection", "other"];

/// Every metric of the process.
pub struct Metrics {
    registry: Registry,
    roles: [RoleMetrics; 2],
    targets: Vec<TargetMetrics>,
    transitions: Transitions,
    table: TableGauges,
    /// Payload that came back different.
    pub echo_mismatch: IntCounter,
    /// Connections that were not followed because `--follow-limit` was reached.
    pub follow_dropped: IntCounter,
    /// Connections that are being followed after close(2).
    pub following: IntGauge,
    /// 1 while this process takes work.
    pub ready: IntGauge,
    /// How long the last drain took, in seconds.
    pub drain_duration: Gauge,
    /// Connections reset at `--drain-timeout`.
    pub drain_aborted: IntCounter,
    /// Who looks at the live page.
    pub live: LiveMetrics,
    /// Lost log lines, and times that events of the kernel were.
    losses: [IntCounter; 2],
    outcomes: IntCounterVec,
    accept_errors: IntCounterVec,
    observers: ObserverFamilies,
    unavailable: IntGaugeVec,
    /// One scrape at a time writes the gauges and reads them back.
    scrape: Mutex<Scrapes>,
}

impl Metrics {
    /// Makes and registers them all, with every label combination that can be known beforehand at zero.
    ///
    /// # Panics
    /// When two metrics share a name: a mistake in this file.
    #[must_use]
    pub fn new(scope: &Scope, observer: Observer, log_lost: &IntCounter) -> Metrics {
        let registry = Registry::new();
        let make = Maker(&registry);
        let unavailable = make.about(observer, log_lost);

        let opened = make.counters("connections_opened_total", "Connections opened by this process.", &["role"]);
        let open = make.gauges(
            "connections_open",
            "Connections whose descriptor this process holds: its own ledger, to hold against echoscope_tcp_sockets.",
            &["role"],
        );
        let closed = make.counters("connections_closed_total", "Connections closed, by why.", &["role", "reason"]);
        let bytes = make.counters("bytes_total", "Payload bytes.", &["role", "direction"]);
        let rtt = make.histograms(
            "tcp_rtt_seconds",
            "Smoothed round-trip time, as the kernel has it, one sample a connection, at its end.",
            &["role"],
            LATENCY,
        );
        let retransmits =
            make.counters("tcp_retransmits_total", "Segments retransmitted, added when a connection ends.", &["role"]);
        let stay = make.histograms(
            "tcp_state_duration_seconds",
            "Time that a connection spent in a state, once it left it; only where both ends of the stay are known.",
            &["role", "state"],
            STAY,
        );
        let role = |role: Role| {
            let label = role.label();
            RoleMetrics {
                opened: opened.with_label_values(&[label]),
                open: open.with_label_values(&[label]),
                closed: Reason::ALL.iter().map(|r| closed.with_label_values(&[label, r.label()])).collect(),
                sent: bytes.with_label_values(&[label, "sent"]),
                received: bytes.with_label_values(&[label, "received"]),
                rtt: rtt.with_label_values(&[label]),
                retransmits: retransmits.with_label_values(&[label]),
                stay: State::ALL.iter().map(|s| stay.with_label_values(&[label, s.label()])).collect(),
            }
        };
        let latency = |name, help| make.histograms(name, help, &["target"], LATENCY);
        let connect =
            latency("connect_duration_seconds", "From when the open was due to ESTABLISHED, late opens included.");
        let echo = latency("echo_duration_seconds", "From the first byte of a message written to its last byte back.");
        let close = latency("close_duration_seconds", "From our FIN (shutdown) to the end of the peer's stream.");
        let observers = ObserverFamilies::new(&make);
        for what in ["census", "follow"] {
            observers.of(observer, what);
        }
        let accept_errors = make.counters(
            "accept_errors_total",
            "accept(2) errors, by listening service; descriptors and memory are waited for.",
            &["service", "reason"],
        );
        let services = scope.has(Role::Server).then_some("echo").into_iter().chain(["web"]);
        for (service, reason) in services.flat_map(|s| ACCEPT_ERRORS.map(|reason| (s, reason))) {
            accept_errors.with_label_values(&[service, reason]);
        }
        Metrics {
            roles: [role(Role::Server), role(Role::Client)],
            targets: scope
                .targets()
                .iter()
                .map(|t| TargetMetrics {
                    connect: connect.with_label_values(&[&t.name]),
                    echo: echo.with_label_values(&[&t.name]),
                    close: close.with_label_values(&[&t.name]),
                })
                .collect(),
            transitions: Transitions::new(
                make.counters(
                    "tcp_transitions_total",
                    "State changes of own connections, by who saw them; from and to may be several steps \
                     apart where nobody saw the way.",
                    &["role", "from", "to", "evidence"],
                ),
                scope,
                observer,
            ),
            table: TableGauges::new(&make),
            echo_mismatch: make.counter("echo_mismatch_total", "Messages that came back different: must stay 0."),
            follow_dropped: make.counter(
                "follow_dropped_total",
                "Connections not followed to their end because --follow-limit was reached.",
            ),
            following: make
                .gauge("following", "Connections followed after close(2), until the kernel lets go of them."),
            ready: make.gauge(
                "ready",
                "Whether this process takes work: 0 before everything listens, and from the first signal on.",
            ),
            drain_duration: make.float_gauge("drain_duration_seconds", "How long the drain took, or takes so far."),
            drain_aborted: make
                .counter("drain_aborted_total", "Connections reset because they were open at --drain-timeout."),
            live: LiveMetrics::new(&make),
            losses: [log_lost.clone(), observers.of(observer, "follow").lost_events],
            outcomes: make.counters(
                "outcomes_total",
                "How the client's turns ended, by target; ok: every echo came back and the close was as asked.",
                &["target", "outcome"],
            ),
            accept_errors,
            observers,
            unavailable,
            scrape: Mutex::default(),
            registry,
        }
    }

    /// The counters of one role.
    #[must_use]
    pub fn role(&self, role: Role) -> &RoleMetrics {
        &self.roles[role as usize]
    }

    /// The latencies of the client's target number `index`.
    #[must_use]
    pub fn target(&self, index: usize) -> &TargetMetrics {
        &self.targets[index]
    }

    /// The counters of how the turns of the client's target `name` end, one for each of `outcomes`.
    #[must_use]
    pub fn outcomes<const N: usize>(&self, name: &str, outcomes: [&str; N]) -> [IntCounter; N] {
        outcomes.map(|outcome| self.outcomes.with_label_values(&[name, outcome]))
    }

    /// The counters of accept(2) errors of one listening service, in the order of [`ACCEPT_ERRORS`].
    #[must_use]
    pub fn accept_errors(&self, service: &str) -> [IntCounter; ACCEPT_ERRORS.len()] {
        ACCEPT_ERRORS.map(|reason| self.accept_errors.with_label_values(&[service, reason]))
    }

    /// The metrics of one use of the socket table: `census` or `follow`.
    #[must_use]
    pub fn observer(&self, observer: Observer, what: &str) -> ObserverMetrics {
        self.observers.of(observer, what)
    }

    /// Tells why an observer that is better than the one in use is not used.
    pub fn unavailable(&self, better: Observer, why: WhyNot) {
        self.unavailable.with_label_values(&[better.label(), why.label()]).set(1);
    }

    /// Counts a transition and the stay that it ended.
    pub fn count(&self, role: Role, t: &Transition) {
        self.transitions.child(role, t).inc();
        if let Some(after) = t.after {
            self.role(role).stay[t.from as usize - 1].observe(after.as_secs_f64());
        }
    }

    /// How often each way was walked so far, those that never were left out.
    #[must_use]
    pub fn walked(&self) -> Vec<(Walk, u64)> {
        self.transitions.walked()
    }

    /// What was lost so far, by what it is.
    #[must_use]
    pub fn lost(&self) -> Vec<(&'static str, u64)> {
        let [log_lines, events] = &self.losses;
        vec![("events", events.get()), ("log_lines", log_lines.get()), ("not_followed", self.follow_dropped.get())]
    }

    /// How often each state was entered, from the transition counters.
    #[must_use]
    pub fn entered(&self, role: Role) -> Vec<(State, u64)> {
        State::ALL.into_iter().map(|to| (to, self.transitions.entered(role, to))).collect()
    }

    /// How often the page was asked for, if somebody asks again and again: of late, and not once only.
    #[must_use]
    pub fn scrapes(&self) -> Option<u64> {
        const OF_LATE: Duration = Duration::from_mins(1);
        let scrapes = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let last = scrapes.last?;
        (scrapes.count > 1 && last.elapsed() < OF_LATE).then_some(scrapes.count)
    }

    /// The page for `/metrics`: what `fill` puts into the table's gauges, and everything else. What it does not fill is
    /// left out: an old number would be a lie.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    pub fn render(&self, fill: impl FnOnce(&TableGauges)) -> prometheus::Result<Vec<u8>> {
        let families = {
            let mut scrapes = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
            self.table.clear();
            fill(&self.table);
            let families = self.registry.gather();
            *scrapes = Scrapes { count: scrapes.count + 1, last: Some(Instant::now()) };
            families
        };
        encode(&families)
    }
}

/// The text that Prometheus reads.
fn encode(families: &[MetricFamily]) -> prometheus::Result<Vec<u8>> {
    let mut page = Vec::with_capacity(64 * 1024);
    TextEncoder::new().encode(families, &mut page)?;
    Ok(page)
}

/// The counter of log lines lost, made before the other metrics: logs start first.
///
/// # Panics
/// Never: the name is valid.
#[must_use]
pub fn log_lost_counter() -> IntCounter {
    IntCounter::with_opts(opts("log_lost_total", "Log lines lost because the queue was full or the output failed."))
        .expect("the name is valid")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::Target;
    use std::sync::Arc;

    /// Every name, type and label set that a pair shows from the start, in one file to read: a change here is a change of the contract.
    #[test]
    fn the_page_is_the_golden_one() {
        let scope = Scope::new(&[7007], vec![Arc::new(Target::new("localhost:7007".into(), 7007))]);
        let metrics = Metrics::new(&scope, Observer::SockDiag, &log_lost_counter());
        metrics.unavailable(Observer::Ebpf, WhyNot::NotPermitted);
        let page = String::from_utf8(metrics.render(|_| ()).unwrap()).unwrap();
        let ours = page.lines().filter(|l| !l.contains("process_") && !l.contains("_bucket{"));
        let ours: Vec<&str> = ours.map(|l| l.replace(env!("CARGO_PKG_VERSION"), "VERSION").leak() as &str).collect();
        let golden: Vec<&str> = include_str!("metrics/golden.txt").lines().collect();
        let differs = |(now, then): &(&&str, &&str)| now != then;
        let first = ours.iter().zip(&golden).find(differs);
        assert!(ours == golden, "{first:?}; the page now:\n{}", ours.join("\n"));
    }
}
