//! A reading as a table for a person, and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use super::check::{Age, Finding, Severity};
use crate::kernel::owners::{Owner, Owners};
use crate::survey::{Listeners, Reading, Service, Sight, Socket};
use crate::tcp::{Role, State};

/// The states that have a column of their own; the rest are added up.
const COLUMNS: [(State, &str); 5] = [
    (State::Established, "ESTAB"),
    (State::CloseWait, "CLOSE-WAIT"),
    (State::TimeWait, "TIME-WAIT"),
    (State::FinWait2, "FIN-WAIT-2"),
    (State::SynRecv, "SYN-RECV"),
];

/// What is wrong, a line each, the worst first.
pub(super) fn verdict(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { severity, text } in findings {
        let _ = writeln!(out, "{} {text}", if *severity == Severity::Critical { "CRITICAL" } else { "WARNING " });
    }
    if findings.is_empty() {
        out.push_str("OK nothing looks wrong\n");
    }
    out
}

/// For a person.
pub(super) fn text(reading: &Reading, owners: &Owners) -> String {
    let mut rows = vec![head()];
    for (service, sight) in &reading.services {
        // Who goes out, and to where nobody goes now, is worth no line.
        let empty = State::ALL.iter().all(|state| sight.count(*state) == 0);
        if service.role == Role::Server || !empty {
            rows.push(line(*service, sight, owners));
        }
    }
    aligned(&rows, |column| column < 3)
}

/// Those that have been in CLOSE_WAIT for longest, for a person, after an empty line; nothing where there are none.
pub(super) fn worst(sockets: &[Socket], owners: &Owners) -> String {
    if sockets.is_empty() {
        return String::new();
    }
    let mut rows = vec![["OLDEST CLOSE-WAIT", "PID", "FD", "LOCAL", "PEER", "COMMAND"].map(str::to_owned).to_vec()];
    for socket in sockets {
        let owner = owners.get(&socket.inode);
        let or_nobody = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            age(socket.age, socket.at_least),
            or_nobody(owner.map(|owner| owner.pid.to_string())),
            or_nobody(owner.map(|owner| owner.fd.to_string())),
            socket.flow.local.to_string(),
            socket.flow.peer.to_string(),
            if socket.inode == 0 { "not accepted yet".to_owned() } else { or_nobody(owner.map(|o| o.command.clone())) },
        ]);
    }
    "\n".to_owned() + &aligned(&rows, |column| column > 2)
}

fn age(age: Duration, at_least: bool) -> String {
    format!("{}{}", if at_least { "≥ " } else { "" }, Age(age))
}

/// Rows of as many cells each, in columns: words to the left, numbers to the right.
fn aligned(rows: &[Vec<String>], is_words: impl Fn(usize) -> bool) -> String {
    let mut out = String::new();
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|i| rows.iter().map(|row| row[i].width()).max().unwrap_or(0)).collect();
    for row in rows {
        let mut text = String::new();
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // As wide as a terminal shows it, which may be two columns for a character, or none.
            let room = " ".repeat(width - cell.width());
            let (before, after) = if is_words(i) { ("", room.as_str()) } else { (room.as_str(), "") };
            let _ = write!(text, "{before}{cell}{after}  ");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out
}

fn head() -> Vec<String> {
    let mut head: Vec<String> = ["", "PORT", "PROCESS"].map(str::to_owned).into();
    head.extend(COLUMNS.map(|(_, name)| name.to_owned()));
    head.extend(["OTHER", "OLDEST CLOSE-WAIT", "QUEUE", "OPENED", "CLOSED"].map(str::to_owned));
    head
}

fn line(service: Service, sight: &Sight, owners: &Owners) -> Vec<String> {
    let names: Vec<&str> = super::names(sight, owners).collect();
    let mut cells = vec![
        if service.role == Role::Server { "in" } else { "out" }.to_owned(),
        service.port.to_string(),
        if names.is_empty() { "-".to_owned() } else { names.join(", ") },
    ];
    cells.extend(COLUMNS.map(|(state, _)| sight.count(state).to_string()));
    let named = |state: &State| *state == State::Listen || COLUMNS.iter().any(|(column, _)| column == state);
    cells.push(State::ALL.iter().filter(|s| !named(s)).map(|s| sight.count(*s)).sum::<u64>().to_string());
    let (oldest, at_least) = sight.oldest(State::CloseWait);
    cells.push(if sight.count(State::CloseWait) == 0 { "-".to_owned() } else { age(oldest, at_least) });
    cells.push(match &sight.listeners {
        Some(Listeners { queue, .. }) => {
            format!("{}/{}", queue.length, queue.limit.map_or("?".to_owned(), |limit| limit.to_string()))
        }
        None => "-".to_owned(),
    });
    cells.extend([sight.opened.to_string(), sight.closed.to_string()]);
    cells
}

