//! The server closes first.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "drain",
    shows: "the server closes first: TIME_WAIT is the server's",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Server, State::Established, State::FinWait1),
        Arrow(Role::Server, State::FinWait1, State::FinWait2),
        Arrow(Role::Server, State::FinWait2, State::TimeWait),
        Arrow(Role::Client, State::Established, State::CloseWait),
        Arrow(Role::Client, State::CloseWait, State::LastAck),
        Arrow(Role::Client, State::LastAck, State::Close),
        Fact("TIME_WAIT is on the server's port"),
    ],
    confirm: "ss -tan state time-wait '( sport = :PORT )'.",
    why: "A server that is drained for a restart, an idle timeout of the server's, HTTP/1.0. The port is not blocked: servers set SO_REUSEADDR, and connections of others may come as before.",
    remedy: "Nothing. It takes no local port that anybody could run out of. A server that binds without SO_REUSEADDR cannot restart for a minute.",
};

pub(super) struct Drain;

impl Scenario for Drain {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, mut server) = stage.connected().await?;
            stage.tell("server: shutdown(WR): it is drained");
            server.shutdown();
            stage.hear_end(&mut client).await?;
            stage.reach(&mut server, State::FinWait2).await?;
            stage.show().await?;
            stage.tell("client: closes too");
            client.shutdown();
            stage.hear_end(&mut server).await?;
            stage.reach(&mut client, State::Close).await?;
            stage.close(server);
            let left = stage.in_table(Role::Server, State::TimeWait).await?;
            stage.confirm("TIME_WAIT is on the server's port", left.flow.local == stage.address);
            stage.show().await?;
            drop(listener);
            Ok(())
        })
    }
}
