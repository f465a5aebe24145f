//! The subscriber: one line an event, for a terminal or as JSON, through a bounded queue to stderr.
//!
//! Nothing that logs ever waits for the output: a line that does not fit is counted as lost. Must not know: what is
//! logged.

/// Writing to a `String` cannot fail; this says so once.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{ let _ = write!($out, $($arg)*); }};
}

mod format;
mod json;
mod queue;
mod terminal;
mod time;

use std::io::Write;
use std::sync::Arc;

use indicatif::ProgressBar;
use prometheus::IntCounter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};

pub use format::Format;
use queue::Queue;

/// The target of every state line, so that it can be filtered.
pub const STATES: &str = "echoscope::tcp";

/// The target of the lab's lines: each is a sentence that tells what happens next.
pub const STEPS: &str = "echoscope::lab";

/// How to log.
#[derive(Clone, Copy, Debug)]
pub struct LogConfig {
    /// The least severe level that is shown.
    pub level: Level,
    /// For whom.
    pub format: Format,
}

/// Keeps the writer alive; writes what is left when dropped.
pub struct LogGuard {
    queue: Arc<Queue>,
}

impl LogGuard {
    /// Draws a progress bar below the lines: they are written above it.
    pub fn below(&self, bar: ProgressBar) {
        self.queue.set_bar(Some(bar));
    }

    /// Waits, for a while, until what was logged so far is written: whoever prints elsewhere next comes after it.
    pub fn flush(&self) {
        self.queue.flush();
    }

    /// No bar any more.
    pub fn no_bar(&self) {
        self.queue.set_bar(None);
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.queue.finish();
    }
}

/// Makes the process log to `output`; lines lost are counted in `lost`.
///
/// # Errors
/// When the process already has a subscriber, or no thread can be started.
pub fn init(config: LogConfig, output: impl Write + Send + 'static, lost: IntCounter) -> anyhow::Result<LogGuard> {
    let queue = Queue::start(output, lost, config.format)?;
    let lines = Lines { format: config.format, queue: Arc::clone(&queue) };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(LevelFilter::from_level(config.level)));
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(LogGuard { queue })
}

/// Turns events into lines.
struct Lines {
    format: Format,
    queue: Arc<Queue>,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let is_warning = *event.metadata().level() <= Level::WARN;
        format::with_line(self.format, event, |line| self.queue.push(line, is_warning));
    }
}

/// Lets a warning through once a minute, with how often it was held back since.
#[derive(Debug, Default)]
pub struct OnceAMinute {
    state: std::sync::Mutex<(Option<std::time::Duration>, u64)>,
}

impl OnceAMinute {
    /// One that has not warned yet.
    #[must_use]
    pub const fn new() -> OnceAMinute {
        OnceAMinute { state: std::sync::Mutex::new((None, 0)) }
    }

    /// `Some(n)` when it is time to warn of `n` occurrences since the last warning, this one included.
    pub fn due(&self, now: std::time::Duration) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.1 += 1;
        match state.0 {
            Some(last) if now.saturating_sub(last).as_secs() < 60 => None,
            _ => {
                state.0 = Some(now);
                Some(std::mem::take(&mut state.1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn once_a_minute_counts_what_it_holds_back() {
        let throttle = OnceAMinute::default();
        let at = |s: u64| Duration::from_secs(1000 + s);
        assert_eq!(throttle.due(at(0)), Some(1));
        assert_eq!(throttle.due(at(1)), None);
        assert_eq!(throttle.due(at(59)), None);
        assert_eq!(throttle.due(at(60)), Some(3));
    }
}
