//! What the survey exports: the same names as of one's own connections, where they mean the same.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use super::maker::Maker;
use super::table::ObserverFamilies;
use super::transitions::Transitions;
use super::{ACCEPT_ERRORS, LiveMetrics, ObserverMetrics, STAY, TableGauges, Walk, encode};
use crate::kernel::{Observer, WhyNot};
use crate::tcp::{Cause, Role, State, Transition};

/// The states whose stays are told: those that pile up.
pub const TOLD: [State; 3] = [State::CloseWait, State::FinWait2, State::TimeWait];

/// The cause that nobody knows.
const UNKNOWN: &str = "unknown";

/// Every metric of a process that watches others.
pub struct SurveyMetrics {
    registry: Registry,
    table: TableGauges,
    opened: IntCounterVec,
    closed: IntCounterVec,
    stay: HistogramVec,
    transitions: Transitions,
    ended: IntCounterVec,
    /// The kernel announces causes.
    announced: bool,
    listener: IntGaugeVec,
    accept_errors: IntCounterVec,
    /// Connections that nobody told the survey of.
    pub missed: IntCounter,
    /// 1 while this process answers.
    pub ready: IntGauge,
    observer: ObserverMetrics,
    /// Who looks at the live page.
    pub live: LiveMetrics,
    log_lost: IntCounter,
    unavailable: IntGaugeVec,
    /// One scrape at a time writes the gauges and reads them back; who was there at the last one.
    scrape: Mutex<BTreeSet<(&'static str, String)>>,
}

/// One service's numbers, as a scrape shows them.
pub struct ServiceRow {
    /// `server` or `client`.
    pub role: &'static str,
    /// A port, or `other`.
    pub port: String,
    /// Opened and closed since the start.
    pub totals: (u64, u64),
    /// The processes that listen, each name once, where they are known.
    pub processes: Vec<String>,
}

impl SurveyMetrics {
    /// Makes and registers them all.
    ///
    /// # Panics
    /// When two metrics share a name: a mistake in this file.
    #[must_use]
    pub fn new(observer: Observer, log_lost: &IntCounter) -> SurveyMetrics {
        let registry = Registry::new();
        let make = Maker(&registry);
        let unavailable = make.about(observer, log_lost);
        let table = TableGauges::new(&make);
        let ready = make.gauge("ready", "Whether this process answers: 0 from the first signal on.");
        let announced = observer == Observer::Ebpf;
        let observer = ObserverFamilies::new(&make).of(observer, "survey");
        let accept_errors =
            make.counters("accept_errors_total", "accept(2) errors, by listening service.", &["service", "reason"]);
        SurveyMetrics {
            announced,
            table,
            opened: make.counters(
                "sockets_opened_total",
                "Connections of others opened since the survey began: new in the table, or freed between two readings.",
                &["role", "port"],
            ),
            closed: make.counters(
                "sockets_closed_total",
                "Connections of others whose full socket is gone since the survey began.",
                &["role", "port"],
            ),
            stay: make.histograms(
                "sockets_state_duration_seconds",
                "Time that connections of others spent in a state that piles up, once they left it, to the interval of the \
                 readings.",
                &["role", "port", "state"],
                STAY,
            ),
            transitions: Transitions::none_yet(make.counters(
                "tcp_transitions_total",
                "State changes of the connections that are watched, by who saw them: where the kernel announces them (eBPF).",
                &["role", "from", "to", "evidence"],
            )),
            ended: make.counters(
                "sockets_ended_total",
                "How connections of others ended: what led to TIME_WAIT or CLOSED; unknown, unless the kernel announces it (eBPF).",
                &["role", "port", "cause"],
            ),
            listener: make.gauges("listener_info", "Which process listens; always 1.", &["port", "process"]),
            accept_errors,
            missed: make.counter(
                "sockets_missed_total",
                "Connections of others that are in no count: the kernel opened them, and its word of their end was lost.",
            ),
            ready,
            observer,
            live: LiveMetrics::new(&make),
            log_lost: log_lost.clone(),
            unavailable,
            scrape: Mutex::default(),
            registry,
        }
    }

