//! No local port is left towards a destination.

use std::time::Duration;

use std::io::ErrorKind;
use std::os::fd::AsFd;

use socket2::Socket;

use crate::kernel::sockopt;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "port-exhaustion",
    shows: "no local port is left towards a destination: EADDRNOTAVAIL",
    takes: Duration::from_secs(1),
    expects: &[Arrow(Role::Client, State::FinWait2, State::TimeWait), Fact("connect(2) fails with EADDRNOTAVAIL")],
    confirm: "ss -tan dst ADDRESS:PORT | wc -l beside sysctl net.ipv4.ip_local_port_range; echoscope_local_ports_used.",
    why: "Every local port in the range is taken towards one address and port, most of them by TIME_WAIT. Other destinations still work: a port is taken for a pair of addresses, not for the host. Here the socket option IP_LOCAL_PORT_RANGE leaves eight ports.",
    remedy: "Reuse connections; let the server close first; more source or destination addresses; a wider ip_local_port_range; net.ipv4.tcp_tw_reuse = 1 with timestamps at both ends.",
};

pub(super) struct PortExhaustion;

impl Scenario for PortExhaustion {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            const FIRST: u16 = 40000;
            const PORTS: u16 = 8;
            let listener = stage.listen(16)?;
            stage.tell(
                "connections from one of eight local ports; each is closed from here, and leaves its port in TIME_WAIT",
            );
            let few = |socket: &Socket| sockopt::choose_local_ports(socket.as_fd(), FIRST, FIRST + PORTS - 1);
            let mut full = false;
            // A TIME_WAIT that is a second old may be used again on loopback (net.ipv4.tcp_tw_reuse = 2): be quick.
            for _ in 0..=PORTS {
                match stage.connect_by(stage::PATIENCE, few).await {
                    Ok(mut client) => {
                        let mut server = listener.accept().await?;
                        stage.part(&mut client, &mut server).await?;
                        stage.close(client);
                    }
                    Err(error) => {
                        stage.tell(&format!("client: {error}"));
                        full = error.kind() == ErrorKind::AddrNotAvailable;
                    }
                }
            }
            stage.confirm("connect(2) fails with EADDRNOTAVAIL", full);
            stage.show().await?;
            drop(listener);
            Ok(())
        })
    }
}
