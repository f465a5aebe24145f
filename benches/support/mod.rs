//! What both benches need: children that end with their owner, numbers, and pictures of them.

#![allow(dead_code, reason = "each bench uses its part")]

pub mod chart;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A child that ends with its owner.
pub struct Kept(pub Child);

impl Kept {
    /// By the kernel's table, whoever measures: what these figures are compared with reads it too, and root would hear events.
    pub fn start(command: &mut Command) -> Kept {
        command.env("ECHOSCOPE_OBSERVER", "sock_diag");
        Kept(command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}")))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits, ten seconds at most, until there is `what`.
pub fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "there is no {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until somebody listens on this port of 127.0.0.1.
pub fn await_listener(port: u16) {
    until(&format!("listener on {port}"), || TcpStream::connect(("127.0.0.1", port)).ok());
}

/// The body of a GET.
pub fn get(web: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(web).expect("connect");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer.split_once("\r\n\r\n").expect("a body").1.to_owned()
}

/// Resident memory in bytes (proc(5), VmRSS).
pub fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    1024.0 * line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).expect("a number")
}

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Compiles a C program beside this one and returns its path.
pub fn compile(name: &str) -> String {
    let source = format!("{}/benches/c/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let binary = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o", &binary, &source]);
    assert!(cc.status().expect("cc").success(), "{cc:?}");
    binary
}

/// Of several rounds: the middle one, the least and the most.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: &[f64]) -> Spread {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { panic!("no values") };
        Spread { median: sorted[sorted.len() / 2], min: *min, max: *max }
    }

    pub fn scaled(self, by: f64) -> Spread {
        Spread { median: self.median * by, min: self.min * by, max: self.max * by }
    }
}

/// The goal for a ratio.
#[derive(Clone, Copy, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    pub fn met(self, value: f64) -> bool {
        match self {
            Goal::AtLeast(goal) => value >= goal,
            Goal::AtMost(goal) => value <= goal,
        }
    }

    pub fn value(self) -> f64 {
        match self {
            Goal::AtLeast(goal) | Goal::AtMost(goal) => goal,
        }
    }
}

/// One line of the result: a ratio of two things measured in the same round, over all rounds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Line {
    pub what: String,
    pub ratio: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    /// What was measured, for the feeling: absolute figures drift by tens of per cent.
    pub absolute: String,
}

pub fn print(lines: &[Line]) {
    let width = lines.iter().map(|l| l.what.chars().count()).max().unwrap_or(0);
    for Line { what, ratio, goal, absolute } in lines {
        let goal = match goal {
            Some(goal @ Goal::AtLeast(value)) => format!("goal ≥ {value:<5} {}", mark(goal.met(ratio.median))),
            Some(goal @ Goal::AtMost(value)) => format!("goal ≤ {value:<5} {}", mark(goal.met(ratio.median))),
            None => String::new(),
        };
        println!("{what:<width$}  {:6.3} ({:.3} to {:.3})  {goal:<18}  {absolute}", ratio.median, ratio.min, ratio.max);
    }
}

fn mark(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}