/// For a script.
#[derive(Serialize)]
pub(super) struct Sockets<'a> {
    observer: &'static str,
    seconds: f64,
    services: Vec<ServiceJson<'a>>,
    /// The fullest pairs of a local address and a destination.
    local_ports: Vec<Pair>,
    local_ports_limit: Option<u32>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct ServiceJson<'a> {
    role: &'static str,
    port: String,
    /// Where several listen on the port, that of the fullest accept queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process<'a>>,
    sockets: BTreeMap<&'static str, u64>,
    oldest_seconds: BTreeMap<&'static str, f64>,
    /// Those whose oldest may be older: they were there when the survey began.
    at_least: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accept_queue: Option<QueueJson>,
    opened: u64,
    closed: u64,
}

#[derive(Serialize)]
struct Process<'a> {
    name: &'a str,
    pid: u32,
    command: &'a str,
}

impl<'a> Process<'a> {
    fn of(owner: &'a Owner) -> Process<'a> {
        Process { name: &owner.name, pid: owner.pid, command: &owner.command }
    }
}

/// Of the listener whose queue is fullest.
#[derive(Serialize)]
struct QueueJson {
    length: u32,
    limit: Option<u32>,
}

#[derive(Serialize)]
struct Pair {
    from: String,
    to: String,
    used: u32,
}

impl<'a> Sockets<'a> {
    pub(super) fn of(reading: &'a Reading, owners: &'a Owners, findings: &'a [Finding]) -> Sockets<'a> {
        let held = |state: &State, sight: &Sight| *state != State::Listen && sight.count(*state) > 0;
        let services = reading.services.iter().map(|(service, sight)| ServiceJson {
            role: service.role.label(),
            port: service.port.to_string(),
            process: sight.listeners.as_ref().and_then(|l| owners.get(&l.queue.inode)).map(Process::of),
            sockets: State::ALL.map(|state| (state.label(), sight.count(state))).into(),
            oldest_seconds: State::ALL
                .into_iter()
                .filter(|state| held(state, sight))
                .map(|state| (state.label(), sight.oldest(state).0.as_secs_f64()))
                .collect(),
            at_least: State::ALL
                .into_iter()
                .filter(|state| held(state, sight) && sight.oldest(*state).1)
                .map(State::label)
                .collect(),
            accept_queue: (sight.listeners.as_ref())
                .map(|Listeners { queue, .. }| QueueJson { length: queue.length, limit: queue.limit }),
            opened: sight.opened,
            closed: sight.closed,
        });
        Sockets {
            observer: reading.observer.label(),
            seconds: reading.took.as_secs_f64(),
            services: services.collect(),
            local_ports: reading
                .fullest
                .iter()
                .map(|(from, to, used)| Pair { from: from.to_string(), to: to.to_string(), used: *used })
                .collect(),
            local_ports_limit: reading.ports_limit,
            findings,
        }
    }
}

/// One socket of those that have been in a state for longest.
#[derive(Serialize)]
pub(super) struct Offender<'a> {
    role: &'static str,
    port: String,
    local: String,
    peer: String,
    age_seconds: f64,
    /// Whether it may be older.
    at_least: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fd: Option<u32>,
}

impl<'a> Offender<'a> {
    pub(super) fn of(socket: &Socket, owners: &'a Owners) -> Offender<'a> {
        let owner = owners.get(&socket.inode);
        Offender {
            role: socket.service.role.label(),
            port: socket.service.port.to_string(),
            local: socket.flow.local.to_string(),
            peer: socket.flow.peer.to_string(),
            age_seconds: socket.age.as_secs_f64(),
            at_least: socket.at_least,
            process: owner.map(Process::of),
            fd: owner.map(|owner| owner.fd),
        }
    }
}
