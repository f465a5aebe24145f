//! The lab as its users meet it: what it lists, plays, says and leaves behind.

mod ground;
mod held;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use echoscope::lab::{self, About};
use echoscope::tcp::{ARROWS, State};
use serde_json::Value;

use crate::support::{Echoscope, command};
use State::{Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait};

/// Every arrow that the kernel was seen to walk; the lab must show each of them.
const WALKED: [(State, State); 23] = [
    (Close, Listen),
    (Close, SynSent),
    (Listen, SynRecv),
    (Listen, Close),
    (SynSent, Established),
    // A simultaneous open.
    (SynSent, SynRecv),
    // Refused, or timed out.
    (SynSent, Close),
    (SynRecv, Established),
    // Closed before the handshake is over.
    (SynRecv, FinWait1),
    (SynRecv, Close),
    (Established, FinWait1),
    (Established, CloseWait),
    (Established, Close),
    (FinWait1, FinWait2),
    // Two FINs cross.
    (FinWait1, Closing),
    (FinWait1, Close),
    (FinWait2, TimeWait),
    // An orphan that the kernel gives up.
    (FinWait2, Close),
    (Closing, TimeWait),
    (CloseWait, LastAck),
    (CloseWait, Close),
    (LastAck, Close),
    (TimeWait, Close),
];

/// What else the state machine has: a reset or a timeout within the instant that CLOSING lasts.
const NOT_WALKED: [(State, State); 1] = [(Closing, Close)];

/// What a scenario shows although nobody without privilege can know the way between the two states (docs/evidence.md).
const WAY_UNKNOWN: [(&str, &str, State, State); 4] = [
    // How a SYN_RECV ended: it may have become a connection that was reset at once.
    ("syn-sent-stuck", "server", SynRecv, Close),
    // Why an orphan died: the FIN may have come, and its TIME_WAIT been killed.
    ("fin-wait2-orphan", "client", FinWait2, Close),
    // A short SYN_RECV: the SYN+ACK may have come in the instant before the FIN went.
    ("simultaneous-open", "client", SynRecv, FinWait1),
    // Our own RST: the peer's FIN may have come in the instant before.
    ("reset-by-linger", "client", Established, Close),
];

/// Nobody waits for so long, unless it hangs: it takes a little more than a minute.
const A_HANG: Duration = Duration::from_secs(150);

/// How long an end takes at most that comes at once.
const AT_ONCE: Duration = Duration::from_secs(5);

/// The scenarios that take no TIME_WAIT's minute.
fn quick() -> Vec<&'static About> {
    lab::ALL.iter().map(|scenario| scenario.about()).filter(|about| about.takes < Duration::from_mins(1)).collect()
}

/// The verdict, which is one line and all that stdout says.
fn verdict(stdout: &str) -> Value {
    assert_eq!(stdout.matches('\n').count(), 1, "{stdout}");
    let verdict: Value = serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"));
    assert!(verdict.is_object(), "{verdict}");
    verdict
}

/// Everything was shown.
fn assert_shown(verdict: &Value) {
    assert_eq!(verdict["shown"], true, "{verdict:#}");
    for scenario in verdict["scenarios"].as_array().unwrap() {
        assert_eq!((&scenario["shown"], &scenario["error"]), (&true.into(), &Value::Null), "{scenario:#}");
        let expected = scenario["expected"].as_array().unwrap();
        assert!(!expected.is_empty() && expected.iter().all(|item| item["shown"] == true), "{scenario:#}");
    }
}

/// The log is lines of JSON, none of which warns.
fn assert_calm(lines: &[Value]) {
    let wrong: Vec<_> = lines.iter().filter(|line| line["level"] != "INFO").collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn message_begins(line: &Value, with: &str) -> bool {
    line["message"].as_str().is_some_and(|message| message.starts_with(with))
}

#[test]
fn the_list_names_every_scenario_and_binds_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let web = taken.local_addr().unwrap().to_string();
    let listed = command().args(["--web.listen-address", &web, "lab"]).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(listed.stdout).unwrap(), String::from_utf8(listed.stderr).unwrap());
    assert_eq!((listed.status.code(), stderr.as_str()), (Some(0), ""));
    for About { name, shows, .. } in lab::ALL.iter().map(|scenario| scenario.about()) {
        let named = |line: &&str| line.starts_with(&format!("{name} ")) && line.ends_with(shows);
        assert_eq!(stdout.lines().filter(named).count(), 1, "{name} in {stdout}");
    }
    let (stated, others): (Vec<_>, Vec<_>) = stdout.lines().partition(|line| line.starts_with("  "));
    assert_eq!(stated.len(), lab::ALL.len(), "{others:#?}");
    for state in stated.iter().flat_map(|line| line.split_whitespace()) {
        assert!(State::ALL.iter().any(|s| s.name() == state), "{state}");
    }
}

