//! Starting the real binary, reading its log and its metrics, and ending it. Every wait is for a condition, with a
//! deadline that only a failure reaches.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Polls until `found` returns something.
pub fn until<T>(what: &str, found: impl FnMut() -> Option<T>) -> T {
    try_until(found).unwrap_or_else(|| panic!("waited {PATIENCE:?} for {what}"))
}

/// Polls until `found` returns something, and for [`PATIENCE`] at most.
pub fn try_until<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(value) = found() {
            return Some(value);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    found()
}

/// A running echoscope that logs JSON.
pub struct Echoscope {
    child: Child,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<Value>, bool)>,
    more: Condvar,
}

/// Where this project's files are.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What is in one of them.
pub fn file(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A port that no socket has or had, not even a TIME_WAIT: the kernel does not hand these out by itself, so that the counts on it are the
/// test's own.
pub fn quiet_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let known = ["/proc/net/tcp", "/proc/net/tcp6"].map(|file| std::fs::read_to_string(file).unwrap_or_default());
    loop {
        let turn = TAKEN.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (std::process::id().wrapping_mul(131).wrapping_add(turn) % 20_000) as u16;
        let used = format!(":{port:04X} ");
        if !known.iter().any(|table| table.contains(&used)) && std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

/// The command, with JSON logs, before arguments are added.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoscope"));
    // As anybody may start it: who has the capabilities to test with would be shown more (see tests/it/ebpf.rs).
    command.env_clear().env("ECHOSCOPE_OBSERVER", "sock_diag").args(["--log.format", "json"]);
    command
}

impl Echoscope {
    /// Starts it with `arguments`; the web side takes a free port unless they say otherwise, and `--listen …:0` a quiet one.
    pub fn start(arguments: &[&str]) -> Echoscope {
        let mut command = command();
        if !arguments.contains(&"--web.listen-address") {
            command.args(["--web.listen-address", "127.0.0.1:0"]);
        }
        let mut before = "";
        for argument in arguments {
            match (before, argument.strip_suffix(":0")) {
                ("--listen", Some(host)) => command.arg(format!("{host}:{}", quiet_port())),
                _ => command.arg(argument),
            };
            before = argument;
        }
        Echoscope::spawn(&mut command)
    }

    /// Starts a command made by [`command`] (or one that ends in it).
    pub fn spawn(command: &mut Command) -> Echoscope {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start echoscope");
        let log = Arc::new(Log::default());
        let stderr = child.stderr.take().expect("piped");
        let reader = Arc::clone(&log);
        std::thread::spawn(move || read_log(stderr, &reader));
        Echoscope { child, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Every line so far.
    pub fn lines(&self) -> Vec<Value> {
        self.log.lines.lock().unwrap().0.clone()
    }

    /// The first line that `wanted` accepts, waited for.
    pub fn line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut guard = self.log.lines.lock().unwrap();
        let mut seen = 0;
        loop {
            if let Some(line) = guard.0[seen..].iter().find(|line| wanted(line)) {
                return line.clone();
            }
            seen = guard.0.len();
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !guard.1, "no line: {what}; log: {:#?}", &guard.0[seen.saturating_sub(20)..]);
            guard = self.log.more.wait_timeout(guard, left).unwrap().0;
        }
    }

    /// The line with this message.
    pub fn message(&self, message: &str) -> Value {
        self.line(message, |line| line["message"] == message)
    }

    /// Where the echo server listens (reachable form).
    pub fn server(&self) -> SocketAddr {
        reachable(&self.message("echo server listening")["address"])
    }

    /// Where the web side listens.
    pub fn web(&self) -> SocketAddr {
        reachable(&self.message("web side listening")["address"])
    }

    /// Sends a signal, named as kill(1) takes it.
    pub fn signal(&self, name: &str) {
        let signal = match name {
            "TERM" => Signal::TERM,
            "INT" => Signal::INT,
            "STOP" => Signal::STOP,
            "CONT" => Signal::CONT,
            "KILL" => Signal::KILL,
            _ => panic!("no signal {name}"),
        };
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("kill");
    }

    /// Waits for its end; returns the status, stdout and every log line.
    pub fn wait(mut self) -> (ExitStatus, String, Vec<Value>) {
        let mut stdout = String::new();
        let mut out = self.child.stdout.take().expect("piped");
        let reader = std::thread::spawn(move || out.read_to_string(&mut stdout).map(|_| stdout));
        let status = until("echoscope to end", || self.child.try_wait().expect("wait"));
        let stdout = reader.join().expect("stdout").expect("stdout is text");
        until("the end of the log", || self.log.lines.lock().unwrap().1.then_some(()));
        let lines = self.lines();
        (status, stdout, lines)
    }

    /// Its stdout and every log line until its end, which must be a good one and come within `patience`.
    pub fn until_end(mut self, patience: Duration) -> (String, Vec<Value>) {
        let out = self.child.stdout.take().expect("piped");
        let reader = std::thread::spawn(move || std::io::read_to_string(out));
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < deadline, "still running after {patience:?}");
            std::thread::sleep(Duration::from_millis(100));
        };
        let stdout = reader.join().expect("stdout").expect("stdout is text");
        assert_eq!(status.code(), Some(0), "{stdout}");
        until("the end of the log", || self.log.lines.lock().unwrap().1.then_some(()));
        (stdout, self.lines())
    }

    /// `/metrics`, parsed.
    pub fn metrics(&self) -> Metrics {
        Metrics::parse(&get(self.web(), "/metrics").1)
    }

    /// Open descriptors (/proc/PID/fd).
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("list descriptors").count()
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read status");
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }
}

