//! The life of the process, as a table of contents: bind, observe, start the roles, wait, drain, stop.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use prometheus::IntCounter;
use tokio::task::JoinHandle;

use crate::afterlife::Afterlife;
use crate::census::Census;
use crate::client;
use crate::config::{ClientConfig, Common, Config, Mode, Output, Roles, TargetName, reachable};
use crate::journal::Journal;
use crate::kernel::{Table, limits};
use crate::log::LogGuard;
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::scope::{Scope, Target};
use crate::server;
use crate::shutdown::{DrainConfig, Stop, on_signals};
use crate::web::{self, Readiness};

/// Descriptors that the echo service leaves to the rest of the process: the web side's connections, netlink, logs.
const RESERVED: u64 = 96;

/// Runs what was asked for on a runtime of its own; returns whether all went well.
///
/// # Errors
/// When it cannot start, or a part of it fails.
pub fn start(config: Config, log: &LogGuard, log_lost: IntCounter) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers())
        .enable_all()
        .build()
        .context("make the runtime")?;
    let result = runtime.block_on(run(config, log, log_lost));
    // Not dropped: that would wait for blocking calls, and a name that does not resolve can take its time.
    runtime.shutdown_background();
    result
}

async fn run(config: Config, log: &LogGuard, log_lost: IntCounter) -> anyhow::Result<bool> {
    match config.mode {
        Mode::Health { url } => web::probe::ready(&url).await.map(|()| true),
        Mode::Run(roles) => run_roles(*roles, config.common, log, log_lost).await,
    }
}

async fn run_roles(roles: Roles, common: Common, log: &LogGuard, log_lost: IntCounter) -> anyhow::Result<bool> {
    let Common { web, observer, follow_limit } = common;
    let Roles { server, client, drain } = roles;
    let descriptors = limits::raise_descriptor_limit();
    let stop = Stop::new();
    tokio::spawn(on_signals(&stop, drain).context("watch for signals")?);

    // Bind: every mistake in an address shows before anything runs.
    let web = web.map(web::bind).transpose()?;
    let server = server.map(server::bind).transpose()?;
    let client = client.map(|client| with_targets(client, server.as_ref()));

    // Observe.
    let server_ports: Vec<u16> = server.iter().map(|bound| bound.address().port()).collect();
    let targets = client.as_ref().map_or(Vec::new(), |(_, targets)| targets.clone());
    let scope = Arc::new(Scope::new(&server_ports, targets));
    let (table, refused) = Table::open(observer).context("read the kernel's socket table")?;
    let observer = table.observer();
    if let Some(error) = refused {
        tracing::warn!(%error, %observer, "netlink refused: sockets are read as text, and known by their \
         addresses only");
    }
    let (second, _) = Table::open(Some(observer)).context("read the kernel's socket table")?;
    let metrics = Arc::new(Metrics::new(&scope, observer, &log_lost));
    let journal = Arc::new(Journal::new(Arc::clone(&metrics)));
    let afterlife =
        Afterlife::start(Arc::clone(&journal), &scope, second, follow_limit).context("start the follower")?;
    let census = Arc::new(Census::new(scope, Arc::clone(&journal), table));

    // Start.
    let readiness = Readiness::default();
    let web_stop = Stop::new();
    let web = web.map(|bound| {
        let sources =
            web::Sources { census: Arc::clone(&census), journal: Arc::clone(&journal), readiness: readiness.clone() };
        tokio::spawn(web::run(bound, sources, web_stop.clone()))
    });
    let server_stop = Stop::new();
    let server = server.map(|bound| {
        let limit = connection_limit(&bound, descriptors, client.as_ref().map_or(0, |(c, _)| c.connections));
        let (afterlife, census) = (afterlife.clone(), Arc::clone(&census));
        tokio::spawn(server::run(bound, limit, afterlife, census, server_stop.clone()))
    });
    readiness.set(true);
    tokio::spawn(on_stop(stop.clone(), server_stop.clone(), readiness.clone()));

    // Wait. The pair's client ends first, so that the server sees its connections close.
    let mut well = true;
    let mut until_gone = false;
    let mut summarize = None;
    if let Some((config, targets)) = client {
        until_gone = config.until_gone;
        let output = config.output;
        let bar = Progress::start(&config, log);
        let stats = client::run(config, targets, afterlife.clone(), stop.clone(), bar.counter()).await;
        bar.finish(log).await;
        well &= stats.is_clean();
        summarize = Some((stats, output));
    } else {
        stop.begun().await;
    }
    readiness.set(false);
    let deadline = drain_deadline(&stop, drain).await;
    server_stop.begin_until(deadline);
    if let Some(server) = server {
        let began = (deadline - drain.timeout).into_std();
        let draining = tokio::spawn(show_duration(Arc::clone(&metrics), began));
        well &= finish_server(server, drain, began, &afterlife).await?;
        draining.abort();
    }

    // What the kernel still keeps. A table that cannot be read must not hold up the end, and a signal need not wait.
    let _ = tokio::time::timeout(Duration::from_secs(5), afterlife.all_seen()).await;
    if until_gone {
        tokio::select! {
            () = afterlife.none_left() => {}
            () = stop.begun() => {}
        }
    }
    if let Some((stats, output)) = summarize {
        let summary = stats.summary(&journal, afterlife.following());
        let mut out = std::io::stdout().lock();
        match output {
            Output::Text => write!(out, "{summary}"),
            Output::Json => writeln!(out, "{}", serde_json::to_string(&summary)?),
        }
        .context("print the summary")?;
    }

    // The web side stops last, so that the drain itself is scraped.
    web_stop.begin();
    if let Some(web) = web {
        web.await.context("web side")??;
    }
    Ok(well)
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

/// Not ready from the first signal on; the second one reaches the server too.
async fn on_stop(stop: Stop, server_stop: Stop, readiness: Readiness) {
    stop.begun().await;
    readiness.set(false);
    stop.was_cut().await;
    server_stop.cut();
}

/// When the drain must be over. After a signal it begins when the drain's delay has passed: somebody must have time
/// to notice. A run that ended by itself has nobody to wait for.
async fn drain_deadline(stop: &Stop, drain: DrainConfig) -> tokio::time::Instant {
    match stop.deadline_at() {
        Some(deadline) => {
            tokio::select! {
                () = tokio::time::sleep_until(deadline - drain.timeout) => {}
                () = stop.was_cut() => {}
            }
            deadline
        }
        None => tokio::time::Instant::now() + drain.timeout,
    }
}

/// The drain's duration grows where a scrape can see it.
async fn show_duration(metrics: Arc<Metrics>, began: Instant) {
    loop {
        metrics.drain_duration.set(began.elapsed().as_secs_f64());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Waits for the server's drain and tells how it went.
async fn finish_server(
    server: JoinHandle<anyhow::Result<server::Verdict>>,
    drain: DrainConfig,
    began: Instant,
    afterlife: &Afterlife,
) -> anyhow::Result<bool> {
    let verdict = server.await.context("echo server")??;
    let took = began.elapsed();
    afterlife.journal().metrics().drain_duration.set(took.as_secs_f64());
    let (open, aborted) = (verdict.open, verdict.aborted);
    let left_in_kernel = afterlife.following();
    let seconds = took.as_secs_f64();
    if aborted == 0 {
        tracing::info!(open, aborted, seconds, left_in_kernel, "drained: every connection ended cleanly");
    } else {
        let timeout_s = drain.timeout.as_secs_f64();
        tracing::warn!(open, aborted, seconds, left_in_kernel, timeout_s, "drain cut short: connections were reset");
    }
    Ok(aborted == 0)
}
