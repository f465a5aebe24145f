//! `explain`: the facts are whole, the diagram is the table of arrows, the values are this machine's, and docs/states.md
//! says the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use echoscope::explain::{CLIENT, FACTS, Query, SERVER, facts};
use echoscope::tcp::{ARROWS, State};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use crate::support::file;

/// No line for a terminal is longer.
const WIDTH: usize = 100;

fn explain(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoscope"));
    command.env_clear().arg("explain").args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    explain(arguments).output().expect("run echoscope")
}

/// What it prints when all is well, and nothing on stderr.
fn printed(arguments: &[&str]) -> String {
    let out = run(arguments);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.is_empty(), "{arguments:?}: {} {said}", out.status);
    String::from_utf8(out.stdout).expect("text")
}

// ---- The table ----

#[test]
fn every_state_has_every_part() {
    for facts in FACTS {
        let state = facts.state;
        let queries = |queries: &'static [Query]| queries.iter().flat_map(|q| [q.text, q.shows]);
        let sysctls = facts.sysctls.iter().flat_map(|s| [s.path, s.unit, s.does]);
        let parts: Vec<(&str, Vec<&str>)> = vec![
            ("meaning", vec![facts.meaning]),
            ("waiting", vec![facts.waiting]),
            ("ends", facts.ends.iter().flat_map(|way| way.on).copied().collect()),
            ("begins", facts.begins().flat_map(|(_, way)| way.on).copied().collect()),
            ("lasts", vec![facts.lasts.words, facts.lasts.differs]),
            ("sources", facts.lasts.sources.to_vec()),
            ("sysctls", sysctls.collect()),
            ("piles_up", facts.piles_up.to_vec()),
            ("commands", queries(facts.commands).collect()),
            ("queries", queries(facts.queries).collect()),
            ("remedies", facts.remedies.to_vec()),
        ];
        for (part, texts) in parts {
            assert!(!texts.is_empty(), "{state}: {part}");
            for text in texts {
                assert!(!text.trim().is_empty() && text == text.trim() && !text.contains("  "), "{state}: {text:?}");
            }
        }
        assert_eq!(facts.meaning.matches(['.', '!', '?']).count(), 1, "{state}: one sentence");
    }
}

#[test]
fn each_state_is_looked_for_where_it_is() {
    for facts in FACTS {
        let (state, label) = (facts.state, facts.state.label());
        // ss writes fin-wait-1, and has other words for a listener (-l) and for what is in no table.
        let in_ss = label.replace('_', "-").replace("wait1", "wait-1").replace("wait2", "wait-2");
        let asks = |what: &str| facts.commands.iter().any(|c| c.text.contains(what));
        let found = match state {
            State::Listen => asks("ss -tlnp"),
            State::Close => asks("/proc/PID/fd"),
            _ => asks(&format!("state {in_ss}")),
        };
        assert!(found, "{state}: no command shows it");
        let metric = match state {
            State::Listen => "echoscope_accept_queue_length".to_owned(),
            State::Close => "to=\"close\"".to_owned(),
            _ => format!("state=\"{label}\""),
        };
        assert!(facts.queries.iter().any(|q| q.text.contains(&metric)), "{state}: no query shows it");
    }
}

#[test]
fn the_alerts_are_the_runbooks() {
    let runbook = file("docs/runbook.md");
    for alert in FACTS.iter().flat_map(|f| f.alerts) {
        assert!(runbook.lines().any(|line| line == format!("## {alert}")), "the runbook has no entry {alert}");
    }
}

#[test]
fn the_document_says_what_the_table_says() {
    let document = printed(&["--output", "markdown"]);
    assert!(
        file("docs/states.md") == document,
        "docs/states.md is out of step; to make it anew: cargo run -- explain --output markdown > docs/states.md"
    );
    for facts in FACTS {
        let section = printed(&[facts.state.name(), "--output", "markdown"]);
        assert!(document.contains(&section), "{}", facts.state);
    }
}

// ---- The diagram ----

