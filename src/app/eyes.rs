//! The eyes of a process: by which observer it sees, and why not by a better one.

use std::sync::Arc;

use anyhow::{Context, bail};
use prometheus::IntCounter;

use crate::afterlife::Afterlife;
use crate::census::Census;
use crate::config::Common;
use crate::journal::Journal;
use crate::kernel::tracepoints::TraceError;
use crate::kernel::{Observer, Table, Tracepoints, WhyNot, capabilities};
use crate::metrics::Metrics;
use crate::scope::Scope;

/// Whether the kernel announces each change to us.
pub(super) enum Announcements {
    /// Nobody asked for them: another observer was named, or there is nobody to announce to.
    NotAskedFor,
    /// They cannot be had.
    Refused(TraceError),
    /// It does.
    Here {
        tracepoints: Box<Tracepoints>,
        /// The capabilities are given up.
        gave_up: bool,
    },
}

/// Attaches to the kernel's announcements, if they are asked for or are the best that is permitted, and gives up the
/// capabilities that this took. With `everything`, of all sockets of the network namespace. Must come before the process has a second thread.
pub(super) fn attach(asked: Option<Observer>, everything: bool) -> anyhow::Result<Announcements> {
    if matches!(asked, Some(Observer::SockDiag | Observer::Procfs)) {
        return Ok(Announcements::NotAskedFor);
    }
    Ok(match Tracepoints::attach(everything) {
        Ok(tracepoints) => {
            let reads = || tracepoints.losses().is_ok();
            let gave_up = capabilities::give_up_tracing(reads).context("give up CAP_BPF and CAP_PERFMON")?;
            Announcements::Here { tracepoints: Box::new(tracepoints), gave_up }
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
    let kernel = match kernel {
        Announcements::Here { mut tracepoints, gave_up } => match tracepoints.tell_of(scope.services()) {
            Ok(_) => Announcements::Here { tracepoints, gave_up },
            Err(error) if common.observer.is_some() => return Err(error).context("observer ebpf"),
            Err(error) => Announcements::Refused(error),
        },
        as_it_is => as_it_is,
    };
    let (tracepoints, no_ebpf) = announce(kernel, common.observer, by_table)?;
    let observer = if tracepoints.is_some() { Observer::Ebpf } else { by_table };
    let metrics = Arc::new(Metrics::new(&scope, observer, log_lost));
    for (better, why) in passed_over(common.observer, observer, no_ebpf) {
        metrics.unavailable(better, why);
    }
    let journal = Arc::new(Journal::new(Arc::clone(&metrics)));
    let afterlife = Afterlife::start(Arc::clone(&journal), &scope, second, common.follow_limit, tracepoints)
        .context("start the follower")?;
    let census = Arc::new(Census::new(scope, Arc::clone(&journal), table, afterlife.tally().cloned()));
    Ok(Observers { metrics, journal, afterlife, census })
}

/// The observers that would be better than the one in use, and why each is not used.
pub(super) fn passed_over(
    asked: Option<Observer>,
    used: Observer,
    no_ebpf: WhyNot,
) -> impl Iterator<Item = (Observer, WhyNot)> {
    let no_netlink = if asked == Some(Observer::Procfs) { WhyNot::NotAskedFor } else { WhyNot::Refused };
    let best_first = [(Observer::Ebpf, no_ebpf), (Observer::SockDiag, no_netlink)];
    best_first.into_iter().take_while(move |(better, _)| *better != used)
}

fn say_why_not(reason: &dyn std::fmt::Display, observer: Observer) {
    tracing::info!(%reason, %observer, "no eBPF: changes are read, not announced");
}

/// The announcements, if there are any and the table goes with them; or why not. Says once which way it is.
pub(super) fn announce(
    kernel: Announcements,
    asked: Option<Observer>,
    by_table: Observer,
) -> anyhow::Result<(Option<Tracepoints>, WhyNot)> {
    let (tracepoints, gave_up) = match kernel {
        Announcements::Here { tracepoints, gave_up } if by_table == Observer::SockDiag => (tracepoints, gave_up),
        Announcements::Here { .. } if asked.is_some() => bail!("observer ebpf: it takes netlink beside it"),
        Announcements::Here { .. } => {
            say_why_not(&"it takes netlink beside it", by_table);
            return Ok((None, WhyNot::NoNetlink));
        }
        Announcements::Refused(error) => {
            say_why_not(&error, by_table);
            return Ok((None, error.reason()));
        }
        Announcements::NotAskedFor => {
            if asked == Some(Observer::Ebpf) {
                tracing::info!("no eBPF: nobody here wants to hear of changes");
            }
            return Ok((None, WhyNot::NotAskedFor));
        }
    };
    if !gave_up {
        tracing::info!("CAP_BPF and CAP_PERFMON are kept: this kernel asks for them at each look (before Linux 5.19)");
    }
    for lack in tracepoints.lacks() {
        tracing::warn!(reason = %lack, "the kernel does not announce everything");
    }
    tracing::info!(observer = %Observer::Ebpf, "the kernel announces each change");
    Ok((Some(*tracepoints), WhyNot::NotAskedFor))
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
