//! The kernel's sockets counted by (role, port, state): one reading at a time, shared by whoever asks within half a
//! second.
//!
//! Must not know: HTTP, or how the numbers are printed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::afterlife::Tally;
use crate::journal::Journal;
use crate::kernel::tracepoints::TraceError;
use crate::kernel::{AcceptQueue, Observer, Row, TIME_WAIT, Table, TableError, Wanted, clock, ports};
use crate::log::OnceAMinute;
use crate::metrics::{ObserverMetrics, TableGauges};
use crate::scope::Scope;
use crate::tcp::{Flow, Role, State, StateSet, unscoped};

/// How long a reading serves everyone who asks.
pub const FRESH: Duration = Duration::from_millis(500);

/// One service's sockets.
#[derive(Clone, Debug)]
pub struct ServiceReading {
    /// Which end of its connections this is.
    pub role: Role,
    /// The service's port.
    pub port: u16,
    /// The fullest of its listeners, if it has any.
    pub accept_queue: Option<AcceptQueue>,
    counts: [u64; State::SLOTS],
    oldest: [Option<Duration>; State::SLOTS],
}

impl ServiceReading {
    /// How many sockets are in `state`.
    #[must_use]
    pub fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// The age of the oldest one whose age is known; zero where there are no sockets, `None` where nobody knows.
    #[must_use]
    pub fn oldest(&self, state: State) -> Option<Duration> {
        if self.count(state) == 0 { Some(Duration::ZERO) } else { self.oldest[state as usize] }
    }
}

/// Local ports in use towards one target.
#[derive(Clone, Debug)]
pub struct TargetReading {
    /// `HOST:PORT` as given.
    pub name: String,
    /// The most sockets between any one local address and any one of the target's addresses.
    pub ports_used: u32,
}

/// The table at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Each service of the scope.
    pub services: Vec<ServiceReading>,
    /// Each target of the scope.
    pub targets: Vec<TargetReading>,
    /// How many local ports one pair of addresses has; `None` when that cannot be read.
    pub ports_limit: Option<u32>,
    /// How the table was read.
    pub observer: Observer,
    /// How long that took.
    pub took: Duration,
}

impl Reading {
    /// Puts the numbers where a scrape finds them.
    pub fn show(&self, gauges: &TableGauges) {
        for service in &self.services {
            let (role, port) = (service.role.label(), service.port.to_string());
            gauges.service(role, &port, |state| (service.count(state), service.oldest(state)));
            if let Some(queue) = service.accept_queue {
                gauges.queue(&port, queue.length, queue.limit);
            }
        }
        for target in &self.targets {
            gauges.ports(&target.name, target.ports_used, self.ports_limit);
        }
    }
}

/// Reads the table on demand.
pub struct Census {
    scope: Arc<Scope>,
    journal: Arc<Journal>,
    table: Mutex<Table>,
    every: Wanted,
    left_by_peer: Wanted,
    /// The last reading, or that it failed, and when.
    cached: tokio::sync::Mutex<Option<(Instant, Option<Arc<Reading>>)>>,
    /// The kernel's own counts, where it keeps them.
    tally: Option<Arc<Tally>>,
    listeners: Wanted,
    metrics: ObserverMetrics,
    warned: OnceAMinute,
}

impl Census {
    /// A census of `scope` by `table`, with ages from the journal's ledger; or by the kernel's own counts, if it keeps them,
    /// and by the table for the rest.
    #[must_use]
    pub fn new(scope: Arc<Scope>, journal: Arc<Journal>, table: Table, tally: Option<Arc<Tally>>) -> Census {
        let observer = if tally.is_some() { Observer::Ebpf } else { table.observer() };
        let metrics = journal.metrics().observer(observer, "census");
        let listeners = scope.wanted(StateSet::of(&[State::Listen]));
        let every = scope.wanted(StateSet::of(&State::ALL));
        let left_by_peer = scope.wanted(StateSet::of(&[State::CloseWait])).with_last_ack();
        Census {
            scope,
            journal,
            table: Mutex::new(table),
            every,
            left_by_peer,
            cached: tokio::sync::Mutex::default(),
            tally,
            listeners,
            metrics,
            warned: OnceAMinute::default(),
        }
    }

    /// The table as of at most [`FRESH`] ago; `None` when it cannot be read, which is counted and logged.
    ///
    /// The reading blocks on a thread of its own; whoever asks meanwhile waits for the same one. It goes on and is kept
    /// even when whoever asked has gone away: nobody can make us read more often by asking and leaving.
    pub async fn read(self: &Arc<Census>) -> Option<Arc<Reading>> {
        let census = Arc::clone(self);
        tokio::spawn(async move { census.read_or_wait().await }).await.ok().flatten()
    }

