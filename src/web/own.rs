//! What a process tells of its own connections.

use std::sync::Arc;

use prometheus::IntCounter;

use super::api;
use crate::census::Census;
use crate::journal::Journal;
use crate::live::Live;
use crate::metrics::ACCEPT_ERRORS;
use crate::source::{Answer, NoAnswer, Source, UNREADABLE, json, page};

const SHUTTING_DOWN: NoAnswer = NoAnswer::Unavailable("shutting down\n");

/// The kernel's sockets of our services, and our own counters and lives.
pub struct Own {
    /// The kernel's sockets.
    pub census: Arc<Census>,
    /// Counters and lives.
    pub journal: Arc<Journal>,
}

impl Source for Own {
    fn metrics(&self) -> Answer<'_, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async {
            let reading = self.census.read().await;
            let journal = Arc::clone(&self.journal);
            // Off the async threads: the process's own metrics list its descriptors, and there may be many.
            let rendered = tokio::task::spawn_blocking(move || {
                journal.metrics().render(|gauges| reading.iter().for_each(|reading| reading.show(gauges)))
            });
            page(rendered.await.map_err(|_| SHUTTING_DOWN)?)
        })
    }

    fn sockets<'a>(&'a self, _: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async {
            let reading = self.census.read().await.ok_or(UNREADABLE)?;
            json(&api::Sockets::of(&reading))
        })
    }

    fn connections<'a>(&'a self, query: Option<&'a str>) -> Answer<'a, Result<Vec<u8>, NoAnswer>> {
        Box::pin(async move {
            let question = api::question(query).map_err(NoAnswer::Question)?;
            let journal = Arc::clone(&self.journal);
            let told = tokio::task::spawn_blocking(move || json(&api::connections(&journal, &question)));
            told.await.map_err(|_| SHUTTING_DOWN)?
        })
    }

    fn live(&self) -> &Arc<Live> {
        self.journal.live()
    }

    fn lost(&self) -> Vec<(&'static str, u64)> {
        self.journal.metrics().lost()
    }

    fn accept_errors(&self) -> [IntCounter; ACCEPT_ERRORS.len()] {
        self.journal.metrics().accept_errors("web")
    }
}
