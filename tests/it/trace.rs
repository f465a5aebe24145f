//! The kernel's own events, and what the log tells, in one form: a life, step by step. Then one is held against the other.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use echoscope::kernel::clock;
use echoscope::tcp::State;
use serde_json::Value;

/// A tracing instance of our own (Documentation/trace/ftrace.rst), gone when dropped.
pub struct Trace(PathBuf);

impl Trace {
    /// Records TCP's changes of state, and the repeats of SYN+ACK, of every socket of the machine that has one of these
    /// ports at either end.
    pub fn start(ports: RangeInclusive<u16>) -> Trace {
        static TAKEN: AtomicU32 = AtomicU32::new(0);
        let root = Path::new("/sys/kernel/tracing");
        if !root.join("instances").exists() {
            let mounted = std::process::Command::new("mount").args(["-t", "tracefs", "tracefs"]).arg(root).status();
            assert!(mounted.expect("mount").success(), "mount tracefs");
        }
        forget_the_dead(&root.join("instances"));
        let turn = TAKEN.fetch_add(1, Ordering::Relaxed);
        let trace = Trace(root.join(format!("instances/echoscope-test-{}-{turn}", std::process::id())));
        fs::create_dir(&trace.0).expect("make a tracing instance");
        trace.write("buffer_size_kb", "16384");
        trace.write("trace_clock", "mono");
        // The socket's address, which tells lives apart that had the same ports, is a field that is not printed otherwise.
        trace.write("options/fields", "1");
        let within = |end| format!("{end} >= {} && {end} <= {}", ports.start(), ports.end());
        let filter = format!("({}) || ({})", within("sport"), within("dport"));
        for event in ["sock/inet_sock_set_state", "tcp/tcp_retransmit_synack"] {
            trace.write(&format!("events/{event}/filter"), &filter);
            trace.write(&format!("events/{event}/enable"), "1");
        }
        trace
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|e| panic!("write {file}: {e}"));
    }

    /// Every socket's life over IPv4 so far, in the order in which they began.
    pub fn walks(&self) -> Vec<Walk> {
        let mut walks: Vec<Walk> = Vec::new();
        // A socket's memory is used again at once: the youngest life at an address is the one that goes on.
        let mut youngest: BTreeMap<u64, usize> = BTreeMap::new();
        for event in self.events("inet_sock_set_state") {
            let state = |name| State::from_kernel(event.field(name) as u8).expect("a state");
            let (from, to) = (state("oldstate"), state("newstate"));
            // close(2) after shutdown(2) is announced as a step from a state to itself.
            if from == to {
                continue;
            }
            let (socket, begins) =
                (event.field("skaddr"), from == State::Close || from == State::Listen && to != State::Close);
            if begins {
                youngest.insert(socket, walks.len());
                walks.push(Walk { task: event.task, ports: (0, 0), steps: Vec::new() });
            }
            let Some(walk) = youngest.get(&socket).map(|index| &mut walks[*index]) else { continue };
            // connect(2) announces SYN_SENT before it has chosen a port (`tcp_v4_connect`).
            walk.ports = (event.port("sport").max(walk.ports.0), event.port("dport"));
            walk.steps.push(Done { at: event.at, from, to });
        }
        walks
    }

    /// The ports of every request socket (SYN_RECV before the third segment) whose SYN+ACK was repeated: they are not
    /// among the changes of state.
    pub fn requests(&self) -> Vec<(u16, u16)> {
        self.events("tcp_retransmit_synack").map(|event| (event.port("sport"), event.port("dport"))).collect()
    }

    fn events(&self, name: &str) -> impl Iterator<Item = Event> {
        let text = fs::read_to_string(self.0.join("trace")).expect("read the trace");
        let mark = format!(": {name}: ");
        let events: Vec<_> = text.lines().filter_map(|line| Event::parse(line, &mark)).collect();
        events.into_iter().filter(|event| event.field("family") == libc::AF_INET as u64)
    }

    /// How many events found no room in the ring buffers.
    pub fn lost(&self) -> u64 {
        let cpus = fs::read_dir(self.0.join("per_cpu")).expect("list the buffers").flatten();
        let stats = cpus.map(|cpu| fs::read_to_string(cpu.path().join("stats")).expect("read the buffer's statistics"));
        let of = |stats: String| {
            let counts = stats.lines().filter_map(|line| line.split_once(": "));
            let lost = counts.filter(|(name, _)| matches!(*name, "overrun" | "commit overrun" | "dropped events"));
            lost.map(|(name, count)| count.parse::<u64>().unwrap_or_else(|e| panic!("{name}: {e}"))).sum::<u64>()
        };
        stats.map(of).sum()
    }
}