#[test]
fn an_unknown_name_is_a_mistake_that_lists_the_known() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let web = taken.local_addr().unwrap().to_string();
    let played = command().args(["--web.listen-address", &web, "lab", "half-close", "half-clsoe"]).output().unwrap();
    let stderr = String::from_utf8(played.stderr).unwrap();
    assert_eq!((played.status.code(), played.stdout.len()), (Some(2), 0), "{stderr}");
    assert!(stderr.contains("'half-clsoe'"), "{stderr}");
    let known: BTreeSet<&str> = stderr.split(|c: char| !c.is_alphanumeric() && c != '-').collect();
    let unnamed: Vec<_> =
        lab::ALL.iter().map(|s| s.about().name).chain(["all"]).filter(|n| !known.contains(n)).collect();
    assert!(unnamed.is_empty(), "{unnamed:?} in {stderr}");
}

/// A little more than a minute, most of it one real TIME_WAIT; runs beside the others.
#[test]
fn all_of_it_shows_every_state_and_every_arrow() {
    let lab = Echoscope::start(&["lab", "all", "--output", "json"]);
    lab.line("all played", |line| message_begins(line, "waiting for TIME_WAIT"));
    lab.metrics().assert_nothing_lost();
    let (stdout, lines) = lab.until_end(A_HANG);
    assert_calm(&lines);
    let verdict = verdict(&stdout);
    assert_shown(&verdict);
    let scenarios = verdict["scenarios"].as_array().unwrap();
    let played: Vec<_> = scenarios.iter().map(|s| s["scenario"].as_str().unwrap()).collect();
    assert_eq!(played, lab::ALL.iter().map(|s| s.about().name).collect::<Vec<_>>());

    let (mut states, mut arrows, mut unknown) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for scenario in scenarios {
        for item in scenario["expected"].as_array().unwrap().iter().filter(|item| item["fact"].is_null()) {
            let text = |name: &str| item[name].as_str().unwrap_or_else(|| panic!("{name} in {item}"));
            let state = |name| State::named(text(name)).unwrap();
            let arrow = (state("from"), state("to"));
            states.extend([arrow.0, arrow.1]);
            arrows.insert(arrow);
            if item["way_known"] != true {
                unknown.push((scenario["scenario"].as_str().unwrap(), text("role"), arrow.0, arrow.1));
            }
        }
    }
    assert_eq!(states, BTreeSet::from(State::ALL), "every state");
    assert_eq!(arrows, BTreeSet::from(WALKED), "every arrow");
    assert_eq!(unknown, WAY_UNKNOWN);
    let whole: BTreeSet<_> = ARROWS.iter().map(|arrow| (arrow.from, arrow.to)).collect();
    assert_eq!(
        whole,
        BTreeSet::from(WALKED).union(&NOT_WALKED.into()).copied().collect(),
        "the state machine has grown"
    );
}

#[test]
fn each_scenario_explains_itself_in_words() {
    let names: Vec<&str> = quick().iter().map(|about| about.name).collect();
    let told: Vec<_> = names.iter().map(|name| Echoscope::start(&["lab", name])).collect();
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    for (about, lab) in quick().into_iter().zip(told) {
        let (status, stdout, lines) = lab.wait();
        assert_eq!(status.code(), Some(0), "{stdout}");
        assert_calm(&lines);
        assert!(stdout.lines().all(|line| line.chars().count() <= 120), "{stdout}");
        let text = words(&stdout);
        let About { name, shows, confirm, why, remedy, .. } = about;
        let parts = [
            format!("{name}: {shows} "),
            words(&format!("why {why} find it {confirm} do {remedy}")),
            "verdict: shown".to_owned(),
        ];
        for part in parts {
            assert!(text.contains(&part), "{part:?} is not in {stdout}");
        }
        // What is printed at the end was told on the way: the log has gone elsewhere.
        assert!(!stdout.contains("\"message\""), "{stdout}");
        let said = |what: &str| lines.iter().any(|line| line["scenario"] == *name && message_begins(line, what));
        assert!(said(shows) && said("shown: all"), "{lines:#?}");
    }
}

