//! The life of the process, as a table of contents: bind, observe, start the roles, wait, drain, stop.

mod eyes;
mod lab;
mod watch;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use prometheus::IntCounter;
use tokio::task::JoinHandle;

use crate::client::{self, Summary};
use crate::config::{ClientConfig, Common, Config, Mode, Output, Roles, TargetName, WatchMode, reachable};
use crate::explain;
use crate::journal::Journal;
use crate::kernel::limits;
use crate::log::LogGuard;
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::scope::{Scope, Target};
use crate::server;
use crate::shutdown::{DrainConfig, Stop, Verdict, on_signals};
use crate::tcp::Role;
use crate::web::{self, Readiness};
use eyes::{Observers, observe};

/// Descriptors that the echo service leaves to the rest of the process: the web side's connections, netlink, what is attached
/// to the kernel, logs.
const RESERVED: u64 = 128;

/// How long a drain that was cut short waits to be scraped.
const LAST_SCRAPE: Duration = Duration::from_secs(15);

/// What must be done before the process has a second thread.
pub struct Prepared {
    lab: Option<lab::Prepared>,
    kernel: eyes::Announcements,
}

/// Prepares the process for what was asked for, while it has one thread only.
///
/// # Errors
/// A `clap::Error` for a mistake in what was typed; whatever else keeps it from starting.
pub fn prepare(config: &Config) -> anyhow::Result<Prepared> {
    let lab = match &config.mode {
        Mode::Lab(lab) if !lab.scenarios.is_empty() => Some(lab::prepare(lab, config.common.web)?),
        _ => None,
    };
    // After the lab has moved: the kernel announces what happens where we are.
    let kernel = match &config.mode {
        // Who does not want to see needs no eyes.
        Mode::Run(roles)
            if roles.client.is_none() && roles.server.as_ref().is_some_and(|server| !server.lifecycles) =>
        {
            eyes::Announcements::NotAskedFor
        }
        Mode::Run(_) => eyes::attach(config.common.observer, false)?,
        Mode::Lab(_) if lab.is_some() => eyes::attach(config.common.observer, false)?,
        // Who looks once hears of no change.
        Mode::Watch(watch) if watch.mode == WatchMode::Serve => eyes::attach(config.common.observer, true)?,
        _ => eyes::Announcements::NotAskedFor,
    };
    Ok(Prepared { lab, kernel })
}

/// Runs what was asked for on a runtime of its own; returns the exit code.
///
/// # Errors
/// When it cannot start, or a part of it fails.
pub fn start(config: Config, prepared: Prepared, log: &LogGuard, log_lost: IntCounter) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers())
        .enable_all()
        .build()
        .context("make the runtime")?;
    let result = runtime.block_on(run(config, prepared, log, log_lost));
    // Not dropped: that would wait for blocking calls, and a name that does not resolve can take its time.
    runtime.shutdown_background();
    result
}

async fn run(config: Config, prepared: Prepared, log: &LogGuard, log_lost: IntCounter) -> anyhow::Result<u8> {
    let well = match config.mode {
        Mode::Watch(config_of_watch) => {
            return watch::run(config_of_watch, prepared.kernel, config.common, log_lost).await;
        }
        Mode::Lab(config_of_lab) => match prepared.lab {
            Some(lab) => lab::run(&config_of_lab, lab, prepared.kernel, config.common, log, log_lost).await,
            None => lab::list().map(|()| true),
        },
        Mode::Explain { state, format, colour } => {
            explain::print(state, format, colour).context("print the explanation").map(|()| true)
        }
        Mode::Health { url } => web::probe::ready(&url).await.map(|()| true),
        Mode::Run(roles) => run_roles(*roles, prepared.kernel, config.common, log, log_lost).await,
    };
    well.map(|well| u8::from(!well))
}

