//! A reader that does not read: the window closes.

use std::time::Duration;

use std::io::ErrorKind;

use socket2::SockRef;
use tokio::time::timeout;

use crate::kernel::timer;
use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "slow-reader",
    shows: "a reader that does not read: the window closes, and the sender waits",
    takes: Duration::from_secs(2),
    expects: &[
        Arrow(Role::Client, State::SynSent, State::Established),
        Fact("the window is zero: the sender's persist timer runs"),
        Fact("all arrives once it is read"),
    ],
    confirm: "ss -tnom: Recv-Q full at the reader, Send-Q at the sender, timer:(persist,…); nstat -az TcpExtTCPToZeroWindowAdv.",
    why: "The reading application is slow or blocked. Nothing is wrong with the network: both ends are ESTABLISHED, and data stands still.",
    remedy: "Look at the end with the full Recv-Q. Give writes a timeout: a peer that does not read holds the sender for ever.",
};

pub(super) struct SlowReader;

impl Scenario for SlowReader {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            let listener = stage.listen(16)?;
            SockRef::from(&listener.descriptor()).set_recv_buffer_size(16 * 1024)?;
            let mut client = stage.connect().await?;
            let mut server = listener.accept().await?;
            SockRef::from(&client.descriptor()).set_send_buffer_size(16 * 1024)?;
            stage.tell("client: sends; the server's application does not read");
            let mut sent = 0;
            while let Ok(Ok(())) = timeout(Duration::from_millis(300), client.writable()).await {
                match client.try_write(&[b'x'; 4096]) {
                    Ok(written) => sent += written,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e.into()),
                }
            }
            let stands = stage.until("the persist timer", || {
                stage.rows(Role::Client).ok()?.into_iter().find(|r| r.timer == timer::PERSIST)
            });
            stage.confirm("the window is zero: the sender's persist timer runs", stands.await.is_ok());
            stage.show().await?;
            stage.tell("server: reads at last");
            let received = stage.receive(&mut server, sent).await?;
            stage.confirm("all arrives once it is read", received == sent);
            stage.abort(client);
            drop((server, listener));
            Ok(())
        })
    }
}
