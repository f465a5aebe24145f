//! The client: connect, send, verify, close; paced, bounded, measured.
//!
//! Must not know: the server, the web side.

mod exchange;
mod lifecycle;
mod outcome;
mod pace;
mod stats;
mod summary;
mod target;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use tokio::task::JoinSet;

use crate::afterlife::Afterlife;
use crate::config::ClientConfig;
use crate::log::OnceAMinute;
use crate::scope::Target;
use crate::shutdown::Stop;
use crate::tcp::Role;
pub use outcome::Outcome;
use pace::Pace;
pub use stats::Stats;
pub use summary::Summary;
use target::Targets;

/// Runs until the count or the duration is reached, or `stop`; then finishes what is in flight, until the stop's
/// deadline resets what is left.
///
/// `progress` is told of each open that is done.
pub async fn run(
    config: ClientConfig,
    targets: Vec<Arc<Target>>,
    afterlife: Afterlife,
    stop: Stop,
    progress: Arc<AtomicU64>,
) -> Stats {
    let pace = Arc::new(Pace::start(config.rate, config.count, config.duration));
    let worker = Arc::new(lifecycle::Worker {
        targets: Targets::new(targets, config.resolve_interval, afterlife.journal().metrics()),
        stats: Stats::new(config.connections),
        afterlife,
        progress,
        warned: OnceAMinute::default(),
        config,
    });
    // What the connections see: it is cut at the deadline too.
    let ending = Stop::new();
    let mut workers = JoinSet::new();
    for i in 0..worker.config.connections {
        let (worker, pace, stop, ending) = (Arc::clone(&worker), Arc::clone(&pace), stop.clone(), ending.clone());
        workers.spawn(async move {
            let share = worker.stats.share(i);
            while let Some(ticket) = pace.next(&stop).await {
                tokio::select! {
                    biased;
                    () = worker.open(ticket, share, &stop, &ending) => {}
                    // Resolving, connecting or waiting to try again: nothing is open yet.
                    () = ending.was_cut() => return worker.done(ticket, share, Outcome::CutShort),
                }
            }
        });
    }
    let open_at_stop = AtomicI64::new(0);
    let cut = async {
        stop.begun().await;
        let open = worker.afterlife.journal().metrics().role(Role::Client).open.get();
        open_at_stop.store(open, Ordering::Relaxed);
        tokio::select! {
            () = stop.deadline() => {}
            () = stop.was_cut() => {}
        }
        ending.cut();
    };
    tokio::pin!(cut);
    let all = async {
        while let Some(ended) = workers.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "client worker failed");
                worker.stats.share(0).done(Outcome::Error);
            }
        }
    };
    tokio::pin!(all);
    tokio::select! {
        () = &mut all => {}
        () = &mut cut => all.await,
    }
    worker.stats.end(pace.unopened(), open_at_stop.load(Ordering::Relaxed).unsigned_abs());
    worker.stats.clone()
}
