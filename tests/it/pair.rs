//! Server and client in one process: whole lives, nothing invented, nothing lost.

use std::net::TcpStream;

use crate::support::{Change, Echoscope, Metrics, get, lives, quiet_port, until, walk};

/// The textbook's walk of each end, without the very last step of the client (a minute later).
const CLIENT: [&str; 6] = ["CLOSED", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"];
const SERVER: [&str; 6] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];

/// Every step is what it claims to be: seen by someone who can see it, or the only way.
fn assert_honest(role: &str, changes: &[Change]) {
    for change in changes {
        let Change { from, to, evidence, via, .. } = change;
        assert_eq!(*via, None, "{role} {from}→{to}");
        let can_be_seen_by = match (role, to.as_str()) {
            ("client", "TIME_WAIT") => &["sock_diag"][..],
            ("client", "CLOSED") => &["sock_diag"],
            ("client", "ESTABLISHED") | ("server", "ESTABLISHED" | "CLOSE_WAIT" | "LISTEN") => &["tcp_info"],
            ("server", "SYN_RECV") => &["inferred"],
            ("server", "CLOSED") if from == "LISTEN" => &["inferred"],
            ("server", "CLOSED") => &["tcp_info", "sock_diag"],
            _ => &["tcp_info", "sock_diag", "inferred"],
        };
        assert!(can_be_seen_by.contains(&evidence.as_str()), "{role} {from}→{to} by {evidence}");
    }
}

fn json(summary: &str) -> serde_json::Value {
    serde_json::from_str(summary).unwrap_or_else(|e| panic!("{e}: {summary}"))
}

#[test]
fn two_hundred_lives_are_whole_at_both_ends() {
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--connections",
        "8",
        "--count",
        "200",
        "--duration",
        "60s",
        "--until-gone",
        "--output",
        "json",
    ]);
    // The run goes on until the kernel has let go of all, so that the counters can be asked when all is told.
    let metrics = until("200 in TIME_WAIT", || {
        let metrics = pair.metrics();
        let entered = metrics.sum("echoscope_tcp_transitions_total", &[("role", "client"), ("to", "time_wait")]);
        (entered == 200.0).then_some(metrics)
    });
    metrics.assert_nothing_lost();
    pair.signal("TERM");
    let (status, summary, lines) = pair.wait();
    assert_eq!(status.code(), Some(0), "{lines:#?}");
    let summary = json(&summary);
    assert_eq!((summary["connections"].as_u64(), summary["outcomes"]["ok"].as_u64()), (Some(200), Some(200)));
    assert_eq!(summary["bytes_sent"], summary["bytes_received"]);
    let lives = lives(&lines);
    let (mut clients, mut servers) = (0, 0);
    for ((role, _), changes) in &lives {
        assert_honest(role, changes);
        match (role.as_str(), walk(changes).as_slice()) {
            ("server", ["CLOSED", "LISTEN", "CLOSED"]) => {}
            ("server", states) => {
                assert_eq!(states, SERVER);
                servers += 1;
            }
            // Local ports may be reused while the run goes on: then a TIME_WAIT's early end is told too.
            (_, [states @ .., "CLOSED"] | states) => {
                assert_eq!(states, CLIENT);
                clients += 1;
            }
        }
    }
    assert_eq!((clients, servers), (200, 200));
}

#[test]
fn at_a_human_pace_the_states_that_last_are_seen_not_inferred() {
    let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0", "--duration", "1500ms", "--think-time", "10ms"]);
    let (status, _, lines) = pair.wait();
    assert_eq!(status.code(), Some(0), "{lines:#?}");
    let lives = lives(&lines);
    let whole: Vec<_> = lives.iter().filter(|(_, changes)| changes.len() > 2).collect();
    assert!(whole.len() >= 4, "two connections at least, two ends each: {lives:#?}");
    for ((role, _), changes) in whole {
        assert_honest(role, changes);
        let seen = |to: &str| changes.iter().find(|c| c.to == to).map(|c| c.evidence.clone());
        if role == "client" {
            assert_eq!(seen("FIN_WAIT2").as_deref(), Some("tcp_info"), "the close delay outlasts the delayed ACK");
        } else {
            let stayed = changes.iter().find(|c| c.from == "CLOSE_WAIT").and_then(|c| c.after);
            assert!(stayed.unwrap() >= 0.3, "CLOSE_WAIT is held by the close delay");
        }
    }
}

/// About 65 s; runs beside the others.
#[test]
fn every_time_wait_is_followed_to_its_end() {
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--connections",
        "4",
        "--count",
        "40",
        "--until-gone",
        "--output",
        "json",
    ]);
    let web = pair.web();
    until("40 in TIME_WAIT", || {
        let page = get(web, "/metrics").1;
        let metrics = Metrics::parse(&page);
        (metrics.sum("echoscope_tcp_sockets", &[("role", "client"), ("state", "time_wait")]) == 40.0).then_some(())
    });
    // The one wait that cannot be hurried: TIME_WAIT lasts a minute.
    let (_, lines) = pair.until_end(std::time::Duration::from_secs(100));
    let lives = lives(&lines);
    let ends: Vec<_> = lives.iter().filter(|((role, _), _)| role == "client").collect();
    assert_eq!(ends.len(), 40);
    for (_, changes) in ends {
        let states = walk(changes);
        assert_eq!((&states[..CLIENT.len()], &states[CLIENT.len()..]), (&CLIENT[..], &["CLOSED"][..]));
        let end = changes.last().unwrap();
        assert_eq!((end.evidence.as_str(), end.cause.as_deref()), ("sock_diag", Some("expired")));
        let stayed = end.after.unwrap();
        assert!((60.0..64.0).contains(&stayed), "TIME_WAIT lasted {stayed} s");
    }
}

