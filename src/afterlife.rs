//! Follows connections after close(2): LAST_ACK, FIN_WAIT2, TIME_WAIT, until the kernel has let go. Where the kernel itself
//! announces each change (eBPF), their whole lives are told from here.
//!
//! No descriptor is left to ask, so the kernel's socket table is: by cookie while few are due, by one filtered dump
//! when many are. The kernel's destroy events say when an orphan moves on; they are listened to only while there are
//! orphans to hear of. Runs on a thread of its own, which sleeps while nobody is followed. Must not know: how a
//! connection came to be closed.

mod followed;
mod follower;
mod tally;
mod witness;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError::{self, Full};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::journal::Journal;
use crate::kernel::{Table, Tracepoints, clock};
use crate::ledger::Reason;
use crate::log::OnceAMinute;
use crate::scope::Scope;
use crate::tcp::{Cause, Identity, Known, Lifecycle, Role};
use crate::thread::with_event_loop;
use follower::Follower;
pub use tally::{Sum, Tally};
use witness::Witness;

/// Closes that come within this time share a wake-up.
const GATHER: Duration = Duration::from_millis(2);

/// And announcements, while many come: a wake-up costs as much as ten of them.
const GATHER_MANY: Duration = Duration::from_millis(10);

/// A connection whose descriptor has just been closed, and what its owner last knew of it.
#[derive(Clone, Copy, Debug)]
pub struct Departed {
    /// Which connection.
    pub id: Identity,
    /// Its life so far.
    pub life: Lifecycle,
    /// When the descriptor was first seen to read CLOSE although the connection ended well: since then it is in
    /// TIME_WAIT, or gone. With it what was known then.
    pub left: Option<(Duration, Known)>,
    /// What is known of the time since the last observation.
    pub known: Known,
    /// What TCP_INFO's `bytes_acked` reads once the peer has acknowledged everything, our FIN included.
    pub all_acked: u64,
    /// What it means if the kernel has it no more.
    pub cause_if_gone: Option<Cause>,
    /// Why the descriptor was closed.
    pub reason: Option<Reason>,
}

/// A handle to the follower: cheap to clone, and as small as a pointer, for every connection has one.
#[derive(Clone)]
pub struct Afterlife(Arc<Handle>);

/// The follower ends when this does: it has only what is shared.
struct Handle {
    shared: Arc<Shared>,
    queue: Queue,
}

/// To whoever tells of what comes after close(2).
enum Queue {
    /// The follower, who looks.
    Follower(mpsc::Sender<Departed>),
    /// The witness, to whom the kernel announces every change.
    Witness {
        closed: mpsc::Sender<Closed>,
        /// Asks for the last comparison with the table.
        last: mpsc::Sender<oneshot::Sender<()>>,
        /// The kernel's counts, where it counts those without a full socket too.
        tally: Option<Arc<Tally>>,
    },
}

/// A descriptor that has just been closed, of a connection whose states the kernel announces.
#[derive(Clone, Copy)]
struct Closed {
    role: Role,
    cookie: u64,
    reason: Reason,
    /// Until when its beginning may still be announced.
    until: Option<Duration>,
}

struct Shared {
    journal: Arc<Journal>,
    following: AtomicUsize,
    /// Of those, how many have not been looked at once.
    unseen: AtomicUsize,
    limit: usize,
    /// The thread has ended.
    gone: AtomicBool,
    none_left: Notify,
    warned: OnceAMinute,
}

impl Afterlife {
    /// Starts the thread that follows, or with `tracepoints` the one that tells whole lives.
    ///
    /// # Errors
    /// When the thread cannot be started, its event loop cannot be made, or the kernel refuses.
    pub fn start(
        journal: Arc<Journal>,
        scope: &Arc<Scope>,
        table: Table,
        limit: usize,
        tracepoints: Option<Tracepoints>,
    ) -> anyhow::Result<Afterlife> {
        let shared = Arc::new(Shared {
            journal,
            following: AtomicUsize::new(0),
            unseen: AtomicUsize::new(0),
            limit,
            gone: AtomicBool::new(false),
            none_left: Notify::new(),
            warned: OnceAMinute::default(),
        });
        let room = limit.max(1);
        let gone = Gone(Arc::clone(&shared));
        let queue = match tracepoints {
            None => {
                let (queue, inbox) = mpsc::channel(room);
                let follower = Follower::new(Arc::clone(&shared), scope, table);
                with_event_loop("afterlife", move || gone.after(follower.run(inbox)))?;
                Queue::Follower(queue)
            }
            Some(tracepoints) => {
                let (closed, inbox) = mpsc::channel(room);
                let (last, asked) = mpsc::channel(1);
                let counts_all = tracepoints.tells_of_timers();
                let (witness, tally) = Witness::new(Arc::clone(&shared), scope, table, tracepoints)?;
                with_event_loop("afterlife", move || gone.after(witness.run(inbox, asked)))?;
                Queue::Witness { closed, last, tally: counts_all.then_some(tally) }
            }
        };
        Ok(Afterlife(Arc::new(Handle { shared, queue })))
    }

