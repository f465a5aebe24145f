//! The kernel's TCP socket table, by whichever way it may be read.

use std::fmt;

use super::error::TableError;
use super::procfs;
use super::row::{Row, Wanted};
use super::sock_diag::SockDiag;
use crate::tcp::{Evidence, Flow, State, StateSet};

/// A way of reading the socket table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observer {
    /// The kernel's own announcements of each change (eBPF), and netlink beside them.
    Ebpf,
    /// Netlink: exact, filtered in the kernel, sockets named by cookie.
    SockDiag,
    /// Text: where netlink is refused.
    Procfs,
}

impl Observer {
    /// The metric label and flag value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Observer::Ebpf => "ebpf",
            Observer::SockDiag => "sock_diag",
            Observer::Procfs => "procfs",
        }
    }

    /// The evidence that its readings, or its events, are.
    #[must_use]
    pub const fn evidence(self) -> Evidence {
        match self {
            Observer::Ebpf => Evidence::Tracepoint,
            Observer::SockDiag => Evidence::SockDiag,
            Observer::Procfs => Evidence::Procfs,
        }
    }
}

impl fmt::Display for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.label())
    }
}

/// Why an observer is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// Another was asked for.
    NotAskedFor,
    /// This process lacks a capability.
    NotPermitted,
    /// The kernel does not describe its own types.
    NoTypes,
    /// The kernel does not tell which network namespace a socket is in.
    NoNamespace,
    /// There is no netlink, which it takes beside it.
    NoNetlink,
    /// The kernel, or a sandbox, said no.
    Refused,
}

impl WhyNot {
    /// All of them.
    pub const ALL: [WhyNot; 6] = [
        WhyNot::NotAskedFor,
        WhyNot::NotPermitted,
        WhyNot::NoTypes,
        WhyNot::NoNamespace,
        WhyNot::NoNetlink,
        WhyNot::Refused,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            WhyNot::NotAskedFor => "not_asked_for",
            WhyNot::NotPermitted => "not_permitted",
            WhyNot::NoTypes => "no_types",
            WhyNot::NoNamespace => "no_namespace",
            WhyNot::NoNetlink => "no_netlink",
            WhyNot::Refused => "refused",
        }
    }
}

/// The table, opened one way or the other. Its calls block for as long as the kernel walks its hash.
pub struct Table(Way);

enum Way {
    SockDiag(SockDiag),
    Procfs,
}

impl Table {
    /// Opens the best way that is permitted, or the one that is asked for; the kernel's announcements take netlink beside
    /// them. The second value says why netlink was refused, when it was.
    ///
    /// # Errors
    /// When the way asked for, or every way, is refused.
    pub fn open(asked: Option<Observer>) -> Result<(Table, Option<TableError>), TableError> {
        if asked == Some(Observer::Procfs) {
            procfs::probe()?;
            return Ok((Table(Way::Procfs), None));
        }
        match SockDiag::open() {
            Ok(diag) => Ok((Table(Way::SockDiag(diag)), None)),
            Err(refused) if asked.is_none() => {
                procfs::probe()?;
                Ok((Table(Way::Procfs), Some(refused)))
            }
            Err(refused) => Err(refused),
        }
    }

    /// Which way it is.
    #[must_use]
    pub fn observer(&self) -> Observer {
        match self.0 {
            Way::SockDiag(_) => Observer::SockDiag,
            Way::Procfs => Observer::Procfs,
        }
    }

    /// Calls `row` with every socket that is wanted, in constant memory. Returns whether the kernel said that the
    /// table changed meanwhile.
    ///
    /// # Errors
    /// When the table cannot be read to its end; rows already given are then not the whole.
    pub fn each(&mut self, wanted: &Wanted, mut row: impl FnMut(&Row)) -> Result<bool, TableError> {
        match &mut self.0 {
            Way::SockDiag(diag) => diag.each(wanted, &mut row),
            Way::Procfs => procfs::each(wanted, &mut row).map(|()| false),
        }
    }

    /// The socket with these addresses and this cookie; `None` when the kernel has it no more. By text, the addresses
    /// alone decide, and the whole table is read for it.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn find(&mut self, flow: &Flow, cookie: u64) -> Result<Option<Row>, TableError> {
        match &mut self.0 {
            Way::SockDiag(diag) => diag.find(flow, cookie),
            Way::Procfs => {
                let wanted = Wanted::new(StateSet::of(&State::ALL), &[flow.local.port()], &[]);
                let mut found = None;
                procfs::each(&wanted, &mut |row: &Row| {
                    if row.flow == flow.unscoped() {
                        found = Some(*row);
                    }
                })?;
                Ok(found)
            }
        }
    }
}
