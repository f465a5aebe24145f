//! The lab's log held against the kernel's own events: whatever it tells was done, and what it does not know is what nobody
//! can know without privilege (docs/evidence.md).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use echoscope::lab;
use echoscope::tcp::State;
use serde_json::Value;

use crate::ebpf::said_lost;
use crate::support::Echoscope;
use crate::trace::{Told, Trace, Walk, held_against, paired, told};

/// Why something cannot be known, as docs/evidence.md has it, or need not be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Why {
    /// A short SYN_RECV, and how it ended. A request socket's beginning is seen, when it lasts; its end is that the
    /// table has it no more, and it may have become a connection that ended at once.
    ShortSynRecv,
    /// Why an orphan died: its FIN may have been acknowledged, the peer's may have come, and nobody asked in between.
    /// After our own RST too: the peer's FIN may have come in the instant before.
    OrphansEnd,
    /// CLOSING or FIN_WAIT2, when the other end's CLOSE_WAIT was not seen and the count of segments proves nothing.
    ClosingOrFinWait2,
    /// Nothing was sent: connect(2) enters SYN_SENT before it looks for a port, and finds none.
    NoSegment,
}
use Why::{ClosingOrFinWait2, NoSegment, OrphansEnd, ShortSynRecv};

/// All that the log does not know of what the kernel did, each in every run: unknown ways as `FROM … TO`.
const UNKNOWN: &[(&str, &str, Why)] = &[
    (
        "syn-sent-stuck",
        "server is not announced: LISTEN → SYN_RECV [sock_diag] … CLOSED [sock_diag, via unknown]",
        ShortSynRecv,
    ),
    ("syn-recv-stuck", "server ESTABLISHED … CLOSED", OrphansEnd),
    ("syn-recv-stuck", "client FIN_WAIT1 … TIME_WAIT", ClosingOrFinWait2),
    ("fin-wait1-stuck", "server ESTABLISHED … CLOSED", OrphansEnd),
    // A minisocket in FIN_WAIT2: its timer ran out, or the FIN came and TIME_WAIT was killed.
    ("fin-wait2-orphan", "client FIN_WAIT2 … CLOSED", OrphansEnd),
    ("simultaneous-open", "client ESTABLISHED … CLOSED", OrphansEnd),
    // Closed in SYN_RECV: the SYN+ACK may have come in the instant before.
    ("simultaneous-open", "client SYN_RECV … FIN_WAIT1", ShortSynRecv),
    ("simultaneous-open", "client FIN_WAIT1 … CLOSED", OrphansEnd),
    // A connection to itself is a simultaneous open.
    ("simultaneous-close", "client SYN_SENT … ESTABLISHED", ShortSynRecv),
    ("port-exhaustion", "is not told: CLOSED → SYN_SENT → CLOSED", NoSegment),
    ("time-wait-reuse", "client ESTABLISHED … CLOSED", OrphansEnd),
    ("reset-by-linger", "client ESTABLISHED … CLOSED", OrphansEnd),
    ("reset-by-unread-data", "server ESTABLISHED … CLOSED", OrphansEnd),
    ("accept-queue-overflow", "client ESTABLISHED … CLOSED", OrphansEnd),
    ("retransmission-timeout", "server ESTABLISHED … CLOSED", OrphansEnd),
    ("keepalive-death", "server ESTABLISHED … CLOSED", OrphansEnd),
    ("slow-reader", "client ESTABLISHED … CLOSED", OrphansEnd),
];

/// The first scenario's port; the others follow in their order.
const FIRST_PORT: u16 = 7101;

/// One socket's life: as the log tells it, and as the kernel announced it.
type Pair = (Option<Told>, Option<Walk>);

/// What even the kernel's own announcements leave open.
const UNKNOWN_TO_ALL: &[(&str, &str, Why)] = &[
    // Its timer tells, which is not among the changes of state that the trace records.
    ("syn-sent-stuck", "server is not announced: LISTEN → SYN_RECV [tracepoint] → CLOSED [tracepoint]", ShortSynRecv),
    ("port-exhaustion", "is not told: CLOSED → SYN_SENT → CLOSED", NoSegment),
];