    /// Tells why an observer that is better than the one in use is not used.
    pub fn unavailable(&self, better: Observer, why: WhyNot) {
        self.unavailable.with_label_values(&[better.label(), why.label()]).set(1);
    }

    /// The counters of accept(2) errors of the web side.
    #[must_use]
    pub fn accept_errors(&self) -> [IntCounter; ACCEPT_ERRORS.len()] {
        ACCEPT_ERRORS.map(|reason| self.accept_errors.with_label_values(&["web", reason]))
    }

    /// A stay of somebody's connection has ended.
    pub fn stay(&self, role: &'static str, port: &str, state: &str, time: Duration) {
        // Also of a service that is gone before anybody scrapes.
        self.known().insert((role, port.to_owned()));
        self.stay.with_label_values(&[role, port, state]).observe(time.as_secs_f64());
    }

    /// Whether the kernel announces each step.
    #[must_use]
    pub fn announces(&self) -> bool {
        self.announced
    }

    /// How often each way was walked so far, those that never were left out.
    #[must_use]
    pub fn walked(&self) -> Vec<(Walk, u64)> {
        self.transitions.walked()
    }

    /// The kernel has announced a step of somebody's connection.
    pub fn announced(&self, role: Role, port: &str, t: &Transition) {
        self.transitions.child(role, t).inc();
        let role = role.label();
        if TOLD.contains(&t.from)
            && let Some(after) = t.after
        {
            self.stay(role, port, t.from.label(), after);
        }
        if t.to == State::TimeWait || (t.to == State::Close && t.from != State::TimeWait) {
            self.known().insert((role, port.to_owned()));
            self.ended.with_label_values(&[role, port, t.cause.map_or(UNKNOWN, Cause::label)]).inc();
        }
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<(&'static str, String)>> {
        self.scrape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the survey reports of itself.
    #[must_use]
    pub fn observer(&self) -> &ObserverMetrics {
        &self.observer
    }

    /// What was lost so far, by what it is.
    #[must_use]
    pub fn lost(&self) -> Vec<(&'static str, u64)> {
        let events = self.observer.lost_events.get();
        vec![("events", events), ("log_lines", self.log_lost.get()), ("missed", self.missed.get())]
    }

    /// The page for `/metrics`: these services, what `fill` puts into the table's gauges, and everything else. A service that
    /// is gone takes its series with it.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    pub fn render(&self, services: &[ServiceRow], fill: impl FnOnce(&TableGauges)) -> prometheus::Result<Vec<u8>> {
        let families = {
            let mut known = self.known();
            self.table.clear();
            self.listener.reset();
            let now: BTreeSet<_> = services.iter().map(|s| (s.role, s.port.clone())).collect();
            for (role, port) in known.difference(&now) {
                let labels: [&str; 2] = [role, port];
                let _ = self.opened.remove_label_values(&labels);
                let _ = self.closed.remove_label_values(&labels);
                for cause in Cause::ALL.into_iter().map(Cause::label).chain([UNKNOWN]) {
                    let _ = self.ended.remove_label_values(&[role, port.as_str(), cause]);
                }
                for state in State::ALL {
                    let _ = self.stay.remove_label_values(&[role, port.as_str(), state.label()]);
                }
            }
            for ServiceRow { role, port, totals, processes } in services {
                for (counter, total) in [(&self.opened, totals.0), (&self.closed, totals.1)] {
                    let counter = counter.with_label_values(&[*role, port.as_str()]);
                    counter.inc_by(total.saturating_sub(counter.get()));
                }
                let unknown = self.ended.with_label_values(&[*role, port.as_str(), UNKNOWN]);
                if !self.announced {
                    unknown.inc_by(totals.1.saturating_sub(unknown.get()));
                }
                // Present at zero: an increase from nothing is none.
                for state in TOLD {
                    let _ = self.stay.with_label_values(&[*role, port.as_str(), state.label()]);
                }
                for process in processes {
                    self.listener.with_label_values(&[port.as_str(), process.as_str()]).set(1);
                }
            }
            *known = now;
            fill(&self.table);
            self.registry.gather()
        };
        encode(&families)
    }
}
