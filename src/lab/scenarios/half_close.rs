//! One side has said all it has to say, and still listens.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "half-close",
    shows: "one side has finished, the other still sends: FIN_WAIT2 and CLOSE_WAIT with data",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Client, State::Established, State::FinWait1),
        Arrow(Role::Client, State::FinWait1, State::FinWait2),
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Arrow(Role::Server, State::Established, State::CloseWait),
        Arrow(Role::Server, State::CloseWait, State::LastAck),
        Arrow(Role::Server, State::LastAck, State::Close),
        Fact("data still flows towards the end that has sent its FIN"),
    ],
    confirm: "ss -tan state close-wait state fin-wait-2, and tcpdump: data after the FIN of the other side.",
    why: "A request that ends with a FIN (netcat, rsh, some proxies), or a server that streams its answer after the client has finished. It is why CLOSE_WAIT exists.",
    remedy: "Nothing, while data flows. A proxy that closes both sides at the first FIN cuts such answers short: look there when they end early.",
};

pub(super) struct HalfClose;

impl Scenario for HalfClose {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, mut server) = stage.connected().await?;
            stage.tell("client: shutdown(WR): it has said all, and still reads");
            client.shutdown();
            stage.hear_end(&mut server).await?;
            stage.reach(&mut client, State::FinWait2).await?;
            let mut received = 0;
            for _ in 0..3 {
                stage.send(&mut server, &[b'x'; 1000]).await?;
                received += stage.receive(&mut client, 1000).await?;
            }
            let halves = client.observe() == State::FinWait2 && server.observe() == State::CloseWait;
            stage.confirm("data still flows towards the end that has sent its FIN", halves && received == 3000);
            stage.show().await?;
            stage.tell("server: is done too, and closes");
            server.shutdown();
            stage.hear_end(&mut client).await?;
            stage.close(client);
            stage.reach(&mut server, State::Close).await?;
            drop(listener);
            Ok(())
        })
    }
}
