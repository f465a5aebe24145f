//! The numbers of a run, gathered without a lock that all connections share.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::outcome::Outcome;
use crate::shutdown::Verdict;

/// The numbers of a run. Workers write to shares of it, which are added up when somebody asks.
#[derive(Clone)]
pub struct Stats(Arc<Whole>);

struct Whole {
    began: Instant,
    ended: OnceLock<End>,
    shares: Vec<Share>,
}

/// What is known when the last connection is closed.
#[derive(Clone, Copy)]
struct End {
    at: Instant,
    unopened: u64,
    open_at_stop: u64,
}

/// The numbers of some of the workers.
pub(super) struct Share(Mutex<Numbers>);

/// What was counted and measured.
pub(super) struct Numbers {
    outcomes: [u64; Outcome::ALL.len()],
    pub(super) retries: u64,
    pub(super) connect: Histogram<u64>,
    pub(super) echo: Histogram<u64>,
    pub(super) close: Histogram<u64>,
}

impl Numbers {
    fn new() -> Numbers {
        // Nanoseconds up to ten minutes, to three digits: a quarter of a megabyte each, of which the touched pages count.
        let histogram = || Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("the bounds are valid");
        Numbers {
            outcomes: [0; Outcome::ALL.len()],
            retries: 0,
            connect: histogram(),
            echo: histogram(),
            close: histogram(),
        }
    }

    /// How many turns ended so.
    pub(super) fn of(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    fn add(&mut self, other: &Numbers) {
        for (mine, theirs) in self.outcomes.iter_mut().zip(other.outcomes) {
            *mine += theirs;
        }
        self.retries += other.retries;
        for (mine, theirs) in
            [(&mut self.connect, &other.connect), (&mut self.echo, &other.echo), (&mut self.close, &other.close)]
        {
            mine.add(theirs).expect("all histograms have the same bounds");
        }
    }
}

impl Stats {
    /// Begins now, for so many workers.
    pub(super) fn new(workers: usize) -> Stats {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let shares = (0..workers.min(2 * cores).max(1)).map(|_| Share(Mutex::new(Numbers::new()))).collect();
        Stats(Arc::new(Whole { began: Instant::now(), ended: OnceLock::new(), shares }))
    }

    /// Where worker number `worker` writes.
    pub(super) fn share(&self, worker: usize) -> &Share {
        &self.0.shares[worker % self.0.shares.len()]
    }

    /// The last connection is closed: the run has lasted until now. `unopened` were due and never opened, and so many
    /// were open when the run was told to stop, if it was.
    pub(super) fn end(&self, unopened: u64, open_at_stop: u64) {
        self.0.ended.get_or_init(|| End { at: Instant::now(), unopened, open_at_stop });
    }

    /// From the first open to the last close, or to now.
    pub(super) fn lasted(&self) -> Duration {
        let end = self.0.ended.get().map_or_else(Instant::now, |end| end.at);
        end.saturating_duration_since(self.0.began)
    }

    /// Opens that were due before the end and never made, because every connection was busy.
    #[must_use]
    pub fn unopened(&self) -> u64 {
        self.0.ended.get().map_or(0, |end| end.unopened)
    }

    /// How the end went, for a run that was told to stop.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let aborted = self.total().of(Outcome::CutShort);
        let open = self.0.ended.get().map_or(0, |end| end.open_at_stop);
        Verdict { open, aborted, ..Verdict::default() }
    }

    /// Whether everything that was opened echoed and closed as it should.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let whole = self.total();
        Outcome::ALL.into_iter().all(|outcome| !outcome.is_failure() || whole.of(outcome) == 0)
    }

    pub(super) fn total(&self) -> Numbers {
        let mut whole = Numbers::new();
        self.0.shares.iter().for_each(|share| whole.add(&share.lock()));
        whole
    }
}

impl Share {
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

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record(histogram: &mut Histogram<u64>, took: Duration) {
    histogram.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_not_clean_whoever_counted_it() {
        let stats = Stats::new(2);
        stats.share(0).done(Outcome::Ok);
        assert!(stats.is_clean());
        stats.share(1).done(Outcome::Refused);
        assert!(!stats.is_clean());
    }

    #[test]
    fn shares_add_up() {
        let stats = Stats::new(3);
        for worker in 0..9 {
            stats.share(worker).done(Outcome::Ok);
            stats.share(worker).echoed(Duration::from_millis(worker as u64 + 1));
        }
        let total = stats.total();
        assert_eq!((total.of(Outcome::Ok), total.echo.len()), (9, 9));
        assert_eq!(total.echo.max() / 1_000_000, 9);
    }

    #[test]
    fn the_run_ends_when_it_is_told_to_have_ended() {
        let stats = Stats::new(1);
        stats.end(3, 2);
        let lasted = stats.lasted();
        assert_eq!((stats.lasted(), stats.unopened(), stats.verdict().open), (lasted, 3, 2));
    }
}
