//! What this process looks at: its roles, their ports, its targets.
//!
//! Must not know: how any of it is counted.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kernel::Wanted;
use crate::tcp::{Flow, Role, StateSet};

/// A destination that the client was given.
#[derive(Debug)]
pub struct Target {
    /// As it was given: `HOST:PORT`. The metric label.
    pub name: String,
    /// The remote port.
    pub port: u16,
    addresses: Mutex<Vec<SocketAddr>>,
}

impl Target {
    /// A target that is not resolved yet.
    #[must_use]
    pub fn new(name: String, port: u16) -> Target {
        Target { name, port, addresses: Mutex::default() }
    }

    /// Notes what the name resolves to now.
    pub fn resolved(&self, addresses: &[SocketAddr]) {
        addresses.clone_into(&mut self.addresses.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What the name resolved to last.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What this process looks at: its roles, their ports, its targets. Fixed at start, so that label values are bounded.
#[derive(Debug, Default)]
pub struct Scope {
    services: Vec<(Role, u16)>,
    targets: Vec<Arc<Target>>,
}

impl Scope {
    /// The scope of listeners on `server_ports` and a client of `targets`.
    #[must_use]
    pub fn new(server_ports: &[u16], targets: Vec<Arc<Target>>) -> Scope {
        let servers = server_ports.iter().map(|port| (Role::Server, *port));
        let clients = targets.iter().map(|target| (Role::Client, target.port));
        let mut services: Vec<_> = servers.chain(clients).collect();
        services.sort_unstable();
        services.dedup();
        Scope { services, targets }
    }

    /// The client's targets.
    #[must_use]
    pub fn targets(&self) -> &[Arc<Target>] {
        &self.targets
    }

    /// The services, by role and port.
    #[must_use]
    pub fn services(&self) -> &[(Role, u16)] {
        &self.services
    }

    /// Whether anything in this role is looked at.
    #[must_use]
    pub fn has(&self, role: Role) -> bool {
        self.services.iter().any(|s| s.0 == role)
    }

    /// The sockets in `states` that belong to this scope.
    #[must_use]
    pub fn wanted(&self, states: StateSet) -> Wanted {
        let ports = |role| self.services.iter().filter(|s| s.0 == role).map(|s| s.1).collect::<Vec<_>>();
        Wanted::new(states, &ports(Role::Server), &ports(Role::Client))
    }

    /// Which service a socket belongs to. A local port that is served decides, so that over loopback each end counts
    /// once, under its own role.
    #[must_use]
    pub fn service_of(&self, flow: &Flow) -> Option<usize> {
        let position = |role, port| self.services.binary_search(&(role, port)).ok();
        let client = || position(Role::Client, flow.peer.port());
        // A connection to itself was opened here, and nobody listens.
        if flow.local == flow.peer {
            return client().or_else(|| position(Role::Server, flow.local.port()));
        }
        position(Role::Server, flow.local.port()).or_else(client)
    }
}
