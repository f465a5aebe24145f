//! Signals, the stop token and the deadline.
//!
//! Stopping has two steps: `begin` asks everyone to finish what they have, `cut` tells them to let go now.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Tells everyone to stop. All clones are one, and one is as small as a pointer: every connection has its own.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Signals>);

#[derive(Debug, Default)]
struct Signals {
    /// Beside the token, because asking the token takes a lock and every connection asks for every message.
    begun: AtomicBool,
    begin: CancellationToken,
    cut: CancellationToken,
    /// One deadline for everyone, set where the end begins.
    deadline: OnceLock<Instant>,
}

impl Stop {
    /// A token that nobody has used.
    #[must_use]
    pub fn new() -> Stop {
        Stop::default()
    }

    /// Asks for a graceful end.
    pub fn begin(&self) {
        self.0.begun.store(true, Ordering::Release);
        self.0.begin.cancel();
    }

    /// Asks for a graceful end by then; the first deadline counts.
    pub fn begin_until(&self, deadline: Instant) {
        self.0.deadline.get_or_init(|| deadline);
        self.begin();
    }

    /// Waits for the end to begin and its deadline to pass; without one, for ever.
    pub async fn deadline(&self) {
        self.begun().await;
        match self.0.deadline.get() {
            Some(deadline) => tokio::time::sleep_until(*deadline).await,
            None => std::future::pending().await,
        }
    }

    /// The deadline, once the end has begun with one.
    #[must_use]
    pub fn deadline_at(&self) -> Option<Instant> {
        self.0.deadline.get().copied()
    }

    /// Ends it now: the deadline has passed, or somebody insists.
    pub fn cut(&self) {
        self.begin();
        self.0.cut.cancel();
    }

    /// Whether the end has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.0.begun.load(Ordering::Acquire)
    }

    /// Whether it is over now.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.0.cut.is_cancelled()
    }

    /// Waits for the end to begin.
    pub fn begun(&self) -> impl Future<Output = ()> + '_ {
        self.0.begin.cancelled()
    }

    /// Waits for it to be cut short.
    pub fn was_cut(&self) -> impl Future<Output = ()> + '_ {
        self.0.cut.cancelled()
    }
}

/// How a graceful end is timed.
#[derive(Clone, Copy, Debug)]
pub struct DrainConfig {
    /// How long to go on as usual after the signal, not ready, so that load balancers notice.
    pub delay: Duration,
    /// How long everything may take after that.
    pub timeout: Duration,
}

/// How a drain went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Connections that were open or queued when the end began.
    pub open: u64,
    /// Those that the peer reset, or the network failed, meanwhile: not our doing.
    pub lost: u64,
    /// Those that were reset because time was up.
    pub aborted: u64,
    /// Handshakes that had begun and were not finished when time was up. Whether anybody was there, nobody knows.
    pub unfinished: u64,
}

impl Verdict {
    /// Whether nothing was cut short.
    #[must_use]
    pub fn is_clean(self) -> bool {
        self.aborted == 0
    }
}

/// Begins `stop` at the first SIGTERM or SIGINT, with the drain's deadline, and cuts it at the second.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals(stop: &Stop, drain: DrainConfig) -> std::io::Result<impl Future<Output = ()> + use<>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = stop.clone();
    Ok(async move {
        let mut name = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let first = name().await;
        tracing::info!(signal = first, "stopping; a second signal ends it at once");
        stop.begin_until(Instant::now() + drain.delay + drain.timeout);
        let second = name().await;
        tracing::warn!(signal = second, "second signal: ending now");
        stop.cut();
    })
}
