//! Handshakes come faster than accept(2).

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "accept-queue-overflow",
    shows: "a full accept queue: the next SYN goes unanswered",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::Established),
        Fact("the queue is over its limit"),
        Fact("the next client is held in SYN_SENT"),
        Fact("accept(2) makes room, and the repeated SYN is answered"),
    ],
    confirm: "ss -tln: Recv-Q above Send-Q; nstat -az TcpExtListenOverflows TcpExtListenDrops; echoscope_accept_queue_length.",
    why: "The application accepts too slowly (blocked, or a single thread at its limit), or the backlog is small (listen(2), net.core.somaxconn). The kernel drops SYNs: clients see a second of silence, then three, then seven.",
    remedy: "Accept faster; a larger backlog buys time only. net.ipv4.tcp_abort_on_overflow = 1 turns the silence into resets.",
};

pub(super) struct AcceptQueueOverflow;

impl Scenario for AcceptQueueOverflow {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let listener = stage.listen(0)?;
            stage.tell("server: listen(0), and does not accept: one connection fits");
            let first = stage.connect().await?;
            let full = stage.until("the queue to be full", || {
                let rows = stage.rows(Role::Server).ok()?;
                rows.into_iter().find(|row| row.state == State::Listen && Some(row.receive_queue) > row.send_queue)
            });
            stage.confirm("the queue is over its limit", full.await.is_ok());
            let opening = stage.connect_by(stage::PATIENCE + stage.hold * 2, |_| Ok(()));
            let accepting = async {
                let waits = stage.in_table(Role::Client, State::SynSent).await.is_ok();
                stage.show().await?;
                stage.confirm("the next client is held in SYN_SENT", waits);
                stage.tell("server: accepts");
                listener.accept().await
            };
            let (opened, accepted) = tokio::join!(opening, accepting);
            let (second, first_served) = (opened?, accepted?);
            let second_served = listener.accept().await?;
            stage.confirm("accept(2) makes room, and the repeated SYN is answered", true);
            for conn in [first, second] {
                stage.abort(conn);
            }
            drop((first_served, second_served, listener));
            Ok(())
        })
    }
}
