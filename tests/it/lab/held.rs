//! Each scenario alone, held to be looked at from outside: the metrics count what it shows, and the lives tell it.

use echoscope::tcp::{Role, State};
use serde_json::Value;

use super::{assert_calm, assert_shown, message_begins, network_of, quick, stage_sockets, verdict};
use crate::support::{Echoscope, get, until};
use Role::{Client, Server};
use State::{Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait};

/// Long enough for two readings of the table and for a busy machine, and for what passes to have passed.
const HOLD: &str = "5s";

/// So many in one state at one end.
type Seen = (Role, State, usize);

/// What there is to see while a scenario is held.
struct Picture {
    /// In the kernel's table: these and no other.
    sockets: &'static [Seen],
    /// Among the lives.
    lives: &'static [Seen],
}

/// Where the lives say the same as the table.
const fn alike(seen: &'static [Seen]) -> Picture {
    Picture { sockets: seen, lives: seen }
}

/// The quick scenarios, and what is to be seen at each hold.
const HELD: &[(&str, &[Picture])] = &[
    ("syn-sent-stuck", &[alike(&[(Client, SynSent, 1), (Server, SynRecv, 1), (Server, Listen, 1)])]),
    ("syn-recv-stuck", &[alike(&[(Client, Established, 1), (Server, SynRecv, 1), (Server, Listen, 1)])]),
    ("fin-wait1-stuck", &[alike(&[(Client, FinWait1, 1), (Server, Established, 1), (Server, Listen, 1)])]),
    ("half-close", &[alike(&[(Client, FinWait2, 1), (Server, CloseWait, 1), (Server, Listen, 1)])]),
    // The orphan in FIN_WAIT2 passes in a second.
    (
        "fin-wait2-orphan",
        &[Picture {
            sockets: &[(Server, CloseWait, 1), (Server, Listen, 1)],
            lives: &[(Client, Close, 1), (Server, CloseWait, 1), (Server, Listen, 1)],
        }],
    ),
    // Nobody asks the clients' descriptors any more: whether their lives tell of the ACK depends on when it came.
    (
        "close-wait-leak",
        &[Picture {
            sockets: &[(Client, FinWait2, 3), (Server, CloseWait, 3), (Server, Listen, 1)],
            lives: &[(Server, CloseWait, 3), (Server, Listen, 1)],
        }],
    ),
    ("last-ack-lost", &[alike(&[(Client, TimeWait, 1), (Server, LastAck, 1), (Server, Listen, 1)])]),
    ("simultaneous-open", &[alike(&[(Client, SynRecv, 1)])]),
    ("simultaneous-close", &[alike(&[(Client, Closing, 1)])]),
    ("time-wait-flood", &[alike(&[(Client, TimeWait, 50), (Server, Listen, 1)])]),
    ("port-exhaustion", &[alike(&[(Client, TimeWait, 8), (Server, Listen, 1)])]),
    ("time-wait-reuse", &[alike(&[(Client, TimeWait, 1), (Server, Listen, 1)])]),
    ("time-wait-assassination", &[alike(&[(Client, TimeWait, 1), (Server, Listen, 1)])]),
    ("reset-by-linger", &[alike(&[(Client, Established, 1), (Server, Established, 1), (Server, Listen, 1)])]),
    ("reset-by-unread-data", &[alike(&[(Client, Established, 1), (Server, Established, 1), (Server, Listen, 1)])]),
    ("refused", &[Picture { sockets: &[], lives: &[(Client, Close, 1)] }]),
    // What waits in the queue has no descriptor yet, and so no life of its own.
    (
        "accept-queue-overflow",
        &[Picture {
            sockets: &[(Client, Established, 1), (Client, SynSent, 1), (Server, Established, 1), (Server, Listen, 1)],
            lives: &[(Client, Established, 1), (Client, SynSent, 1), (Server, Listen, 1)],
        }],
    ),
    // The client times out meanwhile, and nobody asks its descriptor.
    (
        "retransmission-timeout",
        &[Picture {
            sockets: &[(Server, Established, 1), (Server, Listen, 1)],
            lives: &[(Client, Established, 1), (Server, Established, 1), (Server, Listen, 1)],
        }],
    ),
    (
        "keepalive-death",
        &[Picture {
            sockets: &[(Server, Established, 1), (Server, Listen, 1)],
            lives: &[(Client, Established, 1), (Server, Established, 1), (Server, Listen, 1)],
        }],
    ),
    ("slow-reader", &[alike(&[(Client, Established, 1), (Server, Established, 1), (Server, Listen, 1)])]),
    (
        "drain",
        &[
            alike(&[(Server, FinWait2, 1), (Client, CloseWait, 1), (Server, Listen, 1)]),
            Picture {
                sockets: &[(Server, TimeWait, 1), (Server, Listen, 1)],
                lives: &[(Server, TimeWait, 1), (Client, Close, 1), (Server, Listen, 1)],
            },
        ],
    ),
];

