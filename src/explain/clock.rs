//! How long the kernel's timers let a state last, reckoned from its settings.
//!
//! Each is the kernel's own sum. Its timers fire a little later: the timer wheel rounds up, by an eighth at most.

use std::time::Duration;

use serde::Serialize;

use super::sysctls::{
    FIN_TIMEOUT, KEEPALIVE_INTVL, KEEPALIVE_PROBES, KEEPALIVE_TIME, ORPHAN_RETRIES, RETRIES2, RTO_MAX_MS,
    SYN_LINEAR_TIMEOUTS, SYN_RETRIES, SYNACK_RETRIES,
};
use crate::kernel::TIME_WAIT;

/// TCP_TIMEOUT_INIT: the first pause of a handshake (RFC 6298 section 2).
const HANDSHAKE_RTO: u64 = 1_000;
/// TCP_RTO_MIN: the first pause that the kernel reckons with elsewhere, whatever the real one was.
const LEAST_RTO: u64 = 200;
/// TCP_RTO_MAX, where there is no sysctl for it.
const LONGEST_RTO: u64 = 120_000;
/// tcp_orphan_retries(): what 0 stands for.
const ORPHAN_DEFAULT: u64 = 8;
/// More than any of these settings can be, and little enough that no sum of them overflows.
const MOST: u64 = 1 << 22;

/// Which sum of the kernel's limits a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// A SYN, repeated.
    Syn,
    /// A SYN+ACK, repeated.
    SynAck,
    /// Data or a FIN, repeated, while a descriptor is open.
    Retransmission,
    /// Data or a FIN, repeated, when the descriptor is closed.
    Orphan,
    /// Probes that nobody answers.
    Keepalive,
    /// FIN_WAIT2 without a descriptor.
    FinTimeout,
    /// TIME_WAIT: no setting changes it.
    TimeWait,
}

impl Clock {
    /// Whether it is the least that the kernel waits: it gives up at the first repetition due after that, and how far
    /// apart those are depends on the round trip.
    #[must_use]
    pub fn is_least(self) -> bool {
        matches!(self, Clock::Retransmission | Clock::Orphan)
    }

    /// The limit where `value` tells the number of a setting by its path; `None` where one that it takes is unknown.
    pub fn limit(self, value: impl Fn(&str) -> Option<u64>) -> Option<Duration> {
        let value = |path| value(path).map(|n| n.min(MOST));
        let longest = value(RTO_MAX_MS.path).unwrap_or(LONGEST_RTO);
        let seconds = |path| value(path).map(|n| n * 1_000);
        let millis = match self {
            Clock::Syn => {
                let linear = value(SYN_LINEAR_TIMEOUTS.path).unwrap_or(0);
                linear * HANDSHAKE_RTO + doubling(HANDSHAKE_RTO, value(SYN_RETRIES.path)?, longest)
            }
            Clock::SynAck => doubling(HANDSHAKE_RTO, value(SYNACK_RETRIES.path)?, longest),
            Clock::Retransmission => doubling(LEAST_RTO, value(RETRIES2.path)?, longest),
            Clock::Orphan => {
                let retries = value(ORPHAN_RETRIES.path)?;
                doubling(LEAST_RTO, if retries == 0 { ORPHAN_DEFAULT } else { retries }, longest)
            }
            Clock::Keepalive => {
                seconds(KEEPALIVE_TIME.path)? + value(KEEPALIVE_PROBES.path)? * seconds(KEEPALIVE_INTVL.path)?
            }
            Clock::FinTimeout => seconds(FIN_TIMEOUT.path)?,
            Clock::TimeWait => return Some(TIME_WAIT),
        };
        Some(Duration::from_millis(millis))
    }
}

/// The time until something was repeated `retries` times and the pause after that is over: each pause twice the last,
/// up to `longest` (`tcp_model_timeout`).
fn doubling(first: u64, retries: u64, longest: u64) -> u64 {
    let pauses = std::iter::successors(Some(first), |pause| Some(pause.saturating_mul(2)));
    pauses.take(retries as usize + 1).map(|pause| pause.min(longest)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_default(path: &str) -> Option<u64> {
        Some(match path {
            "net/ipv4/tcp_syn_retries" => 6,
            "net/ipv4/tcp_syn_linear_timeouts" => 4,
            "net/ipv4/tcp_synack_retries" => 5,
            "net/ipv4/tcp_retries2" => 15,
            "net/ipv4/tcp_orphan_retries" => 0,
            "net/ipv4/tcp_fin_timeout" => 60,
            "net/ipv4/tcp_keepalive_time" => 7200,
            "net/ipv4/tcp_keepalive_intvl" => 75,
            "net/ipv4/tcp_keepalive_probes" => 9,
            "net/ipv4/tcp_rto_max_ms" => 120_000,
            _ => return None,
        })
    }

    /// The figures of the kernel's Documentation/networking/ip-sysctl.rst.
    #[test]
    fn with_the_defaults_they_are_what_the_kernel_documents() {
        let limit = |clock: Clock| clock.limit(by_default).unwrap().as_secs_f64();
        assert_eq!(limit(Clock::Syn), 131.0);
        assert_eq!(limit(Clock::SynAck), 63.0);
        assert_eq!(limit(Clock::Retransmission), 924.6);
        assert_eq!(limit(Clock::Orphan), 102.2);
        assert_eq!(limit(Clock::Keepalive), 7875.0);
        assert_eq!(limit(Clock::FinTimeout), 60.0);
        assert_eq!(limit(Clock::TimeWait), 60.0);
    }

    #[test]
    fn an_older_kernel_has_no_linear_timeouts_and_one_longest_pause() {
        let older = |path: &str| by_default(path).filter(|_| !path.contains("linear") && !path.contains("rto_max"));
        assert_eq!(Clock::Syn.limit(older), Some(Duration::from_secs(127)));
        assert_eq!(Clock::Retransmission.limit(older), Some(Duration::from_millis(924_600)));
    }

    #[test]
    fn what_is_unknown_is_not_guessed_and_nothing_overflows() {
        for clock in [Clock::Syn, Clock::SynAck, Clock::Retransmission, Clock::Orphan, Clock::Keepalive] {
            assert_eq!(clock.limit(|_| None), None, "{clock:?}");
            assert!(clock.limit(|_| Some(u64::MAX)).is_some(), "{clock:?}");
        }
    }
}
