//! A late duplicate ends a TIME_WAIT early (RFC 1337).

use std::time::Duration;

use std::net::{IpAddr, SocketAddr};

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "time-wait-assassination",
    shows: "a late duplicate ends a TIME_WAIT early (RFC 1337)",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Arrow(Role::Client, State::TimeWait, State::Close),
        Fact("TIME_WAIT is gone long before its minute is over"),
    ],
    confirm: "nstat -az TcpOutRsts; tcpdump: an old segment, the ACK that TIME_WAIT answers, the RST that answers the ACK.",
    why: "A segment of the connection that was long on its way arrives. TIME_WAIT answers it with an ACK; the other end knows of no connection any more, and answers with a RST; and a RST ends TIME_WAIT, unless net.ipv4.tcp_rfc1337 = 1.",
    remedy: "Harmless nearly always. net.ipv4.tcp_rfc1337 = 1 where the same addresses are used again at once, and old duplicates would be taken for new data.",
};

pub(super) struct TimeWaitAssassination;

impl Scenario for TimeWaitAssassination {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, mut server) = stage.connected().await?;
            stage.part(&mut client, &mut server).await?;
            let flow = client.flow();
            stage.close(client);
            stage.reach(&mut server, State::Close).await?;
            stage.in_table(Role::Client, State::TimeWait).await?;
            stage.told(Role::Client, State::TimeWait).await?;
            stage.show().await?;
            stage.tell("an old segment of the connection arrives at TIME_WAIT: an ACK answers it, and a RST the ACK");
            late_duplicate(flow.peer, flow.local).context("send a raw segment (wants CAP_NET_RAW)")?;
            stage.told(Role::Client, State::Close).await?;
            let gone = stage.count(Role::Client, State::TimeWait)? == 0;
            stage.confirm("TIME_WAIT is gone long before its minute is over", gone);
            drop(listener);
            Ok(())
        })
    }
}

/// Sends a bare ACK of a sequence number that is long past, as if the network had kept it (RFC 9293 section 3.1 for the
/// header, section 3.1 too for the checksum over the pseudo-header).
fn late_duplicate(from: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let (IpAddr::V4(source), IpAddr::V4(target)) = (from.ip(), to.ip()) else {
        return Err(std::io::ErrorKind::Unsupported.into());
    };
    let mut segment = [0; 20];
    segment[0..2].copy_from_slice(&from.port().to_be_bytes());
    segment[2..4].copy_from_slice(&to.port().to_be_bytes());
    segment[4..8].copy_from_slice(&1u32.to_be_bytes());
    segment[8..12].copy_from_slice(&1u32.to_be_bytes());
    segment[12] = 5 << 4; // five words of header
    segment[13] = 0x10; // ACK
    segment[14..16].copy_from_slice(&1024u16.to_be_bytes());
    let mut summed = Vec::from(source.octets());
    summed.extend(target.octets());
    summed.extend([0, 6, 0, 20]); // protocol, length
    summed.extend(segment);
    let sum: u32 = summed.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !(((folded & 0xffff) + (folded >> 16)) as u16);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::new(from.ip(), 0).into())?;
    socket.send_to(&segment, &SocketAddr::new(to.ip(), 0).into()).map(drop)
}