async fn run_roles(
    roles: Roles,
    kernel: eyes::Announcements,
    common: Common,
    log: &LogGuard,
    log_lost: IntCounter,
) -> anyhow::Result<bool> {
    let Roles { server, client, drain } = roles;
    let descriptors = limits::raise_descriptor_limit();
    let stop = Stop::new();
    tokio::spawn(on_signals(&stop, drain).context("watch for signals")?);

    // Bind: every mistake in an address shows before anything runs.
    let web = common.web.map(web::bind).transpose()?;
    let server = server.map(server::bind).transpose()?;
    let client = client.map(|client| with_targets(client, server.as_ref()));

    // Observe.
    let server_ports: Vec<u16> = server.iter().map(|bound| bound.address().port()).collect();
    let targets = client.as_ref().map_or(Vec::new(), |(_, targets)| targets.clone());
    let Observers { metrics, journal, afterlife, census } =
        observe(Scope::new(&server_ports, targets), kernel, common, &log_lost)?;

    // Start. The server is told to drain when the pair's client has ended, so that it sees its connections close.
    let readiness = Readiness::new(metrics.ready.clone());
    let (draining, server_stop, web_stop) = (Stop::new(), Stop::new(), Stop::new());
    let end_all = EndAll { stop: stop.clone(), timeout: drain.timeout };
    let web = web.map(|bound| {
        let own = Arc::new(web::Own { census: Arc::clone(&census), journal: Arc::clone(&journal) });
        end_all.with("web side", &web_stop, web::run(bound, own, readiness.clone(), web_stop.clone()))
    });
    let server = server.map(|bound| {
        let limit = connection_limit(&bound, descriptors, client.as_ref().map_or(0, |(c, _)| c.connections));
        let run = server::run(bound, limit, afterlife.clone(), Arc::clone(&census), server_stop.clone());
        end_all.with("echo server", &server_stop, run)
    });
    readiness.set(true);
    tokio::spawn(on_stop(stop.clone(), drain, readiness.clone(), draining.clone(), server_stop.clone()));

    // Wait.
    let mut well = true;
    let mut until_gone = false;
    let mut summarize = None;
    if let Some((config, targets)) = client {
        until_gone = config.until_gone;
        let output = config.output;
        let bar = Progress::start(&config, log);
        let stats = client::run(config, targets, afterlife.clone(), draining.clone(), bar.counter()).await;
        bar.finish(log).await;
        well &= stats.is_clean();
        summarize = Some((stats, output));
    } else {
        draining.begun().await;
    }

    // Drain.
    readiness.set(false);
    let deadline = draining.deadline_at().unwrap_or_else(|| tokio::time::Instant::now() + drain.timeout);
    let began = (deadline - drain.timeout).into_std();
    server_stop.begin_until(deadline);
    let duration = tokio::spawn(show_duration(Arc::clone(&metrics), began));
    let server = match server {
        Some(server) => Some(server.await.context("echo server").flatten()),
        None => None,
    };
    duration.abort();
    metrics.drain_duration.set(began.elapsed().as_secs_f64());

    // What the kernel still keeps.
    patiently(&stop, afterlife.all_seen()).await;
    match &summarize {
        Some((stats, _)) if draining.has_begun() => {
            tell(Role::Client, stats.verdict(), drain, began, &journal);
        }
        _ => {}
    }
    match server {
        Some(Ok(verdict)) => well &= tell(Role::Server, verdict, drain, began, &journal),
        Some(Err(error)) => {
            well = false;
            tracing::error!(error = format!("{error:#}"), "echo server failed");
        }
        None => {}
    }
    if until_gone {
        tokio::select! {
            () = afterlife.none_left() => {}
            () = stop.begun() => {}
        }
    }
    patiently(&stop, afterlife.last_look()).await;
    if let Some((stats, output)) = summarize {
        let summary = Summary::of(&stats, &journal);
        let mut out = std::io::stdout().lock();
        match output {
            Output::Text => write!(out, "{summary}"),
            Output::Json => writeln!(out, "{}", serde_json::to_string(&summary)?),
        }
        .context("print the summary")?;
    }

    // The web side stops last, so that the drain itself is scraped; what went wrong in it a moment ago, too.
    if metrics.drain_aborted.get() > 0 && web.is_some() {
        last_scrape(&metrics, &stop).await;
    }
    web_stop.begin();
    if let Some(web) = web {
        web.await.context("web side").flatten()?;
    }
    Ok(well)
}

/// Ends everything when a part ends before it was told to: what is left of the process would look healthy and serve
/// nobody.
#[derive(Clone)]
struct EndAll {
    stop: Stop,
    timeout: Duration,
}

