//! The two clocks: monotonic for durations and order, real time for people.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since an arbitrary start, never set back: CLOCK_MONOTONIC, the clock of the kernel's own TCP events too
/// (`bpf_ktime_get_ns`), so that both can be compared (clock_gettime(2)).
#[must_use]
pub fn monotonic() -> Duration {
    since_zero(ClockId::Monotonic)
}

/// Unix time: CLOCK_REALTIME.
#[must_use]
pub fn unix() -> Duration {
    since_zero(ClockId::Realtime)
}

/// What Unix time is ahead of the monotonic clock, now: it changes when somebody sets the clock.
#[must_use]
pub fn unix_offset() -> Duration {
    unix().saturating_sub(monotonic())
}

/// Processor time that this thread has used: CLOCK_THREAD_CPUTIME_ID. What something costs, however busy the machine
/// is.
#[must_use]
pub fn thread_cpu() -> Duration {
    since_zero(ClockId::ThreadCPUTime)
}

fn since_zero(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}
