//! A FIN that is not acknowledged.

use std::time::Duration;

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "fin-wait1-stuck",
    shows: "our FIN is not acknowledged",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::Established, State::FinWait1),
        Arrow(Role::Client, State::FinWait1, State::FinWait2),
        Arrow(Role::Client, State::FinWait1, State::Close),
        Arrow(Role::Server, State::Established, State::CloseWait),
        Fact("the FIN is repeated, and not answered"),
    ],
    confirm: "ss -tano state fin-wait-1: Send-Q holds at least the FIN, the timer counts its repeats.",
    why: "The peer vanished, or does not read: the FIN comes after all data, so a full receive window holds it back. Without a descriptor the kernel gives up after net.ipv4.tcp_orphan_retries.",
    remedy: "Look whether Send-Q is more than the FIN: then the peer does not read. Set TCP_USER_TIMEOUT where a peer may vanish. Thousands of them with data are an attack: net.ipv4.tcp_max_orphans ends it.",
};

pub(super) struct FinWait1Stuck;

impl Scenario for FinWait1Stuck {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, mut server) = stage.connected().await?;
            stage.lose(server.descriptor(), Segment::Fin, "the server")?;
            client.shutdown();
            stage.reach(&mut client, State::FinWait1).await?;
            let repeated = stage.until("the FIN to be repeated", || {
                stage
                    .rows(Role::Client)
                    .ok()?
                    .into_iter()
                    .find(|row| row.state == State::FinWait1 && row.retransmits > 0)
            });
            let repeated = repeated.await?;
            stage.confirm("the FIN is repeated, and not answered", repeated.send_queue > Some(0));
            stage.show().await?;
            stage.heal(server.descriptor())?;
            stage.tell("client: its kernel repeats the FIN, and it arrives");
            stage.hear_end(&mut server).await?;
            stage.reach(&mut client, State::FinWait2).await?;
            server.shutdown();
            stage.hear_end(&mut client).await?;
            stage.close(client);
            stage.tell(
                "another connection: this time the server's application dies before any FIN arrives, and a RST answers",
            );
            let mut client = stage.connect().await?;
            let server = listener.accept().await?;
            stage.lose(server.descriptor(), Segment::Fin, "the server")?;
            client.shutdown();
            stage.abort(server);
            stage.reach(&mut client, State::Close).await?;
            drop(listener);
            Ok(())
        })
    }
}
