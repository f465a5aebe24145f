//! A moment as text, cheaply: every state line has one.

use std::cell::RefCell;
use std::time::{Duration, UNIX_EPOCH};

thread_local! {
    /// The last second and how it reads: moments that follow each other share it.
    static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

/// Writes Unix time as RFC 3339 in UTC, to the microsecond: 27 characters until the year 9999.
pub(super) fn put_timestamp(at: Duration, out: &mut String) {
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != at.as_secs() || text.is_empty() {
            let moment = UNIX_EPOCH.checked_add(Duration::from_secs(at.as_secs())).unwrap_or(UNIX_EPOCH);
            *text = humantime::format_rfc3339_seconds(moment).to_string();
            *second = at.as_secs();
        }
        out.push_str(text.trim_end_matches('Z'));
    });
    put_fraction(at.subsec_micros(), out);
    out.push('Z');
}

/// Writes seconds to the microsecond.
pub(super) fn put_seconds(seconds: Duration, out: &mut String) {
    out.push_str(itoa::Buffer::new().format(seconds.as_secs()));
    put_fraction(seconds.subsec_micros(), out);
}

fn put_fraction(mut micros: u32, out: &mut String) {
    let mut digits = [0; 6];
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (micros % 10) as u8;
        micros /= 10;
    }
    out.push('.');
    out.extend(digits.map(char::from));
}

/// The time of day, to the millisecond, in UTC.
pub(super) fn clock_of(rfc3339: &str) -> &str {
    rfc3339.get(11..23).unwrap_or(rfc3339)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_as_the_library_writes_them() {
        for micros in
            [0, 1, 999_999, 1_700_000_001_123_456, 1_700_000_001_999_999, 1_700_000_002_000_000, 4_102_444_800_000_001]
        {
            let at = Duration::from_micros(micros);
            let mut out = String::new();
            put_timestamp(at, &mut out);
            assert_eq!(out, humantime::format_rfc3339_micros(UNIX_EPOCH + at).to_string());
        }
    }

    #[test]
    fn seconds_have_six_digits_after_the_point() {
        for (micros, text) in [(0, "0.000000"), (42, "0.000042"), (61_893_000, "61.893000")] {
            let mut out = String::new();
            put_seconds(Duration::from_micros(micros), &mut out);
            assert_eq!(out, text);
        }
    }
}
