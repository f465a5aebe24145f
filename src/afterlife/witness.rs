//! The thread that hears what the kernel announces, and tells whole lives by it: from the first SYN to the end of
//! TIME_WAIT, whether or not anybody accepted, and after close(2) as before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::tally::{self, Ages, Tally};
use super::{Closed, GATHER, GATHER_MANY, Shared};
use crate::kernel::tracepoints::{Alarm, Event, Kind, Tracepoints};
use crate::kernel::{Row, Table, TableError, Wanted, clock};
use crate::lives::audit::{self, Audit, Doubts};
use crate::lives::{KnownLosses, Lives, Said};
use crate::log::OnceAMinute;
use crate::metrics::ObserverMetrics;
use crate::scope::Scope;
use crate::tcp::{Cookies, Identity, State, StateSet};

/// So many events at once are many.
const MANY: usize = 64;

/// What led to a close(2) was announced before it. It may be behind an event that another CPU has not finished, for as long as
/// that is interrupted; after this long it was lost.
const LATE: Duration = Duration::from_millis(50);

/// How often losses are looked for.
const CHECK: Duration = Duration::from_millis(100);

/// After a loss everything is looked at again at most for one part in this many of the time.
const DUTY: u32 = 20;

/// How many minisockets in FIN_WAIT2 are looked up each time: a lookup takes about 3 µs.
const ORPHANS: usize = 500;

/// How often the ends of TIME_WAITs are read where no timer tells of them, and how often names are asked for.
const REST: Duration = Duration::from_millis(500);
const NAMES: Duration = Duration::from_millis(50);

pub(super) struct Witness {
    tracepoints: Tracepoints,
    lives: Lives,
    ears: Ears,
    scope: Arc<Scope>,
    table: Table,
    all: Wanted,
    handshakes: Wanted,
    losses: KnownLosses,
    begin_again: bool,
    next_begin: Duration,
    next_check: Duration,
    next_names: Duration,
    next_rest: Duration,
    /// Who seems to be elsewhere than was announced.
    doubts: Option<Doubts>,
    /// When everybody, or they, are to be looked at again.
    next_audit: Duration,
    warned: OnceAMinute,
}

/// Where what is told goes to.
struct Ears {
    shared: Arc<Shared>,
    tally: Arc<Tally>,
    ages: Ages,
    metrics: ObserverMetrics,
}

impl Ears {
    fn tell(&mut self, id: &Identity, said: Said<'_>) {
        let journal = &self.shared.journal;
        match said {
            Said::Begins(state, at) => {
                journal.open(id, state, at);
                self.ages.begins(id, state, at);
            }
            Said::Moves(transitions) => {
                journal.record(id, transitions);
                self.ages.moves(id, transitions);
            }
            Said::Path { rtt_us, retransmits } => journal.note_path(id.role, rtt_us, retransmits),
            Said::Ends { departed } => {
                self.ages.ends(id);
                if departed {
                    self.shared.has_gone();
                }
            }
        }
    }
}

impl Witness {
    /// Begins to listen for the services of `scope`, and takes in who is there already.
    ///
    /// # Errors
    /// When the kernel refuses, or its table cannot be read.
    pub(super) fn new(
        shared: Arc<Shared>,
        scope: &Arc<Scope>,
        table: Table,
        tracepoints: Tracepoints,
    ) -> anyhow::Result<(Witness, Arc<Tally>)> {
        let tally = Arc::new(Tally::default());
        let which = Arc::clone(scope);
        let which = Box::new(move |flow: &_, _| which.service_of(flow).map(|place| which.services()[place]));
        let metrics = shared.journal.metrics().observer(crate::kernel::Observer::Ebpf, "follow");
        let mut witness = Witness {
            lives: Lives::new(which, tracepoints.tells_of_timers()),
            ears: Ears { shared, tally: Arc::clone(&tally), ages: Ages::new(scope), metrics },
            tracepoints,
            scope: Arc::clone(scope),
            table,
            all: scope.wanted(StateSet::of(&State::ALL)),
            handshakes: scope.wanted(StateSet::of(&[State::SynSent, State::SynRecv])),
            losses: KnownLosses::default(),
            begin_again: false,
            next_begin: Duration::ZERO,
            next_check: Duration::ZERO,
            next_names: Duration::ZERO,
            next_rest: Duration::ZERO,
            doubts: None,
            next_audit: audit::next(clock::monotonic(), Duration::ZERO),
            warned: OnceAMinute::default(),
        };
        witness.begin()?;
        Ok((witness, tally))
    }