/// All at once: each is in a network of its own.
#[test]
fn each_scenario_shows_to_whoever_looks_from_outside_what_it_says() {
    let names: Vec<&str> = quick().iter().map(|about| about.name).collect();
    assert_eq!(HELD.iter().map(|held| held.0).collect::<Vec<_>>(), names);
    std::thread::scope(|scope| {
        for (name, pictures) in HELD {
            let look = move || look_at(name, pictures);
            std::thread::Builder::new().name((*name).to_owned()).spawn_scoped(scope, look).expect("a thread");
        }
    });
}

fn look_at(name: &str, pictures: &[Picture]) {
    let lab = Echoscope::start(&["lab", name, "--hold", HOLD, "--output", "json"]);
    let port = lab.line("its port", |line| line["scenario"] == name)["port"].as_u64().expect("a port") as u16;
    for (turn, picture) in pictures.iter().enumerate() {
        let lines = until("a hold", || {
            let lines = lab.lines();
            let held = lines.iter().enumerate().filter(|(_, line)| message_begins(line, "held for")).nth(turn)?.0;
            Some(lines[..=held].to_vec())
        });
        let said: Vec<_> = lines.iter().filter(|line| message_begins(line, "metric:")).map(|l| &l["message"]).collect();
        let assert_held = |seen: &[Seen], wanted: &[Seen]| {
            let over = lab.lines().iter().skip(lines.len()).any(|line| line["scenario"] == name);
            assert!(!over, "{name} was not held for so long: {seen:?} were seen last, not {wanted:?}");
        };
        let mut counted: Vec<Seen> = Vec::new();
        until("so many sockets", || {
            assert_held(&counted, picture.sockets);
            let metrics = lab.metrics();
            metrics.assert_nothing_lost();
            let count = |role: Role, state: State| metrics.sockets(role.label(), port, state.label()) as usize;
            let all = Role::ALL.into_iter().flat_map(|role| State::ALL.map(|state| (role, state, count(role, state))));
            counted = all.filter(|seen| seen.2 > 0).collect();
            let same =
                counted.len() == picture.sockets.len() && counted.iter().all(|seen| picture.sockets.contains(seen));
            same.then_some(())
        });
        let mut told: Vec<Seen> = Vec::new();
        until("such lives", || {
            assert_held(&told, picture.lives);
            let lives: Value = serde_json::from_str(&get(lab.web(), "/api/connections?limit=1000").1).expect("lives");
            let lives = lives.as_array().expect("a list");
            assert!(lives.iter().all(|life| life["port"] == port), "{lives:#?}");
            let count = |role: Role, state: State| {
                lives.iter().filter(|life| life["role"] == role.label() && life["state"] == state.name()).count()
            };
            told = picture.lives.iter().map(|(role, state, _)| (*role, *state, count(*role, *state))).collect();
            (told == picture.lives).then_some(())
        });
        // What lasts, the lab said itself, in the metrics' own words.
        for (role, state, count) in picture.sockets.iter().filter(|seen| picture.lives.contains(seen)) {
            let (role, state) = (role.label(), state.label());
            let metric =
                format!("metric:  echoscope_tcp_sockets{{port=\"{port}\",role=\"{role}\",state=\"{state}\"}} {count}");
            assert!(said.iter().any(|line| **line == metric), "{metric:?} is not in {said:#?}");
        }
        assert_ne!(network_of(lab.pid()), network_of(std::process::id()));
        assert!(stage_sockets().is_empty(), "outside: {:?}", stage_sockets());
    }
    let (status, stdout, lines) = lab.wait();
    assert_eq!(status.code(), Some(0), "{stdout}");
    assert_calm(&lines);
    let verdict = verdict(&stdout);
    assert_shown(&verdict);
    assert_eq!(verdict["scenarios"].as_array().unwrap().len(), 1, "{verdict:#}");
    assert_eq!(verdict["scenarios"][0]["scenario"], name);
}
