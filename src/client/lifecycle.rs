//! One turn of the client: open (again, if refused), echo, close.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::exchange::{self, Buffers, EchoError};
use super::outcome::Outcome;
use super::pace::Ticket;
use super::stats::{Share, Stats};
use super::target::{OneTarget, Targets, backoff};
use crate::afterlife::Afterlife;
use crate::config::{ClientConfig, CloseMode};
use crate::conn::Conn;
use crate::kernel::clock;
use crate::ledger::Reason;
use crate::log::OnceAMinute;
use crate::metrics::{Metrics, TargetMetrics};
use crate::shutdown::Stop;

/// What all workers share.
pub(super) struct Worker {
    pub(super) config: ClientConfig,
    pub(super) targets: Targets,
    pub(super) stats: Stats,
    pub(super) afterlife: Afterlife,
    pub(super) progress: Arc<AtomicU64>,
    pub(super) warned: OnceAMinute,
}

/// Why a turn was not a good one: what counts, and what to say.
struct Failure {
    outcome: Outcome,
    error: String,
}

impl Failure {
    fn new(outcome: Outcome, error: impl Into<String>) -> Failure {
        Failure { outcome, error: error.into() }
    }
}

impl Worker {
    /// Takes one turn. `stop` ends pauses and tries; `ending` is cut when the time for everything is up.
    pub(super) async fn open(&self, ticket: Ticket, share: &Share, stop: &Stop, ending: &Stop) {
        let target = self.targets.of(ticket.number);
        let mut again = 0;
        let result = loop {
            let result = self.attempt(target, &ticket, share, stop, ending).await;
            match &result {
                Err(failure) if failure.outcome.may_be_tried_again() && again < self.config.retries => {}
                _ => break result,
            }
            if stop.has_begun() {
                break result;
            }
            share.retried();
            let wait = backoff(again);
            again += 1;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.begun() => break result,
            }
        };
        self.done(ticket, share, result.as_ref().map_or_else(|failure| failure.outcome, |()| Outcome::Ok));
        match result {
            Ok(()) | Err(Failure { outcome: Outcome::CutShort, .. }) => {}
            Err(Failure { outcome, error }) => {
                if let Some(times) = self.warned.due(clock::monotonic()) {
                    let (target_name, outcome) = (target.name(), outcome.label());
                    tracing::warn!(target_name, outcome, error, times, "connection failed");
                }
            }
        }
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts how a turn ended.
    pub(super) fn done(&self, ticket: Ticket, share: &Share, outcome: Outcome) {
        self.targets.of(ticket.number).count(outcome);
        share.done(outcome);
    }