/// Removes what a test run left behind that was killed: it would go on recording, and slow down every change of state.
fn forget_the_dead(instances: &Path) {
    for instance in fs::read_dir(instances).expect("list tracing instances").flatten() {
        let name = instance.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix("echoscope-test-")?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another test may have done it meanwhile.
            let _ = fs::remove_dir(instance.path());
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A line of the trace: `comm-PID [cpu] flags seconds: name: field=0x1 (1) …`.
struct Event {
    task: u32,
    at: Duration,
    fields: String,
}

impl Event {
    fn parse(line: &str, mark: &str) -> Option<Event> {
        let (head, fields) = line.split_once(mark)?;
        let (task, rest) = head.rsplit_once(" [").unwrap_or_else(|| panic!("no task in {line}"));
        let task = task.rsplit('-').next().and_then(|pid| pid.trim().parse().ok());
        let at = rest.rsplit(' ').next().and_then(|seconds| seconds.parse().ok());
        Some(Event {
            task: task.unwrap_or_else(|| panic!("no task in {line}")),
            at: Duration::from_secs_f64(at.unwrap_or_else(|| panic!("no time in {line}"))),
            fields: format!(" {fields}"),
        })
    }

    fn field(&self, name: &str) -> u64 {
        let value = self.fields.split(&format!(" {name}=0x")).nth(1).and_then(|rest| rest.split(' ').next());
        let value = value.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        value.unwrap_or_else(|| panic!("{name} in {}", self.fields))
    }

    fn port(&self, name: &str) -> u16 {
        u16::try_from(self.field(name)).expect("a port")
    }
}

/// A socket's life, as the kernel announced it.
#[derive(Clone, Debug)]
pub struct Walk {
    /// Which thread was running when it began: for connect(2) and listen(2) the one that called.
    pub task: u32,
    /// Its own and the other.
    pub ports: (u16, u16),
    pub steps: Vec<Done>,
}

/// One step that the kernel took, at `at` on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub at: Duration,
    pub from: State,
    pub to: State,
}

impl Walk {
    pub fn began(&self) -> Duration {
        self.steps[0].at
    }

    /// Its last state.
    pub fn last(&self) -> Done {
        *self.steps.last().expect("a life has a step")
    }
}

/// A socket's life, as the log tells it.
#[derive(Clone, Debug)]
pub struct Told {
    pub conn: String,
    pub role: String,
    /// Its own and the other.
    pub ports: (u16, u16),
    pub steps: Vec<Said>,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Said {
    /// On the monotonic clock.
    pub at: Duration,
    pub from: String,
    pub to: String,
    pub evidence: String,
    /// Whether a system call of our own made the step: then it is dated when that began.
    pub called: bool,
    /// `None` where one arrow leads from one to the other.
    pub via: Option<String>,
}

impl fmt::Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.steps[0].from)?;
        self.steps.iter().try_for_each(|step| write!(f, " → {}", step.to))
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.steps[0].from)?;
        self.steps.iter().try_for_each(|Said { to, evidence, via, .. }| match via {
            None => write!(f, " → {to} [{evidence}]"),
            Some(via) => write!(f, " … {to} [{evidence}, via {via}]"),
        })
    }
}

