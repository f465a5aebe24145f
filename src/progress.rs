//! The progress bar of a bounded run that somebody watches.
//!
//! Drawn by a thread of its own: a terminal that takes nothing stops the bar, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::config::ClientConfig;
use crate::log::LogGuard;

/// How often the bar is drawn, and how long a stuck terminal may delay the end.
const TICK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(500);

/// A bar, or none.
pub struct Progress {
    done: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    drawer: Option<JoinHandle<()>>,
}

impl Progress {
    /// Draws a bar for a run that has an end, when stderr is a terminal.
    #[must_use]
    pub fn start(config: &ClientConfig, log: &LogGuard) -> Progress {
        let (done, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let drawer = bar(config).filter(|bar| !bar.is_hidden()).and_then(|bar| {
            log.below(bar.clone());
            let (done, over) = (Arc::clone(&done), Arc::clone(&over));
            let draw = move || {
                while !over.load(Ordering::Acquire) {
                    bar.set_position(done.load(Ordering::Relaxed));
                    thread::park_timeout(TICK);
                }
                bar.finish_and_clear();
            };
            thread::Builder::new().name("progress".into()).spawn(draw).ok()
        });
        Progress { done, over, drawer }
    }

    /// Where to count what is done.
    #[must_use]
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.done)
    }

    /// Takes the bar away.
    pub async fn finish(self, log: &LogGuard) {
        self.over.store(true, Ordering::Release);
        if let Some(drawer) = self.drawer {
            drawer.thread().unpark();
            let began = Instant::now();
            while !drawer.is_finished() && began.elapsed() < PATIENCE {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            log.no_bar();
        }
    }
}

fn bar(config: &ClientConfig) -> Option<ProgressBar> {
    let style = |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    match (config.count, config.duration) {
        (Some(count), _) => {
            Some(ProgressBar::new(count).with_style(style("{bar:40} {pos}/{len} connections  {per_sec}  {eta} left")))
        }
        (None, Some(_)) => {
            Some(ProgressBar::new_spinner().with_style(style("{spinner} {pos} connections  {per_sec}  {elapsed}")))
        }
        (None, None) => None,
    }
}
