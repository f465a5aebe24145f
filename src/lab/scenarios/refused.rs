//! Nobody listens.

use std::time::Duration;

use std::io::ErrorKind;

use crate::lab::Expect::{Arrow, Fact};
use crate::lab::stage;
use crate::lab::{About, Play, Scenario, Stage};
use crate::tcp::{Role, State};

const ABOUT: About = About {
    name: "refused",
    shows: "nobody listens: a RST answers the SYN",
    takes: Duration::from_secs(1),
    expects: &[
        Arrow(Role::Client, State::Close, State::SynSent),
        Arrow(Role::Client, State::SynSent, State::Close),
        Fact("connect(2) fails with ECONNREFUSED"),
    ],
    confirm: "ss -tln: no listener on that port; tcpdump: SYN, RST+ACK.",
    why: "The service is down, listens on another address (127.0.0.1 in a container), or a firewall rejects.",
    remedy: "It is the quickest failure there is: try again, after a pause. Look with ss -tln on which addresses the service listens.",
};

pub(super) struct Refused;

impl Scenario for Refused {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a> {
        Box::pin(async move {
            stage.tell("client: connects to a port where nobody listens");
            let refused = stage.connect_by(stage::PATIENCE, |_| Ok(())).await;
            let refused = refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
            stage.confirm("connect(2) fails with ECONNREFUSED", refused);
            stage.show().await?;
            Ok(())
        })
    }
}
