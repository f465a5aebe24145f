//! The log held against the kernel's own events: nothing claimed that the kernel did not do, nothing done that is not told.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Echoscope, until};

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
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// From, to, and whether the way between is known.
type Told = (String, String, bool);

fn port_of(address: &serde_json::Value) -> u16 {
    address.as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root and tracefs"]
fn the_log_says_what_the_kernel_did_step_by_step() {
    let trace = Trace::start();
    for close in ["graceful", "server-first", "reset"] {
        let pair = Echoscope::start(&[
            "pair",
            "--listen",
            "127.0.0.1:0",
            "--connections",
            "8",
            "--count",
            "200",
            "--close",
            close,
        ]);
        let port = pair.server().port();
        let (status, _, lines) = pair.wait();
        assert_eq!(status.code(), Some(0));
        let mut told: BTreeMap<(u16, u16), Vec<Told>> = BTreeMap::new();
        for line in lines.iter().filter(|l| l["message"] == "state") {
            let ports = (port_of(&line["local"]), port_of(&line["peer"]));
            let text = |name: &str| line[name].as_str().unwrap().to_owned();
            // TIME_WAIT is a minisocket: the kernel announces its beginning as the end of the full socket, and its end not at all.
            let (from, to) = (text("from"), text("to"));
            if ports.1 != 0 && from != "TIME_WAIT" {
                let to = if to == "TIME_WAIT" { "CLOSED".to_owned() } else { to };
                told.entry(ports).or_default().push((from, to, line["via"].is_null()));
            }
        }
        let done = until("the kernel's events", || {
            let done = trace.steps(port);
            (done.len() >= 400).then_some(done)
        });
        // connect(2) announces SYN_SENT before it has chosen a port (`tcp_v4_connect`).
        let mut done = done;
        let opened = done.remove(&(0, port)).unwrap_or_default();
        assert_eq!(opened, vec![("CLOSED".to_owned(), "SYN_SENT".to_owned()); 200]);
        for steps in told.values_mut().filter(|steps| steps[0].0 == "CLOSED") {
            assert_eq!(steps.remove(0), ("CLOSED".to_owned(), "SYN_SENT".to_owned(), true));
        }
        assert_eq!(done.len(), 400, "200 connections, two ends each");
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
        assert_eq!(gaps, if close == "reset" { 200 } else { 0 }, "{close}");
    }
}
