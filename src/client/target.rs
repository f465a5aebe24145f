//! The targets: names resolved again and again, and those that refuse left alone for a while.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::time::Instant;

use super::outcome::Outcome;
use crate::metrics::Metrics;
use crate::scope::Target;

/// How long to leave a target alone after a failed open: at first, and at most.
const BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// All targets, taken in turn.
pub(super) struct Targets {
    each: Vec<OneTarget>,
}

pub(super) struct OneTarget {
    pub(super) index: usize,
    target: Arc<Target>,
    resolve_interval: Duration,
    state: Mutex<Resolved>,
    asking: tokio::sync::Mutex<()>,
    outcomes: [IntCounter; Outcome::ALL.len()],
}

#[derive(Default)]
struct Resolved {
    addresses: Vec<SocketAddr>,
    at: Option<Instant>,
}

impl Targets {
    pub(super) fn new(targets: Vec<Arc<Target>>, resolve_interval: Duration, metrics: &Metrics) -> Targets {
        let one = |(index, target): (usize, Arc<Target>)| OneTarget {
            index,
            outcomes: metrics.outcomes(&target.name, Outcome::ALL.map(Outcome::label)),
            target,
            resolve_interval,
            state: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        };
        Targets { each: targets.into_iter().enumerate().map(one).collect() }
    }

    /// The target whose turn it is.
    pub(super) fn of(&self, number: u64) -> &OneTarget {
        &self.each[number as usize % self.each.len()]
    }
}

impl OneTarget {
    /// As it was given.
    pub(super) fn name(&self) -> &str {
        &self.target.name
    }

    /// Counts how a turn at it ended.
    pub(super) fn count(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].inc();
    }

    /// Its addresses, in the order to try them; resolved anew when the last answer is old or has failed.
    pub(super) async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        if let Some(addresses) = self.fresh() {
            return Ok(addresses);
        }
        // One question at a time: many workers with a dead resolver would fill the pool of blocking threads.
        let _asking = self.asking.lock().await;
        if let Some(addresses) = self.fresh() {
            return Ok(addresses);
        }
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(&self.target.name).await?.map(reached).collect();
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        self.target.resolved(&addresses);
        *self.lock() = Resolved { addresses: addresses.clone(), at: Some(Instant::now()) };
        Ok(addresses)
    }

    fn fresh(&self) -> Option<Vec<SocketAddr>> {
        let state = self.lock();
        let fresh = state.at.is_some_and(|at| at.elapsed() < self.resolve_interval);
        fresh.then(|| state.addresses.clone())
    }

    /// The last answer led nowhere: ask again next time.
    pub(super) fn forget(&self) {
        self.lock().at = None;
    }

    fn lock(&self) -> MutexGuard<'_, Resolved> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address that the kernel really connects to, and shows in its table: of the wildcard, this host (ip(7)); of an
/// IPv4-mapped one, the IPv4 address.
fn reached(address: SocketAddr) -> SocketAddr {
    match (address.ip().to_canonical(), address) {
        (IpAddr::V4(ip), _) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        (IpAddr::V6(ip), _) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, address.port()).into(),
        (ip @ IpAddr::V4(_), SocketAddr::V6(_)) => (ip, address.port()).into(),
        _ => address,
    }
}

/// How long to wait before try number `again` (from 0): doubling, with up to a quarter taken off at random so that
/// many clients do not come back at once.
pub(super) fn backoff(again: u32) -> Duration {
    let full = BACKOFF.saturating_mul(1 << again.min(16)).min(LONGEST_BACKOFF);
    full.mul_f64(1.0 - fastrand::f64() / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_the_kernel_shows() {
        for (given, shown) in [
            ("0.0.0.0:7", "127.0.0.1:7"),
            ("[::]:7", "[::1]:7"),
            ("[::ffff:10.0.0.1]:7", "10.0.0.1:7"),
            ("[::ffff:0.0.0.0]:7", "127.0.0.1:7"),
            ("[fe80::1%3]:7", "[fe80::1%3]:7"),
            ("192.0.2.1:7", "192.0.2.1:7"),
        ] {
            assert_eq!(reached(given.parse().unwrap()).to_string(), shown);
        }
    }

    #[test]
    fn backoff_doubles_up_to_a_limit() {
        for (again, full) in [(0, 100), (1, 200), (3, 800), (6, 5000), (u32::MAX, 5000)] {
            let wait = backoff(again).as_millis();
            assert!(wait <= full && wait >= full * 3 / 4, "{again}: {wait}");
        }
    }
}
