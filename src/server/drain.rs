//! The end of a listener: whoever thinks to be connected is still served, and only then it is closed.
//!
//! Closing a listener resets what waits in its accept queue, and answers with a RST whoever has finished the handshake
//! from his own side only (his ACK was dropped because the queue was full; `tcp_check_req`).

use std::collections::HashMap;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use super::{Shared, accepted, count_aborted, permit, start};
use crate::ledger::Reason;
use crate::listener::{accept_queued, refuse_new};
use crate::shutdown::Stop;
use crate::tcp::Flow;

/// How often handshakes are looked at: at first, and at last. A look may cost a walk through a large table.
const EAGER: Duration = Duration::from_millis(20);
const PATIENT: Duration = Duration::from_millis(250);

/// A peer that is there answers a repeated SYN+ACK within this time.
const ANSWER: Duration = Duration::from_secs(1);

/// Who has left so many repetitions of our SYN+ACK unanswered (1 s, 2 s and 4 s apart, RFC 6298) is not waited for.
const MOST_REPEATED: u8 = 2;

/// How often to wait for handshakes that began while earlier ones were waited for.
const ROUNDS: usize = 3;

/// How a queue came to be empty.
enum Emptied {
    AtOnce,
    /// The house was full: somebody had to leave first.
    InTurn,
}

/// The stop was cut before the queue was empty.
struct Cut;

/// Serves what waits in the accept queue, and who is still in the handshake, then closes the listener.
pub(super) async fn serve_queued(
    listener: StdListener,
    tasks: &TaskTracker,
    permits: &Arc<Semaphore>,
    shared: &Arc<Shared>,
    stop: &Stop,
) {
    // Without the privilege to refuse, new ones begin while the earlier are waited for; those that begin in the last
    // instant are reset.
    let rounds = if refuse_new(&listener) { 1 } else { ROUNDS };
    for _ in 0..rounds {
        match settle(&listener, tasks, permits, shared, stop).await {
            Ok(Settled::Quiet) => return,
            Ok(Settled::Busy) => {}
            Err(Cut) => return reset_queued(&listener, shared),
        }
    }
}

/// The deadline passed with a full house: those that still wait are taken only to be reset, so that each is told and
/// counted.
fn reset_queued(listener: &StdListener, shared: &Shared) {
    loop {
        match accept_queued(listener, &shared.faults) {
            Ok(Some((stream, peer))) => {
                shared.drained.fetch_add(1, Ordering::Relaxed);
                if let Some(mut conn) = accepted(stream, peer, shared) {
                    conn.abort(Reason::DrainAborted);
                    count_aborted(shared, 1);
                }
            }
            Ok(None) => return,
            // Not even to be told: the listener's end resets them.
            Err(_no_descriptor) => {
                let left = shared.census.accept_queue(shared.address.port()).unwrap_or(1).max(1);
                shared.drained.fetch_add(left, Ordering::Relaxed);
                return count_aborted(shared, left);
            }
        }
    }
}

/// Whether there was anybody to wait for.
enum Settled {
    Quiet,
    Busy,
}

/// Serves until nobody waits in the queue and every handshake that had begun by now is over: finished and served,
/// vanished, or known to have no peer any more.
async fn settle(
    listener: &StdListener,
    tasks: &TaskTracker,
    permits: &Arc<Semaphore>,
    shared: &Arc<Shared>,
    stop: &Stop,
) -> Result<Settled, Cut> {
    let mut handshakes = Handshakes::of(shared).await;
    let (mut pause, mut settled) = (EAGER, Settled::Quiet);
    loop {
        match serve_all(listener, tasks, permits, shared, stop).await {
            Ok(Emptied::AtOnce) => {}
            // While nobody could be taken in, an answer could not either: from now on it can.
            Ok(Emptied::InTurn) => handshakes.begin_to_wait(),
            Err(Cut) => return Err(handshakes.cut(shared)),
        }
        if handshakes.are_over() {
            return Ok(settled);
        }
        settled = Settled::Busy;
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.was_cut() => return Err(handshakes.cut(shared)),
        }
        pause = (pause * 2).min(PATIENT);
        handshakes.look(shared).await;
    }
}

async fn serve_all(
    listener: &StdListener,
    tasks: &TaskTracker,
    permits: &Arc<Semaphore>,
    shared: &Arc<Shared>,
    stop: &Stop,
) -> Result<Emptied, Cut> {
    let mut emptied = Emptied::AtOnce;
    loop {
        let permit = match Arc::clone(permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_full) => {
                emptied = Emptied::InTurn;
                next_permit(permits, stop).await?
            }
        };
        match accept_queued(listener, &shared.faults) {
            Ok(Some((stream, peer))) => start(tasks, stream, peer, permit, shared, stop),
            Ok(None) => return Ok(emptied),
            Err(_no_descriptor_yet) => {
                emptied = Emptied::InTurn;
                tokio::select! {
                    () = sleep(EAGER) => {}
                    () = stop.was_cut() => return Err(Cut),
                }
            }
        }
        // A queue that fills as fast as it is emptied must not keep the others waiting.
        tokio::task::coop::consume_budget().await;
    }
}

async fn next_permit(permits: &Arc<Semaphore>, stop: &Stop) -> Result<OwnedSemaphorePermit, Cut> {
    tokio::select! {
        biased;
        permit = permit(permits) => Ok(permit),
        () = stop.was_cut() => Err(Cut),
    }
}

/// Handshakes that had begun when the end did, each with the time at which it is given up. A peer may have finished it
/// from its own side; then it answers the next repetition of our SYN+ACK.
struct Handshakes(HashMap<Flow, Option<Instant>>);

impl Handshakes {
    async fn of(shared: &Arc<Shared>) -> Handshakes {
        Handshakes(in_progress(shared).await.into_keys().map(|flow| (flow, None)).collect())
    }

    fn are_over(&self) -> bool {
        self.0.is_empty()
    }

    fn begin_to_wait(&mut self) {
        self.0.values_mut().for_each(|until| *until = None);
    }

    async fn look(&mut self, shared: &Arc<Shared>) {
        let present = in_progress(shared).await;
        let now = Instant::now();
        self.0.retain(|flow, until| match present.get(flow) {
            None => false,
            // A peer that has not answered so often is none: a scan, or long gone.
            Some((repeated, _)) if *repeated > MOST_REPEATED => false,
            Some((_, next)) => *until.get_or_insert(now + *next + ANSWER) > now,
        });
    }

    /// The deadline came first: each counts as unfinished.
    fn cut(&self, shared: &Shared) -> Cut {
        shared.unfinished.fetch_add(self.0.len() as u64, Ordering::Relaxed);
        Cut
    }
}

/// Handshakes with our port. A table that cannot be read holds nothing up.
async fn in_progress(shared: &Arc<Shared>) -> HashMap<Flow, (u8, Duration)> {
    let (census, port) = (Arc::clone(&shared.census), shared.address.port());
    let read = tokio::task::spawn_blocking(move || census.handshakes_in_progress(port)).await;
    match read {
        Ok(Ok(handshakes)) => handshakes,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot see who is still in the handshake");
            HashMap::new()
        }
        Err(_shutting_down) => HashMap::new(),
    }
}
