//! The census of many sockets beside `ss -tan`, `cat /proc/net/tcp` and, where it is installed, node_exporter's tcpstat,
//! on the same table; what it does to echo traffic meanwhile; a lookup; the follower at full churn.
//!
//! `cargo bench --bench census [-- SOCKETS…] [--save DIRECTORY]` (default 1000 10000 30000 90000 100000; goals are told at 90000). The sockets are held by
//! helper processes (this program again), both ends of each connection in one, because a process may open 20,000
//! descriptors or so. Prints figures; asserts only that the counts are right. Absolute times are the machine's of the
//! moment: the ratios, taken in turn in one run, are what counts.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use echoscope::kernel::{Table, sockopt};
use echoscope::tcp::Flow;
use support::{Goal, Kept, Line, Spread, await_listener, chart, get, installed, print, resident, until};

const PORT: u16 = 17007;
const WEB: &str = "127.0.0.1:19907";
const NODE_EXPORTER: u16 = 19100;
const EACH: usize = 8_000;
const ROUNDS: usize = 9;

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if std::env::var_os("CENSUS_HOLD").is_some() {
        return hold(&arguments[0], arguments[1].parse().expect("count"));
    }
    let save = arguments.iter().position(|a| a == "--save").map(|i| {
        let directory = arguments.get(i + 1).expect("--save needs a directory").clone();
        arguments.drain(i..=i + 1);
        directory
    });
    let mut sizes: Vec<usize> = arguments.iter().map(|n| n.parse().expect("SOCKETS are numbers")).collect();
    if sizes.is_empty() {
        sizes = vec![1_000, 10_000, 30_000, 90_000, 100_000];
    }
    sizes.sort_unstable();
    await_quiet_table();
    let echoscope = start_echoscope();
    let node_exporter = installed("prometheus-node-exporter").then(start_node_exporter);
    let empty = Reading::take();
    let resident_before = resident(echoscope.pid());
    let (mut holders, mut held, mut lines) = (Vec::new(), 0, Vec::new());
    for size in &sizes {
        holders.extend(start_holders((size - held) / 2, holders.len()));
        held = *size;
        std::thread::sleep(Duration::from_millis(600)); // the cached reading must be stale
        let shown = Reading::take().established - empty.established;
        assert!(shown + 2 >= held as u64, "the census counts {shown} of {held}");
        lines.extend(compare(held, held == 90_000, node_exporter.is_some()));
    }
    print(&lines);
    let grown = resident(echoscope.pid()) - resident_before;
    println!(
        "memory: {:.0} KiB more after {} readings than before (goal < 1 MB)",
        grown / 1024.0,
        ROUNDS * sizes.len()
    );

    let rounds: Vec<[f64; 2]> = (0..5).map(|_| [false, true].map(echo_p99)).collect();
    let p99 = |i: usize| Spread::of(&rounds.iter().map(|r| r[i]).collect::<Vec<_>>()).scaled(1e6);
    lines.push(Line {
        what: format!("echo p99 while {held} sockets are counted / not"),
        ratio: Spread::of(&rounds.iter().map(|[quiet, scraped]| scraped / quiet).collect::<Vec<_>>()),
        goal: Some(Goal::AtMost(2.0)),
        absolute: format!("{:.0} µs quiet, {:.0} µs counted", p99(0).median, p99(1).median),
    });
    print(&lines[lines.len() - 1..]);
    // Downwards, and last: what this leaves in TIME_WAIT would be in the way of the others.
    for size in sizes.iter().rev() {
        while held > *size
            && let Some(holder) = holders.pop()
        {
            held -= 2 * holder.connections;
        }
        let (hit, miss) = lookups();
        let (share, each, rate) = follower();
        println!(
            "{held:>7} sockets: lookup by cookie {:.1} µs, {:.1} µs when it is gone; follower at {rate:.0} lives a second: \
             {:.1} % of a core, {:.1} µs for each life",
            1e6 * hit,
            1e6 * miss,
            100.0 * share,
            1e6 * each
        );
    }
    if let Some(directory) = save {
        let json = serde_json::to_string_pretty(&lines).expect("JSON");
        std::fs::write(format!("{directory}/census.json"), json).expect("save the figures");
        let picture = chart::svg("echoscope's census, ratio of wall time (tick: the goal)", &lines);
        std::fs::write(format!("{directory}/census.svg"), picture).expect("save the chart");
    }
}

