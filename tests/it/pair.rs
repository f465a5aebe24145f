//! Server and client in one process: whole lives, nothing invented, nothing lost.

use crate::support::{Change, Echoscope, lives, walk};

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
        "--output",
        "json",
    ]);
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
fn at_a_human_pace_every_state_is_seen_not_inferred() {
    let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0", "--duration", "1500ms", "--think-time", "10ms"]);
    let (status, _, lines) = pair.wait();
    assert_eq!(status.code(), Some(0), "{lines:#?}");
    for ((role, _), changes) in lives(&lines).into_iter().filter(|(_, c)| c.len() > 2) {
        assert_honest(&role, &changes);
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
    crate::support::until("40 in TIME_WAIT", || {
        let page = crate::support::get(web, "/metrics").1;
        let metrics = crate::support::Metrics::parse(&page);
        (metrics.sum("echoscope_tcp_sockets", &[("role", "client"), ("state", "time_wait")]) == 40.0).then_some(())
    });
    // The one wait that cannot be hurried: TIME_WAIT lasts a minute.
    let lines = pair.lines_until_end(std::time::Duration::from_secs(100));
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

#[test]
fn twenty_thousand_lives_as_fast_as_they_go_agree_to_the_last_transition() {
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
    // The client is done when all its connections are closed; TIME_WAIT goes on, so that there is something to ask.
    let metrics = crate::support::until("20,000 lives", || {
        let metrics = pair.metrics();
        let entered = metrics.sum("echoscope_tcp_transitions_total", &[("role", "client"), ("to", "time_wait")]);
        (entered == 20_000.0).then_some(metrics)
    });
    metrics.assert_nothing_lost();
    // The log is written in batches, behind the counters.
    let counted = metrics.sum("echoscope_tcp_transitions_total", &[]) as usize;
    crate::support::until("the log to catch up", || (pair.line_count() >= counted).then_some(()));
    let logged = lives(&pair.lines());
    for (role, states) in [("client", &CLIENT[1..]), ("server", &SERVER[1..5])] {
        let labels = [("role", role)];
        assert_eq!(metrics.sum("echoscope_connections_opened_total", &labels), 20_000.0);
        assert_eq!(metrics.sum("echoscope_connections_open", &labels), 0.0);
        let graceful = [("role", role), ("reason", "graceful")];
        assert_eq!(metrics.sum("echoscope_connections_closed_total", &graceful), 20_000.0);
        for state in states {
            let to = state.to_lowercase();
            let counted = metrics.sum("echoscope_tcp_transitions_total", &[("role", role), ("to", &to)]);
            let of_role = logged.iter().filter(|((r, _), _)| r == role).flat_map(|(_, changes)| changes);
            let logged = of_role.filter(|c| c.to == *state).count();
            assert_eq!((counted, logged), (20_000.0, 20_000), "{role} {state}");
        }
    }
    assert_eq!(metrics.sum("echoscope_tcp_transitions_total", &[("from", "last_ack"), ("to", "close")]), 20_000.0);
    assert_eq!(
        metrics.sum("echoscope_bytes_total", &[("role", "client"), ("direction", "sent")]),
        metrics.sum("echoscope_bytes_total", &[("role", "server"), ("direction", "received")]),
    );
    // What 20,000 lives leave behind is what the follower still follows; the descriptors are gone.
    assert!(pair.descriptors() < 40, "{} descriptors", pair.descriptors());
    assert!(pair.resident_kib() < 64 * 1024, "{} KiB", pair.resident_kib());
    pair.signal("TERM");
    pair.signal("TERM");
}
