//! What the kernel announces of everybody's connections (eBPF): each change, with its time and its cause, between the readings
//! of the table.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Port, Selection, Service};
use crate::journal;
use crate::kernel::tracepoints::{Alarm, Kind, Tracepoints};
use crate::kernel::{Row, Table, TableError, Wanted, clock};
use crate::live::Live;
use crate::lives::audit::{self, Audit, Doubts};
use crate::lives::{KnownLosses, Lives, Said};
use crate::metrics::SurveyMetrics;
use crate::tcp::{Flow, Identity, Role, State, StateSet};

/// How often the table is asked for the names of those who have none.
const NAMES: Duration = Duration::from_millis(50);

/// The ports on which somebody listens, or did as long as connections are left.
type Served = Arc<Mutex<BTreeSet<u16>>>;

pub(super) struct Announced {
    tracepoints: Tracepoints,
    lives: Lives,
    served: Served,
    ears: Ears,
    losses: KnownLosses,
    /// A reading under way that everybody is held against, and when the table was asked for it.
    reading: Option<(Duration, Vec<Row>)>,
    /// The next reading must be such a one.
    stale: bool,
    /// Something was missed, and the reading has not been told so yet.
    unheard: bool,
    next_names: Duration,
    /// A reading under way that everybody is compared with.
    audit: Option<Audit>,
    /// Who seemed to be elsewhere in the last such one.
    doubts: Option<Doubts>,
    next_audit: Duration,
}

/// Where what is told goes to.
struct Ears {
    selection: Selection,
    metrics: Arc<SurveyMetrics>,
    live: Arc<Live>,
    /// Opened and closed, of whoever is left out too: only then it can be said how many are missing.
    totals: HashMap<Service, (u64, u64)>,
    /// Whoever is new to us was there before us.
    seeding: bool,
}

impl Announced {
    /// Everything that `tracepoints` tell of the namespace.
    pub(super) fn new(
        tracepoints: Tracepoints,
        selection: Selection,
        metrics: Arc<SurveyMetrics>,
        live: Arc<Live>,
    ) -> Announced {
        let served = Served::default();
        let listens = Arc::clone(&served);
        let which = Box::new(move |flow: &Flow, born: Option<Role>| {
            let local = flow.local.port();
            let role =
                born.unwrap_or_else(|| if lock(&listens).contains(&local) { Role::Server } else { Role::Client });
            Some((role, if role == Role::Server { local } else { flow.peer.port() }))
        });
        Announced {
            lives: Lives::new(which, tracepoints.tells_of_timers()),
            tracepoints,
            served,
            ears: Ears { selection, metrics, live, totals: HashMap::new(), seeding: true },
            losses: KnownLosses::default(),
            reading: None,
            // Whoever is there already is in the first one.
            stale: true,
            unheard: false,
            next_names: Duration::ZERO,
            audit: None,
            doubts: None,
            next_audit: audit::next(clock::monotonic(), Duration::ZERO),
        }
    }

    /// What rings when there is something to hear; to be asked for within the event loop.
    pub(super) fn alarm(&self) -> std::io::Result<Alarm> {
        self.tracepoints.alarm()
    }

    /// When to listen again although nothing rings.
    pub(super) fn next(&self) -> Option<Duration> {
        let now = clock::monotonic();
        let doubts = self.doubts.as_ref().map(|doubts| doubts.due.saturating_sub(now));
        self.lives.next(now).into_iter().chain(doubts).min()
    }

    /// Takes in what was announced.
    pub(super) fn hear(&mut self, table: &mut Table) -> Result<(), TableError> {
        self.hear_events();
        let now = clock::monotonic();
        if let Some(doubts) = self.doubts.take_if(|doubts| now >= doubts.due) {
            self.resolve(doubts, table)?;
        }
        let (lives, ears) = (&mut self.lives, &mut self.ears);
        lives.settle(now, &mut |id, said| ears.tell(id, said));
        if now >= self.next_names && lives.wants_names(now) {
            self.next_names = now + NAMES;
            let handshakes = Wanted::new(StateSet::of(&[State::SynSent, State::SynRecv]), &[], &[]);
            table.each(&handshakes, |row| lives.named(row, now, &mut |id, said| ears.tell(id, said)))?;
        }
        Ok(())
    }

    fn hear_events(&mut self) {
        let (lives, ears, served) = (&mut self.lives, &mut self.ears, &self.served);
        self.tracepoints.drain(|event| {
            if let Kind::Changed { to: State::Listen, .. } = event.kind {
                lock(served).insert(event.flow.local.port());
            }
            lives.hear(event, &mut |id, said| ears.tell(id, said));
        });
    }

    /// Looks once more at those who seemed to be elsewhere than was announced. If they are, everybody is held against the next
    /// reading.
    fn resolve(&mut self, doubts: Doubts, table: &mut Table) -> Result<(), TableError> {
        let looked_up = doubts.look_up(&self.lives, |id| table.find(&id.flow, id.cookie))?;
        self.hear_events();
        if self.losses.found(&looked_up, &self.lives, self.ears.metrics.observer()) {
            (self.stale, self.unheard) = (true, true);
        }
        Ok(())
    }

