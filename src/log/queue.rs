//! The bounded queue between those who log and the one thread that writes.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use prometheus::IntCounter;

use super::format::{self, Format};

/// What may wait: about 50,000 state lines.
const CAPACITY: usize = 8 * 1024 * 1024;

/// What is kept for warnings beyond that: a flood of lines must not keep out that something is wrong, of which the flood
/// itself may be the cause.
const RESERVE: usize = 256 * 1024;

/// Lines that come within this time share one write and one wake-up: a wake-up per line costs the connection more
/// than the line does.
const GATHER: Duration = Duration::from_millis(5);

/// How long an output that takes nothing may delay the end of the process.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
    lost: IntCounter,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    asleep: bool,
    stopping: bool,
    stopped: bool,
    bar: Option<ProgressBar>,
}

impl Queue {
    pub(super) fn start(
        output: impl Write + Send + 'static,
        lost: IntCounter,
        format: Format,
    ) -> io::Result<Arc<Queue>> {
        let queue = Arc::new(Queue { state: Mutex::default(), wake: Condvar::new(), done: Condvar::new(), lost });
        let writer = Arc::clone(&queue);
        thread::Builder::new().name("log".into()).spawn(move || writer.write_to(output, format))?;
        Ok(queue)
    }

    /// Adds a line, or counts it as lost; a warning finds room when others do not. Never waits for the output.
    pub(super) fn push(&self, line: &[u8], is_warning: bool) {
        let room = if is_warning { CAPACITY + RESERVE } else { CAPACITY };
        let mut state = self.lock();
        if state.lines.len() + line.len() > room || state.stopped {
            drop(state);
            self.lost.inc();
            return;
        }
        state.lines.extend_from_slice(line);
        if state.asleep {
            state.asleep = false;
            drop(state);
            self.wake.notify_one();
        }
    }

    pub(super) fn set_bar(&self, bar: Option<ProgressBar>) {
        self.lock().bar = bar;
    }

    /// Waits, for a while, until all is written.
    pub(super) fn flush(&self) {
        let mut state = self.lock();
        let deadline = Instant::now() + PATIENCE;
        while !(state.stopped || state.lines.is_empty() && state.asleep) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes what is left, for a while.
    pub(super) fn finish(&self) {
        let mut state = self.lock();
        state.stopping = true;
        self.wake.notify_one();
        let deadline = Instant::now() + PATIENCE;
        while !state.stopped {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn write_to(&self, mut output: impl Write, format: Format) {
        let mut batch = Vec::new();
        let mut told = 0;
        let mut last_told: Option<Instant> = None;
        loop {
            let (bar, stopping) = {
                let mut state = self.lock();
                while state.lines.is_empty() && !state.stopping {
                    state.asleep = true;
                    self.done.notify_all();
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.asleep = false;
                if !state.stopping {
                    drop(state);
                    thread::sleep(GATHER);
                    state = self.lock();
                }
                batch.clear();
                std::mem::swap(&mut batch, &mut state.lines);
                (state.bar.clone(), state.stopping)
            };
            let lost = self.lost.get();
            let overdue = last_told.is_none_or(|t| t.elapsed() >= Duration::from_mins(1));
            if lost > told && (overdue || stopping) {
                format::warn_lost(format, lost - told, &mut batch);
                told = lost;
                last_told = Some(Instant::now());
            }
            let mut write = || output.write_all(&batch).and_then(|()| output.flush());
            let written = match bar {
                Some(bar) => bar.suspend(write),
                None => write(),
            };
            if written.is_err() {
                self.lost.inc_by(batch.iter().filter(|b| **b == b'\n').count() as u64);
            }
            // A burst's memory is given back, an ordinary batch's is kept.
            if batch.capacity() > CAPACITY / 8 {
                batch = Vec::new();
            }
            let mut state = self.lock();
            if state.stopping && state.lines.is_empty() {
                state.stopped = true;
                self.done.notify_all();
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::log_lost_counter;
    use std::sync::mpsc;

    /// An output that takes what it is given only when it is allowed to.
    struct Gate {
        open: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.open.recv();
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_output_never_blocks_and_every_line_is_written_or_counted() {
        let (allow, open) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let lost = log_lost_counter();
        let gate = Gate { open, written: Arc::clone(&written) };
        let queue = Queue::start(gate, lost.clone(), Format::Json).unwrap();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        let sent = 3 * CAPACITY / line.len();
        for _ in 0..sent {
            queue.push(&line, false);
        }
        assert!(lost.get() > 0, "the queue is bounded");
        let before = lost.get();
        queue.push(b"a warning\n", true);
        assert_eq!(lost.get(), before, "a warning has room of its own");
        drop(allow);
        queue.finish();
        let written = written.lock().unwrap();
        let lines = written.split(|b| *b == b'\n').filter(|l| l.starts_with(b"x")).count();
        assert_eq!(lines as u64 + lost.get(), sent as u64);
        let text = String::from_utf8_lossy(&written);
        assert!(text.contains("log lines lost"), "the loss is told");
        assert!(text.contains("a warning"));
    }

    #[test]
    fn lines_that_an_output_refuses_are_counted() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lost = log_lost_counter();
        let queue = Queue::start(Broken, lost.clone(), Format::Json).unwrap();
        queue.push(b"one\n", false);
        queue.push(b"two\n", false);
        queue.finish();
        assert_eq!(lost.get(), 2);
    }
}
