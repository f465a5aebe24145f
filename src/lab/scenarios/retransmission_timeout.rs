//! Data that is never acknowledged.

use std::time::Duration;

use std::io::ErrorKind;

use socket2::SockRef;

use crate::kernel::filter::Segment;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "retransmission-timeout",
    shows: "data is never acknowledged: the connection times out",
    takes: Duration::from_secs(2),
    expects: &[Arrow(Role::Client, State::Established, State::Close), Fact("it ends with ETIMEDOUT")],
    confirm: "ss -tino: backoff, rto, retrans; nstat -az TcpRetransSegs TcpExtTCPTimeouts.",
    why: "The peer, or the way to it, is gone without a word: a host that lost power, a NAT or firewall that forgot the connection. The kernel repeats with growing pauses, for net.ipv4.tcp_retries2 (15: a quarter of an hour). Here TCP_USER_TIMEOUT makes it 0.8 s.",
    remedy: "TCP_USER_TIMEOUT, or a timeout of the application's own, wherever somebody waits for the answer.",
};

pub(super) struct RetransmissionTimeout;

impl Scenario for RetransmissionTimeout {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, server) = stage.connected().await?;
            SockRef::from(&client.descriptor()).set_tcp_user_timeout(Some(Duration::from_millis(800)))?;
            stage.lose(server.descriptor(), Segment::Any, "the server")?;
            stage.send(&mut client, b"is anybody there?").await?;
            stage.show().await?;
            stage.reach(&mut client, State::Close).await?;
            let timed_out = client.failure().is_some_and(|error| error.kind() == ErrorKind::TimedOut);
            stage.confirm("it ends with ETIMEDOUT", timed_out);
            stage.tell("server: knows nothing of it, and stays ESTABLISHED; that is what keepalive is for");
            stage.abort(server);
            drop(listener);
            Ok(())
        })
    }
}
