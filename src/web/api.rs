//! The JSON of `/api/sockets` and `/api/connections`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::census::Reading;
use crate::journal::Journal;
use crate::kernel::clock;
use crate::ledger::{KEPT, Life, Reason};
use crate::tcp::{Cause, State, Step};

const DEFAULT_LIMIT: usize = 100;

/// The `limit` of a query: how many lives to tell of.
pub(super) fn limit(query: Option<&str>) -> Result<usize, &'static str> {
    let mut limit = DEFAULT_LIMIT;
    for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
        let value = pair.strip_prefix("limit=").ok_or("unknown parameter; known: limit\n")?;
        limit = value.parse().ok().filter(|n| (1..=10 * KEPT).contains(n)).ok_or("limit must be from 1 to 10000\n")?;
    }
    Ok(limit)
}

/// The census.
#[derive(Serialize)]
pub(super) struct Sockets<'a> {
    observer: &'static str,
    seconds: f64,
    services: Vec<Service>,
    targets: Vec<Ports<'a>>,
}

#[derive(Serialize)]
struct Service {
    role: &'static str,
    port: u16,
    sockets: BTreeMap<&'static str, u64>,
    oldest_seconds: BTreeMap<&'static str, f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accept_queue: Option<Queue>,
}

#[derive(Serialize)]
struct Queue {
    length: u32,
    limit: Option<u32>,
}

#[derive(Serialize)]
struct Ports<'a> {
    target: &'a str,
    local_ports_used: u32,
    local_ports_limit: Option<u32>,
}

impl Sockets<'_> {
    pub(super) fn of(reading: &Reading) -> Sockets<'_> {
        let services = reading.services.iter().map(|s| Service {
            role: s.role.label(),
            port: s.port,
            sockets: State::ALL.map(|state| (state.label(), s.count(state))).into(),
            oldest_seconds: State::ALL
                .into_iter()
                .filter(|state| s.count(*state) > 0)
                .filter_map(|state| Some((state.label(), s.oldest(state)?.as_secs_f64())))
                .collect(),
            accept_queue: s.accept_queue.map(|q| Queue { length: q.length, limit: q.limit }),
        });
        let targets = reading.targets.iter().map(|t| Ports {
            target: &t.name,
            local_ports_used: t.ports_used,
            local_ports_limit: reading.ports_limit,
        });
        Sockets {
            observer: reading.observer.label(),
            seconds: reading.took.as_secs_f64(),
            services: services.collect(),
            targets: targets.collect(),
        }
    }
}

/// One life.
#[derive(Serialize)]
pub(super) struct Connection {
    conn: String,
    role: &'static str,
    port: u16,
    local: String,
    peer: String,
    state: &'static str,
    /// Unix time.
    opened: f64,
    /// Unix time.
    since: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// False when nobody follows it to its end.
    followed: bool,
    steps: Vec<TakenStep>,
}

#[derive(Serialize)]
struct TakenStep {
    to: &'static str,
    /// Unix time.
    at: f64,
    evidence: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<&'static str>,
}

/// The youngest `limit` lives, going on or ended.
pub(super) fn connections(journal: &Journal, limit: usize) -> Vec<Connection> {
    let offset = clock::unix().saturating_sub(clock::monotonic());
    let unix = |at: Duration| (offset + at).as_secs_f64();
    let tell = |life: &Life| {
        let flow = life.flow();
        Connection {
            conn: format!("{:x}", life.cookie),
            role: life.role.label(),
            port: life.port,
            local: flow.local.to_string(),
            peer: flow.peer.to_string(),
            state: life.state.name(),
            opened: unix(life.opened),
            since: unix(life.since),
            reason: life.reason.map(Reason::label),
            followed: life.followed,
            steps: life
                .steps()
                .map(|s| TakenStep {
                    to: s.to.name(),
                    at: unix(s.at),
                    evidence: s.evidence.label(),
                    cause: s.cause.map(Cause::label),
                    via: match s.step {
                        Step::Arrow => None,
                        Step::Gap => Some("unknown"),
                        Step::Unexpected => Some("unexpected"),
                    },
                })
                .collect(),
        }
    };
    journal.ledger().recent(limit).iter().map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        assert_eq!(limit(None), Ok(DEFAULT_LIMIT));
        assert_eq!(limit(Some("limit=7")), Ok(7));
        for wrong in ["limit=0", "limit=", "limit=x", "limit=99999999999", "role=server", "=", "limit=1&x=2"] {
            assert!(limit(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
