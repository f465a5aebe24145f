//! Many short connections, all closed from here.

use std::time::Duration;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::{About, Play, Scenario, Stage};
use crate::ledger::Reason;
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "time-wait-flood",
    shows: "many short connections: each leaves a TIME_WAIT at the end that closes first",
    takes: Duration::from_secs(2),
    expects: &[
        Arrow(Role::Client, State::FinWait2, State::TimeWait),
        Fact("each connection has left a TIME_WAIT, and the server has none"),
    ],
    confirm: "ss -tan state time-wait '( dport = :PORT )' | wc -l; cat /proc/net/sockstat (tw).",
    why: "A client without a pool or keep-alive, a health check, a proxy that opens a connection for each request. Opens a second times 60 is how many there are.",
    remedy: "Reuse connections. As such TIME_WAIT costs some 300 bytes and no descriptor; what runs out is local ports, for each destination (see port-exhaustion).",
};

pub(super) struct TimeWaitFlood;

impl Scenario for TimeWaitFlood {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            const MANY: usize = 50;
            let listener = stage.listen(16)?;
            for _ in 0..MANY {
                let mut client = stage.connect().await?;
                let mut server = listener.accept().await?;
                stage.part(&mut client, &mut server).await?;
                for mut conn in [client, server] {
                    conn.because(Reason::Graceful);
                }
            }
            let left = stage.count(Role::Client, State::TimeWait)?;
            let served: Vec<_> =
                stage.rows(Role::Server)?.into_iter().filter(|row| row.state == State::TimeWait).collect();
            let none = served.iter().all(|row| row.flow.local != stage.address);
            stage.confirm("each connection has left a TIME_WAIT, and the server has none", left == MANY && none);
            stage.show().await?;
            drop(listener);
            Ok(())
        })
    }
}