/// The drawing as characters, and where the box of each state is: its rows and columns, borders included.
struct Drawing {
    cells: Vec<Vec<char>>,
    boxes: Vec<(State, [usize; 2], [usize; 2])>,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stroke {
    Light,
    Heavy,
    Double,
}

impl Drawing {
    fn of(text: &str) -> Drawing {
        let cells: Vec<Vec<char>> = text.lines().map(|line| line.chars().collect()).collect();
        let mut drawing = Drawing { cells, boxes: Vec::new() };
        let corners = |c: char| -> Vec<[usize; 2]> {
            let rows = drawing.cells.iter().enumerate();
            rows.flat_map(|(y, row)| row.iter().enumerate().filter(move |(_, d)| **d == c).map(move |(x, _)| [y, x]))
                .collect()
        };
        let (lower, mut boxes) = (corners('┘'), Vec::new());
        for [top, left] in corners('┌') {
            // The box whose upper left corner this is, if it is one's: its upper border runs to the other corner.
            let row = &drawing.cells[top];
            let Some(width) = row[left + 1..].iter().position(|c| *c != '─') else { continue };
            let right = left + 1 + width;
            let Some([bottom, _]) = lower.iter().find(|[y, x]| *x == right && *y > top) else { continue };
            if row[right] != '┐' {
                continue;
            }
            let inside: String = (top + 1..*bottom).flat_map(|y| &drawing.cells[y][left + 1..right]).collect();
            let name = inside.trim();
            let state = State::ALL.into_iter().find(|s| s.name() == name).unwrap_or_else(|| panic!("box {name:?}"));
            boxes.push((state, [top, *bottom], [left, right]));
        }
        drawing.boxes = boxes;
        drawing
    }

    fn at(&self, y: usize, x: usize) -> char {
        self.cells.get(y).and_then(|row| row.get(x)).copied().unwrap_or(' ')
    }

    fn box_at(&self, y: usize, x: usize) -> Option<State> {
        let inside = |[least, most]: [usize; 2], n| (least..=most).contains(&n);
        self.boxes.iter().find(|(_, rows, columns)| inside(*rows, y) && inside(*columns, x)).map(|b| b.0)
    }

    /// Every arrow: followed back from its head to the box where its line begins.
    fn arrows(&self) -> BTreeSet<(State, State, Stroke)> {
        let mut found = BTreeSet::new();
        for y in 0..self.cells.len() {
            for x in 0..self.cells[y].len() {
                let (stroke, step) = match self.at(y, x) {
                    '↓' => (Stroke::Light, [1, 0]),
                    '→' => (Stroke::Light, [0, 1]),
                    '←' => (Stroke::Light, [0, -1]),
                    '▼' => (Stroke::Heavy, [1, 0]),
                    '▶' => (Stroke::Heavy, [0, 1]),
                    '◀' => (Stroke::Heavy, [0, -1]),
                    '▽' => (Stroke::Double, [1, 0]),
                    '▷' => (Stroke::Double, [0, 1]),
                    '◁' => (Stroke::Double, [0, -1]),
                    _ => continue,
                };
                let [ahead_y, ahead_x] = moved([y, x], step);
                let to = self.box_at(ahead_y, ahead_x).unwrap_or_else(|| panic!("line {y}: an arrow to nowhere"));
                let from = self.back([y, x], [-step[0], -step[1]], stroke);
                assert!(found.insert((from, to, stroke)), "{from} → {to} twice");
            }
        }
        found
    }

