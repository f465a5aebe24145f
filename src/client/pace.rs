//! When the next connection is due.
//!
//! Open-loop: the schedule does not wait for anyone, and an open that comes late is measured from when it was due
//! (otherwise a stall would hide every open that it delayed: "coordinated omission").

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::shutdown::Stop;

/// What tokio's timer may add by rounding. It is ours, not the network's: an open that is late by no more is on time.
const TIMER_GRAIN: Duration = Duration::from_millis(2);

/// Hands out turns to open a connection.
pub(super) struct Pace {
    start: Instant,
    interval: Option<f64>,
    count: Option<u64>,
    end: Option<Instant>,
    next: AtomicU64,
    handed_out: AtomicU64,
    /// When the run was told to stop, if it was.
    stopped: OnceLock<Instant>,
}

/// One turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    /// Which.
    pub(super) number: u64,
    /// Since when it counts.
    pub(super) due: Instant,
}

impl Pace {
    pub(super) fn start(rate: Option<f64>, count: Option<u64>, duration: Option<Duration>) -> Pace {
        let start = Instant::now();
        Pace {
            start,
            interval: rate.map(|rate| 1.0 / rate),
            count,
            end: duration.and_then(|d| start.checked_add(d)),
            next: AtomicU64::new(0),
            handed_out: AtomicU64::new(0),
            stopped: OnceLock::new(),
        }
    }

    /// How many turns were due before the end of the duration, or before the stop, and never taken.
    pub(super) fn unopened(&self) -> u64 {
        let ends = [self.end, self.stopped.get().copied()];
        let (Some(interval), Some(end)) = (self.interval, ends.into_iter().flatten().min()) else { return 0 };
        let due = (end.saturating_duration_since(self.start).as_secs_f64() / interval).ceil() as u64;
        due.min(self.count.unwrap_or(u64::MAX)).saturating_sub(self.handed_out.load(Ordering::Relaxed))
    }

    /// The next turn, when it is due; `None` when there will be no more.
    pub(super) async fn next(&self, stop: &Stop) -> Option<Ticket> {
        if stop.has_begun() {
            return self.stopped();
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if self.count.is_some_and(|count| number >= count) {
            return None;
        }
        let due = match self.interval {
            Some(interval) => {
                let offset = Duration::try_from_secs_f64(interval * number as f64).ok()?;
                self.start.checked_add(offset)?
            }
            None => Instant::now(),
        };
        // However many were due meanwhile: the end is the end.
        if self.end.is_some_and(|end| due.max(Instant::now()) >= end) {
            return None;
        }
        if due > Instant::now() {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = stop.begun() => return self.stopped(),
            }
            let now = Instant::now();
            if now - due <= TIMER_GRAIN {
                return Some(self.hand_out(number, now));
            }
        }
        Some(self.hand_out(number, due))
    }

    fn hand_out(&self, number: u64, due: Instant) -> Ticket {
        self.handed_out.fetch_add(1, Ordering::Relaxed);
        Ticket { number, due }
    }

    fn stopped(&self) -> Option<Ticket> {
        self.stopped.get_or_init(Instant::now);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn turns_are_due_by_the_schedule_however_late_they_are_taken() {
        let pace = Pace::start(Some(10.0), Some(4), None);
        let (start, stop) = (Instant::now(), Stop::new());
        let mut due = Vec::new();
        for i in 0..4 {
            let ticket = pace.next(&stop).await.unwrap();
            due.push((ticket.due - start).as_millis());
            if i == 1 {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        assert_eq!(due, [0, 100, 200, 300]);
        assert!(pace.next(&stop).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_duration_and_the_stop_end_it() {
        let pace = Pace::start(Some(1.0), None, Some(Duration::from_millis(2500)));
        let stop = Stop::new();
        for _ in 0..3 {
            assert!(pace.next(&stop).await.is_some());
        }
        assert!(pace.next(&stop).await.is_none(), "3 s is past the end");
        let forever = Pace::start(Some(0.001), None, None);
        assert!(forever.next(&stop).await.is_some());
        let waiting = forever.next(&stop);
        stop.begin();
        assert!(waiting.await.is_none());
        assert_eq!(forever.unopened(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_due_and_never_opened_is_known_and_the_end_is_kept() {
        let stop = Stop::new();
        let pace = Pace::start(Some(10.0), None, Some(Duration::from_secs(2)));
        for _ in 0..5 {
            assert!(pace.next(&stop).await.is_some());
        }
        // Everybody is busy until long after the end.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(pace.next(&stop).await.is_none(), "due before the end, but the end has passed");
        assert_eq!(pace.unopened(), 15);
        let stopped = Pace::start(Some(10.0), Some(12), Some(Duration::from_mins(1)));
        assert!(stopped.next(&stop).await.is_some());
        tokio::time::sleep(Duration::from_millis(550)).await;
        stop.begin();
        assert!(stopped.next(&stop).await.is_none());
        assert_eq!(stopped.unopened(), 5, "0.1 s to 0.5 s");
    }
}
