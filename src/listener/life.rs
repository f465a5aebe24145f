//! A listening socket's own life: CLOSED → LISTEN → CLOSED.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::time::Duration;

use crate::journal::Journal;
use crate::kernel::{TcpInfo, clock, sockopt};
use crate::tcp::{Cause, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet};

/// A listening socket's life, told to the journal.
pub struct ListenerLife {
    id: Identity,
    life: Lifecycle,
}

impl ListenerLife {
    /// Tells of a listener on `address` that was made at `at`; nothing, if the kernel says nothing of it.
    #[must_use]
    pub fn open(listener: &StdListener, address: SocketAddr, at: Duration, journal: &Journal) -> Option<ListenerLife> {
        let nobody = match address {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let cookie = sockopt::cookie(listener.as_fd()).ok()?;
        let flow = Flow { local: address, peer: nobody };
        let id = Identity { cookie, role: Role::Server, port: address.port(), flow };
        let mut life = Lifecycle::listener(at);
        journal.open(&id, life.state(), at);
        let state = TcpInfo::of(listener.as_fd()).ok()?.state;
        journal.record(&id, &life.observe(clock::monotonic(), state, Evidence::TcpInfo));
        Some(ListenerLife { id, life })
    }

    /// Right after the descriptor is closed: a listener has no afterlife, and our own close(2) is what ended it.
    pub fn close(mut self, journal: &Journal) {
        let now = clock::monotonic();
        let call = Some((Cause::Close, now));
        let known =
            Known { cause: Some(Cause::Close), never: StateSet::of(&[State::SynRecv]), call, ..Known::default() };
        journal.record(&self.id, &self.life.observe_knowing(now, State::Close, Evidence::Inferred, &known));
    }
}
