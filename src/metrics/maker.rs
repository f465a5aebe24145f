//! Making a metric with the project's prefix, and registering it.

use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::kernel::{Observer, WhyNot};

/// Makes metrics with the project's prefix and registers them.
pub(super) struct Maker<'a>(pub(super) &'a Registry);

impl Maker<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, metric: &C) {
        self.register_collector(Box::new(metric.clone()));
    }

    fn register_collector(&self, metric: Box<dyn prometheus::core::Collector>) {
        self.0.register(metric).expect("metric names are unique");
    }

    /// What every process tells of itself: what it is, how it reads the kernel, what it uses, and what its log lost. Returns
    /// where it tells why it does not read the kernel by a better way.
    pub(super) fn about(&self, observer: Observer, log_lost: &IntCounter) -> IntGaugeVec {
        self.register(log_lost);
        self.register_collector(Box::new(ProcessCollector::for_self()));
        let build = self.gauges("build_info", "What this binary is; always 1.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let info = self.gauges("observer_info", "How the kernel's socket table is read; always 1.", &["observer"]);
        info.with_label_values(&[observer.label()]).set(1);
        let unavailable = self.gauges(
            "observer_unavailable",
            "Whether this is why an observer that is better than the one in use is not used.",
            &["observer", "reason"],
        );
        let netlink = [WhyNot::NotAskedFor, WhyNot::Refused].map(|why| (Observer::SockDiag, why));
        for (better, why) in WhyNot::ALL.map(|why| (Observer::Ebpf, why)).into_iter().chain(netlink) {
            unavailable.with_label_values(&[better.label(), why.label()]);
        }
        unavailable
    }

    fn made<C: prometheus::core::Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("metric names and labels are valid");
        self.register(&metric);
        metric
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.made(IntCounter::with_opts(opts(name, help)))
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.made(IntCounterVec::new(opts(name, help), labels))
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.made(IntGauge::with_opts(opts(name, help)))
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.made(IntGaugeVec::new(opts(name, help), labels))
    }

    pub(super) fn float_gauge(&self, name: &str, help: &str) -> Gauge {
        self.made(Gauge::with_opts(opts(name, help)))
    }

    pub(super) fn float_gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.made(GaugeVec::new(opts(name, help), labels))
    }

    pub(super) fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        self.made(HistogramVec::new(opts, labels))
    }
}

pub(super) fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("echoscope_{name}"), help)
}
