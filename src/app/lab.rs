//! The life of a lab: its place found before anything runs, its web side where it was started, its end.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use prometheus::IntCounter;

use super::EndAll;
use super::eyes::{Announcements, Observers, observe, open_table};
use crate::config::{Common, LabConfig, Output, mistake};
use crate::lab::{self, Ground, Plan, Verdict};
use crate::log::{LogGuard, STEPS};
use crate::scope::Scope;
use crate::shutdown::{DrainConfig, Stop, on_signals};
use crate::web::{self, Readiness};

/// What a lab needs from before there was a second thread.
pub(super) struct Prepared {
    plan: Plan,
    ground: Ground,
    web: Option<web::Bound>,
}

/// Finds the scenarios, binds the web side where the process was started, so that it can be reached, and moves to where
/// the lab may play.
pub(super) fn prepare(config: &LabConfig, web: Option<SocketAddr>) -> anyhow::Result<Prepared> {
    let plan = Plan::new(&config.scenarios, config.hold).map_err(|name| {
        let known: Vec<&str> = lab::ALL.iter().map(|scenario| scenario.about().name).collect();
        mistake(&format!("no scenario is called '{name}': there are all, {}", known.join(", ")))
    })?;
    let web = web.map(web::bind).transpose()?;
    let ground = Ground::find()?;
    Ok(Prepared { plan, ground, web })
}

/// Prints what there is to see.
pub(super) fn list() -> anyhow::Result<()> {
    std::io::stdout().lock().write_all(lab::list().as_bytes()).context("print the list")
}

/// Plays, and prints what was shown. Returns whether that is all that should have been.
pub(super) async fn run(
    config: &LabConfig,
    prepared: Prepared,
    kernel: Announcements,
    common: Common,
    log: &LogGuard,
    log_lost: IntCounter,
) -> anyhow::Result<bool> {
    let Prepared { plan, ground, web } = prepared;
    let drain = DrainConfig { delay: Duration::ZERO, timeout: Duration::from_secs(5) };
    let stop = Stop::new();
    tokio::spawn(on_signals(&stop, drain).context("watch for signals")?);
    let (ports, targets) = plan.services();
    let Observers { metrics, journal, afterlife, census } =
        observe(Scope::new(&ports, targets), kernel, common, &log_lost)?;
    let table = open_table(common.observer)?;
    let readiness = Readiness::new(metrics.ready.clone());
    let web_stop = Stop::new();
    let web = web.map(|bound| {
        let own = Arc::new(web::Own { census, journal: Arc::clone(&journal) });
        let end_all = EndAll { stop: stop.clone(), timeout: drain.timeout };
        end_all.with("web side", &web_stop, web::run(bound, own, readiness.clone(), web_stop.clone()))
    });
    readiness.set(true);
    tracing::info!(target: STEPS, "playing in {}", ground.label());
    let verdicts = lab::run(&plan, afterlife, table, &stop).await;
    readiness.set(false);
    log.flush();
    let mut out = std::io::stdout().lock();
    match config.output {
        Output::Text => verdicts.iter().try_for_each(|verdict| write!(out, "{verdict}")),
        Output::Json => writeln!(out, "{}", lab::as_json(&verdicts, ground)),
    }
    .context("print the verdict")?;
    drop(out);
    web_stop.begin();
    if let Some(web) = web {
        web.await.context("web side").flatten()?;
    }
    Ok(!verdicts.is_empty() && verdicts.iter().all(Verdict::is_good))
}
