//! The log held against the kernel's own events: nothing claimed that the kernel did not do, nothing done that is not told.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Echoscope, try_until};

/// A tracing instance of our own (Documentation/trace/ftrace.rst), gone when dropped.
struct Trace(PathBuf);

impl Trace {
    fn start() -> Trace {
        let root = Path::new("/sys/kernel/tracing");
        if !root.join("instances").exists() {
            let mounted = std::process::Command::new("mount").args(["-t", "tracefs", "tracefs"]).arg(root).status();
            assert!(mounted.expect("mount").success(), "mount tracefs");
        }
        let trace = Trace(root.join(format!("instances/echoscope-test-{}", std::process::id())));
        fs::create_dir(&trace.0).expect("make a tracing instance");
        trace.write("buffer_size_kb", "16384");
        trace.write("events/sock/inet_sock_set_state/enable", "1");
        trace
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|e| panic!("write {file}: {e}"));
    }

    /// Each end's steps in the kernel's order, by (own port, other port), of connections to `port`.
    fn steps(&self, port: u16) -> BTreeMap<(u16, u16), Vec<(String, String)>> {
        let text = fs::read_to_string(self.0.join("trace")).expect("read the trace");
        let mut steps: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for line in text.lines().filter(|l| l.contains("inet_sock_set_state: family=AF_INET ")) {
            let field = |name: &str| {
                let value = line.split(&format!(" {name}=")).nth(1).and_then(|rest| rest.split(' ').next());
                value.unwrap_or_else(|| panic!("{name} in {line}"))
            };
            let ports = (field("sport").parse().unwrap(), field("dport").parse().unwrap());
            let state = |name| field(name).trim_start_matches("TCP_").replace("CLOSE_WAIT", "close_wait");
            let (from, to) = (state("oldstate"), state("newstate"));
            // close(2) after shutdown(2) is announced as a step from a state to itself.
            if (ports.0 == port || ports.1 == port) && ports.1 != 0 && from != to {
                let named = |s: String| s.replace("CLOSE", "CLOSED").replace("close_wait", "CLOSE_WAIT");
                steps.entry(ports).or_default().push((named(from), named(to)));
            }
        }
        steps
    }

    /// What the ring buffers say of themselves, losses included.
    fn buffers(&self) -> String {
        let cpus = fs::read_dir(self.0.join("per_cpu")).expect("list the buffers").flatten();
        cpus.map(|cpu| fs::read_to_string(cpu.path().join("stats")).unwrap_or_default()).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// From, to, and whether the way between is known.
type Told = (String, String, bool);

/// One end's life, as the log tells it.
struct Life<'a> {
    began: &'a str,
    ports: (u16, u16),
    steps: Vec<Told>,
}

fn port_of(address: &serde_json::Value) -> u16 {
    address.as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap()
}

/// What the log tells of each end, in the order of the kernel's events: lives that had the same ports one after the
/// other (a reset leaves nothing behind that keeps a port) follow each other.
fn told(lines: &[serde_json::Value]) -> BTreeMap<(u16, u16), Vec<Told>> {
    let mut lives: BTreeMap<&str, Life<'_>> = BTreeMap::new();
    for line in lines.iter().filter(|l| l["message"] == "state") {
        let text = |name: &str| line[name].as_str().unwrap();
        let ports = (port_of(&line["local"]), port_of(&line["peer"]));
        let (from, to) = (text("from"), text("to"));
        // TIME_WAIT is a minisocket: the kernel announces its beginning as the end of the full socket, and its end
        // not at all. Listeners have no peer.
        if ports.1 == 0 || from == "TIME_WAIT" {
            continue;
        }
        let to = if to == "TIME_WAIT" { "CLOSED" } else { to };
        let life = lives.entry(text("conn")).or_insert(Life { began: text("timestamp"), ports, steps: Vec::new() });
        life.steps.push((from.to_owned(), to.to_owned(), line["via"].is_null()));
    }
    let mut lives: Vec<_> = lives.into_values().collect();
    lives.sort_by_key(|life| life.began);
    let mut told: BTreeMap<_, Vec<Told>> = BTreeMap::new();
    for Life { ports, steps, .. } in lives {
        // connect(2) announces SYN_SENT before it has chosen a port (`tcp_v4_connect`): that step is compared apart.
        let opened = ("CLOSED".to_owned(), "SYN_SENT".to_owned(), true);
        let steps = steps.into_iter().filter(|step| *step != opened);
        told.entry(ports).or_default().extend(steps);
    }
    told
}

#[test]
#[ignore = "needs root and tracefs"]
fn the_log_says_what_the_kernel_did_step_by_step() {
    const LIVES: usize = 200;
    let trace = Trace::start();
    for close in ["graceful", "server-first", "reset"] {
        let count = LIVES.to_string();
        let arguments = ["pair", "--listen", "127.0.0.1:0", "--connections", "8", "--count", &count, "--close", close];
        let pair = Echoscope::start(&arguments);
        let port = pair.server().port();
        let (status, _, lines) = pair.wait();
        assert_eq!(status.code(), Some(0));
        let told = told(&lines);
        let mut last = BTreeMap::new();
        let done = try_until(|| {
            last = trace.steps(port);
            let ends = last.values().flatten().filter(|(_, to)| to == "CLOSED").count();
            (ends >= 2 * LIVES).then(|| last.clone())
        });
        let Some(mut done) = done else {
            let short: Vec<_> =
                told.iter().filter(|(p, steps)| last.get(p).map(Vec::len) != Some(steps.len())).collect();
            panic!(
                "{close}: not all was announced; told {short:#?}, announced {last:#?}; buffers: {}",
                trace.buffers()
            );
        };
        let opened = done.remove(&(0, port)).unwrap_or_default();
        assert_eq!(opened, vec![("CLOSED".to_owned(), "SYN_SENT".to_owned()); LIVES]);
        assert_eq!(told.keys().collect::<Vec<_>>(), done.keys().collect::<Vec<_>>());
        let mut gaps = 0;
        for (ports, done) in &done {
            let mut rest = &done[..];
            for (from, to, certain) in &told[ports] {
                let step = (from.clone(), to.clone());
                if *certain {
                    assert_eq!(rest.first(), Some(&step), "{close} {ports:?}: told {:?}, done {done:?}", told[ports]);
                    rest = &rest[1..];
                } else {
                    // Told as two ends of an unknown way: the kernel went from one to the other.
                    gaps += 1;
                    assert_eq!(rest.first().map(|s| &s.0), Some(from), "{close} {ports:?}");
                    let end = rest.iter().position(|s| s.1 == *to).expect("the way ends where it is told to");
                    rest = &rest[end + 1..];
                }
            }
            assert_eq!(rest, [], "{close} {ports:?}: done but not told");
        }
        // Only our own RST leaves a way open: a FIN could have come in the instant before it.
        assert_eq!(gaps, if close == "reset" { LIVES } else { 0 }, "{close}");
    }
}
