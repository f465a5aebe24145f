//! Who is connected to the web side, and who must go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::kernel::clock;

/// Connections served at once; one more, and the one that has been idle for the longest time goes.
const CONNECTIONS: usize = 64;

/// Nobody is shown out sooner, however many more come.
const TIME_TO_ASK: Duration = Duration::from_millis(250);

/// The first request of a connection must be there within this time.
const FIRST: Duration = Duration::from_secs(5);

/// An answer may take so long to be taken.
const ANSWER: Duration = Duration::from_secs(10);

/// Who is connected. When the house is full, whoever has asked for nothing for the longest time is shown out, those
/// first who never asked: a crowd that asks for nothing must not keep a probe waiting.
#[derive(Default)]
pub(super) struct Peers {
    all: Mutex<Vec<Arc<Peer>>>,
    left: Notify,
}

impl Peers {
    /// Lets one more in, as soon as there is a place or somebody has had the time to ask and did not.
    pub(super) async fn enter(&self) -> Arc<Peer> {
        loop {
            let wait = match self.try_enter() {
                Ok(peer) => return peer,
                Err(wait) => wait,
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.left.notified() => {}
            }
        }
    }

    /// The error is how long to wait before somebody may be shown out.
    fn try_enter(&self) -> Result<Arc<Peer>, Duration> {
        let now = clock::monotonic();
        let mut all = self.lock();
        if all.len() >= CONNECTIONS
            && let Some(i) = (0..all.len()).min_by_key(|i| all[*i].rank())
        {
            let silent = now.saturating_sub(all[i].rank().1);
            if silent < TIME_TO_ASK {
                return Err(TIME_TO_ASK.saturating_sub(silent));
            }
            all.swap_remove(i).shown_out.notify_one();
        }
        let peer = Arc::new(Peer::new(now));
        all.push(Arc::clone(&peer));
        Ok(peer)
    }

    pub(super) fn leave(&self, gone: &Arc<Peer>) {
        self.lock().retain(|peer| !Arc::ptr_eq(peer, gone));
        self.left.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Peer>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a connection's peer asks, and takes its answers, streams included.
pub(super) struct Peer {
    /// How often it asked for something, or took what a stream told it.
    stirred: AtomicU64,
    /// When it last did, before the first time when it connected; nanoseconds of the monotonic clock.
    since: AtomicU64,
    shown_out: Notify,
}

impl Peer {
    fn new(now: Duration) -> Peer {
        Peer { stirred: AtomicU64::new(0), since: AtomicU64::new(nanos(now)), shown_out: Notify::new() }
    }

    /// It asks for something, or has taken what a stream told it.
    pub(super) fn stirs(&self) {
        self.since.store(nanos(clock::monotonic()), Ordering::Relaxed);
        self.stirred.fetch_add(1, Ordering::Relaxed);
    }

    /// Who comes first here goes first.
    fn rank(&self) -> (bool, Duration) {
        let has_asked = self.stirred.load(Ordering::Relaxed) > 0;
        (has_asked, Duration::from_nanos(self.since.load(Ordering::Relaxed)))
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
        let mut seen = self.stirred.load(Ordering::Relaxed);
        if seen == 0 {
            return;
        }
        loop {
            tokio::time::sleep(pause + ANSWER).await;
            let now = self.stirred.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_never_asked_goes_first_and_nobody_before_he_had_the_time_to_ask() {
        let peers = Peers::default();
        let first = peers.try_enter().unwrap();
        first.stirs();
        let rest: Vec<_> = (1..CONNECTIONS).map(|_| peers.try_enter().unwrap()).collect();
        let wait = peers.try_enter().err().unwrap();
        assert!(wait <= TIME_TO_ASK, "{wait:?}");
        let late = peers.enter().await;
        tokio::time::timeout(Duration::from_secs(10), rest[0].shown_out()).await.expect("the first that never asked");
        assert_eq!(peers.lock().len(), CONNECTIONS);
        assert!(peers.lock().iter().any(|peer| Arc::ptr_eq(peer, &first)), "who has asked stays");
        peers.leave(&late);
        assert!(peers.try_enter().is_ok(), "there is a place");
    }
}