/// Every life in the log, in the order in which they began.
pub fn told(lines: &[Value]) -> Vec<Told> {
    let offset = clock::unix().saturating_sub(clock::monotonic());
    let mut lives: BTreeMap<&str, Told> = BTreeMap::new();
    for line in lines.iter().filter(|l| l["message"] == "state") {
        let text = |name: &str| line[name].as_str().unwrap_or_else(|| panic!("{name} in {line}"));
        let at = humantime::parse_rfc3339(text("timestamp")).expect("a time").duration_since(UNIX_EPOCH);
        let port = |name| text(name).rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        let life = lives.entry(text("conn")).or_insert_with(|| Told {
            conn: text("conn").to_owned(),
            role: text("role").to_owned(),
            ports: (0, 0),
            steps: Vec::new(),
        });
        // A client has its port once connect(2) has chosen one.
        life.ports = (port("local"), port("peer"));
        life.steps.push(Said {
            at: at.expect("after 1970").saturating_sub(offset),
            from: text("from").to_owned(),
            to: text("to").to_owned(),
            evidence: text("evidence").to_owned(),
            called: matches!(line["cause"].as_str(), Some("connect" | "listen" | "shutdown" | "close")),
            via: line["via"].as_str().map(str::to_owned),
        });
    }
    let mut lives: Vec<_> = lives.into_values().collect();
    lives.sort_by_key(|life| life.steps[0].at);
    lives
}

/// Puts each life that is told beside the one that was walked: those that had the same ports one after the other, in
/// order.
pub fn paired(told: Vec<Told>, walks: Vec<Walk>) -> Vec<(Option<Told>, Option<Walk>)> {
    let mut by_ports: BTreeMap<_, (Vec<Told>, Vec<Walk>)> = BTreeMap::new();
    for life in told {
        by_ports.entry(life.ports).or_default().0.push(life);
    }
    for walk in walks {
        by_ports.entry(walk.ports).or_default().1.push(walk);
    }
    let mut pairs = Vec::new();
    for (told, walked) in by_ports.into_values() {
        let (mut told, mut walked) = (told.into_iter(), walked.into_iter());
        loop {
            match (told.next(), walked.next()) {
                (None, None) => break,
                pair => pairs.push(pair),
            }
        }
    }
    pairs
}

/// Holds what is told of a life against what the kernel did. Every step that is told for certain, seen or inferred, must be
/// the kernel's next one, and must not be dated before it; where the way is unknown, the kernel must have gone from one
/// state to the other. Returns what the log does not know: unknown ways as `FROM … TO`, untold steps as `FROM → TO`.
///
/// # Errors
/// What is told and was not done.
pub fn held_against(told: &Told, walk: &Walk) -> Result<Vec<String>, String> {
    /// Both clocks are the kernel's; the log's way there and back over the wall clock rounds and drifts.
    const DRIFT: Duration = Duration::from_millis(5);
    let mut missed = Vec::new();
    let mut rest = &walk.steps[..];
    for said in &told.steps {
        let Said { from, to, .. } = said;
        // TIME_WAIT is a minisocket: the kernel announces its beginning as the end of the full socket, and its end not at
        // all.
        if from == "TIME_WAIT" {
            continue;
        }
        let waits = to == "TIME_WAIT";
        let is_end = |done: &Done| {
            let kept = matches!(done.from, State::FinWait2 | State::Closing) && done.to == State::Close;
            if waits { kept } else { done.to.name() == to }
        };
        let Some(first) = rest.first().filter(|done| done.from.name() == from) else {
            return Err(format!("{from} → {to} is told when the kernel did {:?}", rest.first()));
        };
        let taken = match said.via.as_deref() {
            None if is_end(first) => 1,
            Some("unknown") => 1 + rest.iter().position(is_end).ok_or_else(|| format!("no way leads {from} … {to}"))?,
            _ => return Err(format!("{said:?} is told when the kernel did {first:?}")),
        };
        // A request socket is in SYN_RECV before the third segment makes a full one of it, which is what is announced.
        let announced_late = from == "LISTEN";
        let seen = said.evidence != "inferred" && !said.called && !announced_late;
        if seen && said.at + DRIFT < rest[taken - 1].at {
            return Err(format!("{said:?} is dated before the kernel did {:?}", rest[taken - 1]));
        }
        if said.via.is_some() {
            missed.push(format!("{from} … {to}"));
        }
        rest = &rest[taken..];
    }
    missed.extend(rest.iter().map(|done| format!("{} → {}", done.from, done.to)));
    Ok(missed)
}
