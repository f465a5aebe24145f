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
use crate::listener::{accept_queued, refuse_new, take_fewer};
use crate::shutdown::Stop;
use crate::tcp::Flow;

/// How often handshakes are looked at: at first, and at last. A look may cost a walk through a large table.
const EAGER: Duration = Duration::from_millis(20);
const PATIENT: Duration = Duration::from_millis(250);

/// A peer that is there answers a repeated SYN+ACK within this time.
const ANSWER: Duration = Duration::from_secs(1);

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
    let end = async {
        if refuse_new(&listener) {
            return settle(&listener, tasks, permits, shared, stop).await;
        }
        // Without the privilege to refuse: those first who are in the handshake now, for a shorter queue would keep
        // them out; then with the shortest queue those that came meanwhile.
        settle(&listener, tasks, permits, shared, stop).await?;
        take_fewer(&listener);
        settle(&listener, tasks, permits, shared, stop).await
    };
    if let Err(Cut) = end.await {
        // The deadline passed with a full house: those that still wait are taken only to be reset, so that each is
        // told and counted.
        while let Ok(Some((stream, peer))) = accept_queued(&listener, &shared.faults) {
            shared.drained.fetch_add(1, Ordering::Relaxed);
            if let Some(mut conn) = accepted(stream, peer, shared) {
                conn.abort(Reason::DrainAborted);
                count_aborted(shared, 1);
            }
        }
    }
}

/// Serves until nobody waits in the queue and every handshake that had begun by now is over: finished and served,
/// vanished, or known to have no peer any more.
async fn settle(
    listener: &StdListener,
    tasks: &TaskTracker,
    permits: &Arc<Semaphore>,
    shared: &Arc<Shared>,
    stop: &Stop,
) -> Result<(), Cut> {
    let mut handshakes = Handshakes::of(shared).await;
    let mut pause = EAGER;
    loop {
        match serve_all(listener, tasks, permits, shared, stop).await {
            Ok(Emptied::AtOnce) => {}
            // While nobody could be taken in, an answer could not either: from now on it can.
            Ok(Emptied::InTurn) => handshakes.begin_to_wait(),
            Err(Cut) => return Err(handshakes.cut(shared)),
        }
        if handshakes.are_over() {
            return Ok(());
        }
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
        let now = Instant::now();
        let present = in_progress(shared).await;
        let before = self.0.len();
        self.0.retain(|flow, until| match present.get(flow) {
            None => false,
            Some(repeated_in) => *until.get_or_insert(now + *repeated_in + ANSWER) > now,
        });
        let unanswered = before - self.0.len() - self.0.keys().filter(|flow| !present.contains_key(flow)).count();
        if unanswered > 0 {
            tracing::debug!(unanswered, "handshakes over, or given up: their peers do not answer");
        }
    }

    /// The deadline came first: each counts as unfinished.
    fn cut(&self, shared: &Shared) -> Cut {
        shared.unfinished.fetch_add(self.0.len() as u64, Ordering::Relaxed);
        Cut
    }
}

/// Handshakes with our port, and when our SYN+ACK will be repeated next. A table that cannot be read holds nothing up.
async fn in_progress(shared: &Arc<Shared>) -> HashMap<Flow, Duration> {
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