impl Drop for Echoscope {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_log(stderr: ChildStderr, log: &Log) {
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { break };
        let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
        log.lines.lock().unwrap().0.push(value);
        log.more.notify_all();
    }
    log.lines.lock().unwrap().1 = true;
    log.more.notify_all();
}

fn reachable(address: &Value) -> SocketAddr {
    let address: SocketAddr = address.as_str().expect("an address").parse().expect("an address");
    echoscope::config::reachable(address)
}

/// A GET over a connection of its own: status and body.
pub fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connect to the web side");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("answer: {answer:?}"));
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    (status, body.to_owned())
}

/// A `/metrics` page: value by `name{label="value",…}` as printed.
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn parse(page: &str) -> Metrics {
        let lines = page.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
        Metrics(
            lines
                .map(|l| {
                    let (name, value) = l.rsplit_once(' ').expect("a value");
                    (name.to_owned(), value.parse().expect("a number"))
                })
                .collect(),
        )
    }

    /// The series `name` whose labels include all of `labels`, summed; at least one must exist.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found: Vec<f64> = self.series(name, labels).collect();
        assert!(!found.is_empty(), "no series {name} {labels:?}");
        found.iter().sum()
    }

    pub fn series<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = f64> + 'a {
        let of_name = move |key: &str| key == name || key.starts_with(&format!("{name}{{"));
        let labelled = move |key: &str| labels.iter().all(|(k, v)| key.contains(&format!("{k}=\"{v}\"")));
        self.0.iter().filter(move |(key, _)| of_name(key) && labelled(key)).map(|(_, value)| *value)
    }

    /// Sockets of one service in one state.
    pub fn sockets(&self, role: &str, port: u16, state: &str) -> f64 {
        self.sum("echoscope_tcp_sockets", &[("role", role), ("port", &port.to_string()), ("state", state)])
    }

    /// Every counter of losses and failures must be zero.
    pub fn assert_nothing_lost(&self) {
        for name in ["echoscope_log_lost_total", "echoscope_follow_dropped_total", "echoscope_echo_mismatch_total"] {
            assert_eq!(self.sum(name, &[]), 0.0, "{name}");
        }
        for name in ["echoscope_observer_lost_events_total", "echoscope_observer_errors_total"] {
            assert_eq!(self.sum(name, &[]), 0.0, "{name}");
        }
    }
}

/// One state change, from the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub from: String,
    pub to: String,
    pub evidence: String,
    pub cause: Option<String>,
    pub via: Option<String>,
    pub after: Option<f64>,
}

/// Each connection's changes in the order they were logged, by (role, conn).
pub fn lives(lines: &[Value]) -> BTreeMap<(String, String), Vec<Change>> {
    let mut lives: BTreeMap<_, Vec<Change>> = BTreeMap::new();
    for line in lines.iter().filter(|l| l["message"] == "state") {
        let text = |field: &str| line[field].as_str().map(str::to_owned);
        let must = |field: &str| text(field).unwrap_or_else(|| panic!("{field} in {line}"));
        lives.entry((must("role"), must("conn"))).or_default().push(Change {
            from: must("from"),
            to: must("to"),
            evidence: must("evidence"),
            cause: text("cause"),
            via: text("via"),
            after: line["after_s"].as_f64(),
        });
    }
    lives
}

/// The states of a life, its start included; the chain must be unbroken.
pub fn walk(changes: &[Change]) -> Vec<&str> {
    let mut states = vec![changes[0].from.as_str()];
    for change in changes {
        assert_eq!(*states.last().unwrap(), change.from, "the chain is broken: {changes:#?}");
        states.push(&change.to);
    }
    states
}