/// About 70 s, most of it TIME_WAIT; runs beside the others.
#[test]
fn twenty_thousand_lives_as_fast_as_they_go_agree_to_the_last_transition() {
    const LIVES: usize = 20_000;
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--connections",
        "64",
        "--count",
        "20000",
        "--messages",
        "1",
        "--output",
        "json",
        "--until-gone",
    ]);
    // TIME_WAIT goes on, so that there is something to ask when the client is done.
    let metrics = until("20,000 lives", || {
        let metrics = pair.metrics();
        let entered = metrics.sum("echoscope_tcp_transitions_total", &[("role", "client"), ("to", "time_wait")]);
        (entered == 20_000.0).then_some(metrics)
    });
    metrics.assert_nothing_lost();
    for role in ["client", "server"] {
        let labels = [("role", role)];
        assert_eq!(metrics.sum("echoscope_connections_opened_total", &labels), 20_000.0);
        assert_eq!(metrics.sum("echoscope_connections_open", &labels), 0.0);
        let graceful = [("role", role), ("reason", "graceful")];
        assert_eq!(metrics.sum("echoscope_connections_closed_total", &graceful), 20_000.0);
    }
    // What 20,000 lives leave behind is what the follower still follows; the descriptors are gone.
    assert!(pair.descriptors() < 40, "{} descriptors", pair.descriptors());
    assert!(pair.resident_kib() < 64 * 1024, "{} KiB", pair.resident_kib());
    // Until the kernel has let go of all: before that, a TIME_WAIT may end between the summary and the log's last line.
    let (summary, lines) = pair.until_end(std::time::Duration::from_secs(150));
    let summary = json(&summary);
    assert_eq!((&summary["connections"], &summary["outcomes"]["ok"]), (&LIVES.into(), &LIVES.into()));
    assert_eq!((&summary["echoes"], &summary["bytes_sent"]), (&LIVES.into(), &(64 * LIVES).into()));
    assert_eq!(summary["bytes_sent"], summary["bytes_received"]);
    // Each life is told whole and in order, and the counters tell the same as the log.
    let lives = lives(&lines);
    let mut entered = std::collections::BTreeMap::new();
    for ((role, _), changes) in &lives {
        assert_honest(role, changes);
        match (role.as_str(), walk(changes).as_slice()) {
            ("server", ["CLOSED", "LISTEN", "CLOSED"]) => continue,
            ("server", states) => assert_eq!(states, SERVER),
            (_, [states @ .., "CLOSED"]) => assert_eq!(states, CLIENT),
            (_, states) => panic!("not followed to its end: {states:?}"),
        }
        for change in changes {
            *entered.entry((role.as_str(), change.to.as_str())).or_insert(0) += 1;
        }
    }
    let whole = |role: &str| lives.iter().filter(|((r, _), changes)| r == role && changes.len() > 2).count();
    assert_eq!((whole("client"), whole("server")), (LIVES, LIVES));
    for ((role, state), logged) in entered {
        let counted = &summary[format!("{role}_states")][state];
        // The listener's own end is one more.
        let listeners = u64::from((role, state) == ("server", "CLOSED"));
        assert_eq!(counted.as_u64(), Some(logged + listeners), "{role} {state}");
    }
}

/// What a life leaves behind must not grow with the lives.
#[test]
fn memory_is_flat_however_many_lives_have_passed() {
    // Without state lines: a log that waits to be written takes memory for as long as it waits.
    let [echo, web] = [(); 2].map(|()| format!("127.0.0.1:{}", quiet_port()));
    let quiet = ["--log.level", "warn", "--web.listen-address"];
    let server = Echoscope::start(&[&quiet[..], &["none", "server", "--listen", &echo]].concat());
    // A RST leaves no TIME_WAIT behind: what has ended is over at both ends.
    let load = ["--connections", "16", "--rate", "max", "--messages", "1", "--close", "reset"];
    let client = Echoscope::start(&[&quiet[..], &[&web, "client", &echo], &load].concat());
    let resident_after = |lives: f64| {
        until("so many lives", || {
            TcpStream::connect(&web).ok()?;
            let metrics = Metrics::parse(&get(web.parse().unwrap(), "/metrics").1);
            let aborted = [("role", "client"), ("reason", "aborted")];
            let closed = metrics.sum("echoscope_connections_closed_total", &aborted);
            (closed >= lives).then(|| [client.resident_kib(), server.resident_kib()])
        })
    };
    let early = resident_after(5_000.0);
    let late = resident_after(40_000.0);
    for (early, late) in early.into_iter().zip(late) {
        assert!(late < early + 2 * 1024, "35,000 lives more took {early} KiB to {late} KiB");
    }
}