/// Everybody reads the same table in turn.
fn compare(sockets: usize, goals: bool, node_exporter: bool) -> Vec<Line> {
    let (mut ours, mut ss, mut text, mut node) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(550));
        ours.push(Reading::take().seconds);
        ss.push(timed("ss", &["-tan"], sockets));
        text.push(timed("cat", &["/proc/net/tcp", "/proc/net/tcp6"], sockets));
        if node_exporter {
            let began = Instant::now();
            let page = get(&format!("127.0.0.1:{NODE_EXPORTER}"), "/metrics");
            node.push(began.elapsed().as_secs_f64());
            assert!(page.contains("node_tcp_connection_states{state=\"established\"}"), "{page}");
        }
    }
    let census = Spread::of(&ours).scaled(1e3).median;
    let line = |other: &str, theirs: &[f64], goal: f64| Line {
        what: format!("{sockets} sockets: census / {other}"),
        ratio: Spread::of(&ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>()),
        goal: goals.then_some(Goal::AtMost(goal)),
        absolute: format!("{census:.1} ms, {other} {:.1} ms", Spread::of(theirs).scaled(1e3).median),
    };
    let mut lines = vec![line("ss -tan", &ss, 0.40), line("cat /proc/net/tcp", &text, 1.0)];
    if node_exporter {
        lines.push(line("node_exporter tcpstat", &node, 0.45));
    }
    lines
}