#[test]
#[ignore = "needs root: tracefs"]
fn whatever_the_lab_tells_was_done() {
    told_was_done(play("sock_diag"), UNKNOWN);
}

#[test]
#[ignore = "needs root: tracefs, CAP_BPF and CAP_PERFMON"]
fn by_the_kernels_word_the_lab_tells_all_that_was_done() {
    // Where the kernel does not announce all (docs/ebpf.md, Losses), once more: this is about what it says. That a segment sent
    // again went unheard shows nowhere else: no state depends on it.
    let sent_again: BTreeSet<Resent> = RESENT.iter().copied().map(owned).collect();
    let mut plays = (0..3).map(|_| play("ebpf"));
    let whole = plays.find(|play| said_lost(&play.lines) == 0 && resent(&play.lines).is_superset(&sent_again));
    let whole = whole.expect("a play of which nothing was lost, and which tells all that was sent again");
    let lines = told_was_done(whole, UNKNOWN_TO_ALL);
    for told in told(&lines).iter().filter(|told| told.ports.1 != 0) {
        let by_others: Vec<_> = told.steps.iter().filter(|said| said.evidence != "tracepoint").collect();
        assert!(by_others.is_empty(), "{told}");
    }
    let expected = ENDS.iter().map(|(name, ends)| (*name, ends.iter().map(|end| (*end).to_owned()).collect()));
    assert_eq!(ends(&lines), expected.collect());
    let resent = resent(&lines);
    assert!(resent.iter().all(|(name, ..)| *name != "handshake-and-four-way-close"), "{resent:?}");
}

/// Where segments are lost on purpose, by role and state: what was sent in it is sent again.
const RESENT: &[(&str, &str, &str)] = &[
    ("syn-sent-stuck", "client", "SYN_SENT"),
    ("syn-sent-stuck", "server", "SYN_RECV"),
    ("syn-recv-stuck", "server", "SYN_RECV"),
    ("fin-wait1-stuck", "client", "FIN_WAIT1"),
    ("last-ack-lost", "server", "LAST_ACK"),
    ("simultaneous-open", "client", "FIN_WAIT1"),
    ("accept-queue-overflow", "client", "SYN_SENT"),
    ("retransmission-timeout", "client", "ESTABLISHED"),
];

