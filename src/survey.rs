//! The survey: the sockets of every listener of this network namespace, and of what goes out from it, whoever owns them.
//!
//! One thread reads the table again and again and hears what the kernel frees in between; whoever asks gets the last
//! reading, or a new one where that is old. Must not know: who asks, and in which form it is shown.

mod tracker;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::kernel::{DestroyEvents, Destroyed, Observer, Row, Table, TableError, Wanted, clock, opens, ports};
use crate::log::OnceAMinute;
use crate::metrics::SurveyMetrics;
use crate::tcp::{Flow, Role, State, StateSet};
use tracker::{LATE, Tracker};

/// One reading serves everyone for so long.
const FRESH: Duration = Duration::from_millis(500);

/// How many pairs of addresses are told of.
const FULLEST: usize = 10;

/// Which sockets are looked at.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these listening ports; none: all.
    pub only: Vec<u16>,
    /// Not these.
    pub ignore: Vec<u16>,
    /// The remote ports that are told apart; all others are told together.
    pub remote: Vec<u16>,
    /// Where we ourselves are asked: neither that listener nor who asks it from this host is told of.
    pub own: Option<u16>,
}

impl Selection {
    /// Whether somebody on this host asks us: a healthcheck.
    fn is_own(&self, flow: &Flow) -> bool {
        let peer = flow.canonical().peer;
        self.own == Some(peer.port()) && (peer.ip().is_loopback() || peer.ip() == flow.canonical().local.ip())
    }

    fn takes(&self, service: Service) -> bool {
        match (service.role, service.port) {
            (_, Port::Number(port)) if self.own == Some(port) && !self.remote.contains(&port) => false,
            (Role::Server, Port::Number(port)) => {
                (self.only.is_empty() || self.only.contains(&port)) && !self.ignore.contains(&port)
            }
            // Whoever names listeners only does not ask for what goes out.
            (Role::Client, Port::Other) => self.only.is_empty() || !self.remote.is_empty(),
            _ => true,
        }
    }
}

/// A port, or all that were not named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// This one.
    Number(u16),
    /// Any other.
    Other,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Port::Number(port) => f.pad(itoa::Buffer::new().format(*port)),
            Port::Other => f.pad("other"),
        }
    }
}

/// One end of somebody's connections: those that a listener accepted, or those that go out to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// Which end is here.
    pub role: Role,
    /// The listener's port, or the remote one.
    pub port: Port,
}

/// An accept queue, over all listening sockets of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Connections that wait for accept(2).
    pub length: u32,
    /// How many may; `None` where that is not told.
    pub limit: Option<u32>,
    /// By which the process that listens can be found: of one of them, where several share the port.
    pub inode: u32,
}

/// What a reading shows of one service.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    /// Of its listener; `None` when nobody listens any more.
    pub queue: Option<Queue>,
    /// Connections opened since the survey began, as far as they were seen.
    pub opened: u64,
    /// Connections closed since then.
    pub closed: u64,
    counts: [u64; State::SLOTS],
    oldest: [(Duration, bool); State::SLOTS],
}

impl Sight {
    pub(crate) fn add(&mut self, state: State, age: Duration, at_least: bool) {
        self.counts[state as usize] += 1;
        let oldest = &mut self.oldest[state as usize];
        *oldest = (*oldest).max((age, at_least));
    }

    /// How many sockets are in `state`; for LISTEN, whether somebody listens.
    #[must_use]
    pub fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// The age of the oldest in `state`, and whether it may be older: it was there when the survey began.
    #[must_use]
    pub fn oldest(&self, state: State) -> (Duration, bool) {
        self.oldest[state as usize]
    }
}

/// One socket, named because it has been where it is for long.
#[derive(Clone, Copy, Debug)]
pub struct Socket {
    /// Whose.
    pub service: Service,
    /// Its addresses.
    pub flow: Flow,
    /// By which its process can be found; 0: no process holds it.
    pub inode: u32,
    /// How long it has been in its state.
    pub age: Duration,
    /// Whether it may be older.
    pub at_least: bool,
}

/// A stay in a state that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stay {
    /// Whose.
    pub service: Service,
    /// Where.
    pub state: State,
    /// How long.
    pub time: Duration,
}

/// The table at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Every service, listeners without connections included.
    pub services: BTreeMap<Service, Sight>,
    /// The pairs of a local address and a destination that have taken the most local ports.
    pub fullest: Vec<(IpAddr, SocketAddr, u32)>,
    /// How many one pair can have; `None` where that cannot be read.
    pub ports_limit: Option<u32>,
    /// How the table was read.
    pub observer: Observer,
    /// How long that took.
    pub took: Duration,
}

/// A handle to the survey.
#[derive(Clone)]
pub struct Survey(mpsc::Sender<Question>);

/// What is asked of the survey's thread.
enum Question {
    Reading(oneshot::Sender<Option<Arc<Reading>>>),
    Oldest(State, usize, oneshot::Sender<Vec<Socket>>),
}

