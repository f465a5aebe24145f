//! The life of a watch: once, again and again on a terminal, or until it is told to stop.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use prometheus::IntCounter;

use super::EndAll;
use super::eyes::{Announcements, announce, open_table, passed_over};
use crate::config::{Common, Output, WatchConfig, WatchMode};
use crate::kernel::Observer;
use crate::live::Live;
use crate::metrics::SurveyMetrics;
use crate::shutdown::{DrainConfig, Stop, on_signals};
use crate::survey::{Selection, Survey, Told};
use crate::watch::{Look, Thresholds, Watch};
use crate::web::{self, Readiness};

/// What a check exits with that could not look: neither well nor wrong (Nagios: UNKNOWN).
const UNKNOWN: u8 = 3;

/// Watches as it was told to; returns the exit code.
pub(super) async fn run(
    config: WatchConfig,
    kernel: Announcements,
    common: Common,
    log_lost: IntCounter,
) -> anyhow::Result<u8> {
    let (mode, output) = (config.mode, config.output);
    match watch(config, kernel, common, log_lost).await {
        Err(error) if mode == WatchMode::Once => {
            // Where a monitor looks for the answer; a script that wants JSON gets none.
            match output {
                Output::Text => writeln!(std::io::stdout(), "UNKNOWN {error:#}").context("print")?,
                Output::Json => tracing::error!(error = format!("{error:#}"), "nothing is known"),
            }
            Ok(UNKNOWN)
        }
        ended => ended,
    }
}

async fn watch(config: WatchConfig, kernel: Announcements, common: Common, log_lost: IntCounter) -> anyhow::Result<u8> {
    let drain = DrainConfig { delay: Duration::ZERO, timeout: Duration::from_secs(5) };
    let stop = Stop::new();
    tokio::spawn(on_signals(&stop, drain).context("watch for signals")?);
    let serves = config.mode == WatchMode::Serve;
    let web = common.web.filter(|_| serves).map(web::bind).transpose()?;
    let WatchConfig { only, ignore, remote, interval, warn, crit, .. } = config;
    let own = web.as_ref().map(|bound| bound.address().port());
    let asked = common.observer;
    let table = open_table(asked)?;
    let by_table = table.observer();
    let (tracepoints, no_ebpf) = announce(kernel, asked, by_table)?;
    let observer = if tracepoints.is_some() { Observer::Ebpf } else { by_table };
    let metrics = Arc::new(SurveyMetrics::new(observer, &log_lost));
    for (better, why) in passed_over(asked, observer, no_ebpf) {
        metrics.unavailable(better, why);
    }
    let selection = Selection { only, ignore, remote, own };
    let live = Arc::new(Live::of_others(&metrics));
    let told = Told { metrics: Arc::clone(&metrics), live: Arc::clone(&live) };
    let survey = Survey::start(selection, table, told, interval, tracepoints).context("start the survey")?;
    // Whatever comes after this is new: so nobody is told that it watches before.
    // Whether it can be read is told by whoever asks.
    let _ = survey.read().await;
    let readiness = Readiness::new(metrics.ready.clone());
    let watch = Arc::new(Watch::new(survey, metrics, Thresholds { warn, crit }, live));
    match config.mode {
        WatchMode::Once => match config.output {
            Output::Text => print(&watch, |look| Ok(look.text())).await,
            Output::Json => print(&watch, json).await,
        },
        WatchMode::Live => {
            // Home, and what is below is cleared: the table stays where it is.
            const AGAIN: &str = "\x1b[H\x1b[J";
            loop {
                let code = print(&watch, |look| Ok(AGAIN.to_owned() + &look.screen())).await?;
                tokio::select! {
                    () = tokio::time::sleep(interval) => {}
                    () = stop.begun() => return Ok(code),
                }
            }
        }
        WatchMode::Serve => {
            let Some(bound) = web else {
                bail!("watch serves its metrics: give --web.listen-address, or --once or --live")
            };
            let web_stop = Stop::new();
            let end_all = EndAll { stop: stop.clone(), timeout: drain.timeout };
            let web = end_all.with("web side", &web_stop, web::run(bound, watch, readiness.clone(), web_stop.clone()));
            readiness.set(true);
            tracing::info!(%observer, "watching every listener of this network namespace");
            stop.begun().await;
            readiness.set(false);
            web_stop.begin();
            web.await.context("web side").flatten()?;
            Ok(0)
        }
    }
}

/// Prints one reading, as `show` puts it; returns how bad it is.
async fn print(watch: &Watch, show: impl Fn(&Look) -> anyhow::Result<String>) -> anyhow::Result<u8> {
    let look = watch.look_closely().await.context("read the kernel's socket table")?;
    let text = show(&look)?;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("print")?;
    Ok(look.severity() as u8)
}

fn json(look: &Look) -> anyhow::Result<String> {
    let json = look.json().map_err(|_| anyhow!("encode the reading"))?;
    String::from_utf8(json).map(|json| json + "\n").context("encode the reading")
}
