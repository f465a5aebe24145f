//! A whole life at both ends: three segments to open, four to close, and a minute of TIME_WAIT.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Later};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "handshake-and-four-way-close",
    shows: "three segments to open, four to close, a minute of TIME_WAIT",
    takes: Duration::from_secs(62),
    expects: &[
        Arrow(Role::Server, State::Close, State::Listen),
        Arrow(Role::Server, State::Listen, State::Close),
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::Established),
        Arrow(Role::Client, State::Established, State::FinWait1),
        Arrow(Role::Client, State::FinWait1, State::FinWait2),
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Arrow(Role::Server, State::Listen, State::SynRecv),
        Arrow(Role::Server, State::SynRecv, State::Established),
        Arrow(Role::Server, State::Established, State::CloseWait),
        Arrow(Role::Server, State::CloseWait, State::LastAck),
        Arrow(Role::Server, State::LastAck, State::Close),
        Later(Role::Client, State::TimeWait, State::Close),
    ],
    confirm: "ss -tano '( sport = :PORT or dport = :PORT )', again and again; or this program's log of any pair.",
    why: "It is what every connection does that ends well. Opening takes three segments because each side must hear that its own first number has arrived; closing takes four because the side that hears the FIN may still have data to send: its ACK and its own FIN are two segments, and CLOSE_WAIT is the time between them.",
    remedy: "Nothing: this is health. TIME_WAIT belongs to whoever closes first; let it be the client, where there are many.",
};

pub(super) struct HandshakeAndFourWayClose;

impl Scenario for HandshakeAndFourWayClose {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            stage.tell("server: listens");
            let (listener, mut client, mut server) = stage.connected().await?;
            stage.tell(
                "SYN, SYN+ACK, ACK: both ends are ESTABLISHED; the client first, for the third segment is its own",
            );
            stage.send(&mut client, b"hello").await?;
            stage.receive(&mut server, 5).await?;
            stage.show().await?;
            stage.tell("client: shutdown(WR) sends FIN, segment 1 of 4; the server's kernel answers ACK, 2 of 4");
            client.shutdown();
            stage.hear_end(&mut server).await?;
            stage.reach(&mut client, State::FinWait2).await?;
            stage.show().await?;
            stage.tell("server: has data left, and sends it; then its own FIN, 3 of 4; the client's kernel answers ACK, 4 of 4");
            stage.send(&mut server, b"the rest").await?;
            stage.receive(&mut client, 8).await?;
            server.shutdown();
            stage.hear_end(&mut client).await?;
            stage.close(client);
            stage.in_table(Role::Client, State::TimeWait).await?;
            stage.reach(&mut server, State::Close).await?;
            stage.tell("client: TIME_WAIT for a minute: if its last ACK was lost, somebody must be there to answer the repeated FIN");
            stage.show().await?;
            drop((server, listener));
            Ok(())
        })
    }
}
