//! Two FINs cross.

use std::time::Duration;

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "simultaneous-close",
    shows: "two FINs cross: CLOSING, and TIME_WAIT at both ends",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Client, State::Established, State::FinWait1),
        Arrow(Role::Client, State::FinWait1, State::Closing),
        Arrow(Role::Client, State::Closing, State::TimeWait),
        Fact("CLOSING, until our FIN is acknowledged"),
    ],
    confirm: "ss -tan state closing: seldom to be caught, it lasts a round trip.",
    why: "Both ends close at the same moment: each FIN arrives before the answer to the other. Here it is a connection to itself, so that there is one FIN, and it is both.",
    remedy: "Nothing. Many that stay in CLOSING: the ACKs of our FINs do not arrive.",
};

pub(super) struct SimultaneousClose;

impl Scenario for SimultaneousClose {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let mut conn = stage.connect_by(stage::PATIENCE, |socket| socket.bind(&stage.address.into())).await?;
            stage.lose(conn.descriptor(), Segment::BareAck, "the socket")?;
            conn.shutdown();
            stage.reach(&mut conn, State::Closing).await?;
            let closing = stage.in_table(Role::Client, State::Closing).await?;
            stage.confirm("CLOSING, until our FIN is acknowledged", closing.send_queue > Some(0));
            stage.show().await?;
            // Until it is read, our FIN lies in our own receive queue, and what lies in a queue of this host is not
            // repeated (`skb_still_in_host_queue`).
            stage.hear_end(&mut conn).await?;
            stage.heal(conn.descriptor())?;
            stage.in_table(Role::Client, State::TimeWait).await?;
            conn.observe();
            stage.close(conn);
            Ok(())
        })
    }
}
