//! close(2) while data waits to be read.

use std::time::Duration;

use std::io::ErrorKind;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "reset-by-unread-data",
    shows: "close(2) with unread data sends a RST instead of a FIN",
    takes: Duration::from_secs(1),
    expects: &[Arrow(Role::Client, State::Established, State::Close), Fact("the client reads ECONNRESET")],
    confirm: "nstat -az TcpExtTCPAbortOnClose at the end that closes; ss -tan shows Recv-Q before.",
    why: "A server that answers early and closes without reading the rest of the request (an upload that is refused): the kernel says that data was lost (RFC 9293 section 3.6.1). The client may never see the answer that was sent before.",
    remedy: "shutdown(WR), then read to the end of the stream, then close.",
};

pub(super) struct ResetByUnreadData;

impl Scenario for ResetByUnreadData {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let (listener, mut client, server) = stage.connected().await?;
            stage.send(&mut client, b"nobody reads this").await?;
            stage
                .until("data to wait", || {
                    stage.rows(Role::Server).ok()?.into_iter().find(|row| row.receive_queue >= 17)
                })
                .await?;
            stage.show().await?;
            stage.tell("server: closes, with 17 bytes unread");
            stage.close(server);
            stage.reach(&mut client, State::Close).await?;
            let reset = client.failure().is_some_and(|error| error.kind() == ErrorKind::ConnectionReset);
            stage.confirm("the client reads ECONNRESET", reset);
            drop(listener);
            Ok(())
        })
    }
}
