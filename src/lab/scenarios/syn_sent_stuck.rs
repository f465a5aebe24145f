//! A client whose SYN is never answered, as far as it can see.

use std::time::Duration;

use std::io::ErrorKind;
use std::os::fd::AsFd;

use crate::kernel::filter::{self, Segment};
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "syn-sent-stuck",
    shows: "a client whose SYN goes unanswered",
    takes: Duration::from_secs(4),
    expects: &[
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::Close),
        Arrow(Role::Server, State::Listen, State::SynRecv),
        Arrow(Role::Server, State::SynRecv, State::Close),
        Fact("connect(2) times out"),
    ],
    confirm: "ss -tano state syn-sent: the timer counts the repeats; tcpdump 'tcp[tcpflags] & tcp-syn != 0'.",
    why: "A firewall that drops silently, a host that is gone, a route that leads nowhere, or an answer that finds no way back. The SYN is repeated after 1, 3, 7 … seconds (net.ipv4.tcp_syn_retries: about two minutes in all).",
    remedy: "Set a connect timeout of your own. Look on both hosts whether the SYN arrives and the SYN+ACK leaves. Let firewalls reject (RST, ICMP) rather than drop.",
};

pub(super) struct SynSentStuck;

impl Scenario for SynSentStuck {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let listener = stage.listen(16)?;
            stage.tell("the network loses every SYN+ACK on its way to the client");
            let patience = Duration::from_millis(1500) + stage.hold;
            let opening = stage.connect_by(patience, |socket| filter::lose(socket.as_fd(), Segment::SynAck));
            let watching = async {
                let request = stage.in_table(Role::Server, State::SynRecv).await?;
                stage.follow(&request)?;
                stage.tell("server: has answered, and waits for the third segment in SYN_RECV");
                stage.show().await
            };
            let (opened, watched) = tokio::join!(opening, watching);
            watched?;
            stage.confirm("connect(2) times out", opened.is_err_and(|e| e.kind() == ErrorKind::TimedOut));
            stage.tell("server: repeats its SYN+ACK, and hears a RST now: nobody waits for it any more");
            stage.told(Role::Server, State::Close).await?;
            drop(listener);
            Ok(())
        })
    }
}
