//! The eyes of a process: by which observer it sees, and why not by a better one.

use std::sync::Arc;

use anyhow::{Context, bail};
use prometheus::IntCounter;

use crate::afterlife::Afterlife;
use crate::census::Census;
use crate::config::Common;
use crate::journal::Journal;
use crate::kernel::tracepoints::TraceError;
use crate::kernel::{Observer, Table, Tracepoints, capabilities};
use crate::metrics::Metrics;
use crate::scope::Scope;

/// Whether the kernel announces each change to us.
pub(super) enum Announcements {
    /// There is nothing to announce to.
    NotNeeded,
    /// Another observer was asked for.
    NotAskedFor,
    /// They cannot be had.
    Refused(TraceError),
    /// It does.
    Here(Box<Tracepoints>),
}

/// Attaches to the kernel's announcements, if they are asked for or are the best that is permitted, and gives up the
/// capabilities that this took. Must come before the process has a second thread.
pub(super) fn attach(asked: Option<Observer>) -> anyhow::Result<Announcements> {
    if matches!(asked, Some(Observer::SockDiag | Observer::Procfs)) {
        return Ok(Announcements::NotAskedFor);
    }
    Ok(match Tracepoints::attach(false) {
        Ok(tracepoints) => {
            capabilities::give_up_tracing().context("give up CAP_BPF and CAP_PERFMON")?;
            Announcements::Here(Box::new(tracepoints))
        }
        Err(error) if asked.is_some() => return Err(error).context("observer ebpf"),
        Err(error) => Announcements::Refused(error),
    })
}

/// The eyes, whatever they look at.
pub(super) struct Observers {
    pub(super) metrics: Arc<Metrics>,
    pub(super) journal: Arc<Journal>,
    pub(super) afterlife: Afterlife,
    pub(super) census: Arc<Census>,
}

/// Opens the kernel's table and whatever keeps what is seen in it.
pub(super) fn observe(
    scope: Scope,
    kernel: Announcements,
    common: Common,
    log_lost: &IntCounter,
) -> anyhow::Result<Observers> {
    let scope = Arc::new(scope);
    let table = open_table(common.observer)?;
    let by_table = table.observer();
    let second = open_table(Some(by_table))?;
    let tracepoints = match kernel {
        Announcements::Here(tracepoints) if by_table == Observer::SockDiag => Some(*tracepoints),
        Announcements::Here(_) if common.observer.is_some() => bail!("observer ebpf: it takes netlink beside it"),
        Announcements::Here(_) => {
            say_why_not(&"it takes netlink beside it", by_table);
            None
        }
        Announcements::Refused(error) => {
            say_why_not(&error, by_table);
            None
        }
        Announcements::NotNeeded | Announcements::NotAskedFor => None,
    };
    let observer = if tracepoints.is_some() { Observer::Ebpf } else { by_table };
    let metrics = Arc::new(Metrics::new(&scope, observer, log_lost));
    let journal = Arc::new(Journal::new(Arc::clone(&metrics)));
    if let Some(tracepoints) = &tracepoints {
        for lack in tracepoints.lacks() {
            tracing::warn!(reason = %lack, "the kernel does not announce everything");
        }
        tracing::info!(%observer, "the kernel announces each change");
    }
    let afterlife = Afterlife::start(Arc::clone(&journal), &scope, second, common.follow_limit, tracepoints)
        .context("start the follower")?;
    let census = Arc::new(Census::new(scope, Arc::clone(&journal), table, afterlife.tally().cloned()));
    Ok(Observers { metrics, journal, afterlife, census })
}

fn say_why_not(reason: &dyn std::fmt::Display, observer: Observer) {
    tracing::info!(%reason, %observer, "no eBPF: changes are read, not announced");
}

/// Opens the kernel's table in the way that is asked for, or in the best that is permitted.
pub(super) fn open_table(asked: Option<Observer>) -> anyhow::Result<Table> {
    let (table, refused) = Table::open(asked).context("read the kernel's socket table")?;
    if let Some(error) = refused {
        let observer = table.observer();
        tracing::warn!(%error, %observer, "netlink refused: sockets are read as text, and known by their \
         addresses only");
    }
    Ok(table)
}
