//! Two SYNs cross: nobody listens, and yet they connect.

use std::time::Duration;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use anyhow::{Context, bail};
use tokio::time::timeout;

use crate::kernel::filter::{self, Segment};
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "simultaneous-open",
    shows: "two SYNs cross: nobody listens, and yet there is a connection",
    takes: Duration::from_secs(3),
    expects: &[
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::SynRecv),
        Arrow(Role::Client, State::SynRecv, State::Established),
        Arrow(Role::Client, State::SynRecv, State::FinWait1),
        Fact("connected without a listener"),
    ],
    confirm: "ss -tan state syn-recv with a client's local port; tcpdump shows a SYN each way.",
    why: "Hole punching through NAT does it on purpose; and a client that connects to a local port in the ephemeral range may meet itself: the kernel picks the very port that it connects to, and the two SYNs are one. Here it is such a self-connection.",
    remedy: "Nothing listens on ports within net.ipv4.ip_local_port_range: choose others for services, or reserve them (ip_local_reserved_ports). Check local == peer after connecting to loopback.",
};

pub(super) struct SimultaneousOpen;

impl Scenario for SimultaneousOpen {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            stage.tell(
                "one socket, bound to the port that it connects to; the network loses every SYN+ACK on its way to it",
            );
            let copy = OnceLock::new();
            let opened = {
                let opening = stage.connect_by(stage::PATIENCE + stage.hold * 2, |socket| {
                    socket.bind(&stage.address.into())?;
                    filter::lose(socket.as_fd(), Segment::SynAck)?;
                    copy.set(socket.try_clone()?).map_err(|_| ErrorKind::AlreadyExists.into())
                });
                let watching = async {
                    stage.in_table(Role::Client, State::SynRecv).await?;
                    stage.tell("a SYN came in while ours was out: SYN_SENT becomes SYN_RECV, not ESTABLISHED");
                    stage.show().await
                };
                tokio::pin!(opening, watching);
                tokio::select! {
                    biased;
                    opened = &mut opening => drop(opened?),
                    watched = &mut watching => watched?,
                }
                stage.heal(copy.get().context("the socket was not prepared")?.as_fd())?;
                stage.tell("the SYN+ACK is repeated");
                opening.await?
            };
            // The last descriptor must go before close(2) does anything.
            drop(copy);
            stage.confirm("connected without a listener", opened.flow().local == opened.flow().peer);
            stage.abort(opened);
            stage.tell("another one closes while it is in SYN_RECV: its FIN goes out all the same");
            let other = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), stage.address.port()));
            let copy = OnceLock::new();
            let opening = stage.connect_to(other, stage::PATIENCE, |socket| {
                socket.bind(&other.into())?;
                socket.set_tcp_user_timeout(Some(Duration::from_millis(500)))?;
                filter::lose(socket.as_fd(), Segment::SynAck)?;
                copy.set(socket.try_clone()?).map_err(|_| ErrorKind::AlreadyExists.into())
            });
            match timeout(Duration::from_millis(100), opening).await {
                Err(_elapsed) => {}
                Ok(Ok(_)) => bail!("connected although every SYN+ACK was lost"),
                Ok(Err(error)) => return Err(error).with_context(|| format!("connect {other} to itself")),
            }
            let copy = copy.into_inner().context("the socket was not prepared")?;
            stage.lose(copy.as_fd(), Segment::Any, "the socket")?;
            drop(copy);
            stage.told(Role::Client, State::FinWait1).await?;
            Ok(())
        })
    }
}
