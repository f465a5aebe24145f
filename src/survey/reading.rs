//! What is looked at, and what a reading shows: plain values. Must not know: how they come about.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::kernel::{AcceptQueue, Observer, Row};
use crate::tcp::{Flow, Role, State};

/// Which sockets are looked at.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these listening ports; none: all.
    pub only: Vec<u16>,
    /// Not these.
    pub ignore: Vec<u16>,
    /// The remote ports that are told apart; all others are told together.
    pub remote: Vec<u16>,
    /// Where we ourselves are asked: neither that listener nor who asks it from this host is told of.
    pub own: Option<u16>,
}

impl Selection {
    /// Whether somebody on this host asks us: a healthcheck.
    pub(super) fn is_own(&self, flow: &Flow) -> bool {
        let peer = flow.canonical().peer;
        self.own == Some(peer.port()) && (peer.ip().is_loopback() || peer.ip() == flow.canonical().local.ip())
    }

    pub(super) fn takes(&self, service: Service) -> bool {
        match (service.role, service.port) {
            (_, Port::Number(port)) if self.own == Some(port) && !self.remote.contains(&port) => false,
            (Role::Server, Port::Number(port)) => {
                (self.only.is_empty() || self.only.contains(&port)) && !self.ignore.contains(&port)
            }
            // Whoever names listeners only does not ask for what goes out.
            (Role::Client, Port::Other) => self.only.is_empty() || !self.remote.is_empty(),
            _ => true,
        }
    }
}

/// A port, or all that were not named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// This one.
    Number(u16),
    /// Any other.
    Other,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Port::Number(port) => f.pad(itoa::Buffer::new().format(*port)),
            Port::Other => f.pad("other"),
        }
    }
}

/// One end of somebody's connections: those that a listener accepted, or those that go out to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// Which end is here.
    pub role: Role,
    /// The listener's port, or the remote one.
    pub port: Port,
}

/// The listening sockets of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listeners {
    /// The fullest of their accept queues.
    pub queue: AcceptQueue,
    /// Their inodes, by which the processes that listen can be found.
    pub inodes: Vec<u32>,
}

impl Listeners {
    pub(super) fn add(of: &mut BTreeMap<u16, Listeners>, row: &Row) {
        let queue = AcceptQueue::of(row);
        match of.entry(row.flow.local.port()) {
            Entry::Vacant(vacant) => drop(vacant.insert(Listeners { queue, inodes: vec![queue.inode] })),
            Entry::Occupied(mut occupied) => {
                let listeners = occupied.get_mut();
                listeners.queue = listeners.queue.fuller(queue);
                listeners.inodes.push(queue.inode);
            }
        }
    }
}

/// What a reading shows of one service.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    /// Who listens; `None` when nobody does (any more).
    pub listeners: Option<Listeners>,
    /// Connections opened since the survey began, as far as they were seen.
    pub opened: u64,
    /// Connections closed since then.
    pub closed: u64,
    pub(super) counts: [u64; State::SLOTS],
    oldest: [(Duration, bool); State::SLOTS],
}

impl Sight {
    pub(crate) fn add(&mut self, state: State, age: Duration, at_least: bool) {
        self.counts[state as usize] += 1;
        let oldest = &mut self.oldest[state as usize];
        *oldest = (*oldest).max((age, at_least));
    }

    /// How many sockets are in `state`; for LISTEN, whether somebody listens.
    #[must_use]
    pub fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// The age of the oldest in `state`, and whether it may be older: it was there when the survey began.
    #[must_use]
    pub fn oldest(&self, state: State) -> (Duration, bool) {
        self.oldest[state as usize]
    }
}

/// One socket, named because it has been where it is for long.
#[derive(Clone, Copy, Debug)]
pub struct Socket {
    /// Whose.
    pub service: Service,
    /// Its addresses.
    pub flow: Flow,
    /// By which its process can be found; 0: no process holds it.
    pub inode: u32,
    /// How long it has been in its state.
    pub age: Duration,
    /// Whether it may be older.
    pub at_least: bool,
}

/// A stay in a state that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stay {
    /// Whose.
    pub service: Service,
    /// Where.
    pub state: State,
    /// How long.
    pub time: Duration,
}

/// The table at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Every service, listeners without connections included.
    pub services: BTreeMap<Service, Sight>,
    /// The pairs of a local address and a destination that have taken the most local ports.
    pub fullest: Vec<(IpAddr, SocketAddr, u32)>,
    /// How many one pair can have; `None` where that cannot be read.
    pub ports_limit: Option<u32>,
    /// The listening ports that were asked for by number.
    pub named: Vec<u16>,
    /// How the table was read.
    pub observer: Observer,
    /// How long that took.
    pub took: Duration,
}
