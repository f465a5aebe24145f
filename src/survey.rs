//! The survey: the sockets of every listener of this network namespace, and of what goes out from it, whoever owns them.
//!
//! One thread reads the table again and again and hears what the kernel frees in between; whoever asks gets the last
//! reading, or a new one where that is old. Must not know: who asks, and in which form it is shown.

mod announced;
mod reading;
mod tracker;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

pub use reading::{Listeners, Port, Reading, Selection, Service, Sight, Socket, Stay};

use crate::kernel::tracepoints::Tracepoints;
use crate::kernel::{DestroyEvents, Destroyed, Observer, Row, Table, TableError, Wanted, clock, opens, ports};
use crate::live::Live;
use crate::log::OnceAMinute;
use crate::metrics::SurveyMetrics;
use crate::tcp::{Flow, State, StateSet};
use crate::thread::with_event_loop;
use announced::Announced;
use tracker::{LATE, Tracker};

/// One reading serves everyone for so long.
const FRESH: Duration = Duration::from_millis(500);

/// After how many rows of a reading, a millisecond or less, what the kernel frees meanwhile is listened to: where
/// net.core.rmem_max is what it mostly is, a few hundred words of it fit.
const ROWS: u64 = 512;

/// Announcements that come within this time share a wake-up.
const GATHER: Duration = Duration::from_millis(2);

/// How many pairs of addresses are told of.
const FULLEST: usize = 10;

/// A handle to the survey.
#[derive(Clone)]
pub struct Survey(mpsc::Sender<Question>);

/// Where what the survey sees is told.
pub struct Told {
    /// The counters.
    pub metrics: Arc<SurveyMetrics>,
    /// The live page.
    pub live: Arc<Live>,
}

/// A reading, or why there is none.
type Answer = Result<Arc<Reading>, Arc<TableError>>;

/// What is asked of the survey's thread.
enum Question {
    Reading(oneshot::Sender<Answer>),
    Oldest(State, usize, oneshot::Sender<Vec<Socket>>),
}

impl Survey {
    /// Begins to look, every `interval`, and with `tracepoints` to hear each change in between.
    ///
    /// # Errors
    /// When its thread or event loop cannot be made.
    pub fn start(
        selection: Selection,
        table: Table,
        told: Told,
        interval: Duration,
        tracepoints: Option<Tracepoints>,
    ) -> io::Result<Survey> {
        let (ask, asked) = mpsc::channel(64);
        let Told { metrics, live } = told;
        let announced = tracepoints.map(|t| Announced::new(t, selection.clone(), Arc::clone(&metrics), live));
        let surveyor = Surveyor {
            announced,
            tracker: Tracker::new(selection),
            table,
            metrics,
            interval,
            ears: None,
            last: None,
            opens_before: None,
            missing: None,
            lost: false,
            warned: OnceAMinute::default(),
        };
        with_event_loop("survey", move || surveyor.run(asked))?;
        Ok(Survey(ask))
    }

    /// The table as of at most half a second ago.
    ///
    /// # Errors
    /// When it cannot be read, which is counted and logged.
    pub async fn read(&self) -> Result<Arc<Reading>, Arc<TableError>> {
        let ended = || Arc::new(TableError::Io { what: "ask the survey", source: io::ErrorKind::BrokenPipe.into() });
        let (answer, reading) = oneshot::channel();
        self.0.send(Question::Reading(answer)).await.map_err(|_| ended())?;
        reading.await.map_err(|_| ended())?
    }

    /// The sockets that have been in `state` for longest, as of the last reading.
    pub async fn oldest(&self, state: State, most: usize) -> Vec<Socket> {
        let (answer, sockets) = oneshot::channel();
        if self.0.send(Question::Oldest(state, most, answer)).await.is_err() {
            return Vec::new();
        }
        sockets.await.unwrap_or_default()
    }
}

/// The kernel's announcements. What comes while the table is read is kept until that is over: a row that was on its way
/// to us before its socket was freed must not seem to be another one.
struct Ears {
    events: DestroyEvents,
    heard: Vec<(u64, Flow)>,
    /// Some did not fit.
    lost: bool,
}