    async fn read_or_wait(self: Arc<Census>) -> Option<Arc<Reading>> {
        let mut cached = self.cached.lock().await;
        if let Some((at, reading)) = &*cached
            && at.elapsed() < FRESH
        {
            return reading.clone();
        }
        let census = Arc::clone(&self);
        let reading = match tokio::task::spawn_blocking(move || census.read_now()).await {
            Ok(Ok(reading)) => Some(Arc::new(reading)),
            Ok(Err(error)) => {
                self.metrics.errors.inc();
                if let Some(times) = self.warned.due(clock::monotonic()) {
                    tracing::warn!(%error, times, "cannot read the kernel's socket table");
                }
                None
            }
            Err(_shutting_down) => None,
        };
        *cached = Some((Instant::now(), reading.clone()));
        reading
    }

    /// How many connections wait to be accepted at local `port`, over all its listeners.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn accept_queue(&self, port: u16) -> Result<u64, TableError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut length = 0;
        let wanted = Wanted::new(StateSet::of(&[State::Listen]), &[port], &[]);
        table.each(&wanted, |row| length += u64::from(row.receive_queue))?;
        Ok(length)
    }

    /// The connections to local `port` between SYN and accept queue: how often our SYN+ACK was repeated, and when it will
    /// be repeated next.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn handshakes_in_progress(&self, port: u16) -> Result<HashMap<Flow, (u8, Duration)>, TableError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = HashMap::new();
        let wanted = Wanted::new(StateSet::of(&[State::SynRecv]), &[port], &[]);
        table.each(&wanted, |row| {
            found.insert(row.flow, (row.retransmits, row.expires));
        })?;
        Ok(found)
    }

    fn read_now(&self) -> Result<Reading, CensusError> {
        match &self.tally {
            None => Ok(self.read_table()?),
            Some(tally) => self.read_tally(tally),
        }
    }

    /// What the kernel has counted; of its table, the listeners only, for their queues.
    fn read_tally(&self, tally: &Tally) -> Result<Reading, CensusError> {
        let began = Instant::now();
        let mut count = Count::new(&self.scope);
        {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            table.each(&self.listeners, |row| count.add(row))?;
        }
        let now = clock::monotonic();
        for (service, sum) in count.services.iter_mut().zip(tally.sums(self.scope.services().len())?) {
            service.counts = sum.counts;
            service.oldest = sum.since.map(|since| since.map(|since| now.saturating_sub(since)));
        }
        let targets = &count.targets;
        tally.each_pair(|local, peer, sockets| {
            if targets.contains_key(&peer) {
                count.pairs.insert((local, peer), sockets);
            }
        });
        let took = began.elapsed();
        self.metrics.duration.observe(took.as_secs_f64());
        Ok(count.finish(&Ages::new(), Observer::Ebpf, took))
    }

    fn read_table(&self) -> Result<Reading, TableError> {
        let began = Instant::now();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = Count::new(&self.scope);
        if table.each(&self.every, |row| count.add(row))? {
            // The kernel says that rows may be missing or double: once more, and then take it as it is.
            self.metrics.interrupted.inc();
            count = Count::new(&self.scope);
            table.each(&self.every, |row| count.add(row))?;
        }
        let observer = table.observer();
        let oldest = self.journal.ledger().oldest(clock::monotonic());
        // Whoever closed and is not in the ledger, because nobody accepted it or nobody watches it, has no age but the
        // kernel's own: a leak in the accept queue is a leak too.
        if observer == Observer::SockDiag && count.knows_less_than_it_counts(&oldest, State::CloseWait) {
            table.each(&self.left_by_peer, |row| count.add_age(row))?;
        }
        drop(table);
        let took = began.elapsed();
        self.metrics.duration.observe(took.as_secs_f64());
        Ok(count.finish(&oldest, observer, took))
    }
}

/// Why there is no reading.
#[derive(Debug, thiserror::Error)]
enum CensusError {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Tally(#[from] TraceError),
}

/// What the ledger knows: the age of the oldest in each state, and how many it knows.
type Ages = HashMap<(Role, u16, State), (Duration, u64)>;

/// A reading in the making: constant memory, however many sockets pass.
struct Count<'a> {
    scope: &'a Scope,
    services: Vec<ServiceReading>,
    targets: HashMap<SocketAddr, Vec<usize>>,
    pairs: HashMap<(IpAddr, SocketAddr), u32>,
}

