//! The thread that reads where the followed connections are, by whichever way is cheaper, as seldom as honesty allows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::followed::{Followed, Noted, PATIENT};
use super::{Departed, GATHER, Shared};
use crate::kernel::{DestroyEvents, Destroyed, Observer, Row, Table, TableError, Wanted, clock};
use crate::log::OnceAMinute;
use crate::metrics::ObserverMetrics;
use crate::scope::Scope;
use crate::tcp::{ByCookie, Cause, Evidence, State, StateSet};

/// What a lookup costs, and a dump at least (measured on Linux 6.18): the cheaper way is taken.
const LOOKUP: Duration = Duration::from_micros(3);
const SMALLEST_DUMP: Duration = Duration::from_micros(300);

/// How often sockets that only wait for a timer are read: TIME_WAIT's end is known to this precision.
const REST: Duration = Duration::from_millis(500);

/// Readings of those that rest take at most one part in this many of a core, unless that would leave them unread for
/// longer than is bearable: local ports are reused after a second, and whoever is not read piles up.
const DUTY: u32 = 50;
const LONGEST_REST: Duration = Duration::from_secs(4);

pub(super) struct Follower {
    shared: Arc<Shared>,
    table: Table,
    wanted: Wanted,
    evidence: Evidence,
    metrics: ObserverMetrics,
    events: Option<DestroyEvents>,
    followed: ByCookie<Followed>,
    moving: Vec<u64>,
    next_rest: Duration,
    dump_cost: Duration,
    warned: OnceAMinute,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>, scope: &Scope, table: Table) -> Follower {
        let observer = table.observer();
        Follower {
            metrics: shared.journal.metrics().observer(observer, "follow"),
            shared,
            wanted: scope.wanted(StateSet::of(&State::ALL)),
            evidence: observer.evidence(),
            table,
            events: None,
            followed: ByCookie::default(),
            moving: Vec::new(),
            next_rest: Duration::ZERO,
            dump_cost: SMALLEST_DUMP,
            warned: OnceAMinute::default(),
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Departed>) {
        if self.by_cookie() {
            match DestroyEvents::open() {
                Ok(events) => self.events = Some(events),
                Err(error) => tracing::warn!(%error, "no destroy events: orphans are polled only"),
            }
        }
        let mut arrived = Vec::new();
        loop {
            let open = self.wait(&mut inbox, &mut arrived).await;
            if !open && arrived.is_empty() {
                return;
            }
            let mut due = self.take_in(&mut arrived);
            self.hear(&mut due);
            let now = clock::monotonic();
            due.extend(self.moving.iter().filter(|c| self.followed.get(c).is_some_and(|f| f.next <= now)));
            if self.next_rest <= now {
                due.extend(self.followed.iter().filter(|(_, f)| f.resting).map(|(c, _)| *c));
                self.next_rest = now + (self.dump_cost * DUTY).clamp(REST, LONGEST_REST);
            }
            if !due.is_empty() {
                self.look(due);
                let followed = &self.followed;
                self.moving.retain(|c| followed.get(c).is_some_and(|f| !f.resting));
            }
            self.listen_while_anyone_moves();
            tokio::time::sleep(self.breath()).await;
        }
    }

    fn by_cookie(&self) -> bool {
        self.table.observer() == Observer::SockDiag
    }

    /// Waits for something to do. Returns false when no more will ever arrive.
    async fn wait(&mut self, inbox: &mut mpsc::Receiver<Departed>, arrived: &mut Vec<Departed>) -> bool {
        const BATCH: usize = 4096;
        if self.followed.is_empty() {
            return inbox.recv_many(arrived, BATCH).await > 0;
        }
        let moving = self.moving.iter().filter_map(|c| self.followed.get(c)).map(|f| f.next).min();
        let resting = self.followed.len() > self.moving.len();
        let next = moving.into_iter().chain(resting.then_some(self.next_rest)).min().unwrap_or_default();
        let asleep = tokio::time::sleep(next.saturating_sub(clock::monotonic()));
        let heard = async {
            match &self.events {
                Some(events) if events.is_joined() => drop(events.readable().await),
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            count = inbox.recv_many(arrived, BATCH) => count > 0,
            () = heard => true,
            () = asleep => true,
        }
    }

    /// Begins to follow what arrived; returns it as due.
    fn take_in(&mut self, arrived: &mut Vec<Departed>) -> Vec<u64> {
        let mut due = Vec::with_capacity(arrived.len());
        for departed in arrived.drain(..) {
            let cookie = departed.id.cookie;
            self.followed.insert(cookie, Followed::new(departed, self.evidence));
            self.moving.push(cookie);
            due.push(cookie);
        }
        due
    }

    /// What the kernel announced of those we follow is due; after a loss, everyone is.
    fn hear(&mut self, due: &mut Vec<u64>) {
        let Some(events) = &mut self.events else { return };
        if !events.is_joined() {
            return;
        }
        let followed = &mut self.followed;
        let heard = events.drain(|Destroyed { cookie, info, .. }| {
            if let Some(f) = followed.get_mut(&cookie) {
                let passive = matches!(f.departed.life.state(), State::CloseWait | State::LastAck);
                if passive && info.is_some_and(|i| i.bytes_acked >= f.departed.all_acked) {
                    f.departed.cause_if_gone = f.departed.cause_if_gone.or(Some(Cause::Ack));
                }
                due.push(cookie);
            }
        });
        match heard {
            Ok(false) => {}
            Ok(true) => {
                self.metrics.lost_events.inc();
                due.extend(self.moving.iter().copied());
                if let Some(times) = self.warned.due(clock::monotonic()) {
                    tracing::warn!(times, "the kernel lost destroy events for us; every orphan is looked up");
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Reads where the given ones are now, by whichever way is cheaper.
    fn look(&mut self, mut due: Vec<u64>) {
        due.sort_unstable();
        due.dedup();
        let began = Instant::now();
        let lookups = LOOKUP * u32::try_from(due.len()).unwrap_or(u32::MAX);
        if (!self.by_cookie() || lookups > self.dump_cost)
            && let Err(error) = self.dump(&mut due)
        {
            return self.failed(&error);
        }
        // What a dump did not show may have been passed over while it moved: absence is only believed of a lookup.
        for cookie in due {
            let Some(followed) = self.followed.get(&cookie) else { continue };
            let found = if self.by_cookie() { self.table.find(&followed.departed.id.flow, cookie) } else { Ok(None) };
            match found {
                Ok(row) => self.note(cookie, row.as_ref()),
                Err(error @ TableError::Io { .. }) => return self.failed(&error),
                // An answer that concerns this one only must not hide the others.
                Err(error) => {
                    self.metrics.errors.inc();
                    tracing::debug!(%error, "cannot look up a followed connection");
                    if let Some(followed) = self.followed.get_mut(&cookie) {
                        followed.next = clock::monotonic() + REST;
                    }
                }
            }
        }
        self.metrics.duration.observe(began.elapsed().as_secs_f64());
    }

    /// Notes those of `due` that one dump shows; leaves in `due` those that it does not.
    fn dump(&mut self, due: &mut Vec<u64>) -> Result<(), TableError> {
        let by_cookie = self.by_cookie();
        let mut by_flow = HashMap::new();
        for cookie in due.iter() {
            if let Some(followed) = self.followed.get_mut(cookie) {
                followed.pending = true;
                if !by_cookie {
                    by_flow.insert(followed.departed.id.flow.unscoped(), *cookie);
                }
            }
        }
        let mut shown = Vec::new();
        let followed = &mut self.followed;
        let began = clock::thread_cpu();
        let interrupted = self.table.each(&self.wanted, |row| {
            let cookie = row.cookie.or_else(|| by_flow.get(&row.flow).copied());
            if let Some(f) = cookie.and_then(|c| followed.get_mut(&c))
                && f.pending
                // A descriptor that is still being closed shows as CLOSE beside its own TIME_WAIT.
                && row.state != State::Close
            {
                f.pending = false;
                shown.push((f.departed.id.cookie, *row));
            }
        })?;
        self.dump_cost = clock::thread_cpu().saturating_sub(began).max(SMALLEST_DUMP);
        if interrupted {
            self.metrics.interrupted.inc();
        }
        for (cookie, row) in shown {
            self.note(cookie, Some(&row));
        }
        due.retain(|cookie| self.followed.get(cookie).is_some_and(|f| f.pending));
        for cookie in due.iter() {
            if let Some(followed) = self.followed.get_mut(cookie) {
                followed.pending = false;
            }
        }
        Ok(())
    }

    /// Takes note of what the table says of one connection, `None` when it has it no more.
    fn note(&mut self, cookie: u64, row: Option<&Row>) {
        let Some(followed) = self.followed.get_mut(&cookie) else { return };
        let first = !followed.was_seen();
        let Noted { transitions, over } = followed.note(clock::monotonic(), row, self.evidence);
        self.shared.journal.record(&followed.departed.id, &transitions);
        if first && followed.was_seen() {
            self.shared.unseen.fetch_sub(1, Ordering::AcqRel);
        }
        if over {
            self.followed.remove(&cookie);
            self.shared.has_gone();
        }
    }

    /// Joins the destroy events while an orphan's FIN is under way, and leaves them when none is.
    fn listen_while_anyone_moves(&mut self) {
        let Some(events) = &mut self.events else { return };
        let changed = match (self.moving.is_empty(), events.is_joined()) {
            (false, false) => {
                // What happened before we listened is looked up.
                for cookie in &self.moving {
                    if let Some(followed) = self.followed.get_mut(cookie) {
                        followed.next = Duration::ZERO;
                    }
                }
                events.join()
            }
            (true, true) => events.leave(),
            _ => Ok(()),
        };
        if let Err(error) = changed {
            tracing::warn!(%error, "no destroy events: orphans are polled only");
            self.events = None;
        }
    }

    /// The pause between two readings, however many connections close meanwhile. By text each reading costs the whole
    /// table.
    fn breath(&self) -> Duration {
        if self.by_cookie() { GATHER } else { (self.dump_cost * DUTY).clamp(GATHER, PATIENT) }
    }

    /// A reading failed: counted, said, and tried again after a rest.
    fn failed(&mut self, error: &TableError) {
        self.metrics.errors.inc();
        if let Some(times) = self.warned.due(clock::monotonic()) {
            tracing::warn!(%error, times, "cannot read the kernel's socket table; will look again");
        }
        let again = clock::monotonic() + REST;
        for cookie in &self.moving {
            if let Some(followed) = self.followed.get_mut(cookie) {
                followed.next = again;
            }
        }
        self.next_rest = again;
    }
}