    /// Begins to count anew, with everybody who is there: first the kernel tells, then the table is read, so that nobody is
    /// between the two. Who was known and is not there any more has gone unheard.
    fn begin(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let era = self.tracepoints.tell_of(self.scope.services())?;
        self.tracepoints.wait_for_programs();
        let asked = clock::monotonic();
        let mut rows = Vec::new();
        if self.table.each(&self.all, |row| rows.push(*row))? {
            // The kernel says that rows may be missing: once more, and then as it is.
            rows.clear();
            self.table.each(&self.all, |row| rows.push(*row))?;
        }
        let mut events: Vec<Event> = Vec::new();
        self.tracepoints.drain(|event| events.push(*event));
        self.know_orphans(&rows, &mut events);
        self.ears.tally.begin(tally::before(&self.scope, era, &rows, &events), self.tracepoints.counts());
        let (ears, table) = (&mut self.ears, &mut self.table);
        let find = |id: &Identity| table.find(&id.flow, id.cookie);
        let now = clock::monotonic();
        self.lives.reconcile(asked, &rows, &events, now, find, &mut |id, said| ears.tell(id, said))?;
        self.publish();
        self.ears.metrics.duration.observe(began.elapsed().as_secs_f64());
        Ok(())
    }

    /// The program must know of minisockets in FIN_WAIT2, and only of those that still are.
    fn know_orphans(&mut self, rows: &[Row], events: &mut Vec<Event>) {
        let orphans = rows.iter().filter(|row| row.is_minisocket() && row.state == State::FinWait2);
        let mut orphans: Vec<u64> = orphans.filter_map(|row| row.cookie).collect();
        if orphans.is_empty() {
            return;
        }
        let moved = move_on(events);
        orphans.retain(|cookie| !moved.contains(cookie));
        for cookie in &orphans {
            if let Err(error) = self.tracepoints.know_orphan(*cookie) {
                // One count in FIN_WAIT2 will be one in TIME_WAIT.
                self.failed(&error);
            }
        }
        // Who went on before the program knew is unknown to it by now; who did after that, it has forgotten itself.
        let heard = events.len();
        self.tracepoints.drain(|event| events.push(*event));
        let moved = move_on(&events[heard..]);
        for cookie in orphans.iter().filter(|cookie| moved.contains(cookie)) {
            if let Err(error) = self.tracepoints.forget_orphan(*cookie) {
                self.failed(&error);
            }
        }
    }