impl EndAll {
    /// Runs a part that is told to end by `told`.
    fn with<T: Send + 'static>(
        &self,
        part: &'static str,
        told: &Stop,
        run: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> JoinHandle<anyhow::Result<T>> {
        struct Guard(EndAll, &'static str, Stop);
        impl Drop for Guard {
            fn drop(&mut self) {
                if !self.2.has_begun() {
                    tracing::error!(part = self.1, "ended before its time: everything ends");
                    self.0.stop.begin_until(tokio::time::Instant::now() + self.0.timeout);
                }
            }
        }
        let guard = Guard(self.clone(), part, told.clone());
        tokio::spawn(async move {
            let _guard = guard;
            run.await
        })
    }
}

/// The client with its targets; the pair's client gets the pair's server.
fn with_targets(mut client: ClientConfig, server: Option<&server::Bound>) -> (ClientConfig, Vec<Arc<Target>>) {
    if let Some(server) = server {
        let address = reachable(server.address());
        client.targets = vec![TargetName { host: address.ip().to_string(), port: address.port() }];
    }
    let targets = client.targets.iter().map(|name| Arc::new(Target::new(name.to_string(), name.port))).collect();
    (client, targets)
}

/// How many connections the server may hold so that the web side, and the pair's own client, still get descriptors.
fn connection_limit(bound: &server::Bound, descriptors: Option<u64>, own_clients: usize) -> usize {
    let reserved = RESERVED + own_clients as u64;
    let left = descriptors.map_or(u64::MAX, |n| n.saturating_sub(reserved).max(n / 4).max(1));
    if descriptors.is_some_and(|n| reserved >= n) {
        tracing::warn!(
            descriptors,
            connections = own_clients,
            "the descriptor limit is too low for so many connections"
        );
    }
    bound.max_connections().unwrap_or(usize::try_from(left).unwrap_or(usize::MAX))
}

/// Not ready from the first signal on. The drain begins when its delay has passed: somebody must have time to notice.
/// The second signal reaches everyone.
async fn on_stop(stop: Stop, drain: DrainConfig, readiness: Readiness, draining: Stop, server_stop: Stop) {
    stop.begun().await;
    readiness.set(false);
    let deadline = stop.deadline_at().unwrap_or_else(tokio::time::Instant::now);
    tokio::select! {
        () = tokio::time::sleep_until(deadline - drain.timeout) => {}
        () = stop.was_cut() => {}
    }
    draining.begin_until(deadline);
    stop.was_cut().await;
    draining.cut();
    server_stop.cut();
}

/// The drain's duration grows where a scrape can see it.
async fn show_duration(metrics: Arc<Metrics>, began: Instant) {
    loop {
        metrics.drain_duration.set(began.elapsed().as_secs_f64());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Waits for the observer: a table that cannot be read must not hold up the end, and somebody who insists need not wait.
async fn patiently(stop: &Stop, observer: impl Future<Output = ()>) {
    tokio::select! {
        () = observer => {}
        () = tokio::time::sleep(Duration::from_secs(5)) => {}
        () = stop.was_cut() => {}
    }
}

/// Waits until the metrics were scraped once more, where somebody scrapes them, for as long as most do from one time to the next.
async fn last_scrape(metrics: &Metrics, stop: &Stop) {
    let Some(before) = metrics.scrapes() else { return };
    let deadline = Instant::now() + LAST_SCRAPE;
    while Instant::now() < deadline && !stop.is_cut() && metrics.scrapes() == Some(before) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Tells how the drain of one role went, and what the kernel still keeps. Returns whether it was clean.
fn tell(role: Role, verdict: Verdict, drain: DrainConfig, began: Instant, journal: &Journal) -> bool {
    let Verdict { open, lost, aborted, unfinished } = verdict;
    let (role, seconds) = (role.label(), began.elapsed().as_secs_f64());
    let left: Vec<String> = journal.ledger().states().iter().map(|(state, n)| format!("{state} {n}")).collect();
    let left_in_kernel = if left.is_empty() { "nothing".to_owned() } else { left.join(", ") };
    if verdict.is_clean() && unfinished > 0 {
        tracing::warn!(
            role,
            open,
            lost,
            unfinished,
            seconds,
            left_in_kernel,
            "drained, but for handshakes that never finished"
        );
    } else if verdict.is_clean() {
        tracing::info!(
            role,
            open,
            lost,
            aborted,
            unfinished,
            seconds,
            left_in_kernel,
            "drained: nothing was cut short"
        );
    } else {
        let timeout_s = drain.timeout.as_secs_f64();
        tracing::warn!(
            role,
            open,
            lost,
            aborted,
            unfinished,
            seconds,
            left_in_kernel,
            timeout_s,
            "drain cut short: connections were reset"
        );
    }
    verdict.is_clean()
}