impl Count<'_> {
    fn new(scope: &Scope) -> Count<'_> {
        let service = |&(role, port): &(Role, u16)| ServiceReading {
            role,
            port,
            accept_queue: None,
            counts: [0; State::SLOTS],
            oldest: [None; State::SLOTS],
        };
        let mut targets: HashMap<SocketAddr, Vec<usize>> = HashMap::new();
        for (i, target) in scope.targets().iter().enumerate() {
            for address in target.addresses() {
                targets.entry(unscoped(address)).or_default().push(i);
            }
        }
        Count { scope, services: scope.services().iter().map(service).collect(), targets, pairs: HashMap::new() }
    }

    fn add(&mut self, row: &Row) {
        let Some(service) = self.scope.service_of(&row.flow).map(|i| &mut self.services[i]) else { return };
        let state = row.state as usize;
        service.counts[state] += 1;
        match row.state {
            State::Listen => {
                let queue = AcceptQueue::of(row);
                service.accept_queue = Some(service.accept_queue.map_or(queue, |fullest| fullest.fuller(queue)));
            }
            State::TimeWait => {
                let age = TIME_WAIT.saturating_sub(row.expires);
                service.oldest[state] = service.oldest[state].max(Some(age));
            }
            _ => {}
        }
        if service.role == Role::Client {
            let flow = row.flow.canonical().unscoped();
            if self.targets.contains_key(&flow.peer) {
                *self.pairs.entry((flow.local.ip(), flow.peer)).or_default() += 1;
            }
        }
    }

    /// Whether sockets in `state` were counted that the ledger does not know.
    fn knows_less_than_it_counts(&self, ledger: &Ages, state: State) -> bool {
        let known = |service: &ServiceReading| ledger.get(&(service.role, service.port, state)).map_or(0, |age| age.1);
        self.services.iter().any(|service| service.count(state) > known(service))
    }

    /// Takes the time since its last ACK for the age of a socket in CLOSE_WAIT: the FIN was one, and what the peer may have
    /// acknowledged since makes it younger than it is, never older.
    fn add_age(&mut self, row: &Row) {
        let Some(service) = self.scope.service_of(&row.flow).map(|i| &mut self.services[i]) else { return };
        let oldest = &mut service.oldest[row.state as usize];
        *oldest = (*oldest).max(row.last_ack);
    }

    fn finish(mut self, oldest: &Ages, observer: Observer, took: Duration) -> Reading {
        for service in &mut self.services {
            for state in State::ALL {
                let known = &mut service.oldest[state as usize];
                *known = (*known).max(oldest.get(&(service.role, service.port, state)).map(|age| age.0));
            }
        }
        let mut used = vec![0; self.scope.targets().len()];
        for ((_, peer), count) in &self.pairs {
            for target in self.targets.get(peer).into_iter().flatten() {
                used[*target] = used[*target].max(*count);
            }
        }
        let targets = self.scope.targets().iter().zip(used);
        Reading {
            services: self.services,
            targets: targets.map(|(t, ports_used)| TargetReading { name: t.name.clone(), ports_used }).collect(),
            ports_limit: ports::local_port_limit().ok(),
            observer,
            took,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::Target;

    fn row(state: State, local: &str, peer: &str) -> Row {
        let flow = Flow { local: local.parse().unwrap(), peer: peer.parse().unwrap() };
        let plain = Row::plain(state, flow, Some(1));
        Row { expires: Duration::from_secs(20), receive_queue: 3, send_queue: Some(128), ..plain }
    }

    fn reading(scope: &Scope, rows: &[Row]) -> Reading {
        let mut count = Count::new(scope);
        for row in rows {
            count.add(row);
        }
        let ledger = HashMap::from([((Role::Server, 7007, State::CloseWait), (Duration::from_secs(5), 1))]);
        count.finish(&ledger, Observer::SockDiag, Duration::ZERO)
    }

    #[test]
    fn over_loopback_each_end_counts_once_under_its_role() {
        let target = Arc::new(Target::new("localhost:7007".into(), 7007));
        target.resolved(&["127.0.0.1:7007".parse().unwrap()]);
        let scope = Scope::new(&[7007], vec![target]);
        let rows = [
            row(State::Listen, "[::]:7007", "[::]:0"),
            Row { receive_queue: 129, ..row(State::Listen, "127.0.0.1:7007", "0.0.0.0:0") },
            row(State::Listen, "127.0.0.2:7007", "0.0.0.0:0"),
            row(State::CloseWait, "[::ffff:127.0.0.1]:7007", "[::ffff:127.0.0.1]:40000"),
            row(State::FinWait2, "127.0.0.1:40000", "127.0.0.1:7007"),
            row(State::TimeWait, "127.0.0.1:40001", "127.0.0.1:7007"),
            row(State::TimeWait, "127.0.0.9:40001", "127.0.0.1:7007"),
            row(State::Established, "127.0.0.1:22", "127.0.0.1:5000"),
        ];
        let reading = reading(&scope, &rows);
        let [server, client] = &reading.services[..] else { panic!("two services") };
        assert_eq!((server.count(State::Listen), server.count(State::CloseWait)), (3, 1));
        assert_eq!((client.count(State::FinWait2), client.count(State::TimeWait)), (1, 2));
        let full = AcceptQueue { length: 129, limit: Some(128), inode: 0 };
        assert_eq!(server.accept_queue, Some(full), "the others do not hide that one is full");
        assert_eq!(server.oldest(State::CloseWait), Some(Duration::from_secs(5)), "from the ledger");
        assert_eq!(client.oldest(State::TimeWait), Some(Duration::from_secs(40)), "from the timer");
        assert_eq!(client.oldest(State::FinWait2), None, "somebody else's: nobody knows");
        assert_eq!(client.oldest(State::CloseWait), Some(Duration::ZERO), "there is none");
        assert_eq!(reading.targets[0].ports_used, 2, "the fullest pair of addresses");
        let total: u64 = reading.services.iter().flat_map(|s| State::ALL.map(|state| s.count(state))).sum();
        assert_eq!(total, 7, "the stranger is not counted");
    }
}