    pub(super) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Closed>,
        mut last: mpsc::Receiver<oneshot::Sender<()>>,
    ) {
        let alarm = match self.tracepoints.alarm() {
            Ok(alarm) => Some(alarm),
            Err(error) => {
                tracing::error!(%error, "cannot wait for the kernel's events: they are read every {GATHER:?}");
                None
            }
        };
        let mut closed = Vec::new();
        loop {
            let open = tokio::select! {
                open = self.wait(&mut inbox, &mut closed, alarm.as_ref()) => open,
                Some(asked) = last.recv() => {
                    self.last_look().await;
                    // Whoever asked may have gone.
                    let _ = asked.send(());
                    true
                }
            };
            if !open && closed.is_empty() {
                return;
            }
            let heard = self.round(&mut closed);
            tokio::time::sleep(if heard < MANY { GATHER } else { GATHER_MANY }).await;
        }
    }

    /// What went unheard since the last comparison is to be counted before the end, too.
    async fn last_look(&mut self) {
        if !self.tracepoints.tells_of_timers() {
            return;
        }
        self.hear();
        self.begin_again |= self.check_for_losses();
        if !self.begin_again {
            if self.doubts.is_none() {
                self.hold_against_the_table();
            }
            // An event may still be on its way.
            if let Some(doubts) = &self.doubts {
                tokio::time::sleep(doubts.due.saturating_sub(clock::monotonic())).await;
                self.hold_against_the_table();
            }
        }
        if std::mem::take(&mut self.begin_again) {
            self.look_again();
        }
    }

    /// Waits for something to do. Returns false when no more will ever depart.
    async fn wait(
        &mut self,
        inbox: &mut mpsc::Receiver<Closed>,
        closed: &mut Vec<Closed>,
        alarm: Option<&Alarm>,
    ) -> bool {
        const BATCH: usize = 4096;
        let now = clock::monotonic();
        // Losses, and orphans, show although nothing else does.
        let check = self.lives.each().next().is_some().then_some(CHECK);
        let late = (!closed.is_empty()).then_some(GATHER);
        // Nobody may be known to be alive because nobody was announced.
        let audit = self.next_audit.saturating_sub(now).max(CHECK);
        let rest = if self.tracepoints.tells_of_timers() { audit } else { REST };
        let pause = self.lives.next(now).into_iter().chain(check).chain(late).fold(rest, Duration::min);
        let heard = async {
            if let Some(alarm) = alarm {
                drop(alarm.rings().await);
            }
        };
        tokio::select! {
            count = inbox.recv_many(closed, BATCH) => count > 0,
            () = heard => true,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// Everything that was announced, and whose descriptor was closed; whoever is not known yet stays in `closed`. Returns how
    /// much was announced.
    fn round(&mut self, closed: &mut Vec<Closed>) -> usize {
        let now = clock::monotonic();
        let count = closed.len();
        // Whoever is alive by what was told so far need not be looked for among those that have ended.
        closed.retain(|closed| !self.departs(*closed));
        let heard = self.hear();
        let ears = &mut self.ears;
        self.lives.settle(now, &mut |id, said| ears.tell(id, said));
        closed.retain_mut(|closed| {
            if self.departs(*closed) {
                return false;
            }
            let Closed { role, cookie, reason, until } = closed;
            let until = *until.get_or_insert(now + LATE);
            if self.ears.shared.journal.ledger().close(*role, *cookie, *reason) || now >= until {
                self.ears.shared.has_gone();
                return false;
            }
            true
        });
        self.ears.shared.unseen.fetch_sub(count - closed.len(), Ordering::AcqRel);
        let now = clock::monotonic();
        if now >= self.next_names && self.lives.wants_names(now) {
            self.next_names = now + NAMES;
            self.ask_for_names();
        }
        if now >= self.next_check {
            self.next_check = now + CHECK;
            self.look_up_orphans();
            if self.tracepoints.tells_of_timers() && now >= self.next_audit && !self.begin_again {
                self.hold_against_the_table();
            }
            // Where no timer tells of them, the ends of TIME_WAITs and of handshakes show in the table only.
            let unheard = !self.tracepoints.tells_of_timers() && now >= self.next_rest;
            self.begin_again |= self.check_for_losses() || unheard;
            // While nobody reads the ring, and that is so while the table is read, it fills: not too often, then.
            if self.begin_again && now >= self.next_begin {
                self.begin_again = false;
                let began = Instant::now();
                self.look_again();
                self.next_begin = now + began.elapsed() * DUTY;
                self.next_rest = now + REST;
            }
        }
        self.publish();
        heard
    }

    /// A descriptor was closed. Returns whether the connection is known, and goes on.
    fn departs(&mut self, Closed { role, cookie, reason, .. }: Closed) -> bool {
        let goes_on = self.lives.departs(cookie);
        if goes_on {
            self.ears.shared.journal.ledger().close(role, cookie, reason);
        }
        goes_on
    }

    /// Takes in what was announced; returns how much that was.
    fn hear(&mut self) -> usize {
        let (ears, lives) = (&mut self.ears, &mut self.lives);
        self.tracepoints.drain(|event| lives.hear(event, &mut |id, said| ears.tell(id, said)))
    }

    /// What was not announced, and is not known to be lost, shows in the table.
    fn hold_against_the_table(&mut self) {
        let began = clock::monotonic();
        let held = match self.doubts.take() {
            None => self.compare(began),
            Some(doubts) => self.resolve(doubts),
        };
        if let Err(error) = held {
            self.failed(&error);
        }
        let now = clock::monotonic();
        let next = || audit::next(now, now.saturating_sub(began));
        self.next_audit = self.doubts.as_ref().map_or_else(next, |doubts| doubts.due);
    }

    /// Compares everybody with the table.
    fn compare(&mut self, now: Duration) -> Result<(), TableError> {
        let (mut audit, lives) = (Audit::begin(now), &self.lives);
        self.table.each(&self.all, |row| audit.row(row, lives))?;
        self.hear();
        self.doubts = audit.ends(&mut self.lives, clock::monotonic());
        Ok(())
    }

    /// Looks once more at those who seemed to be elsewhere.
    fn resolve(&mut self, doubts: Doubts) -> Result<(), TableError> {
        let table = &mut self.table;
        let looked_up = doubts.look_up(&self.lives, |id| table.find(&id.flow, id.cookie))?;
        self.hear();
        self.begin_again |= self.losses.found(&looked_up, &self.lives, &self.ears.metrics);
        Ok(())
    }

    fn publish(&mut self) {
        let lives = &self.lives;
        self.ears.tally.update(&mut self.ears.ages, |cookie| lives.state(cookie));
    }

    /// After a loss everybody is looked for in the table, and counted anew.
    fn check_for_losses(&mut self) -> bool {
        self.losses.look(&self.tracepoints, &mut self.lives, self.begin_again, &self.ears.metrics)
    }

    /// A minisocket that goes from FIN_WAIT2 to TIME_WAIT keeps its timer, and is not always announced.
    fn look_up_orphans(&mut self) {
        for id in self.lives.orphans(ORPHANS) {
            let row = match self.table.find(&id.flow, id.cookie) {
                Ok(Some(row)) => row,
                // Its end is announced.
                Ok(None) => continue,
                Err(error) => {
                    self.failed(&error);
                    self.lives.keep_orphan(id.cookie);
                    continue;
                }
            };
            if row.state == State::FinWait2 {
                self.lives.keep_orphan(id.cookie);
                continue;
            }
            match self.tracepoints.forget_orphan(id.cookie) {
                Ok(true) => {
                    if let Some(place) = self.scope.service_of(&id.flow) {
                        self.ears.tally.correct(place, State::FinWait2, row.state);
                    }
                }
                Ok(false) => {}
                Err(error) => self.failed(&error),
            }
            let now = clock::monotonic();
            self.lives.found(&row, now, &mut |id, said| self.ears.tell(id, said));
        }
    }

    fn look_again(&mut self) {
        if let Err(error) = self.begin() {
            self.failed(&format!("{error:#}"));
            self.begin_again = true;
        }
    }

    /// Asks the table for the names of those who have none.
    fn ask_for_names(&mut self) {
        let now = clock::monotonic();
        let (lives, ears) = (&mut self.lives, &mut self.ears);
        let read = self.table.each(&self.handshakes, |row| lives.named(row, now, &mut |id, said| ears.tell(id, said)));
        if let Err(error) = read {
            self.failed(&error);
        }
    }

    fn failed(&mut self, error: &dyn std::fmt::Display) {
        self.ears.metrics.errors.inc();
        if let Some(times) = self.warned.due(clock::monotonic()) {
            tracing::warn!(%error, times, "cannot read the kernel's socket table; will look again");
        }
    }
}

/// The minisockets whose clock was started or stopped.
fn move_on(events: &[Event]) -> Cookies {
    let clocks = events.iter().filter(|event| matches!(event.kind, Kind::Armed(_) | Kind::Disarmed { .. }));
    clocks.map(|event| event.cookie).collect()
}
