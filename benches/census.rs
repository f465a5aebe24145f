//! The census of many sockets beside `ss -tan` on the same table, and what it does to echo traffic meanwhile.
//!
//! `cargo bench --bench census [-- SOCKETS]` (default 90,000). The sockets are held by helper processes (this program
//! again), both ends of each connection in one, because a process may open 20,000 descriptors or so. Prints figures;
//! asserts only that the counts are right. Absolute times are the machine's of the moment: the ratios, taken in turn
//! in one run, are what counts.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 17007;
const WEB: &str = "127.0.0.1:19907";
const EACH: usize = 8_000;
const ROUNDS: usize = 11;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    if std::env::var_os("CENSUS_HOLD").is_some() {
        let address = arguments.next().expect("address");
        return hold(&address, arguments.next().expect("count").parse().expect("count"));
    }
    let sockets: usize = arguments.next().map_or(90_000, |n| n.parse().expect("SOCKETS is a number"));
    let echoscope = start_echoscope();
    let empty = Reading::take();
    let rss_before = resident_kib(echoscope.0.id());
    let holders = start_holders(sockets / 2);
    std::thread::sleep(Duration::from_millis(600)); // the cached reading must be stale
    let full = Reading::take();
    let held = full.established - empty.established;
    assert!(held >= (sockets - 2) as u64, "the census counts {held} of {sockets}");

    let mut ratios = Vec::new();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(550));
        let census = Reading::take().seconds;
        let began = Instant::now();
        let lines = ss();
        let ss = began.elapsed().as_secs_f64();
        assert!(lines >= sockets, "ss shows {lines}");
        ratios.push(census / ss);
        ours.push(census);
        theirs.push(ss);
    }
    println!("sockets {held}, rounds {ROUNDS}");
    println!("census            median {:7.1} ms  {}", 1e3 * median(&mut ours), spread(&ours, 1e3));
    println!("ss -tan           median {:7.1} ms  {}", 1e3 * median(&mut theirs), spread(&theirs, 1e3));
    println!("census / ss       median {:7.3}     {}", median(&mut ratios), spread(&ratios, 1.0));
    let rss_after = resident_kib(echoscope.0.id());
    println!(
        "resident memory   {rss_before} KiB empty, {rss_after} KiB after {} readings of {held} sockets",
        ROUNDS + 2
    );

    let mut quiet_p99 = Vec::new();
    let mut scraped_p99 = Vec::new();
    let mut p99_ratios = Vec::new();
    for _ in 0..5 {
        let quiet = echo_p99(false);
        let scraped = echo_p99(true);
        p99_ratios.push(scraped / quiet);
        quiet_p99.push(quiet);
        scraped_p99.push(scraped);
    }
    println!("echo p99, quiet   median {:7.3} ms  {}", 1e3 * median(&mut quiet_p99), spread(&quiet_p99, 1e3));
    println!("echo p99, scraped median {:7.3} ms  {}", 1e3 * median(&mut scraped_p99), spread(&scraped_p99, 1e3));
    println!("scraped / quiet   median {:7.3}     {}", median(&mut p99_ratios), spread(&p99_ratios, 1.0));
    drop(holders);
}

/// A child that ends with its owner.
struct Kept(Child);

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_echoscope() -> Kept {
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoscope"));
    command.args(["pair", "--listen", &format!("127.0.0.1:{PORT}"), "--web.listen-address", WEB]);
    command.args(["--connections", "1", "--rate", "0.0001", "--hold", "1h", "--log.level", "warn"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("start echoscope");
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(WEB).is_err() {
        assert!(Instant::now() < deadline, "echoscope does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    Kept(child)
}

fn start_holders(connections: usize) -> Vec<Kept> {
    let me = std::env::current_exe().expect("own path");
    let mut left = connections;
    let mut holders = Vec::new();
    while left > 0 {
        let share = left.min(EACH);
        left -= share;
        let address = format!("127.0.0.{}:{PORT}", 2 + holders.len());
        let mut command = Command::new(&me);
        command.env("CENSUS_HOLD", "1").args([&address, &share.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start holder");
        let mut ready = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready).expect("holder");
        assert_eq!(ready.trim(), "ready");
        holders.push(Kept(child));
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
        let answer = get("/api/sockets");
        let seconds = began.elapsed().as_secs_f64();
        let value: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        let services = value["services"].as_array().expect("services");
        Reading {
            seconds,
            established: services.iter().filter_map(|s| s["sockets"]["established"].as_u64()).sum(),
        }
    }
}

fn get(path: &str) -> String {
    let mut stream = TcpStream::connect(WEB).expect("connect");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer.split_once("\r\n\r\n").expect("a body").1.to_owned()
}

/// `ss -tan`, its output read and thrown away; how many lines there were.
fn ss() -> usize {
    let mut child = Command::new("ss").arg("-tan").stdout(Stdio::piped()).spawn().expect("ss (iproute2)");
    let mut out = child.stdout.take().expect("piped");
    let (mut buffer, mut lines) = (vec![0; 1 << 16], 0);
    while let Ok(n @ 1..) = out.read(&mut buffer) {
        lines += buffer[..n].iter().filter(|b| **b == b'\n').count();
    }
    child.wait().expect("ss");
    lines
}

/// The 99th percentile of 64-byte echoes over three seconds, with a scrape every 500 ms or without.
fn echo_p99(scrape: bool) -> f64 {
    let done = Arc::new(AtomicBool::new(false));
    let scraper = Arc::clone(&done);
    let thread = std::thread::spawn(move || {
        while scrape && !scraper.load(Ordering::Relaxed) {
            get("/metrics");
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

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn spread(sorted: &[f64], scale: f64) -> String {
    format!("({:.3} to {:.3})", scale * sorted[0], scale * sorted[sorted.len() - 1])
}
