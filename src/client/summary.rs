//! What a run came to: totals, outcomes, percentiles, for a person and for a script.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::outcome::Outcome;
use super::stats::Stats;
use crate::journal::Journal;
use crate::tcp::Role;

/// What a run came to.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Turns taken.
    pub connections: u64,
    /// How each ended.
    #[serde(serialize_with = "as_map")]
    pub outcomes: Vec<(&'static str, u64)>,
    /// Tries beyond the first.
    pub retries: u64,
    /// Turns that the drain's deadline ended before they were finished; not among the connections above.
    pub cut_short: u64,
    /// Opens that were due before the end and never made, because every connection was busy. The latencies say nothing
    /// of them.
    pub unopened: u64,
    /// Echoes that came back whole.
    pub echoes: u64,
    /// Payload bytes written.
    pub bytes_sent: u64,
    /// Payload bytes read.
    pub bytes_received: u64,
    /// Due to ESTABLISHED.
    pub connect: Percentiles,
    /// First byte out to last byte back.
    pub echo: Percentiles,
    /// Our FIN to the peer's.
    pub close: Percentiles,
    /// How often this side entered each state.
    #[serde(serialize_with = "as_map")]
    pub client_states: Vec<(&'static str, u64)>,
    /// The same of the server, if it is this process too. A LISTEN is the listener's own.
    #[serde(serialize_with = "as_map")]
    pub server_states: Vec<(&'static str, u64)>,
    /// Connections that the kernel still keeps, by the state they were last seen in: it finishes them by itself.
    #[serde(serialize_with = "as_map")]
    pub still_in_kernel: Vec<(&'static str, u64)>,
}

impl Summary {
    /// What `stats` counted, with what the journal saw meanwhile.
    #[must_use]
    pub fn of(stats: &Stats, journal: &Journal) -> Summary {
        let n = stats.total();
        let role = journal.metrics().role(Role::Client);
        let finished = || Outcome::ALL.into_iter().filter(|o| *o != Outcome::CutShort);
        let states = |role| {
            let entered = journal.metrics().entered(role).into_iter().filter(|(_, count)| *count > 0);
            entered.map(|(state, count)| (state.name(), count)).collect()
        };
        Summary {
            seconds: stats.lasted().as_secs_f64(),
            connections: finished().map(|o| n.of(o)).sum(),
            outcomes: finished().map(|o| (o.label(), n.of(o))).collect(),
            cut_short: n.of(Outcome::CutShort),
            unopened: stats.unopened(),
            retries: n.retries,
            echoes: n.echo.len(),
            bytes_sent: role.sent.get(),
            bytes_received: role.received.get(),
            connect: Percentiles::of(&n.connect),
            echo: Percentiles::of(&n.echo),
            close: Percentiles::of(&n.close),
            client_states: states(Role::Client),
            server_states: states(Role::Server),
            still_in_kernel: journal.ledger().states().into_iter().map(|(s, n)| (s.name(), n)).collect(),
        }
    }
}

/// Percentiles of a latency, in seconds.
#[derive(Debug, Serialize)]
pub struct Percentiles {
    /// Samples.
    pub count: u64,
    /// Half were no longer.
    pub p50: f64,
    /// 90 % were no longer.
    pub p90: f64,
    /// 99 % were no longer.
    pub p99: f64,
    /// 99.9 % were no longer.
    pub p999: f64,
    /// None was longer.
    pub max: f64,
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>) -> Percentiles {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e9;
        Percentiles {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1e9,
        }
    }
}

fn as_map<S: serde::Serializer>(pairs: &[(&'static str, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.connections as f64 / self.seconds.max(1e-9);
        writeln!(
            f,
            "{} connections in {:.2} s ({rate:.1} a second), {} echoes",
            self.connections, self.seconds, self.echoes
        )?;
        writeln!(f, "  bytes    {} sent, {} received", self.bytes_sent, self.bytes_received)?;
        write!(f, "  outcomes")?;
        for (label, count) in self.outcomes.iter().filter(|(_, count)| *count > 0) {
            write!(f, "  {label} {count}")?;
        }
        if self.retries > 0 {
            write!(f, "  (tried again {} times)", self.retries)?;
        }
        writeln!(f)?;
        if self.cut_short > 0 {
            writeln!(f, "  {} cut short: the deadline came before they were finished", self.cut_short)?;
        }
        if self.connect.count > 0 {
            writeln!(f, "  {:<8} {:>10} {:>10} {:>10} {:>10} {:>10}", "latency", "p50", "p90", "p99", "p99.9", "max")?;
        }
        for (name, p) in [("connect", &self.connect), ("echo", &self.echo), ("close", &self.close)] {
            if p.count > 0 {
                write!(f, "  {name:<8}")?;
                for seconds in [p.p50, p.p90, p.p99, p.p999, p.max] {
                    write!(f, " {:>10}", millis(seconds))?;
                }
                writeln!(f)?;
            }
        }
        for (role, states) in [("client", &self.client_states), ("server", &self.server_states)] {
            if !states.is_empty() {
                write!(f, "  {role:<8}")?;
                for (state, count) in states {
                    write!(f, " {state} {count}")?;
                }
                writeln!(f)?;
            }
        }
        if self.unopened > 0 {
            writeln!(f, "  {} not opened: they were due, but every connection was busy until the end", self.unopened)?;
        }
        if !self.still_in_kernel.is_empty() {
            write!(f, "  still in the kernel, which ends them by itself:")?;
            for (state, count) in &self.still_in_kernel {
                write!(f, " {state} {count}")?;
            }
            writeln!(f, " (--until-gone waits)")?;
        }
        Ok(())
    }
}

fn millis(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}
