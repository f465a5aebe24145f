//! Why TIME_WAIT exists: the last ACK is lost, and somebody is there to repeat it.

use std::time::Duration;

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "last-ack-lost",
    shows: "why TIME_WAIT exists: the last ACK is lost, the FIN repeated, and answered again",
    takes: Duration::from_secs(2),
    expects: &[
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Arrow(Role::Server, State::CloseWait, State::LastAck),
        Arrow(Role::Server, State::LastAck, State::Close),
        Fact("TIME_WAIT answers the repeated FIN, and its clock starts again"),
    ],
    confirm: "ss -tano state time-wait: the timer jumps back to 60 s; ss -tano state last-ack at the other end.",
    why: "An ACK is not acknowledged: whoever sends the last one cannot know that it arrived, so it stays for a minute to answer again. If it were gone, the repeated FIN would be answered by a RST, and a close that went well would look like a failure.",
    remedy: "Nothing: TIME_WAIT does its work. Do not shorten it with tricks.",
};

pub(super) struct LastAckLost;

impl Scenario for LastAckLost {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, mut server) = stage.connected().await?;
            client.shutdown();
            stage.hear_end(&mut server).await?;
            stage.reach(&mut client, State::FinWait2).await?;
            stage.lose(server.descriptor(), Segment::BareAck, "the server")?;
            server.shutdown();
            stage.hear_end(&mut client).await?;
            stage.close(client);
            let mut left = stage.in_table(Role::Client, State::TimeWait).await?.expires;
            stage.reach(&mut server, State::LastAck).await?;
            stage.told(Role::Client, State::TimeWait).await?;
            stage.show().await?;
            stage.tell("server: no ACK has come, so it repeats its FIN");
            let restarted = stage.until("TIME_WAIT's clock to start again", || {
                let row = stage.rows(Role::Client).ok()?.into_iter().find(|row| row.state == State::TimeWait)?;
                let before = std::mem::replace(&mut left, row.expires);
                (row.expires > before + Duration::from_millis(20)).then_some(())
            });
            let restarted = restarted.await.is_ok() && server.observe() == State::LastAck;
            stage.confirm("TIME_WAIT answers the repeated FIN, and its clock starts again", restarted);
            stage.heal(server.descriptor())?;
            stage.tell("the FIN is repeated once more, and the answer arrives");
            stage.reach(&mut server, State::Close).await?;
            drop(listener);
            Ok(())
        })
    }
}
