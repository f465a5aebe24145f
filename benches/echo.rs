//! Echoing beside a C epoll server (benches/c/echo_server.c) and, where it is installed, socat: with every connection
//! observed, and with observation off.
//!
//! `cargo bench --bench echo [-- --rounds N] [--seconds S] [--only NAME] [--save DIRECTORY]`
//!
//! All servers run all the time, and are loaded in turn: a round is one load of each, in an order that changes from
//! round to round. What counts are ratios within a round; absolute figures drift by tens of per cent on a shared
//! machine. Client and server share one core unless it is said otherwise. Asserts nothing but that the load could run.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;
use support::{Goal, Kept, Line, Spread, await_listener, chart, compile, get, installed, print, resident};

/// One of those that are compared.
struct Server {
    name: &'static str,
    port: u16,
    process: Kept,
}

const LEVEL: &str = "C level-triggered";
const EDGE: &str = "C edge-triggered";
const ON: &str = "observed";
const OFF: &str = "not observed";
const SOCAT: &str = "socat";
/// Observed, and somebody looks at the live page.
const LIVE: &str = "looked at";

/// One kind of load.
struct Load {
    name: &'static str,
    mode: &'static str,
    connections: usize,
    size: usize,
    cores: [&'static str; 2],
    /// The server that others are held against.
    base: &'static str,
    with_socat: bool,
}

const ONE_CORE: [&str; 2] = ["0", "0"];
const TWO_CORES: [&str; 2] = ["0", "1"];

const fn pingpong(name: &'static str, connections: usize, size: usize, cores: [&'static str; 2]) -> Load {
    Load { name, mode: "pingpong", connections, size, cores, base: LEVEL, with_socat: connections == 1 }
}

const LOADS: [Load; 7] = [
    pingpong("64 B, 1 connection", 1, 64, ONE_CORE),
    pingpong("64 B, 64 connections", 64, 64, ONE_CORE),
    pingpong("64 B, 1,000 connections", 1000, 64, ONE_CORE),
    pingpong("64 B, 1,000 connections, two cores", 1000, 64, TWO_CORES),
    pingpong("16 KiB, 64 connections", 64, 16 * 1024, ONE_CORE),
    Load {
        name: "stream, 8 connections",
        mode: "stream",
        connections: 8,
        size: 256 * 1024,
        cores: ONE_CORE,
        base: EDGE,
        with_socat: false,
    },
    Load {
        name: "lives, 16 at a time",
        mode: "lives",
        connections: 16,
        size: 64,
        cores: ONE_CORE,
        base: LEVEL,
        with_socat: true,
    },
];

/// What the load says of itself.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Measured {
    seconds: f64,
    messages: f64,
    bytes: f64,
    server_cpu: f64,
    p50: f64,
    p99: f64,
    p999: f64,
}

impl Measured {
    fn rate(&self) -> f64 {
        self.messages / self.seconds
    }

    fn cpu_each(&self) -> f64 {
        self.server_cpu / self.messages
    }

    fn cpu_per_kib(&self) -> f64 {
        self.server_cpu / (self.bytes / 1024.0)
    }
}

struct Options {
    rounds: usize,
    seconds: f64,
    only: Option<String>,
    save: Option<String>,
}

impl Options {
    fn from_arguments() -> Options {
        let mut options = Options { rounds: 7, seconds: 1.0, only: None, save: None };
        // Cargo adds --bench.
        let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
        while let Some(flag) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{flag} needs a value"));
            match flag.as_str() {
                "--rounds" => options.rounds = value().parse().expect("--rounds is a number"),
                "--seconds" => options.seconds = value().parse().expect("--seconds is a number"),
                "--only" => options.only = Some(value()),
                "--save" => options.save = Some(value()),
                _ => panic!("unknown argument {flag}"),
            }
        }
        options
    }
}