/// Waits, two minutes at most, until what others left in TIME_WAIT is gone: everybody would have to pass over it.
fn await_quiet_table() {
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        let text = std::fs::read_to_string("/proc/net/sockstat").expect("read sockstat");
        let mut words = text.split_whitespace().skip_while(|word| *word != "tw").skip(1);
        let waiting: usize = words.next().and_then(|n| n.parse().ok()).expect("tw in sockstat");
        if waiting < 100 || Instant::now() > deadline {
            return println!("{waiting} sockets in TIME_WAIT before the start");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn start_echoscope() -> Kept {
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoscope"));
    command.args(["pair", "--listen", &format!("127.0.0.1:{PORT}"), "--web.listen-address", WEB]);
    command.args(["--connections", "1", "--rate", "0.0001", "--hold", "1h", "--log.level", "warn"]);
    let echoscope = Kept::start(command.stdout(Stdio::null()));
    await_listener(19907);
    echoscope
}

fn start_node_exporter() -> Kept {
    let mut command = Command::new("prometheus-node-exporter");
    command.args(["--collector.disable-defaults", "--collector.tcpstat", "--log.level=error"]);
    command.arg(format!("--web.listen-address=127.0.0.1:{NODE_EXPORTER}"));
    let exporter = Kept::start(command.stdout(Stdio::null()));
    await_listener(NODE_EXPORTER);
    exporter
}

/// A process that holds both ends of some connections.
struct Holder {
    connections: usize,
    _process: Kept,
}

fn start_holders(connections: usize, already: usize) -> Vec<Holder> {
    let me = std::env::current_exe().expect("own path");
    let mut left = connections;
    let mut holders = Vec::new();
    while left > 0 {
        let share = left.min(EACH);
        left -= share;
        let address = format!("127.0.0.{}:{PORT}", 2 + already + holders.len());
        let mut command = Command::new(&me);
        command.env("CENSUS_HOLD", "1").args([&address, &share.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start holder");
        let mut ready = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready).expect("holder");
        assert_eq!(ready.trim(), "ready");
        holders.push(Holder { connections: share, _process: Kept(child) });
    }
    holders
}

/// Opens both ends of `count` connections and keeps them until stdin ends.
fn hold(address: &str, count: usize) {
    let listener = TcpListener::bind(address).expect("bind");
    let address = listener.local_addr().expect("address");
    let mut kept = Vec::with_capacity(2 * count);
    for _ in 0..count {
        kept.push(TcpStream::connect(address).expect("connect"));
        kept.push(listener.accept().expect("accept").0);
    }
    drop(listener);
    println!("ready");
    let _ = std::io::stdin().read(&mut [0]);
}

struct Reading {
    seconds: f64,
    established: u64,
}

impl Reading {
    fn take() -> Reading {
        // From the question to the last byte of the answer, as ss is timed from its start to its end.
        let began = Instant::now();
        let answer = get(WEB, "/api/sockets");
        let seconds = began.elapsed().as_secs_f64();
        let value: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        let services = value["services"].as_array().expect("services");
        Reading { seconds, established: services.iter().filter_map(|s| s["sockets"]["established"].as_u64()).sum() }
    }
}

/// How long a command takes, its output read and thrown away; checks that it has told of so many sockets.
fn timed(program: &str, arguments: &[&str], sockets: usize) -> f64 {
    let began = Instant::now();
    let mut child = Command::new(program).args(arguments).stdout(Stdio::piped()).spawn().expect(program);
    let mut out = child.stdout.take().expect("piped");
    let (mut buffer, mut lines) = (vec![0; 1 << 16], 0);
    while let Ok(n @ 1..) = out.read(&mut buffer) {
        lines += buffer[..n].iter().filter(|b| **b == b'\n').count();
    }
    child.wait().expect(program);
    assert!(lines >= sockets, "{program} shows {lines} of {sockets}");
    began.elapsed().as_secs_f64()
}

/// The 99th percentile of 64-byte echoes over three seconds, with a scrape every 500 ms or without.
fn echo_p99(scrape: bool) -> f64 {
    let done = Arc::new(AtomicBool::new(false));
    let scraper = Arc::clone(&done);
    let thread = std::thread::spawn(move || {
        while scrape && !scraper.load(Ordering::Relaxed) {
            get(WEB, "/metrics");
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    let address: SocketAddr = ([127, 0, 0, 1], PORT).into();
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    let (mut times, began, mut bytes) = (Vec::new(), Instant::now(), [7; 64]);
    while began.elapsed() < Duration::from_secs(3) {
        let sent = Instant::now();
        stream.write_all(&bytes).expect("write");
        stream.read_exact(&mut bytes).expect("read");
        times.push(sent.elapsed().as_secs_f64());
    }
    done.store(true, Ordering::Relaxed);
    thread.join().expect("scraper");
    times.sort_by(f64::total_cmp);
    times[times.len() * 99 / 100]
}

/// What a lookup by cookie takes, of a socket that is there and of one that is not, in seconds.
fn lookups() -> (f64, f64) {
    const TIMES: u32 = 20_000;
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let stream = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let flow = Flow { local: stream.local_addr().expect("address"), peer: stream.peer_addr().expect("address") };
    let cookie = sockopt::cookie(stream.as_fd()).expect("cookie");
    let (mut table, _) = Table::open(None).expect("the table");
    let mut each = |cookie: u64, there: bool| {
        let began = Instant::now();
        for _ in 0..TIMES {
            assert_eq!(table.find(&flow, cookie).expect("look up").is_some(), there);
        }
        began.elapsed().as_secs_f64() / f64::from(TIMES)
    };
    (each(cookie, true), each(cookie + 1_000_000_000, false))
}

/// The follower while the pair opens and closes as fast as it goes: its share of a core, its time for each life, and the
/// lives a second.
fn follower() -> (f64, f64, f64) {
    const WEB: &str = "127.0.0.1:19908";
    const OPENED: &str = "echoscope_connections_opened_total{role=\"client\"}";
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoscope"));
    command.args(["--web.listen-address", WEB, "--log.level", "warn", "pair", "--listen", "127.0.0.1:17008"]);
    command.args([
        "--connections",
        "16",
        "--rate",
        "max",
        "--messages",
        "1",
        "--think-time",
        "0s",
        "--close-delay",
        "0s",
    ]);
    let pair = Kept::start(command.stdout(Stdio::null()));
    await_listener(19908);
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    // A thread names itself, and may not have come to that yet.
    let task = until("follower", || {
        let mut tasks = std::fs::read_dir(format!("/proc/{}/task", pair.pid())).expect("tasks").flatten();
        tasks.find(|task| read(task.path().join("comm")).trim() == "afterlife")
    });
    let cpu = || {
        let stat = read(task.path().join("schedstat"));
        stat.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).expect("schedstat") / 1e9
    };
    let count = |name: &str| {
        let page = get(WEB, "/metrics");
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    let (began, cpu_before, opened) = (Instant::now(), cpu(), count(OPENED));
    std::thread::sleep(Duration::from_secs(5));
    let (seconds, cpu, lives) = (began.elapsed().as_secs_f64(), cpu() - cpu_before, count(OPENED) - opened);
    assert_eq!(count("echoscope_follow_dropped_total"), 0.0);
    (cpu / seconds, cpu / lives, lives / seconds)
}
