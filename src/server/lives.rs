//! The listening sockets' own lives: CLOSED → LISTEN → CLOSED.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::time::Duration;

use crate::journal::Journal;
use crate::kernel::{TcpInfo, clock, sockopt};
use crate::tcp::{Cause, Evidence, Flow, Identity, Known, Lifecycle, Role, State, StateSet};

pub(super) struct Lives(Vec<(Identity, Lifecycle)>);

impl Lives {
    /// Tells of listeners on `address` that were made at `at`.
    pub(super) fn open(listeners: &[StdListener], address: SocketAddr, at: Duration, journal: &Journal) -> Lives {
        let nobody = match address {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let open = |listener: &StdListener| {
            let cookie = sockopt::cookie(listener.as_fd()).ok()?;
            let flow = Flow { local: address, peer: nobody };
            let id = Identity { cookie, role: Role::Server, port: address.port(), flow };
            let mut life = Lifecycle::listener(at);
            journal.open_listener(&id, life.state(), at);
            let state = TcpInfo::of(listener.as_fd()).ok()?.state;
            journal.record(&id, &life.observe(clock::monotonic(), state, Evidence::TcpInfo));
            Some((id, life))
        };
        Lives(listeners.iter().filter_map(open).collect())
    }

    /// After the descriptors are closed: a listener has no afterlife, and our own close(2) is what ended it.
    pub(super) fn close(self, journal: &Journal) {
        let known = Known { cause: Some(Cause::Close), never: StateSet::of(&[State::SynRecv]), ..Known::default() };
        for (id, mut life) in self.0 {
            let end = life.observe_knowing(clock::monotonic(), State::Close, Evidence::Inferred, &known);
            journal.record(&id, &end);
        }
    }
}
