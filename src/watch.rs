//! watch: the sockets of every other service in this network namespace, for Prometheus, for a script, for a person.
//!
//! Must not know: server, client, lab, web.

mod check;
mod table;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounter;
use tokio::sync::Mutex;
use tokio::time::Instant;

pub use check::{Finding, Severity, Thresholds};

use crate::kernel::TableError;
use crate::kernel::owners::{self, Owners};
use crate::live::Live;
use crate::metrics::{ACCEPT_ERRORS, ServiceRow, SurveyMetrics};
use crate::source::{Answer, NoAnswer, Source, UNREADABLE, json, page};
use crate::survey::{Listeners, Reading, Sight, Socket, Survey};
use crate::tcp::State;

/// How often processes are searched for whoever began to listen.
const SEARCH: Duration = Duration::from_secs(5);

/// How many sockets `/api/sockets?state=…` names.
const OFFENDERS: usize = 20;

/// How many of a leak are named below the table.
const WORST: usize = 5;

/// Who listens, and when that was last searched for.
type Known = (Arc<Owners>, Option<Instant>);

/// Watches, and tells.
pub struct Watch {
    survey: Survey,
    metrics: Arc<SurveyMetrics>,
    thresholds: Thresholds,
    owners: Mutex<Known>,
    live: Arc<Live>,
}

/// One reading, who listens, and what looks wrong in it.
pub struct Look {
    reading: Arc<Reading>,
    owners: Arc<Owners>,
    findings: Vec<Finding>,
    /// Of a leak, those that have been there for longest, and who holds them.
    worst: (Vec<Socket>, Owners),
}

impl Look {
    /// How bad the worst is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    /// The verdict, and the table below it: a monitor shows the first line of what a check prints.
    #[must_use]
    pub fn text(&self) -> String {
        table::verdict(&self.findings) + "\n" + &table::text(&self.reading, &self.owners) + &self.worst()
    }

    /// The table, and the verdict below it: so the table stays where it is when it is drawn again.
    #[must_use]
    pub fn screen(&self) -> String {
        table::text(&self.reading, &self.owners) + "\n" + &table::verdict(&self.findings) + &self.worst()
    }

    fn worst(&self) -> String {
        table::worst(&self.worst.0, &self.worst.1)
    }

    /// As JSON.
    ///
    /// # Errors
    /// When it cannot be encoded, which is logged.
    pub fn json(&self) -> Result<Vec<u8>, NoAnswer> {
        json(&table::Sockets::of(&self.reading, &self.owners, &self.findings))
    }
}

impl Watch {
    /// Tells what `survey` sees.
    #[must_use]
    pub fn new(survey: Survey, metrics: Arc<SurveyMetrics>, thresholds: Thresholds, live: Arc<Live>) -> Watch {
        Watch { survey, metrics, thresholds, owners: Mutex::default(), live }
    }

    /// Looks at the table, and at what is wrong in it.
    ///
    /// # Errors
    /// When the kernel's table cannot be read.
    pub async fn look(&self) -> Result<Look, Arc<TableError>> {
        let reading = self.survey.read().await?;
        let owners = self.listeners(&reading).await;
        let findings = check::findings(&reading, &owners, self.thresholds);
        Ok(Look { reading, owners, findings, worst: Default::default() })
    }

    /// The same, and of a leak the worst by name: it takes a search of all processes.
    ///
    /// # Errors
    /// When the kernel's table cannot be read.
    pub async fn look_closely(&self) -> Result<Look, Arc<TableError>> {
        let mut look = self.look().await?;
        let mut oldest = self.survey.oldest(State::CloseWait, WORST).await;
        oldest.retain(|socket| socket.age >= self.thresholds.warn);
        look.worst = with_owners(oldest).await;
        Ok(look)
    }

