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

use crate::kernel::owners::{self, Owners};
use crate::live::Live;
use crate::metrics::{ACCEPT_ERRORS, ServiceRow, SurveyMetrics};
use crate::source::{Answer, NoAnswer, Source, UNREADABLE, json, page};
use crate::survey::{Reading, Survey};
use crate::tcp::State;

/// How often processes are searched for whoever began to listen.
const SEARCH: Duration = Duration::from_secs(5);

/// How many sockets `/api/sockets?state=…` names.
const OFFENDERS: usize = 20;

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

impl Watch {
    /// Tells what `survey` sees.
    #[must_use]
    pub fn new(survey: Survey, metrics: Arc<SurveyMetrics>, thresholds: Thresholds) -> Watch {
        let live = Arc::new(Live::without_lives(metrics.live.clone()));
        Watch { survey, metrics, thresholds, owners: Mutex::default(), live }
    }

    /// A reading as a table, and how bad it is; `None` when the table cannot be read.
    pub async fn table(&self) -> Option<(String, Severity)> {
        let (reading, owners, findings) = self.look().await?;
        Some((table::text(&reading, &owners, &findings), worst(&findings)))
    }

    /// A reading as JSON, and how bad it is; `None` when the table cannot be read.
    pub async fn json(&self) -> Option<(Vec<u8>, Severity)> {
        let (reading, owners, findings) = self.look().await?;
        let told = json(&table::Sockets::of(&reading, &owners, &findings)).ok()?;
        Some((told, worst(&findings)))
    }

    async fn look(&self) -> Option<(Arc<Reading>, Arc<Owners>, Vec<Finding>)> {
        let reading = self.survey.read().await?;
        let owners = self.listeners(&reading).await;
        let findings = check::findings(&reading, &owners, self.thresholds);
        Some((reading, owners, findings))
    }

    /// Who listens, as far as that may be known: searched for anew when somebody is not known, and not too often.
    async fn listeners(&self, reading: &Reading) -> Arc<Owners> {
        let listening: BTreeSet<u32> =
            reading.services.values().filter_map(|sight| sight.queue).map(|queue| queue.inode).collect();
        let mut known = self.owners.lock().await;
        let unknown = listening.iter().any(|inode| !known.0.contains_key(inode));
        if unknown && known.1.is_none_or(|at| at.elapsed() >= SEARCH) {
            let found = tokio::task::spawn_blocking(move || owners::of(&listening)).await.unwrap_or_default();
            *known = (Arc::new(found), Some(Instant::now()));
        }
        Arc::clone(&known.0)
    }

    fn page(&self, reading: Option<&Reading>, owners: &Owners) -> prometheus::Result<Vec<u8>> {
        let rows = reading.iter().flat_map(|reading| &reading.services).map(|(service, sight)| ServiceRow {
            role: service.role.label(),
            port: service.port.to_string(),
            totals: (sight.opened, sight.closed),
            process: sight.queue.and_then(|queue| owners.get(&queue.inode)).map(|owner| owner.name.clone()),
        });
        let rows: Vec<ServiceRow> = rows.collect();
        self.metrics.render(&rows, |gauges| {
            let Some(reading) = reading else { return };
            for (service, sight) in &reading.services {
                let (role, port) = (service.role.label(), service.port.to_string());
                gauges.service(role, &port, |state| (sight.count(state), Some(sight.oldest(state).0)));
                if let Some(queue) = sight.queue {
                    gauges.queue(&port, queue.length, queue.limit);
                }
            }
            // Whose addresses they are is told by the API: a label must not grow with the peers.
            let used = reading.fullest.first().map_or(0, |(_, _, used)| *used);
            gauges.ports("fullest", used, reading.ports_limit);
        })
    }
}

fn worst(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
}

impl Source for Watch {
    fn metrics(&self) -> Answer<'_, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async {
            let reading = self.survey.read().await;
            let owners = match &reading {
                Some(reading) => self.listeners(reading).await,
                None => Arc::default(),
            };
            page(self.page(reading.as_deref(), &owners))
        })
    }

    fn sockets<'a>(&'a self, query: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async move {
            let Some(query) = query.filter(|query| !query.is_empty()) else {
                return self.json().await.map(|(told, _)| told).ok_or(UNREADABLE);
            };
            let state = query.strip_prefix("state=").and_then(State::named);
            let state = state.ok_or(NoAnswer::Question("known: state=NAME, as in state=close_wait\n"))?;
            self.survey.read().await.ok_or(UNREADABLE)?;
            let oldest = self.survey.oldest(state, OFFENDERS).await;
            let inodes: BTreeSet<u32> = oldest.iter().map(|socket| socket.inode).filter(|inode| *inode != 0).collect();
            let owners = tokio::task::spawn_blocking(move || owners::of(&inodes)).await.unwrap_or_default();
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