    /// How many of a service's connections were opened and closed since the survey began.
    pub(super) fn totals(&self, service: Service) -> (u64, u64) {
        self.ears.totals.get(&service).copied().unwrap_or_default()
    }

    /// How many connections were opened since then.
    pub(super) fn opened(&self) -> u64 {
        self.ears.totals.values().map(|(opened, _)| opened).sum()
    }

    /// A reading of the table begins, in which these ports are served. Returns whether events were lost.
    pub(super) fn reading_begins(&mut self, served: impl Iterator<Item = u16>) -> bool {
        *lock(&self.served) = served.collect();
        let (metrics, now) = (self.ears.metrics.observer(), clock::monotonic());
        let lost = self.losses.look(&self.tracepoints, &mut self.lives, self.stale, metrics);
        self.stale |= lost;
        self.audit = None;
        if self.stale || !self.tracepoints.tells_of_timers() {
            self.reading = Some((now, Vec::new()));
            self.doubts = None;
        } else if self.doubts.is_none() && now >= self.next_audit {
            self.audit = Some(Audit::begin(now));
        }
        lost | std::mem::take(&mut self.unheard)
    }

    /// A row of it.
    pub(super) fn row(&mut self, row: &Row) {
        if let Some(audit) = &mut self.audit {
            audit.row(row, &self.lives);
        }
        if let Some((_, rows)) = &mut self.reading {
            rows.push(*row);
        } else if row.state == State::TimeWait
            && self.lives.has_orphans()
            && row.cookie.and_then(|cookie| self.lives.state(cookie)).is_some_and(|(s, _)| s == State::FinWait2)
        {
            // A minisocket that goes from FIN_WAIT2 to TIME_WAIT keeps its timer, and is not always announced.
            let ears = &mut self.ears;
            self.lives.found(row, clock::monotonic(), &mut |id, said| ears.tell(id, said));
        }
    }

    /// It is over.
    pub(super) fn reading_ends(&mut self, table: &mut Table) -> Result<(), TableError> {
        self.lives.forget_orphans();
        if let Some(audit) = self.audit.take() {
            self.hear_events();
            let now = clock::monotonic();
            // The reading is made anyway.
            self.next_audit = audit::next(now, Duration::ZERO);
            self.doubts = audit.ends(&mut self.lives, now);
        }
        let Some((asked, rows)) = self.reading.take() else { return Ok(()) };
        self.stale = true;
        let mut events = Vec::new();
        self.tracepoints.drain(|event| events.push(*event));
        let (ears, now) = (&mut self.ears, clock::monotonic());
        let find = |id: &Identity| table.find(&id.flow, id.cookie);
        self.lives.reconcile(asked, &rows, &events, now, find, &mut |id, said| ears.tell(id, said))?;
        self.stale = false;
        self.ears.seeding = false;
        Ok(())
    }
}

impl Ears {
    fn tell(&mut self, id: &Identity, said: Said<'_>) {
        let remote = |port| if self.selection.remote.contains(&port) { Port::Number(port) } else { Port::Other };
        let port = if id.role == Role::Server { Port::Number(id.port) } else { remote(id.port) };
        let told = self.selection.takes(Service { role: id.role, port }) && !self.selection.is_own(&id.flow);
        let (opened, closed) = self.totals.entry(Service { role: id.role, port }).or_default();
        let transitions = match said {
            // connect(2), whatever becomes of it.
            Said::Begins(State::Close, _) => return *opened += 1,
            // Counted when their handshake is complete; found in TIME_WAIT, counted as closed before, or missed, by the kernel's
            // own count of opens.
            Said::Begins(State::Listen | State::SynRecv | State::TimeWait, _)
            | Said::Path { .. }
            | Said::Ends { .. } => {
                return;
            }
            // It was there before us, or its beginning was lost.
            Said::Begins(..) => return *opened += u64::from(!self.seeding),
            Said::Moves(transitions) => transitions,
        };
        for t in transitions.iter() {
            // A handshake that a SYN began is a connection when it is complete.
            let no_connection = id.role == Role::Server && t.from == State::SynRecv;
            *opened += u64::from(no_connection && t.to != State::Close);
            let ends = matches!(t.to, State::TimeWait | State::Close) && t.from != State::TimeWait;
            *closed += u64::from(ends && !no_connection);
            if told {
                self.metrics.announced(id.role, &port.to_string(), t);
            }
        }
        if told {
            self.live.note(id, transitions);
            journal::whisper(id, transitions);
        }
    }
}

fn lock(served: &Served) -> std::sync::MutexGuard<'_, BTreeSet<u16>> {
    served.lock().unwrap_or_else(PoisonError::into_inner)
}