fn main() {
    let options = Options::from_arguments();
    let load = compile("load");
    let servers = start_servers();
    let mut lines = Vec::new();
    for kind in LOADS.iter().filter(|k| options.only.as_ref().is_none_or(|only| k.name.contains(only.as_str()))) {
        lines.extend(compare(kind, &servers, &load, &options));
    }
    if options.only.is_none() {
        lines.extend(memory(&servers, &load));
    }
    println!("\n{} rounds of {} s; ratio to the C server of the same round", options.rounds, options.seconds);
    print(&lines);
    if let Some(directory) = options.save {
        let json = serde_json::to_string_pretty(&lines).expect("JSON");
        std::fs::write(format!("{directory}/performance.json"), json).expect("save the figures");
        // Of another order of magnitude: in the table only.
        let beside_c: Vec<Line> = lines.into_iter().filter(|line| !line.what.contains("socat")).collect();
        let picture = chart::svg("echoscope, ratio to a C epoll server (tick: the goal)", &beside_c);
        std::fs::write(format!("{directory}/performance.svg"), picture).expect("save the chart");
    }
}

/// Starts one of each on the first core.
fn start_servers() -> Vec<Server> {
    let c = compile("echo_server");
    let ours = env!("CARGO_BIN_EXE_echoscope");
    let on_core = |program: &str| {
        let mut command = Command::new("taskset");
        command.args(["-c", "0", program]);
        command
    };
    // As one would run it on a core of its own, with metrics and state lines, which go to a file.
    let echoscope = |port: u16, lifecycles: &str| {
        let log = format!("{}/echoscope-{port}.log", env!("CARGO_TARGET_TMPDIR"));
        let mut command = on_core(ours);
        command.env_clear().stderr(File::create(log).expect("make a log file"));
        command.args(["--log.format", "json", "--web.listen-address", &format!("127.0.0.1:{}", port + 100)]);
        command.args(["server", "--listen", &format!("127.0.0.1:{port}"), "--accept-backlog", "4096"]);
        command.args(["--runtime", "per-core", "--workers", "1", "--lifecycles", lifecycles]);
        command
    };
    let mut all = vec![
        (LEVEL, 18001, on_core(&c)),
        (EDGE, 18002, on_core(&c)),
        (ON, 18003, echoscope(18003, "on")),
        (OFF, 18004, echoscope(18004, "off")),
        (LIVE, 18006, echoscope(18006, "on")),
    ];
    all[0].2.args(["18001", "lt", "65536"]);
    // The buffer of echoscope (server/echo.rs).
    all[1].2.args(["18002", "et", "131072"]);
    if installed("socat") {
        let mut socat = on_core("socat");
        socat.args(["TCP-LISTEN:18005,bind=127.0.0.1,fork,reuseaddr,backlog=4096,nodelay", "PIPE"]);
        all.push((SOCAT, 18005, socat));
    }
    let start = |(name, port, mut command): (&'static str, u16, Command)| {
        let process = Kept::start(&mut command);
        await_listener(port);
        Server { name, port, process }
    };
    let servers: Vec<Server> = all.into_iter().map(start).collect();
    await_listener(18106);
    std::thread::spawn(|| look_at("127.0.0.1:18106"));
    std::thread::spawn(|| {
        loop {
            // As the page asks for its list and its ladder.
            get("127.0.0.1:18106", "/api/connections?limit=50");
            for _ in 0..2 {
                get("127.0.0.1:18106", "/api/connections?conn=2a");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    });
    servers
}

/// Reads the live page's events for as long as they come, as a browser does.
fn look_at(web: &str) {
    let mut stream = TcpStream::connect(web).expect("connect");
    write!(stream, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    let mut buffer = vec![0; 64 * 1024];
    while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
}

/// All rounds of one kind of load: the results of each server by round.
fn compare(kind: &Load, servers: &[Server], load: &str, options: &Options) -> Vec<Line> {
    let taking_part: Vec<&Server> = servers
        .iter()
        .filter(|s| match s.name {
            SOCAT => kind.with_socat,
            LIVE => kind.mode == "lives",
            _ => true,
        })
        .collect();
    let mut results: Vec<Vec<Measured>> = vec![Vec::new(); taking_part.len()];
    for round in 0..options.rounds {
        for i in 0..taking_part.len() {
            let turn = (i + round) % taking_part.len();
            results[turn].push(measure(kind, taking_part[turn], load, round, options.seconds));
        }
        eprintln!("{}: round {} of {}", kind.name, round + 1, options.rounds);
    }
    let of = |name: &str| taking_part.iter().position(|s| s.name == name).map(|i| &results[i]);
    let ratio = |name: &str, base: &str, value: fn(&Measured) -> f64| {
        let (ours, base) = (of(name)?, of(base)?);
        let ratios: Vec<f64> = ours.iter().zip(base).map(|(ours, base)| value(ours) / value(base)).collect();
        Some(Spread::of(&ratios))
    };
    let typical = |name: &str, value: fn(&Measured) -> f64| {
        of(name).map_or(0.0, |m| Spread::of(&m.iter().map(value).collect::<Vec<_>>()).median)
    };
    let mut lines = Vec::new();
    let mut add = |what: String, ratio: Option<Spread>, goal: Option<Goal>, absolute: String| {
        lines.extend(ratio.map(|ratio| Line { what, ratio, goal, absolute }));
    };
    let two_cores = kind.cores[0] != kind.cores[1];
    match kind.mode {
        "pingpong" => {
            let goal = match (kind.size, two_cores) {
                (64, false) => 0.97,
                (64, true) => 0.93,
                _ => 0.95,
            };
            for name in [EDGE, OFF, ON, SOCAT] {
                let goal = (name == ON).then_some(Goal::AtLeast(goal));
                let latency = [Measured::p50, Measured::p99, Measured::p999].map(|p| typical(name, p));
                let absolute = format!(
                    "{:.0} a second, p50 {:.0} p99 {:.0} p99.9 {:.0} µs",
                    typical(name, Measured::rate),
                    latency[0],
                    latency[1],
                    latency[2]
                );
                add(format!("{}: {name}", kind.name), ratio(name, kind.base, Measured::rate), goal, absolute);
            }
            let goal = two_cores.then_some(Goal::AtMost(1.4));
            add(format!("{}: p99, observed", kind.name), ratio(ON, kind.base, Measured::p99), goal, String::new());
            if !two_cores {
                let cost = ratio(ON, OFF, Measured::rate);
                add(format!("{}: observed / not observed", kind.name), cost, Some(Goal::AtLeast(0.99)), String::new());
            }
            let socat = ratio(ON, SOCAT, Measured::rate);
            add(format!("{}: observed / socat", kind.name), socat, Some(Goal::AtLeast(2.0)), String::new());
        }
        "stream" => {
            for (name, goal) in [(OFF, None), (ON, Some(Goal::AtMost(1.08)))] {
                let absolute = format!("{:.0} ns per KiB", 1e9 * typical(name, Measured::cpu_per_kib));
                add(
                    format!("{}: CPU per KiB, {name}", kind.name),
                    ratio(name, kind.base, Measured::cpu_per_kib),
                    goal,
                    absolute,
                );
            }
        }
        _ => {
            for (name, goal) in [(OFF, None), (ON, Some(Goal::AtLeast(0.97))), (SOCAT, None)] {
                let absolute = format!("{:.0} a second", typical(name, Measured::rate));
                add(format!("{}: rate, {name}", kind.name), ratio(name, kind.base, Measured::rate), goal, absolute);
            }
            for (name, goal) in [(OFF, 1.06), (ON, 1.20)] {
                let absolute = format!("{:.1} µs each", 1e6 * typical(name, Measured::cpu_each));
                let ratio = ratio(name, kind.base, Measured::cpu_each);
                add(format!("{}: server CPU each, {name}", kind.name), ratio, Some(Goal::AtMost(goal)), absolute);
            }
            let cost = ratio(ON, OFF, Measured::cpu_each);
            add(format!("{}: CPU, observed / not", kind.name), cost, Some(Goal::AtMost(1.15)), String::new());
            let socat = ratio(ON, SOCAT, Measured::rate);
            add(format!("{}: observed / socat", kind.name), socat, Some(Goal::AtLeast(11.0)), String::new());
            let absolute = format!("{:.0} a second, five state changes each", typical(LIVE, Measured::rate));
            let rate = ratio(LIVE, ON, Measured::rate);
            add(format!("{}: rate, {LIVE} / observed", kind.name), rate, Some(Goal::AtLeast(0.97)), absolute);
            let absolute = format!("{:.1} µs each", 1e6 * typical(LIVE, Measured::cpu_each));
            let cost = ratio(LIVE, ON, Measured::cpu_each);
            add(format!("{}: CPU, {LIVE} / observed", kind.name), cost, Some(Goal::AtMost(1.03)), absolute);
        }
    }
    lines
}

impl Measured {
    fn p50(&self) -> f64 {
        self.p50
    }

    fn p99(&self) -> f64 {
        self.p99
    }

    fn p999(&self) -> f64 {
        self.p999
    }
}

fn measure(kind: &Load, server: &Server, load: &str, round: usize, seconds: f64) -> Measured {
    // One that forks serves with processes whose time nobody counts; its own does not matter.
    let pid = server.process.pid().to_string();
    let source = format!("127.0.1.{}", 1 + round % 250);
    let mut command = Command::new("taskset");
    command.args(["-c", kind.cores[1], load, kind.mode, &server.port.to_string(), &pid]);
    command.args([&kind.connections.to_string(), &kind.size.to_string(), &seconds.to_string(), &source]);
    let out = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().expect("run the load");
    assert!(out.status.success(), "{}: {command:?}", server.name);
    serde_json::from_slice(&out.stdout).expect("the load's JSON")
}

/// Memory of each idle connection, each of which has echoed once.
fn memory(servers: &[Server], load: &str) -> Vec<Line> {
    const IDLE: usize = 10_000;
    let of = |name: &str| {
        let server = servers.iter().find(|s| s.name == name).expect("a server");
        let before = resident(server.process.pid());
        let mut command = Command::new(load);
        command.args(["idle", &server.port.to_string(), &server.process.pid().to_string(), &IDLE.to_string()]);
        command.args(["64", "0", "127.0.2.1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Kept(command.spawn().expect("run the load"));
        let mut ready = String::new();
        BufReader::new(holder.0.stdout.take().expect("piped")).read_line(&mut ready).expect("the load");
        assert_eq!(ready.trim(), "ready");
        let each = (resident(server.process.pid()) - before) / IDLE as f64;
        drop(holder.0.stdin.take());
        let _ = holder.0.stdout.take().map(|mut out| out.read_to_end(&mut Vec::new()));
        each
    };
    let (c, off, on) = (of(LEVEL), of(OFF), of(ON));
    let web = format!("127.0.0.1:{}", servers.iter().find(|s| s.name == ON).expect("a server").port + 100);
    let lost = get(&web, "/metrics").lines().filter(|l| l.starts_with("echoscope_log_lost_total")).collect::<String>();
    println!("idle connection: C {c:.0} B, not observed {off:.0} B, observed {on:.0} B (goal ≤ 1229 B); {lost}");
    let line = |what: &str, bytes: f64, goal| Line {
        what: format!("idle connection: {what}, in KiB"),
        ratio: Spread::of(&[bytes / 1024.0]),
        goal,
        absolute: format!("{bytes:.0} B"),
    };
    vec![line("not observed", off, None), line("observed", on, Some(Goal::AtMost(1.2)))]
}
