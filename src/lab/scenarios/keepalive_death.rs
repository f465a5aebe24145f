//! A silent connection whose peer is gone.

use std::time::Duration;

use std::io::ErrorKind;

use socket2::{SockRef, TcpKeepalive};

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "keepalive-death",
    shows: "a silent connection whose peer is gone: keepalive ends it",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::Established, State::Close),
        Fact("it ends with ETIMEDOUT, and nobody had sent anything"),
    ],
    confirm: "ss -tano: timer:(keepalive,…); nstat -az TcpExtTCPKeepAlive.",
    why: "Nobody sends, so nobody notices. With SO_KEEPALIVE the kernel asks, after net.ipv4.tcp_keepalive_time (two hours), every tcp_keepalive_intvl, tcp_keepalive_probes times. Here it is one second, once.",
    remedy: "SO_KEEPALIVE with TCP_KEEPIDLE of a minute or so on servers with long-lived connections; below the idle timeout of every NAT and balancer on the way.",
};

pub(super) struct KeepaliveDeath;

impl Scenario for KeepaliveDeath {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, server) = stage.connected().await?;
            let second = Duration::from_secs(1);
            let often = TcpKeepalive::new().with_time(second).with_interval(second).with_retries(1);
            SockRef::from(&client.descriptor()).set_tcp_keepalive(&often)?;
            stage.lose(server.descriptor(), Segment::Any, "the server")?;
            stage.show().await?;
            stage.reach(&mut client, State::Close).await?;
            let timed_out = client.failure().is_some_and(|error| error.kind() == ErrorKind::TimedOut);
            stage.confirm("it ends with ETIMEDOUT, and nobody had sent anything", timed_out);
            stage.abort(server);
            drop(listener);
            Ok(())
        })
    }
}
