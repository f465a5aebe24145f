//! The JSON of `/api/sockets` and `/api/connections`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::census::Reading;
use crate::journal::Journal;
use crate::kernel::clock;
use crate::ledger::{KEPT, Life, Order, Reason, Selection};
use crate::tcp::{Cause, Role, State};

const DEFAULT_LIMIT: usize = 100;

/// What is asked of `/api/connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// So many of those selected.
    Some(Selection, usize),
    /// Both ends of one, by its cookie.
    BothEnds(u64),
}

const KNOWN: &str = "unknown parameter; known: limit, role, state, outcome, order; or conn alone\n";

/// The query of `/api/connections`.
pub(super) fn question(query: Option<&str>) -> Result<Question, &'static str> {
    let (mut selection, mut limit) = (Selection::default(), DEFAULT_LIMIT);
    let pairs: Vec<&str> = query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()).collect();
    for pair in &pairs {
        let (name, value) = pair.split_once('=').ok_or(KNOWN)?;
        match name {
            "limit" => {
                limit = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=10 * KEPT).contains(n))
                    .ok_or("limit must be from 1 to 10000\n")?;
            }
            "role" => {
                let role = Role::ALL.into_iter().find(|role| role.label() == value);
                selection.role = Some(role.ok_or("role must be server or client\n")?);
            }
            "state" => selection.state = Some(State::named(value).ok_or("no such state\n")?),
            "outcome" => {
                let reason = Reason::ALL.into_iter().find(|reason| reason.label() == value);
                selection.outcome = Some(match reason {
                    None if value == "open" => None,
                    reason => Some(
                        reason.ok_or("outcome must be open or a reason as in echoscope_connections_closed_total\n")?,
                    ),
                });
            }
            "order" => {
                selection.order = match value {
                    "youngest" => Order::Youngest,
                    "longest" => Order::Longest,
                    _ => return Err("order must be youngest or longest\n"),
                }
            }
            "conn" if pairs.len() == 1 => {
                let cookie = u64::from_str_radix(value, 16).map_err(|_| "conn must be as in the log: hexadecimal\n")?;
                return Ok(Question::BothEnds(cookie));
            }
            _ => return Err(KNOWN),
        }
    }
    Ok(Question::Some(selection, limit))
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
    /// The state in which it was first known.
    began: &'static str,
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

/// Lives, going on or ended, as they were asked for; of one that is not known, nothing.
pub(super) fn connections(journal: &Journal, question: &Question) -> Vec<Connection> {
    let offset = clock::unix_offset();
    let unix = |at: Duration| (offset + at).as_secs_f64();
    let tell = |life: &Life| {
        let flow = life.flow();
        Connection {
            conn: format!("{:x}", life.cookie),
            role: life.role.label(),
            port: life.port,
            local: flow.local.to_string(),
            peer: flow.peer.to_string(),
            began: life.began().name(),
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
                    via: s.step.via(),
                })
                .collect(),
        }
    };
    let lives = match question {
        Question::Some(selection, limit) => journal.ledger().select(*selection, *limit, clock::monotonic()),
        Question::BothEnds(cookie) => match journal.ledger().both_ends(*cookie) {
            Some((this, other)) => std::iter::once(this).chain(other).collect(),
            None => Vec::new(),
        },
    };
    lives.iter().map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions() {
        let all = Selection::default();
        let longest =
            Selection { role: Some(Role::Client), state: Some(State::TimeWait), order: Order::Longest, ..all };
        for (query, asked) in [
            ("", Question::Some(all, DEFAULT_LIMIT)),
            ("limit=7", Question::Some(all, 7)),
            ("role=client&state=time-wait&order=longest", Question::Some(longest, DEFAULT_LIMIT)),
            ("outcome=open&", Question::Some(Selection { outcome: Some(None), ..all }, DEFAULT_LIMIT)),
            (
                "outcome=drain_aborted",
                Question::Some(Selection { outcome: Some(Some(Reason::DrainAborted)), ..all }, 100),
            ),
            ("conn=2a1", Question::BothEnds(0x2a1)),
        ] {
            assert_eq!(question(Some(query)), Ok(asked), "{query}");
        }
        for wrong in [
            "limit=0",
            "limit=",
            "limit=x",
            "limit=99999999999",
            "limit",
            "role=",
            "role=peer",
            "role=Server",
            "state=",
            "state=7",
            "outcome=",
            "outcome=fine",
            "order=oldest",
            "=",
            "limit=1&x=2",
            "conn=",
            "conn=xyz",
            "conn=-1",
            "conn=1&limit=2",
            "limit=2&conn=1",
            "conn=11111111111111111",
            "%72ole=client",
        ] {
            assert!(question(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
