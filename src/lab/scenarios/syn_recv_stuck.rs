//! A handshake whose third segment is lost: the client believes that it is connected.

use std::time::Duration;

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "syn-recv-stuck",
    shows: "the third segment is lost: the client is ESTABLISHED, the server is not",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::Established),
        Arrow(Role::Server, State::Listen, State::SynRecv),
        Arrow(Role::Server, State::SynRecv, State::Established),
        Fact("the client is ESTABLISHED while the server is in SYN_RECV"),
    ],
    confirm: "ss -tan state syn-recv; nstat -az TcpExtSyncookiesSent TcpExtTCPReqQFullDrop.",
    why: "Loss on the way, a SYN flood of senders that never answer, or asymmetric routing. Requests hold no descriptor and no accept queue, but there is a limit to them (net.ipv4.tcp_max_syn_backlog, and the listen backlog).",
    remedy: "A few that come and go are normal. Many: SYN cookies (net.ipv4.tcp_syncookies = 1), and look whether the ACKs arrive at all.",
};

pub(super) struct SynRecvStuck;

impl Scenario for SynRecvStuck {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let listener = stage.listen(16)?;
            stage.lose(listener.descriptor(), Segment::BareAck, "the listener")?;
            let mut client = stage.connect().await?;
            let request = stage.in_table(Role::Server, State::SynRecv).await?;
            stage.follow(&request)?;
            let apart = client.observe() == State::Established && stage.count(Role::Server, State::SynRecv)? == 1;
            stage.confirm("the client is ESTABLISHED while the server is in SYN_RECV", apart);
            stage.show().await?;
            stage.heal(listener.descriptor())?;
            stage.tell("server: repeats its SYN+ACK, a second after the first; the client its ACK");
            let (server, _) = listener.accept_silently().await?;
            stage.told(Role::Server, State::Established).await?;
            stage.close(client);
            drop((server, listener));
            Ok(())
        })
    }
}
