//! A moment as text.

use std::time::{Duration, UNIX_EPOCH};

pub(super) fn timestamp(at: Duration) -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_micros(UNIX_EPOCH.checked_add(at).unwrap_or(UNIX_EPOCH))
}

/// The time of day, to the millisecond, in UTC.
pub(super) fn clock_of(rfc3339: &str) -> &str {
    rfc3339.get(11..23).unwrap_or(rfc3339)
}