impl Ears {
    fn listen(&mut self) -> Result<(), TableError> {
        let heard = &mut self.heard;
        self.lost |= self.events.drain(|Destroyed { cookie, flow, .. }| heard.push((cookie, flow)))?;
        Ok(())
    }
}

struct Surveyor {
    announced: Option<Announced>,
    tracker: Tracker,
    table: Table,
    metrics: Arc<SurveyMetrics>,
    interval: Duration,
    ears: Option<Ears>,
    last: Option<(Instant, Answer)>,
    /// The kernel's count of opens after the first reading.
    opens_before: Option<u64>,
    /// How many were missing at least since then.
    missing: Option<(Instant, u64)>,
    /// Since then events were lost, or did not say of whom they were.
    lost: bool,
    warned: OnceAMinute,
}

impl Surveyor {
    async fn run(mut self, mut asked: mpsc::Receiver<Question>) {
        // What is announced is more than what is freed.
        if self.table.observer() == Observer::SockDiag && self.announced.is_none() {
            let listening = DestroyEvents::open().and_then(|mut events| events.join().map(|()| events));
            match listening {
                Ok(events) => self.ears = Some(Ears { events, heard: Vec::new(), lost: false }),
                Err(error) => {
                    tracing::warn!(%error, "no destroy events: short connections between readings are missed");
                }
            }
        }
        let alarm = match self.announced.as_ref().map(Announced::alarm).transpose() {
            Ok(alarm) => alarm,
            Err(error) => {
                tracing::error!(%error, "cannot wait for the kernel's events: nothing is announced");
                None
            }
        };
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            let heard = async {
                match &self.ears {
                    Some(ears) => drop(ears.events.readable().await),
                    None => std::future::pending().await,
                }
            };
            let rung = async {
                match &alarm {
                    Some(alarm) => drop(alarm.rings().await),
                    None => std::future::pending().await,
                }
            };
            let waits = self.announced.as_ref().and_then(Announced::next);
            let waited = async {
                match waits {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = heard => self.hear(),
                asks = asked.recv() => match asks {
                    Some(Question::Oldest(state, most, answer)) => drop(answer.send(self.tracker.oldest(state, most))),
                    Some(Question::Reading(answer)) => {
                        let last = self.last.take().filter(|(at, _)| at.elapsed() < FRESH);
                        let (at, reading) = last.unwrap_or_else(|| self.read());
                        let _ = answer.send(reading.clone());
                        self.last = Some((at, reading));
                    }
                    None => return,
                },
                _ = ticks.tick() => self.last = Some(self.read()),
                () = rung => self.hear_announced().await,
                () = waited => self.hear_announced().await,
            }
        }
    }

    /// Takes in what the kernel announced; what comes soon after shares the next wake-up.
    async fn hear_announced(&mut self) {
        let Some(announced) = &mut self.announced else { return };
        if let Err(error) = announced.hear(&mut self.table) {
            self.failed(&error);
        }
        tokio::time::sleep(GATHER).await;
    }

    /// Takes in what the kernel freed.
    fn hear(&mut self) {
        let Some(ears) = &mut self.ears else { return };
        let listened = ears.listen();
        for (cookie, flow) in ears.heard.drain(..) {
            // Whose it was, nobody knows; that it was is in the kernel's count of opens.
            self.lost |= !self.tracker.freed(cookie, &flow);
        }
        if std::mem::take(&mut ears.lost) {
            self.lost = true;
            self.metrics.observer().lost_events.inc();
            if let Some(times) = self.warned.due(clock::monotonic()) {
                tracing::warn!(times, "the kernel lost destroy events for us: short connections are missing");
            }
        }
        if let Err(error) = listened {
            self.failed(&error);
        }
    }

    fn read(&mut self) -> (Instant, Answer) {
        let opened = opens().ok();
        // What was freed before the table is read is not in it.
        self.hear();
        let reading = self.read_now(opened).map(Arc::new).map_err(|error| {
            self.failed(&error);
            Arc::new(error)
        });
        (Instant::now(), reading)
    }

