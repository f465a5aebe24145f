//! A closed descriptor whose peer never closes.

use std::time::Duration;

use crate::kernel::sockopt;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "fin-wait2-orphan",
    shows: "closed here, never closed there: the kernel gives FIN_WAIT2 up",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::FinWait1, State::FinWait2),
        Arrow(Role::Client, State::FinWait2, State::Close),
        Arrow(Role::Server, State::Established, State::CloseWait),
        Arrow(Role::Server, State::CloseWait, State::Close),
        Fact("nothing is left of the client's end, while the server's is still in CLOSE_WAIT"),
    ],
    confirm: "ss -tano state fin-wait-2: no process (ss -p shows none), timer:(timewait,…).",
    why: "The peer leaks CLOSE_WAIT: this is how that looks from the other end. Without a descriptor nobody could read what the peer may still send, so the kernel waits net.ipv4.tcp_fin_timeout (60 s), and no longer. Here TCP_LINGER2 makes it one second.",
    remedy: "Find the peer that does not close. tcp_fin_timeout concerns these only: it does not shorten TIME_WAIT.",
};

pub(super) struct FinWait2Orphan;

impl Scenario for FinWait2Orphan {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, client, mut server) = stage.connected().await?;
            sockopt::keep_orphan_for(client.descriptor(), 1)?;
            stage.tell("client: closes; the server's application never will");
            stage.close(client);
            stage.hear_end(&mut server).await?;
            stage.in_table(Role::Client, State::FinWait2).await?;
            stage.show().await?;
            stage.told(Role::Client, State::Close).await?;
            let alone = stage.count(Role::Client, State::FinWait2)? == 0 && server.observe() == State::CloseWait;
            stage.confirm("nothing is left of the client's end, while the server's is still in CLOSE_WAIT", alone);
            stage.tell("server: sends something at last, and hears a RST");
            stage.send(&mut server, b"are you there?").await?;
            stage.reach(&mut server, State::Close).await?;
            drop(listener);
            Ok(())
        })
    }
}