    fn back(&self, from: [usize; 2], mut step: [isize; 2], stroke: Stroke) -> State {
        let mut here = from;
        for _ in 0..1000 {
            here = moved(here, step);
            let [y, x] = here;
            if let Some(state) = self.box_at(y, x) {
                return state;
            }
            let [flat, upright, corners @ ..] = match stroke {
                Stroke::Light => ['─', '│', '┌', '┐', '└', '┘'],
                Stroke::Heavy => ['━', '┃', '┏', '┓', '┗', '┛'],
                Stroke::Double => ['═', '║', '╔', '╗', '╚', '╝'],
            };
            let c = self.at(y, x);
            let corner = corners.iter().position(|corner| *corner == c);
            step = match (step, corner) {
                ([0, _], None) if c == flat => step,
                ([_, 0], None) if c == upright => step,
                ([0, -1], Some(0)) | ([0, 1], Some(1)) => [1, 0],
                ([0, -1], Some(2)) | ([0, 1], Some(3)) => [-1, 0],
                ([-1, 0], Some(0)) | ([1, 0], Some(2)) => [0, 1],
                ([-1, 0], Some(1)) | ([1, 0], Some(3)) => [0, -1],
                _ => panic!("line {}, column {}: {c:?} is no part of a {stroke:?} line", y + 1, x + 1),
            };
        }
        panic!("a line without a beginning at {from:?}");
    }
}

fn moved(from: [usize; 2], step: [isize; 2]) -> [usize; 2] {
    [0, 1].map(|i| from[i].checked_add_signed(step[i]).expect("inside the drawing"))
}

/// The overview's parts: the drawing, its legend, the ways to CLOSED, the states.
fn overview() -> [String; 4] {
    let page = printed(&[]);
    let parts: Vec<String> = page.split("\n\n").map(str::to_owned).collect();
    parts.try_into().unwrap_or_else(|parts| panic!("{parts:#?}"))
}

/// The first word of each line that is not a continuation.
fn names(part: &str) -> Vec<&str> {
    part.lines().skip(1).filter(|l| !l.starts_with("    ")).filter_map(|l| l.split_whitespace().next()).collect()
}

#[test]
fn the_diagram_is_the_table_of_arrows() {
    let [drawing, _, endings, states] = overview();
    let drawing = Drawing::of(&drawing);
    let drawn: BTreeSet<State> = drawing.boxes.iter().map(|b| b.0).collect();
    assert_eq!(drawn, State::ALL.into(), "boxes");

    let arrows = drawing.arrows();
    let path = |states: &[State]| states.windows(2).map(|s| (s[0], s[1])).collect::<BTreeSet<_>>();
    let with = |stroke| arrows.iter().filter(|a| a.2 == stroke).map(|a| (a.0, a.1)).collect::<BTreeSet<_>>();
    assert_eq!(with(Stroke::Heavy), path(&CLIENT), "the client's path");
    assert_eq!(with(Stroke::Double), path(&SERVER), "the server's path");

    let walked: BTreeSet<_> = ARROWS.iter().map(|a| (a.from, a.to)).collect();
    let listed = names(&endings).into_iter().map(|name| (State::named(name).expect(name), State::Close));
    let told: BTreeSet<_> = arrows.iter().map(|a| (a.0, a.1)).chain(listed).collect();
    assert_eq!(told, walked, "drawn or listed, against the table");
    assert_eq!(names(&states), FACTS.map(|f| f.state.name()), "a line for each state");
    assert_eq!(states.lines().count(), 1 + FACTS.len());
}

#[test]
fn the_textbook_paths_are_walked_along_arrows() {
    for path in [CLIENT, SERVER] {
        for pair in path.windows(2) {
            assert!(ARROWS.iter().any(|a| a.from == pair[0] && a.to == pair[1]), "{pair:?}");
        }
    }
}

// ---- What is printed ----

#[test]
fn no_line_is_wider_than_a_terminal() {
    let states = State::ALL.map(|state| vec![state.name()]);
    for arguments in states.into_iter().chain([vec![]]) {
        for line in printed(&arguments).lines() {
            assert!(line.chars().count() <= WIDTH, "{arguments:?}: {} columns: {line}", line.chars().count());
            assert_eq!(line, line.trim_end(), "{arguments:?}");
        }
    }
}

#[test]
fn values_are_this_machines() {
    let mut read = BTreeMap::new();
    for state in State::ALL {
        let page = printed(&[state.name()]);
        let json: Value = serde_json::from_str(&printed(&[state.name(), "--output", "json"])).unwrap();
        assert_eq!((&json["state"], &json["label"]), (&state.name().into(), &state.label().into()));
        for sysctl in facts(state).sysctls {
            let here = fs::read_to_string(format!("/proc/sys/{}", sysctl.path));
            let here = here.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
            let told = match &here {
                Ok(value) if value.is_empty() => "(nothing set)".to_owned(),
                Ok(value) => value.clone(),
                Err(error) => format!("cannot be read: {error}"),
            };
            let line = format!("{} = {told}  ({})", sysctl.name(), sysctl.unit);
            assert!(page.lines().any(|l| l.ends_with(&line)), "{state}: not told: {line}");
            assert_eq!(json["here"]["sysctls"][sysctl.path], Value::from(here.ok()), "{state}: {}", sysctl.path);
            read.insert(sysctl.path, told);
        }
        let limits = json["here"]["limits"].as_object().unwrap();
        assert_eq!(limits.len(), facts(state).lasts.limits.len());
        assert!(limits.values().all(|seconds| seconds.as_f64().is_some_and(|s| s > 0.0)), "{state}: {limits:?}");
    }
    assert!(read["net/ipv4/ip_local_port_range"].contains(' '), "{read:?}");
    let seconds: f64 = read["net/ipv4/tcp_fin_timeout"].parse().unwrap();
    let json: Value = serde_json::from_str(&printed(&["FIN_WAIT2", "--output", "json"])).unwrap();
    assert_eq!(json["here"]["limits"]["the descriptor is closed"], seconds);
}

#[test]
fn all_states_are_one_json_document() {
    let json: Value = serde_json::from_str(&printed(&["--output", "json"])).unwrap();
    let states: Vec<&str> = json["states"].as_array().unwrap().iter().filter_map(|s| s["state"].as_str()).collect();
    assert_eq!(states, FACTS.map(|f| f.state.name()));
    for (role, path) in [("client", CLIENT), ("server", SERVER)] {
        assert_eq!(json[role], Value::from(path.map(State::name).to_vec()));
    }
}

#[test]
fn a_state_is_taken_in_any_usual_spelling_and_nothing_else_is() {
    for (state, spellings) in [
        ("TIME_WAIT", ["time_wait", "TIME-WAIT", "timewait", "TCP_TIME_WAIT"]),
        ("FIN_WAIT1", ["FIN-WAIT-1", "fin_wait1", "FinWait1", "fin-wait-1"]),
        ("CLOSED", ["closed", "close", "CLOSE", "unconn"]),
        ("SYN_RECV", ["SYN-RECEIVED", "syn_rcvd", "syn-recv", "SynRecv"]),
    ] {
        let page = printed(&[state]);
        assert!(page.starts_with(state), "{page}");
        for spelling in spellings {
            assert_eq!(printed(&[spelling]), page, "{spelling}");
        }
    }
    for (wrong, named) in [
        (&["NOWHERE"][..], "NOWHERE"),
        (&[""], "[STATE]"),
        (&["FIN_WAIT"], "FIN_WAIT"),
        (&["LISTEN", "CLOSED"], "CLOSED"),
        (&["LISTEN", "--output", "csv"], "csv"),
    ] {
        let out = run(wrong);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0), "{wrong:?}: {said}");
        assert!(said.contains(named), "{wrong:?}: {said}");
        if wrong.len() == 1 {
            assert!(State::ALL.iter().all(|s| said.contains(s.name())), "{wrong:?} does not list the states: {said}");
        }
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    for arguments in [&["TIME_WAIT"][..], &[], &["--output", "markdown"], &["--output", "json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = explain(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success() && said.is_empty(), "{arguments:?}: {status} {said}");
    }
}

#[test]
fn what_cannot_be_written_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let out = explain(&["LISTEN"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("print the explanation") && !said.contains("panicked"), "{said}");
}

#[test]
fn it_binds_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    printed(&["CLOSE_WAIT", "--web.listen-address", &address]);
}