    async fn attempt(
        &self,
        target: &OneTarget,
        ticket: &Ticket,
        share: &Share,
        stop: &Stop,
        ending: &Stop,
    ) -> Result<(), Failure> {
        let resolved = timeout(self.config.connect_timeout, target.addresses()).await;
        let addresses = match resolved.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(addresses) => addresses,
            Err(error) => return Err(Failure::new(Outcome::Unresolved, format!("resolve {}: {error}", target.name()))),
        };
        let mut failed = Failure::new(Outcome::Unresolved, "no address");
        for address in addresses {
            match Conn::connect(address, self.config.connect_timeout, self.afterlife.clone()).await {
                Ok(mut conn) => {
                    // From when it was due: what it waited for a turn, or for the target to come back, is part of it.
                    let took = ticket.due.elapsed();
                    self.metrics(target).connect.observe(took.as_secs_f64());
                    share.connected(took);
                    return tokio::select! {
                        biased;
                        lived = self.live(&mut conn, target, ticket.number, share, stop) => lived,
                        () = ending.was_cut() => {
                            conn.abort(Reason::DrainAborted);
                            self.afterlife.journal().metrics().drain_aborted.inc();
                            Err(Failure::new(Outcome::CutShort, "cut at the deadline"))
                        }
                    };
                }
                Err(error) => {
                    tracing::debug!(%address, %error, "cannot connect");
                    failed = Failure::new(Outcome::of_connect(&error), format!("connect to {address}: {error}"));
                }
            }
        }
        target.forget();
        Err(failed)
    }

    /// Echoes and closes.
    async fn live(
        &self,
        conn: &mut Conn,
        target: &OneTarget,
        number: u64,
        share: &Share,
        stop: &Stop,
    ) -> Result<(), Failure> {
        let metrics = self.metrics(target);
        let mut random = fastrand::Rng::with_seed(fastrand::u64(..) ^ number);
        let mut buffers = Buffers::default();
        for message in 0..self.config.messages {
            if stop.has_begun() {
                break;
            }
            let size = random.usize(self.config.message_size.clone()) as u64;
            let began = Instant::now();
            let echo = exchange::echo(conn, random.u64(..), size, &mut buffers);
            match timeout(self.config.echo_timeout, echo).await {
                Ok(Ok(())) => {
                    let took = began.elapsed();
                    metrics.echo.observe(took.as_secs_f64());
                    share.echoed(took);
                }
                Ok(Err(error)) => return Err(self.failed_echo(conn, &error)),
                Err(_elapsed) => {
                    conn.abort(Reason::Timeout);
                    return Err(Failure::new(Outcome::EchoTimeout, format!("{}: no echo in time", conn.flow().peer)));
                }
            }
            if message + 1 < self.config.messages {
                pause(self.config.think_time, stop).await;
            }
        }
        pause(self.config.hold, stop).await;
        self.close(conn, metrics, share).await
    }

    fn failed_echo(&self, conn: &mut Conn, error: &EchoError) -> Failure {
        let peer = conn.flow().peer;
        let outcome = match error {
            EchoError::Mismatch { .. } => {
                self.mismatch(conn, error);
                conn.abort(Reason::Mismatch);
                Outcome::Mismatch
            }
            EchoError::Short { .. } => {
                conn.shutdown();
                conn.because(Reason::Error);
                Outcome::Short
            }
            EchoError::Io(error) => Outcome::of_echo(error),
        };
        Failure::new(outcome, format!("{peer}: {error}"))
    }

    fn mismatch(&self, conn: &Conn, error: &dyn std::fmt::Display) {
        self.afterlife.journal().metrics().echo_mismatch.inc();
        tracing::error!(peer = %conn.flow().peer, %error, "echo mismatch");
    }

    async fn close(&self, conn: &mut Conn, metrics: &TargetMetrics, share: &Share) -> Result<(), Failure> {
        if self.config.close == CloseMode::Reset {
            conn.abort(Reason::Aborted);
            return Ok(());
        }
        let began = Instant::now();
        if self.config.close == CloseMode::Graceful {
            conn.shutdown();
        }
        let peer = conn.flow().peer;
        match timeout(self.config.close_timeout, until_end(conn)).await {
            Ok(Ok(0)) => {
                conn.shutdown();
                if let Some(error) = conn.failure() {
                    // Their FIN, and then a RST instead of the ACK of ours.
                    return Err(Failure::new(Outcome::of_echo(error), format!("{peer}: {error}")));
                }
                conn.because(Reason::Graceful);
                if self.config.close == CloseMode::Graceful {
                    let took = began.elapsed();
                    metrics.close.observe(took.as_secs_f64());
                    share.closed(took);
                }
                Ok(())
            }
            Ok(Ok(surplus)) => {
                let error = format!("{surplus} bytes more came back than were sent");
                self.mismatch(conn, &error);
                conn.because(Reason::Mismatch);
                Err(Failure::new(Outcome::Mismatch, format!("{peer}: {error}")))
            }
            Ok(Err(error)) => Err(Failure::new(Outcome::of_echo(&error), format!("{peer}: {error}"))),
            Err(_elapsed) => {
                conn.abort(Reason::Timeout);
                Err(Failure::new(Outcome::CloseTimeout, format!("{peer}: no FIN in time")))
            }
        }
    }

    fn metrics(&self, target: &OneTarget) -> &TargetMetrics {
        let metrics: &Metrics = self.afterlife.journal().metrics();
        metrics.target(target.index)
    }
}

/// Reads to the end of the peer's stream; returns how many bytes came that nobody had asked for.
async fn until_end(conn: &mut Conn) -> std::io::Result<u64> {
    let mut surplus = 0;
    let mut buffer = [0; 1024];
    loop {
        conn.readable().await?;
        match conn.try_read(&mut buffer) {
            Ok(0) => return Ok(surplus),
            Ok(n) => {
                surplus += n as u64;
                // A peer that never stops must not keep the deadline from being noticed.
                tokio::task::coop::consume_budget().await;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

async fn pause(time: Duration, stop: &Stop) {
    if !time.is_zero() {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = stop.begun() => {}
        }
    }
}