type Resent = (&'static str, String, String);

fn owned((scenario, role, state): (&'static str, &str, &str)) -> Resent {
    (scenario, role.to_owned(), state.to_owned())
}

/// In which states of which scenario the log says that segments were sent again.
fn resent(lines: &[Value]) -> BTreeSet<Resent> {
    let again = lines.iter().filter(|line| line["retransmits"].as_u64().is_some_and(|n| n > 0));
    again
        .filter_map(|line| {
            let text = |name: &str| line[name].as_str().expect("a text");
            Some(owned((scenario(ports_of(line))?, text("role"), text("from"))))
        })
        .collect()
}

fn ports_of(line: &Value) -> (u16, u16) {
    let port = |name: &str| line[name].as_str()?.rsplit(':').next()?.parse().ok();
    port("local").zip(port("peer")).expect("two ports")
}

/// How the connections of each scenario end, other than by the four segments and by TIME_WAIT, and why: as it made them end.
const ENDS: &[(&str, &[&str])] = &[
    // Taken back after its timeout; the repeated SYN+ACK met a RST, of which nothing says that it came.
    ("syn-sent-stuck", &["client SYN_SENT shutdown", "server SYN_RECV unknown"]),
    // The one ends by RST on purpose, when its FIN has been lost long enough.
    ("fin-wait1-stuck", &["client FIN_WAIT1 reset", "server ESTABLISHED abort"]),
    ("fin-wait2-orphan", &["client FIN_WAIT2 expired", "server CLOSE_WAIT reset"]),
    ("simultaneous-open", &["client ESTABLISHED abort", "client FIN_WAIT1 timeout"]),
    ("time-wait-reuse", &["client ESTABLISHED abort", "server ESTABLISHED reset"]),
    ("reset-by-linger", &["client ESTABLISHED abort", "server ESTABLISHED reset"]),
    ("reset-by-unread-data", &["client ESTABLISHED reset", "server ESTABLISHED abort"]),
    ("refused", &["client SYN_SENT refused"]),
    ("accept-queue-overflow", &["client ESTABLISHED abort", "server ESTABLISHED reset"]),
    ("retransmission-timeout", &["client ESTABLISHED timeout", "server ESTABLISHED abort"]),
    ("keepalive-death", &["client ESTABLISHED timeout", "server ESTABLISHED abort"]),
    ("slow-reader", &["client ESTABLISHED abort", "server ESTABLISHED reset"]),
];

/// What the log says of ends, by scenario.
fn ends(lines: &[Value]) -> BTreeMap<&'static str, BTreeSet<String>> {
    let mut found: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for line in lines.iter().filter(|l| l["message"] == "state" && l["to"] == "CLOSED") {
        let text = |name: &str| line[name].as_str().unwrap_or("unknown");
        let orderly = matches!((text("from"), text("cause")), ("LISTEN" | "TIME_WAIT", _) | ("LAST_ACK", "ack"));
        if let Some(scenario) = scenario(ports_of(line)).filter(|_| !orderly) {
            let end = format!("{} {} {}", text("role"), text("from"), text("cause"));
            found.entry(scenario).or_default().insert(end);
        }
    }
    found
}

/// What the lab told, and what the kernel's own trace has of the same.
struct Play {
    lines: Vec<Value>,
    walks: Vec<Walk>,
    requests: Vec<(u16, u16)>,
}

/// Plays all of the lab, seen by `observer`.
fn play(observer: &str) -> Play {
    let stages = FIRST_PORT..=FIRST_PORT + lab::ALL.len() as u16 - 1;
    let trace = Trace::start(stages);
    let lab = Echoscope::start(&["lab", "all", "--output", "json", "--observer", observer]);
    let says = |what: &'static str| move |line: &Value| line["message"].as_str().is_some_and(|m| m.starts_with(what));
    lab.line("playing", says("playing in"));
    let threads = fs::read_dir(format!("/proc/{}/task", lab.pid())).expect("list threads").flatten();
    let threads: BTreeSet<u32> = threads.map(|t| t.file_name().to_str().unwrap().parse().unwrap()).collect();
    // What is left is the end of a TIME_WAIT, which the kernel does not announce.
    lab.line("all played", says("waiting for TIME_WAIT"));
    lab.signal("INT");
    let (_, verdict, lines) = lab.wait();
    let verdict: Value = serde_json::from_str(&verdict).expect("a verdict");
    // Whoever still waits for the end of a TIME_WAIT is interrupted in that, and in nothing else.
    let went_wrong = |scenario: &&Value| !scenario["error"].is_null() && scenario["error"] != "interrupted";
    let failed: Vec<_> = verdict["scenarios"].as_array().unwrap().iter().filter(went_wrong).collect();
    assert!(failed.is_empty(), "{failed:#?}");

    let walks = of_process(&threads, trace.walks());
    let requests = trace.requests();
    assert_eq!(trace.lost(), 0, "the kernel's events are not all there");
    Play { lines, walks, requests }
}

/// Holds what was told against what the kernel announced; returns the log.
fn told_was_done(play: Play, unknown: &[(&str, &str, Why)]) -> Vec<Value> {
    let Play { lines, walks, requests } = play;
    let mut by_scenario: BTreeMap<&str, Vec<Pair>> = BTreeMap::new();
    for pair in paired(told(&lines), walks) {
        let name = scenario(ports(&pair)).unwrap_or_else(|| panic!("of no scenario:\n{}", side_by_side(&pair)));
        by_scenario.entry(name).or_default().push(pair);
    }
    let mut faults = String::new();
    for scenario in lab::ALL {
        let name = scenario.about().name;
        let pairs = by_scenario.remove(name).unwrap_or_default();
        let known: BTreeSet<&str> = unknown.iter().filter(|row| row.0 == name).map(|row| row.1).collect();
        faults +=
            &faults_of(&pairs, &known, &requests).map_or_else(|fault| format!("{name}: {fault}\n"), |()| String::new());
    }
    assert!(faults.is_empty(), "{faults}");
    lines
}

/// # Errors
/// What is wrong with these lives: told and not done, or unknown and not `known` to be so.
fn faults_of(pairs: &[Pair], known: &BTreeSet<&str>, requests: &[(u16, u16)]) -> Result<(), String> {
    if pairs.is_empty() {
        return Err("nothing was told or announced".to_owned());
    }
    let mut found = BTreeMap::new();
    for pair in pairs {
        let missed = match pair {
            (Some(told), Some(walk)) => {
                let missed = held_against(told, walk).map_err(|fault| format!("{fault}\n{}", side_by_side(pair)))?;
                missed.into_iter().map(|missed| format!("{} {missed}", told.role)).collect()
            }
            // A request that never became a connection is not among the changes of state, but its SYN+ACK was repeated.
            (Some(told), None) if requests.contains(&told.ports) => {
                vec![format!("{} is not announced: {told}", told.role)]
            }
            (Some(_), None) => return Err(format!("it was never there\n{}", side_by_side(pair))),
            (None, Some(walk)) => vec![format!("is not told: {walk}")],
            (None, None) => vec![],
        };
        found.extend(missed.into_iter().map(|missed| (missed, pair)));
    }
    let more = found.iter().find(|(missed, _)| !known.contains(missed.as_str()));
    if let Some((missed, pair)) = more {
        return Err(format!("the log does not know, and could: {missed}\n{}", side_by_side(pair)));
    }
    match known.iter().find(|missed| !found.contains_key(**missed)) {
        Some(missed) => {
            let all: String = pairs.iter().map(side_by_side).collect();
            Err(format!("is known now, and said to be unknown: {missed}\n{all}"))
        }
        None => Ok(()),
    }
}

/// The lives of one process's sockets: what its threads connected or listened on, and what came to its listeners. The
/// events are the whole machine's, where another lab may play on the same ports.
fn of_process(threads: &BTreeSet<u32>, walks: Vec<Walk>) -> Vec<Walk> {
    let called = |walk: &Walk| walk.steps[0].from == State::Close;
    let on_stage = walks.into_iter().filter(|walk| scenario(walk.ports).is_some());
    let (mut ours, others): (Vec<_>, Vec<_>) = on_stage.partition(|walk| called(walk) && threads.contains(&walk.task));
    let came_to_us = |child: &Walk| {
        let other_end = (child.ports.1, child.ports.0);
        ours.iter().any(|walk| walk.ports == other_end && (walk.began()..=walk.last().at).contains(&child.began()))
    };
    let children: Vec<_> = others.into_iter().filter(|walk| !called(walk) && came_to_us(walk)).collect();
    ours.extend(children);
    ours.sort_by_key(Walk::began);
    ours
}

/// Whose stage has one of these ports: they follow each other as the scenarios do.
fn scenario(ports: (u16, u16)) -> Option<&'static str> {
    let of = |port: u16| lab::ALL.get(usize::from(port.checked_sub(FIRST_PORT)?));
    [ports.1, ports.0].into_iter().find_map(of).map(|scenario| scenario.about().name)
}

fn ports(pair: &Pair) -> (u16, u16) {
    pair.0.as_ref().map(|told| told.ports).or(pair.1.as_ref().map(|walk| walk.ports)).expect("one of them")
}

fn side_by_side(pair: &Pair) -> String {
    let told = pair.0.as_ref().map_or("nothing".to_owned(), |told| format!("{} {}: {told}", told.role, told.conn));
    let done = pair.1.as_ref().map_or("nothing that was announced".to_owned(), Walk::to_string);
    let (own, other) = ports(pair);
    format!("  {own} → {other}\n    told  {told}\n    done  {done}\n")
}