impl Survey {
    /// Begins to look, every `interval`.
    ///
    /// # Errors
    /// When its thread or event loop cannot be made.
    pub fn start(
        selection: Selection,
        table: Table,
        metrics: Arc<SurveyMetrics>,
        interval: Duration,
    ) -> io::Result<Survey> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (ask, asked) = mpsc::channel(64);
        let surveyor = Surveyor {
            tracker: Tracker::new(selection),
            table,
            metrics,
            interval,
            events: None,
            last: None,
            opens_before: None,
            missing: None,
            lost: false,
            warned: OnceAMinute::default(),
        };
        std::thread::Builder::new().name("survey".into()).spawn(move || runtime.block_on(surveyor.run(asked)))?;
        Ok(Survey(ask))
    }

    /// The table as of at most half a second ago; `None` when it cannot be read, which is counted and logged.
    pub async fn read(&self) -> Option<Arc<Reading>> {
        let (answer, reading) = oneshot::channel();
        self.0.send(Question::Reading(answer)).await.ok()?;
        reading.await.ok().flatten()
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

struct Surveyor {
    tracker: Tracker,
    table: Table,
    metrics: Arc<SurveyMetrics>,
    interval: Duration,
    events: Option<DestroyEvents>,
    last: Option<(Instant, Option<Arc<Reading>>)>,
    /// The kernel's count of opens after the first reading.
    opens_before: Option<u64>,
    /// How many were missing at least since then.
    missing: Option<(Instant, u64)>,
    /// Events were lost since then.
    lost: bool,
    warned: OnceAMinute,
}

impl Surveyor {
    async fn run(mut self, mut asked: mpsc::Receiver<Question>) {
        if self.table.observer() == Observer::SockDiag {
            let listening = DestroyEvents::open().and_then(|mut events| events.join().map(|()| events));
            match listening {
                Ok(events) => self.events = Some(events),
                Err(error) => {
                    tracing::warn!(%error, "no destroy events: short connections between readings are missed");
                }
            }
        }
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            let heard = async {
                match &self.events {
                    Some(events) => drop(events.readable().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = heard => self.hear(),
                asks = asked.recv() => match asks {
                    Some(Question::Oldest(state, most, answer)) => drop(answer.send(self.tracker.oldest(state, most))),
                    Some(Question::Reading(answer)) => {
                        let old = self.last.as_ref().is_none_or(|(at, _)| at.elapsed() >= FRESH);
                        if old {
                            self.read();
                        }
                        let _ = answer.send(self.last.as_ref().and_then(|(_, reading)| reading.clone()));
                    }
                    None => return,
                },
                _ = ticks.tick() => self.read(),
            }
        }
    }

    /// Takes in what the kernel freed.
    fn hear(&mut self) {
        let Some(events) = &mut self.events else { return };
        let tracker = &mut self.tracker;
        match events.drain(|Destroyed { cookie, flow, .. }| tracker.freed(cookie, &flow)) {
            Ok(false) => {}
            Ok(true) => {
                self.lost = true;
                self.metrics.observer().lost_events.inc();
                if let Some(times) = self.warned.due(clock::monotonic()) {
                    tracing::warn!(times, "the kernel lost destroy events for us: short connections are missing");
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    fn read(&mut self) {
        let opened = opens().ok();
        // What was freed before the table is read is not in it.
        self.hear();
        let reading = match self.read_now(opened) {
            Ok(reading) => Some(Arc::new(reading)),
            Err(error) => {
                self.failed(&error);
                None
            }
        };
        self.last = Some((Instant::now(), reading));
    }

    fn read_now(&mut self, opened: Option<u64>) -> Result<Reading, TableError> {
        let began = Instant::now();
        let mut listening: BTreeMap<u16, Queue> = BTreeMap::new();
        self.table.each(&Wanted::new(StateSet::of(&[State::Listen]), &[], &[]), |row| {
            let queue = listening.entry(row.flow.local.port()).or_default();
            queue.inode = row.inode;
            queue.length += row.receive_queue;
            if let Some(limit) = row.send_queue {
                *queue.limit.get_or_insert(0) += limit;
            }
        })?;
        let now = clock::monotonic();
        let tracker = &mut self.tracker;
        tracker.begin(now, listening);
        let everything = Wanted::new(StateSet::of(&State::ALL), &[], &[]);
        let interrupted = self.table.each(&everything, |row: &Row| tracker.row(row, clock::monotonic()))?;
        if interrupted {
            // Rows may be missing: nobody is gone for that, so they are looked for once more.
            self.metrics.observer().interrupted.inc();
            self.table.each(&everything, |row| tracker.row(row, clock::monotonic()))?;
        }
        if tracker.wants_ages() {
            let left_by_peer = Wanted::new(StateSet::of(&[State::CloseWait]), &[], &[]).with_last_ack();
            self.table.each(&left_by_peer, |row| tracker.age(row, clock::monotonic()))?;
        }
        let (services, stays) = tracker.finish();
        self.hear();
        self.count_missed(opened);
        for Stay { service, state, time } in stays {
            self.metrics.stay(service.role.label(), &service.port.to_string(), state.label(), time);
        }
        let took = began.elapsed();
        self.metrics.observer().duration.observe(took.as_secs_f64());
        Ok(Reading {
            services,
            fullest: self.tracker.fullest(FULLEST),
            ports_limit: ports::local_port_limit().ok(),
            observer: self.table.observer(),
            took,
        })
    }

    /// After a loss, and where there are no events, the kernel's own count of opens says how many connections nobody has
    /// told us of; `opened` is that count at the beginning of this reading.
    fn count_missed(&mut self, opened: Option<u64>) {
        let Some(first) = self.opens_before.or_else(|| opens().ok()) else { return };
        self.opens_before = Some(first);
        if let (Some(opened), true) = (opened, self.lost || self.events.is_none()) {
            // The kernel's word of an end may still be on its way, late where it has much to say: only those are that were
            // missing all the time. A counter takes nothing back.
            let now = Instant::now();
            let missing = opened.saturating_sub(first).saturating_sub(self.tracker.opened());
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