    /// Whether the kernel itself announces every change: then nobody else has to tell of any.
    #[must_use]
    pub fn hears_the_kernel(&self) -> bool {
        matches!(self.0.queue, Queue::Witness { .. })
    }

    /// The kernel's own counts, where it announces every change.
    #[must_use]
    pub fn tally(&self) -> Option<&Arc<Tally>> {
        match &self.0.queue {
            Queue::Witness { tally, .. } => tally.as_ref(),
            Queue::Follower(_) => None,
        }
    }

    /// Follows a connection to its end; when too many are followed already it is given up and counted. Where the kernel
    /// announces every change there is nobody to follow.
    pub fn follow(&self, departed: Departed) {
        let shared = &self.0.shared;
        let Queue::Follower(queue) = &self.0.queue else { return };
        let before = shared.one_more();
        let refused = if before < shared.limit { queue.try_send(departed).err() } else { Some(Full(departed)) };
        if let Some(refused) = refused {
            shared.journal.lose(&departed.id);
            shared.refused(&refused);
        }
    }

    /// Says that a descriptor was closed, of a connection whose states the kernel announces.
    pub fn closed(&self, role: Role, cookie: u64, reason: Reason) {
        let Queue::Witness { closed, .. } = &self.0.queue else { return };
        self.0.shared.one_more();
        // What the kernel announces it announces without being asked: however many there are, no one is given up.
        if let Err(refused) = closed.try_send(Closed { role, cookie, reason, until: None }) {
            self.0.shared.refused(&refused);
        }
    }

    /// The journal that observations go to.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.0.shared.journal
    }

    /// How many are being followed.
    #[must_use]
    pub fn following(&self) -> usize {
        self.0.shared.following.load(Ordering::Acquire)
    }

    fn is_gone(&self) -> bool {
        self.0.shared.gone.load(Ordering::Acquire)
    }

    /// Waits until every connection that was closed has been looked at: what is known of them is then told.
    pub async fn all_seen(&self) {
        while self.0.shared.unseen.load(Ordering::Acquire) > 0 && !self.is_gone() {
            tokio::time::sleep(GATHER).await;
        }
        if self.hears_the_kernel() {
            // What a second event may change is told a moment later.
            tokio::time::sleep(GATHER_MANY * 2).await;
        }
    }

    /// Before the end: what the kernel did not announce, and is not known to be lost, is looked for in its table and counted.
    /// Takes half a second where something seems to be missing.
    pub async fn last_look(&self) {
        if let Queue::Witness { last, .. } = &self.0.queue {
            let (answer, answered) = oneshot::channel();
            // Whoever does not answer is gone, and has said so.
            if last.send(answer).await.is_ok() {
                let _ = answered.await;
            }
        }
    }

    /// Waits until the kernel has let go of every connection that was closed.
    pub async fn none_left(&self) {
        loop {
            let notified = self.0.shared.none_left.notified();
            if self.following() == 0 || self.is_gone() {
                return;
            }
            notified.await;
        }
    }
}

/// When the follower's thread ends, nobody must wait for it any more.
struct Gone(Arc<Shared>);

impl Gone {
    /// Is there until `work` has ended, however it does.
    async fn after(self, work: impl Future<Output = ()>) {
        work.await;
        drop(self);
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
        self.0.none_left.notify_waiters();
        if std::thread::panicking() {
            tracing::error!("the follower failed: what comes after close(2) is not observed any more");
        }
    }
}

impl Shared {
    /// One is closed; returns how many are followed already.
    fn one_more(&self) -> usize {
        self.unseen.fetch_add(1, Ordering::AcqRel);
        self.journal.metrics().following.inc();
        self.following.fetch_add(1, Ordering::AcqRel)
    }

    /// Nobody takes it.
    fn refused<T>(&self, refused: &TrySendError<T>) {
        self.unseen.fetch_sub(1, Ordering::AcqRel);
        self.journal.metrics().follow_dropped.inc();
        if let Some(times) = self.warned.due(clock::monotonic()) {
            let limit = self.limit;
            match refused {
                Full(_) => tracing::warn!(limit, times, "follow limit reached: connections not followed to their end"),
                TrySendError::Closed(_) => {
                    tracing::error!(times, "the follower is gone: connections not followed to their end");
                }
            }
        }
        self.has_gone();
    }

    /// The kernel has let go of one that was followed.
    fn has_gone(&self) {
        self.journal.metrics().following.dec();
        self.one_less();
    }

    fn one_less(&self) {
        if self.following.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.none_left.notify_waiters();
        }
    }
}
