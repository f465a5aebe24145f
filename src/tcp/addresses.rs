//! The two addresses of a connection in little room, for every connection keeps them.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};

use super::Flow;

/// A flow in the room of two pointers, where both ends are IPv4, also as a dual-stack listener sees it (IPv4-mapped).
#[derive(Clone, Debug)]
pub enum Addresses {
    /// IPv4.
    V4(SocketAddrV4, SocketAddrV4),
    /// IPv4-mapped IPv6, without scope or flow label.
    Mapped(SocketAddrV4, SocketAddrV4),
    /// Anything else.
    Other(Box<Flow>),
}

impl Addresses {
    /// The addresses of `flow`; [`flow`](Self::flow) gives the same back.
    #[must_use]
    pub fn of(flow: Flow) -> Addresses {
        match (flow, mapped(flow.local), mapped(flow.peer)) {
            (Flow { local: SocketAddr::V4(local), peer: SocketAddr::V4(peer) }, ..) => Addresses::V4(local, peer),
            (_, Some(local), Some(peer)) => Addresses::Mapped(local, peer),
            _ => Addresses::Other(Box::new(flow)),
        }
    }

    /// The flow that these are of.
    #[must_use]
    pub fn flow(&self) -> Flow {
        let map = |address: &SocketAddrV4| SocketAddr::new(address.ip().to_ipv6_mapped().into(), address.port());
        match self {
            Addresses::V4(local, peer) => Flow { local: (*local).into(), peer: (*peer).into() },
            Addresses::Mapped(local, peer) => Flow { local: map(local), peer: map(peer) },
            Addresses::Other(flow) => **flow,
        }
    }
}

fn mapped(address: SocketAddr) -> Option<SocketAddrV4> {
    let SocketAddr::V6(v6) = address else { return None };
    match address.ip().to_canonical() {
        IpAddr::V4(ip) if v6.scope_id() == 0 && v6.flowinfo() == 0 => Some(SocketAddrV4::new(ip, v6.port())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        assert_eq!(size_of::<Addresses>(), 16);
        for (local, peer) in [
            ("127.0.0.1:1", "10.0.0.1:65535"),
            ("[::ffff:127.0.0.1]:7007", "[::ffff:127.0.0.1]:40000"),
            ("[::ffff:127.0.0.1%3]:7007", "[::ffff:127.0.0.1%3]:40000"),
            ("[::1]:7007", "[::1]:40000"),
            ("[fe80::1%3]:7007", "[fe80::2%3]:40000"),
            ("[::]:7007", "[::ffff:10.0.0.1]:5"),
            ("0.0.0.0:0", "[::1]:5"),
        ] {
            let flow = Flow { local: local.parse().unwrap(), peer: peer.parse().unwrap() };
            assert_eq!(Addresses::of(flow).flow(), flow);
        }
    }
}