    /// Who listens, as far as that may be known. Whoever is known is asked whether he still does: a socket may outlive the
    /// process that made it. When somebody is not known all are searched for anew, and not too often.
    async fn listeners(&self, reading: &Reading) -> Arc<Owners> {
        let listeners = reading.services.values().filter_map(|sight| sight.listeners.as_ref());
        let listening: BTreeSet<u32> = listeners.flat_map(|listeners| &listeners.inodes).copied().collect();
        let mut known = self.owners.lock().await;
        let due = known.1.is_none_or(|at| at.elapsed() >= SEARCH);
        let before = Arc::clone(&known.0);
        let look = move || {
            let still = owners::still(&before);
            let unknown = listening.iter().any(|inode| !still.contains_key(inode));
            if unknown && due { (owners::of(&listening), true) } else { (still, false) }
        };
        let (now, searched) = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        known.0 = Arc::new(now);
        if searched {
            known.1 = Some(Instant::now());
        }
        Arc::clone(&known.0)
    }

    fn page(&self, reading: Option<&Reading>, owners: &Owners) -> prometheus::Result<Vec<u8>> {
        let rows = reading.iter().flat_map(|reading| &reading.services).map(|(service, sight)| ServiceRow {
            role: service.role.label(),
            port: service.port.to_string(),
            totals: (sight.opened, sight.closed),
            processes: names(sight, owners).map(str::to_owned).collect(),
        });
        let rows: Vec<ServiceRow> = rows.collect();
        self.metrics.render(&rows, |gauges| {
            let Some(reading) = reading else { return };
            for (service, sight) in &reading.services {
                let (role, port) = (service.role.label(), service.port.to_string());
                gauges.service(role, &port, |state| (sight.count(state), Some(sight.oldest(state).0)));
                if let Some(Listeners { queue, .. }) = &sight.listeners {
                    gauges.queue(&port, queue.length, queue.limit);
                }
            }
            // Whose addresses they are is told by the API: a label must not grow with the peers.
            let used = reading.fullest.first().map_or(0, |(_, _, used)| *used);
            gauges.ports("fullest", used, reading.ports_limit);
        })
    }
}

/// Sockets, and who holds them, as far as that may be known.
async fn with_owners(sockets: Vec<Socket>) -> (Vec<Socket>, Owners) {
    let inodes: BTreeSet<u32> = sockets.iter().map(|socket| socket.inode).filter(|inode| *inode != 0).collect();
    if inodes.is_empty() {
        return (sockets, Owners::new());
    }
    let owners = tokio::task::spawn_blocking(move || owners::of(&inodes)).await.unwrap_or_default();
    (sockets, owners)
}

/// The names of those who listen, each once.
fn names<'a>(sight: &Sight, owners: &'a Owners) -> impl Iterator<Item = &'a str> {
    let inodes = sight.listeners.iter().flat_map(|listeners| &listeners.inodes);
    let names: BTreeSet<&str> = inodes.filter_map(|inode| owners.get(inode)).map(|owner| owner.name.as_str()).collect();
    names.into_iter()
}

impl Source for Watch {
    fn metrics(&self) -> Answer<'_, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async {
            let reading = self.survey.read().await;
            let owners = match &reading {
                Ok(reading) => self.listeners(reading).await,
                Err(_) => Arc::default(),
            };
            page(self.page(reading.ok().as_deref(), &owners))
        })
    }

    fn sockets<'a>(&'a self, query: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async move {
            let Some(query) = query.filter(|query| !query.is_empty()) else {
                return self.look().await.map_err(|_| UNREADABLE)?.json();
            };
            let state = query.strip_prefix("state=").and_then(State::named);
            let state = state.ok_or(NoAnswer::Question("known: state=NAME, as in state=close_wait\n"))?;
            self.survey.read().await.map_err(|_| UNREADABLE)?;
            let (oldest, owners) = with_owners(self.survey.oldest(state, OFFENDERS).await).await;
            json(&oldest.iter().map(|socket| table::Offender::of(socket, &owners)).collect::<Vec<_>>())
        })
    }

    fn connections<'a>(&'a self, _: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>> {
        // It makes none, and follows nobody's life.
        Box::pin(async { Ok(b"[]".to_vec()) })
    }

    fn live(&self) -> &Arc<Live> {
        &self.live
    }

    fn lost(&self) -> Vec<(&'static str, u64)> {
        self.metrics.lost()
    }

    fn accept_errors(&self) -> [IntCounter; ACCEPT_ERRORS.len()] {
        self.metrics.accept_errors()
    }
}