/// What it prints on a terminal.
fn on_a_terminal(command: &mut Command) -> String {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let slave = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    let reader = std::thread::spawn(move || {
        let mut master = fs::File::from(master);
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        // A terminal that nobody holds open any more ends with EIO.
        while let Ok(n @ 1..) = master.read(&mut buffer) {
            text.extend_from_slice(&buffer[..n]);
        }
        String::from_utf8(text).unwrap()
    });
    let status = command.stdout(slave).status().unwrap();
    // The command holds the terminal's other end until it is given something else.
    command.stdout(Stdio::null());
    assert!(status.success(), "{status}");
    reader.join().unwrap()
}

#[test]
fn colour_is_for_terminals_that_want_it() {
    for arguments in [&[][..], &["TIME_WAIT"]] {
        assert!(on_a_terminal(&mut explain(arguments)).contains("\x1b["), "{arguments:?}");
        let refused = on_a_terminal(explain(arguments).env("NO_COLOR", "1"));
        assert!(refused.len() > 1000 && !refused.contains('\x1b'), "{arguments:?}: {refused}");
        let unset = on_a_terminal(explain(arguments).env("NO_COLOR", ""));
        assert!(unset.contains("\x1b["), "{arguments:?}");
        assert!(!printed(arguments).contains('\x1b'), "{arguments:?}");
    }
}
