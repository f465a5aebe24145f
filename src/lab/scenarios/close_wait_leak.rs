//! An application that never closes.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "close-wait-leak",
    shows: "the peers have closed, the application never does",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Server, State::Established, State::CloseWait),
        Arrow(Role::Server, State::CloseWait, State::LastAck),
        Arrow(Role::Server, State::LastAck, State::Close),
        Arrow(Role::Client, State::FinWait1, State::FinWait2),
        Fact("every connection is in CLOSE_WAIT, and no timer will end it"),
    ],
    confirm: "ss -tanp state close-wait '( sport = :PORT )': which process; echoscope_tcp_oldest_seconds{state=\"close_wait\"}: since when.",
    why: "An error path that forgets to close, a pool that keeps what the peer has closed, a thread that waits for something else. The kernel waits for the application, without any limit, and each one holds a descriptor.",
    remedy: "Close when read returns 0. A restart frees them all, until the next time: find the path that forgets. No sysctl ends CLOSE_WAIT.",
};

pub(super) struct CloseWaitLeak;

impl Scenario for CloseWaitLeak {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let listener = stage.listen(16)?;
            let mut held = Vec::new();
            for _ in 0..3 {
                let mut client = stage.connect().await?;
                let mut server = listener.accept().await?;
                client.shutdown();
                stage.hear_end(&mut server).await?;
                held.push((client, server));
            }
            stage.tell("the clients have closed; the server's application has heard it, and does nothing");
            let rows = stage.rows(Role::Server)?;
            let leaked: Vec<_> = rows.iter().filter(|row| row.state == State::CloseWait).collect();
            let for_ever = leaked.len() == 3 && leaked.iter().all(|row| row.timer == 0);
            stage.confirm("every connection is in CLOSE_WAIT, and no timer will end it", for_ever);
            stage.show().await?;
            stage.tell("the application is restarted: its descriptors are closed, and the kernel sends the FINs that were owed");
            for (mut client, mut server) in held {
                stage.reach(&mut client, State::FinWait2).await?;
                server.shutdown();
                stage.hear_end(&mut client).await?;
                stage.close(client);
                stage.reach(&mut server, State::Close).await?;
            }
            drop(listener);
            Ok(())
        })
    }
}
