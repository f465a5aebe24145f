//! What a run came to: totals, outcomes, percentiles, for a person and for a script.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::journal::Journal;
use crate::tcp::{Role, State};

/// How one turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// Everything came back and the connection was closed as asked.
    Ok,
    /// A RST answered the SYN.
    Refused,
    /// Nothing answered the SYN in time.
    ConnectTimeout,
    /// The network says that there is no way.
    Unreachable,
    /// No local port was left.
    NoLocalPort,
    /// The name has no address.
    Unresolved,
    /// The connection was reset.
    Reset,
    /// An echo took too long.
    EchoTimeout,
    /// Something else came back.
    Mismatch,
    /// The peer ended its stream before everything was back.
    Short,
    /// The peer's FIN did not come in time.
    CloseTimeout,
    /// No descriptor was left in this process.
    NoDescriptor,
    /// Anything else.
    Error,
    /// The drain's deadline ended it: told apart from the rest, it is nobody's failure but the clock's.
    CutShort,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 14] = [
        Outcome::Ok,
        Outcome::Refused,
        Outcome::ConnectTimeout,
        Outcome::Unreachable,
        Outcome::NoLocalPort,
        Outcome::Unresolved,
        Outcome::Reset,
        Outcome::EchoTimeout,
        Outcome::Mismatch,
        Outcome::Short,
        Outcome::CloseTimeout,
        Outcome::NoDescriptor,
        Outcome::Error,
        Outcome::CutShort,
    ];

    /// The name in the summary.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Refused => "refused",
            Outcome::ConnectTimeout => "connect_timeout",
            Outcome::Unreachable => "unreachable",
            Outcome::NoLocalPort => "no_local_port",
            Outcome::Unresolved => "unresolved",
            Outcome::Reset => "reset",
            Outcome::EchoTimeout => "echo_timeout",
            Outcome::Mismatch => "mismatch",
            Outcome::Short => "short",
            Outcome::CloseTimeout => "close_timeout",
            Outcome::NoDescriptor => "no_descriptor",
            Outcome::Error => "error",
            Outcome::CutShort => "cut_short",
        }
    }

    /// What an error of connect(2) means.
    #[must_use]
    pub(super) fn of_connect(error: &std::io::Error) -> Outcome {
        use std::io::ErrorKind::{
            AddrNotAvailable, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
        };
        match error.kind() {
            _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Outcome::NoDescriptor,
            ConnectionRefused | ConnectionReset => Outcome::Refused,
            TimedOut => Outcome::ConnectTimeout,
            HostUnreachable | NetworkUnreachable => Outcome::Unreachable,
            AddrNotAvailable => Outcome::NoLocalPort,
            _ => Outcome::Error,
        }
    }

    /// What an error of an open connection means.
    #[must_use]
    pub(super) fn of_echo(error: &std::io::Error) -> Outcome {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut};
        match error.kind() {
            ConnectionReset | BrokenPipe => Outcome::Reset,
            TimedOut => Outcome::EchoTimeout,
            _ => Outcome::Error,
        }
    }

    /// Whether another try may go better: nobody listened yet, the name was not there yet, or the ports were all in
    /// use.
    pub(super) fn may_be_tried_again(self) -> bool {
        matches!(
            self,
            Outcome::Refused
                | Outcome::Unresolved
                | Outcome::NoLocalPort
                | Outcome::NoDescriptor
                | Outcome::Unreachable
        )
    }

    /// Whether something failed to echo.
    #[must_use]
    pub fn is_failure(self) -> bool {
        self != Outcome::Ok
    }
}

/// The numbers of a run, shared by its workers.
#[derive(Clone)]
pub struct Stats(Arc<Mutex<Numbers>>);

struct Numbers {
    began: Instant,
    outcomes: [u64; Outcome::ALL.len()],
    retries: u64,
    connect: Histogram<u64>,
    echo: Histogram<u64>,
    close: Histogram<u64>,
}

impl Stats {
    pub(super) fn new() -> Stats {
        // Nanoseconds up to ten minutes, to three digits.
        let histogram = || Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("the bounds are valid");
        Stats(Arc::new(Mutex::new(Numbers {
            began: Instant::now(),
            outcomes: [0; Outcome::ALL.len()],
            retries: 0,
            connect: histogram(),
            echo: histogram(),
            close: histogram(),
        })))
    }

    pub(super) fn done(&self, outcome: Outcome) {
        self.lock().outcomes[outcome as usize] += 1;
    }

    pub(super) fn retried(&self) {
        self.lock().retries += 1;
    }

    pub(super) fn connected(&self, took: Duration) {
        record(&mut self.lock().connect, took);
    }

    pub(super) fn echoed(&self, took: Duration) {
        record(&mut self.lock().echo, took);
    }

    pub(super) fn closed(&self, took: Duration) {
        record(&mut self.lock().close, took);
    }

    /// The deadline came before this one was finished.
    pub(super) fn cut_short(&self) {
        self.done(Outcome::CutShort);
    }

    /// Whether everything that was opened echoed and closed as it should.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let numbers = self.lock();
        Outcome::ALL.iter().all(|o| !o.is_failure() || numbers.outcomes[*o as usize] == 0)
    }

    /// The whole, with what the journal saw meanwhile.
    #[must_use]
    pub fn summary(&self, journal: &Journal, still_followed: usize) -> Summary {
        let n = self.lock();
        let role = journal.metrics().role(Role::Client);
        let finished = || Outcome::ALL.into_iter().filter(|o| *o != Outcome::CutShort);
        let states = |role| {
            let entered = journal.metrics().entered(role).into_iter().filter(|(_, count)| *count > 0);
            entered.map(|(state, count)| (state.name(), count)).collect()
        };
        Summary {
            seconds: n.began.elapsed().as_secs_f64(),
            connections: finished().map(|o| n.outcomes[o as usize]).sum(),
            outcomes: finished().map(|o| (o.label(), n.outcomes[o as usize])).collect(),
            cut_short: n.outcomes[Outcome::CutShort as usize],
            retries: n.retries,
            echoes: n.echo.len(),
            bytes_sent: role.sent.get(),
            bytes_received: role.received.get(),
            connect: Percentiles::of(&n.connect),
            echo: Percentiles::of(&n.echo),
            close: Percentiles::of(&n.close),
            client_states: states(Role::Client),
            server_states: states(Role::Server),
            still_followed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record(histogram: &mut Histogram<u64>, took: Duration) {
    histogram.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1));
}

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
    /// Connections that the kernel still keeps, TIME_WAIT mostly: it finishes them by itself.
    pub still_followed: usize,
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
        if self.still_followed > 0 {
            writeln!(
                f,
                "  {} still in the kernel, in {} mostly: it ends them by itself within a minute (--until-gone waits)",
                self.still_followed,
                State::TimeWait
            )?;
        }
        Ok(())
    }
}

fn millis(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_not_clean() {
        let stats = Stats::new();
        stats.done(Outcome::Ok);
        assert!(stats.is_clean());
        stats.done(Outcome::Refused);
        assert!(!stats.is_clean());
    }

    #[test]
    fn outcomes_are_indexed_by_their_place() {
        for (i, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, i);
        }
    }
}
