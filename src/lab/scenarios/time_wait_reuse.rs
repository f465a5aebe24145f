//! A TIME_WAIT gives its addresses to a new connection.

use std::time::Duration;

use std::net::{Ipv4Addr, SocketAddr};

use socket2::Socket;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "time-wait-reuse",
    shows: "a new connection takes over the addresses of a TIME_WAIT",
    takes: Duration::from_secs(2),
    expects: &[
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Arrow(Role::Client, State::TimeWait, State::Close),
        Arrow(Role::Client, State::SynSent, State::Established),
        Fact("the same addresses are connected again, long before its minute is over"),
    ],
    confirm: "nstat -az TcpExtTWRecycled; sysctl net.ipv4.tcp_tw_reuse (2: loopback only, 1: everywhere, 0: never).",
    why: "With timestamps (RFC 6191) an old segment can be told from a new one, so connect(2) may take a TIME_WAIT's place after a second at most.",
    remedy: "tcp_tw_reuse = 1 helps a client that runs out of ports; it needs net.ipv4.tcp_timestamps at both ends. (tcp_tw_recycle broke clients behind NAT, and is gone since Linux 4.12.)",
};

pub(super) struct TimeWaitReuse;

impl Scenario for TimeWaitReuse {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let from = SocketAddr::from((Ipv4Addr::LOCALHOST, stage.address.port() + 1000));
            let bound = |socket: &Socket| {
                socket.set_reuse_address(true)?;
                socket.bind(&from.into())
            };
            let listener = stage.listen(16)?;
            let mut client = stage.connect_by(stage::PATIENCE, bound).await?;
            let mut server = listener.accept().await?;
            stage.part(&mut client, &mut server).await?;
            stage.close(client);
            stage.in_table(Role::Client, State::TimeWait).await?;
            stage.told(Role::Client, State::TimeWait).await?;
            stage.show().await?;
            stage.tell("client: connects again from the very same port");
            let again = stage.connect_by(stage::PATIENCE, bound).await?;
            let server = listener.accept().await?;
            let same = server.flow().peer == from;
            stage.confirm("the same addresses are connected again, long before its minute is over", same);
            stage.told(Role::Client, State::Close).await?;
            stage.abort(again);
            drop((server, listener));
            Ok(())
        })
    }
}
