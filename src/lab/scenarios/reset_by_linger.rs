//! close(2) with SO_LINGER 0.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "reset-by-linger",
    shows: "SO_LINGER 0: close(2) sends a RST, and nothing is left at either end",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Client, State::Established, State::Close),
        Arrow(Role::Server, State::Established, State::Close),
        Fact("no TIME_WAIT at either end"),
    ],
    confirm: "tcpdump: RST instead of FIN; nstat -az TcpExtTCPAbortOnData; the peer reads ECONNRESET.",
    why: "An application that wants no TIME_WAIT (load generators, health checks), or whose runtime ends without closing properly.",
    remedy: "Data that the peer has not read yet is lost: do not use it to get rid of TIME_WAIT.",
};

pub(super) struct ResetByLinger;

impl Scenario for ResetByLinger {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, client, mut server) = stage.connected().await?;
            stage.show().await?;
            stage.abort(client);
            stage.reach(&mut server, State::Close).await?;
            let none =
                Role::ALL.iter().map(|role| stage.count(*role, State::TimeWait)).sum::<anyhow::Result<usize>>()?;
            stage.confirm("no TIME_WAIT at either end", none == 0);
            drop(listener);
            Ok(())
        })
    }
}