    fn read_now(&mut self, opened: Option<u64>) -> Result<Reading, TableError> {
        let began = Instant::now();
        let mut listening = BTreeMap::new();
        let wanted = Wanted::new(StateSet::of(&[State::Listen]), &[], &[]);
        self.table.each(&wanted, |row| Listeners::add(&mut listening, row))?;
        let now = clock::monotonic();
        let tracker = &mut self.tracker;
        tracker.begin(now, listening);
        if let Some(announced) = &mut self.announced {
            self.lost |= announced.reading_begins(tracker.served());
        }
        let everything = Wanted::new(StateSet::of(&State::ALL), &[], &[]);
        let (ears, announced, mut rows) = (&mut self.ears, &mut self.announced, 0);
        let mut row = |row: &Row| {
            tracker.row(row, clock::monotonic());
            if let Some(announced) = announced {
                announced.row(row);
            }
            rows += 1;
            if rows % ROWS == 0
                && let Some(ears) = ears
            {
                // If it fails, it fails again when the reading is over.
                let _ = ears.listen();
            }
        };
        if self.table.each(&everything, &mut row)? {
            // Rows may be missing: nobody is gone for that, so they are looked for once more.
            self.metrics.observer().interrupted.inc();
            self.table.each(&everything, &mut row)?;
        }
        if tracker.wants_ages() {
            let left_by_peer = Wanted::new(StateSet::of(&[State::CloseWait]), &[], &[]).with_last_ack();
            self.table.each(&left_by_peer, |row| tracker.age(row, clock::monotonic()))?;
        }
        // Before another while in which nobody listens.
        if let Some(ears) = &mut self.ears {
            let _ = ears.listen();
        }
        let (mut services, stays) = tracker.finish();
        self.hear();
        if let Some(announced) = &mut self.announced {
            announced.reading_ends(&mut self.table)?;
            for (service, sight) in &mut services {
                (sight.opened, sight.closed) = announced.totals(*service);
            }
        }
        self.count_missed(opened);
        // What is announced is exact, and told already.
        for Stay { service, state, time } in stays.into_iter().filter(|_| self.announced.is_none()) {
            self.metrics.stay(service.role.label(), &service.port.to_string(), state.label(), time);
        }
        let took = began.elapsed();
        self.metrics.observer().duration.observe(took.as_secs_f64());
        Ok(Reading {
            services,
            fullest: self.tracker.fullest(FULLEST),
            ports_limit: ports::local_port_limit().ok(),
            named: self.tracker.named().to_vec(),
            observer: if self.announced.is_some() { Observer::Ebpf } else { self.table.observer() },
            took,
        })
    }

    /// After a loss, and where there are no events, the kernel's own count of opens says how many connections nobody has
    /// told us of; `opened` is that count at the beginning of this reading.
    fn count_missed(&mut self, opened: Option<u64>) {
        let Some(first) = self.opens_before.or_else(|| opens().ok()) else { return };
        self.opens_before = Some(first);
        let told = self.announced.as_ref().map_or_else(|| self.tracker.opened(), Announced::opened);
        let silent = self.ears.is_none() && self.announced.is_none();
        if let (Some(opened), true) = (opened, self.lost || silent) {
            // The kernel's word of an end may still be on its way, late where it has much to say: only those are that were
            // missing all the time. A counter takes nothing back.
            let now = Instant::now();
            let missing = opened.saturating_sub(first).saturating_sub(told);
            let (since, least) = self.missing.map_or((now, missing), |(since, least)| (since, least.min(missing)));
            self.missing = Some((since, least));
            if now.duration_since(since) >= LATE {
                self.metrics.missed.inc_by(least.saturating_sub(self.metrics.missed.get()));
                self.missing = None;
            }
        }
    }

    fn failed(&mut self, error: &TableError) {
        self.metrics.observer().errors.inc();
        if let Some(times) = self.warned.due(clock::monotonic()) {
            tracing::warn!(%error, times, "cannot read the kernel's socket table");
        }
    }
}