#[test]
fn a_signal_ends_it_and_leaves_nothing_behind() {
    for signal in ["INT", "TERM"] {
        let lab = Echoscope::start(&["lab", "half-close", "drain", "--hold", "10m", "--output", "json"]);
        lab.line("held", |line| message_begins(line, "held for"));
        let namespace = network_of(lab.pid());
        assert_eq!(inhabitants(&namespace), [lab.pid()]);
        let signalled = Instant::now();
        lab.signal(signal);
        let (status, stdout, lines) = lab.wait();
        assert!(signalled.elapsed() < AT_ONCE, "{signal}: {:?}", signalled.elapsed());
        assert_eq!(status.code(), Some(1), "{lines:#?}");
        let verdict = verdict(&stdout);
        let [scenario] = &verdict["scenarios"].as_array().unwrap()[..] else {
            panic!("the next one began: {verdict:#}")
        };
        assert_eq!((&verdict["shown"], &scenario["shown"]), (&false.into(), &false.into()));
        assert_eq!(scenario["error"], "interrupted");
        // What had been shown by then is told all the same.
        let shown: Vec<_> =
            scenario["expected"].as_array().unwrap().iter().filter(|item| item["shown"] == true).collect();
        assert!(shown.iter().any(|item| item["to"] == "FIN_WAIT2"), "{scenario:#}");
        assert!(shown.iter().all(|item| item["to"] != "LAST_ACK"), "{scenario:#}");
        // A network namespace lives as long as somebody is in it (or holds it, which nobody did).
        assert_eq!(inhabitants(&namespace), [0; 0]);
        assert_eq!(stage_sockets(), [""; 0]);
    }
}

#[test]
fn a_signal_ends_the_wait_for_time_wait_too() {
    let lab = Echoscope::start(&["lab", "handshake-and-four-way-close", "--output", "json"]);
    lab.line("played", |line| message_begins(line, "waiting for TIME_WAIT"));
    let signalled = Instant::now();
    lab.signal("INT");
    let (status, stdout, _) = lab.wait();
    assert!(signalled.elapsed() < AT_ONCE, "{:?}", signalled.elapsed());
    assert_eq!(status.code(), Some(1));
    let verdict = verdict(&stdout);
    assert_eq!((&verdict["shown"], &verdict["scenarios"][0]["shown"]), (&false.into(), &false.into()));
    assert_eq!(verdict["scenarios"][0]["error"], "interrupted");
    let missing: Vec<_> =
        verdict["scenarios"][0]["expected"].as_array().unwrap().iter().filter(|item| item["shown"] == false).collect();
    assert_eq!(missing.len(), 1, "{missing:#?}");
    assert_eq!((&missing[0]["from"], &missing[0]["to"]), (&"TIME_WAIT".into(), &"CLOSED".into()));
}

#[test]
fn what_is_named_twice_is_played_once() {
    let lab = Echoscope::start(&["lab", "refused", "half-close", "refused", "--output", "json"]);
    let (stdout, _) = lab.until_end(A_HANG);
    let verdict = verdict(&stdout);
    assert_shown(&verdict);
    let played: Vec<_> = verdict["scenarios"].as_array().unwrap().iter().map(|s| s["scenario"].clone()).collect();
    assert_eq!(played, ["refused", "half-close"]);
}

#[test]
fn nothing_outside_is_touched() {
    let before = SYSCTLS.map(sysctl);
    // The first changes a sysctl, the second tells of ports, the third sends raw segments.
    let arguments = ["lab", "half-close", "port-exhaustion", "time-wait-assassination", "--hold", "300ms"];
    let lab = Echoscope::start(&[&arguments[..], &["--output", "json"]].concat());
    lab.line("held", |line| message_begins(line, "held for"));
    assert_ne!(network_of(lab.pid()), network_of(std::process::id()));
    assert_eq!((SYSCTLS.map(sysctl), stage_sockets()), (before.clone(), vec![]), "while it plays");
    let (status, stdout, _) = lab.wait();
    assert_eq!(status.code(), Some(0), "{stdout}");
    let verdict = verdict(&stdout);
    assert_shown(&verdict);
    assert_eq!(verdict["ground"], "a network namespace of its own");
    assert_eq!((SYSCTLS.map(sysctl), stage_sockets()), (before, vec![]), "after it");
}

const SYSCTLS: [&str; 3] = ["tcp_no_metrics_save", "ip_local_port_range", "tcp_tw_reuse"];

/// As the calling thread's network namespace has it.
fn sysctl(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("read a sysctl")
}

/// The sockets on the lab's own ports in the network namespace that the tests run in, as /proc/net has them.
fn stage_sockets() -> Vec<String> {
    let ports = 7101..7101 + lab::ALL.len() as u32;
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let on_stage = |line: &&str| {
        let addresses = line.split_whitespace().skip(1).take(2);
        addresses.filter_map(|a| u32::from_str_radix(a.rsplit(':').next()?, 16).ok()).any(|port| ports.contains(&port))
    };
    tables.iter().flat_map(|table| table.lines().filter(on_stage)).map(str::to_owned).collect()
}

/// A process's network namespace by its name, `net:[…]`.
fn network_of(pid: u32) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).expect("a network namespace");
    link.to_str().expect("a name").to_owned()
}

/// Who is in a network namespace.
fn inhabitants(namespace: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("list processes").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|link| link.to_str() == Some(namespace)))
        .collect()
}
