//! Who is connected to the web side, and who must go.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::kernel::clock;

/// Connections served at once; one more, and the one that has been idle for the longest time goes.
const CONNECTIONS: usize = 64;

/// The first request of a connection must be there within this time.
const FIRST: Duration = Duration::from_secs(5);

/// An answer may take so long to be taken.
const ANSWER: Duration = Duration::from_secs(10);

/// Who is connected. When the house is full, whoever has asked for nothing for the longest time is shown out: a
/// crowd that asks for nothing must not keep a probe waiting.
#[derive(Default)]
pub(super) struct Peers(Mutex<VecDeque<Arc<Peer>>>);

impl Peers {
    pub(super) fn enter(&self) -> Arc<Peer> {
        let peer = Arc::new(Peer::default());
        let mut all = self.lock();
        all.push_back(Arc::clone(&peer));
        if all.len() > CONNECTIONS {
            let last = |peer: &Arc<Peer>| peer.last_asked.load(Ordering::Relaxed);
            let longest = (0..all.len()).min_by_key(|i| last(&all[*i]));
            if let Some(peer) = longest.and_then(|i| all.remove(i)) {
                peer.shown_out.notify_one();
            }
        }
        peer
    }

    pub(super) fn leave(&self, gone: &Arc<Peer>) {
        self.lock().retain(|peer| !Arc::ptr_eq(peer, gone));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Peer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a connection's peer asks, and takes its answers.
#[derive(Default)]
pub(super) struct Peer {
    requests: AtomicU64,
    /// When the last request came, in nanoseconds of the monotonic clock; 0 before the first.
    last_asked: AtomicU64,
    shown_out: Notify,
}

impl Peer {
    pub(super) fn asked(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let now = u64::try_from(clock::monotonic().as_nanos()).unwrap_or(u64::MAX);
        self.last_asked.store(now, Ordering::Relaxed);
    }

    /// Waits until somebody else needs the place.
    pub(super) async fn shown_out(&self) {
        self.shown_out.notified().await;
    }

    /// Waits until the peer has asked for nothing for longer than `pause`, which any scraper may make, and the time
    /// for an answer: whether it is silent, sends its headers a byte at a time, or does not take its answer. Looked at
    /// that seldom, so that it may take twice as long.
    pub(super) async fn overdue(&self, pause: Duration) {
        tokio::time::sleep(FIRST).await;
        let mut seen = self.requests.load(Ordering::Relaxed);
        if seen == 0 {
            return;
        }
        loop {
            tokio::time::sleep(pause + ANSWER).await;
            let now = self.requests.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    }
}
