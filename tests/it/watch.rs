//! `echoscope watch` beside services that it knows nothing of: what it counts is what the kernel's table has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::panic::resume_unwind;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use echoscope::kernel::namespace;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::fallback::without_netlink;
use crate::support::{Echoscope, Metrics, command, get, quiet_port, try_until, until};
use crate::web::KeptAlive;

/// Keeps whatever it accepts, and never closes it. A line on stdin makes it send a byte on each.
const LEAKY: &str = "
import socket, sys, threading
kept = []
def remind():
    for line in sys.stdin:
        for connection in list(kept):
            connection.send(b'x')
        print('sent', flush=True)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('127.0.0.1', int(sys.argv[1])))
if len(sys.argv) > 2:
    open('/proc/self/comm', 'wb').write(sys.argv[2].encode().decode('unicode_escape').encode())
listener.listen(1000)
print('listening', flush=True)
threading.Thread(target=remind, daemon=True).start()
while True:
    kept.append(listener.accept()[0])
";

/// Accepts nobody before there is something to read: until then a connection is the kernel's note of a SYN.
const DEFERRING: &str = "
import socket, sys, time
listener = socket.socket()
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 300)
listener.bind(('127.0.0.1', int(sys.argv[1])))
listener.listen(1000)
print('listening', flush=True)
sys.stdin.read()
";

/// The states: as we spell them, as ss does, and by the number in /proc/net/tcp.
const STATES: [(&str, &str, &str); 11] = [
    ("established", "ESTAB", "01"),
    ("syn_sent", "SYN-SENT", "02"),
    ("syn_recv", "SYN-RECV", "03"),
    ("fin_wait1", "FIN-WAIT-1", "04"),
    ("fin_wait2", "FIN-WAIT-2", "05"),
    ("time_wait", "TIME-WAIT", "06"),
    ("close", "UNCONN", "07"),
    ("close_wait", "CLOSE-WAIT", "08"),
    ("last_ack", "LAST-ACK", "09"),
    ("listen", "LISTEN", "0A"),
    ("closing", "CLOSING", "0B"),
];

/// Sockets by role, port and state; none at zero.
type Counts = BTreeMap<(&'static str, u16, &'static str), u64>;

/// What the kernel tells of ages is rounded to its tick.
const TICK: f64 = 0.02;

/// A server in Python, which nobody here wrote for our sake.
struct Python {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Python {
    /// Starts `script` with these arguments; returns when it listens.
    fn start(script: &str, arguments: &[&str]) -> Python {
        let mut child = Command::new("python3")
            .args(["-c", script])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3");
        let said = BufReader::new(child.stdout.take().expect("piped"));
        let mut python = Python { child, said };
        python.hear("listening");
        python
    }

    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("a line");
        assert_eq!(line.trim(), word);
    }

    fn name(&self) -> String {
        fs::read_to_string(format!("/proc/{}/comm", self.child.id())).expect("read comm").trim_end().to_owned()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `test` in a network namespace of its own, where nobody else's sockets are.
fn alone(test: impl FnOnce() + Send + 'static) {
    let there = thread::spawn(|| {
        namespace::enter_own_network().expect("a network namespace (CAP_SYS_ADMIN)");
        test();
    });
    there.join().unwrap_or_else(|panic| resume_unwind(panic));
}

fn watch(arguments: &[&str]) -> Echoscope {
    let watch = Echoscope::start(&[&["watch"], arguments].concat());
    watch.message("watching every listener of this network namespace");
    watch
}

fn once(arguments: &[&str]) -> Output {
    command().args(["watch", "--once"]).args(arguments).output().expect("run watch")
}

/// Exit code and reading.
fn once_json(arguments: &[&str]) -> (Option<i32>, Value) {
    let out = once(&[&["--output", "json"], arguments].concat());
    let text = String::from_utf8(out.stdout).expect("text");
    (out.status.code(), serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

fn sockets(watch: &Echoscope, query: &str) -> Value {
    let (status, body) = get(watch.web(), &format!("/api/sockets{query}"));
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}"))
}

/// What a reading tells of a service.
fn service<'a>(reading: &'a Value, role: &str, port: u16) -> Option<&'a Value> {
    let services = reading["services"].as_array().expect("services");
    let port = Value::from(port.to_string());
    services.iter().find(|service| service["role"] == role && service["port"] == port)
}

fn readings(metrics: &Metrics) -> f64 {
    metrics.sum("echoscope_observer_duration_seconds_count", &[("what", "survey")])
}

/// Waits until the table was read anew, from its beginning.
fn read_anew(watch: &Echoscope) {
    let before = readings(&watch.metrics());
    until("two more readings", || (readings(&watch.metrics()) >= before + 2.0).then_some(()));
}

/// A reading's counts of these ports.
fn told(reading: &Value, ports: &[u16]) -> Counts {
    let mut counts = Counts::new();
    for port in ports {
        for role in ["server", "client"] {
            for (state, _, _) in STATES {
                let count = service(reading, role, *port).map_or(0, |s| s["sockets"][state].as_u64().expect("a count"));
                if count > 0 {
                    counts.insert((role, *port, state), count);
                }
            }
        }
    }
    counts
}

/// The same, of rows of a state, a local and a remote port.
fn count(rows: impl Iterator<Item = (&'static str, u16, u16)>, ports: &[u16]) -> Counts {
    let mut counts = Counts::new();
    for (state, local, remote) in rows {
        if ports.contains(&local) {
            *counts.entry(("server", local, state)).or_default() += 1;
        } else if ports.contains(&remote) {
            *counts.entry(("client", remote, state)).or_default() += 1;
        }
    }
    counts
}

/// As `ss -tan` has it.
fn by_ss(ports: &[u16]) -> Counts {
    let out = Command::new("ss").arg("-tanH").output().expect("ss (iproute2)");
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).expect("text");
    let port = |address: &str| address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0);
    let rows = text.lines().map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (state, _, _) = STATES.iter().find(|(_, name, _)| *name == fields[0]).expect("a state");
        (*state, port(fields[3]), port(fields[4]))
    });
    count(rows, ports)
}

/// As the kernel's text has it, of this thread's namespace.
fn by_text(ports: &[u16]) -> Counts {
    let tables = ["tcp", "tcp6"].map(|f| fs::read_to_string(format!("/proc/thread-self/net/{f}")).unwrap_or_default());
    let port = |address: &str| u16::from_str_radix(address.rsplit_once(':').expect("a port").1, 16).expect("a port");
    let rows = tables.iter().flat_map(|table| table.lines().skip(1)).map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (state, _, _) = STATES.iter().find(|(_, _, number)| *number == fields[3]).expect("a state");
        (*state, port(fields[1]), port(fields[2]))
    });
    count(rows, ports)
}

/// A listener by socket2: on this address, with others if `shared`.
fn listen(address: &str, shared: bool) -> TcpListener {
    let address: SocketAddr = address.parse().unwrap();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_port(shared).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(false).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    socket.listen(1000).unwrap();
    socket.into()
}

/// Accepts and closes, once its peer has, until it is told to stop.
fn serve(listener: TcpListener) -> impl FnOnce() {
    let address = listener.local_addr().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let server = thread::spawn(move || {
        for stream in listener.incoming() {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            let _ = stream.unwrap().read(&mut [0]);
        }
    });
    move || {
        stop.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(address).unwrap());
        server.join().unwrap();
    }
}

/// Opens and closes so many, and waits until the other end has closed each.
fn short_lives(address: SocketAddr, number: u32) {
    for _ in 0..number {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

/// So many connections that their peer keeps open and we have closed: CLOSE_WAIT. And since when.
fn leak(port: u16, number: usize) -> (Vec<TcpStream>, Instant, Instant) {
    let streams: Vec<_> = (0..number).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let began = Instant::now();
    for stream in &streams {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    (streams, began, Instant::now())
}

#[test]
#[ignore = "needs root, and ss (iproute2)"]
fn fifty_readings_equal_ss_and_the_kernels_text() {
    alone(|| {
        const PORTS: [u16; 3] = [8001, 8002, 8003];
        let shared: Vec<_> = (0..3).map(|_| listen("127.0.0.1:8001", true)).collect();
        let dual = listen("[::]:8002", false);
        let _deferring = Python::start(DEFERRING, &["8003"]);
        let watch = watch(&["--interval", "20ms", "--remote-port", "8001,8002,8003"]);
        let mut held: Vec<TcpStream> = Vec::new();
        let mut seen = BTreeSet::new();
        for turn in 0..50_usize {
            // Some of everything: nobody accepts them, so that they are in the queue; both families, and through IPv4 to [::].
            for address in ["127.0.0.1:8001", "127.0.0.1:8002", "[::1]:8002", "127.0.0.1:8003"] {
                held.extend((0..=turn % 4).map(|_| TcpStream::connect(address).unwrap()));
            }
            // Some of them half closed, some reset, some closed by both ends.
            for stream in held.iter().skip(turn).step_by(3) {
                let _ = stream.shutdown(Shutdown::Write);
            }
            if turn % 5 == 4 {
                dual.set_nonblocking(true).unwrap();
                let accepted: Vec<_> = std::iter::from_fn(|| dual.accept().ok()).take(8).collect();
                drop(accepted);
                held.drain(..held.len() / 3);
            }
            // Paused: the table stands still, by itself and while we compare.
            let quiet = || {
                until("the table to stand still", || {
                    let before = by_text(&PORTS);
                    read_anew(&watch);
                    (by_text(&PORTS) == before).then_some(before)
                })
            };
            loop {
                let text = quiet();
                let reading = sockets(&watch, "");
                let ss = by_ss(&PORTS);
                if by_text(&PORTS) == text {
                    assert_eq!(told(&reading, &PORTS), ss, "{turn}: ss");
                    assert_eq!(ss, text, "{turn}: the text");
                    break;
                }
            }
            seen.extend(by_text(&PORTS).keys().map(|(role, _, state)| (*role, *state)));
        }
        for state in ["established", "syn_recv", "close_wait", "listen"] {
            assert!(seen.contains(&("server", state)), "{state} was never there: {seen:?}");
        }
        for state in ["established", "fin_wait2"] {
            assert!(seen.contains(&("client", state)), "{state} was never there: {seen:?}");
        }
        assert!(seen.iter().any(|(_, state)| *state == "time_wait"), "{seen:?}");
        assert_eq!(service(&sockets(&watch, ""), "server", 8001).unwrap()["sockets"]["listen"], 3);
        drop(shared);
    });
}

#[test]
fn a_leak_is_named_with_its_port_its_age_and_its_owner() {
    let port = quiet_port();
    let name = port.to_string();
    let leaky = Python::start(LEAKY, &[&name]);
    let arguments = ["--port", &name, "--interval", "100ms", "--warn", "1s", "--crit", "1h"];
    let watched = watch(&arguments);
    read_anew(&watched);
    let (_streams, began, ended) = leak(port, 100);
    let (asked, reading) = until("the leak to be named", || {
        let asked = Instant::now();
        let reading = sockets(&watched, "");
        (!reading["findings"].as_array().expect("findings").is_empty()).then_some((asked, reading))
    });
    // Watched from its start: within a second, and never older than it is.
    let of_leak = service(&reading, "server", port).unwrap();
    let age = of_leak["oldest_seconds"]["close_wait"].as_f64().unwrap();
    let most = began.elapsed().as_secs_f64() + TICK;
    assert!(age <= most && age >= asked.duration_since(began).as_secs_f64() - 1.0, "{age} of {most}");
    assert_eq!(of_leak["at_least"], Value::from(vec!["listen"; 0]), "{of_leak}");
    assert_eq!(
        (&of_leak["sockets"]["close_wait"], &of_leak["opened"], &of_leak["closed"]),
        (&100.into(), &100.into(), &0.into())
    );
    let finding = &reading["findings"][0];
    let text = finding["text"].as_str().unwrap();
    let begin = format!("port {port} ({}): 100 CLOSE_WAIT, oldest 1 s: the application", leaky.name());
    assert!(finding["severity"] == "warning" && text.starts_with(&begin), "{finding}");
    // Who: the process and the descriptor of the worst, 20 at most.
    let offenders = sockets(&watched, "?state=close_wait");
    let offenders = offenders.as_array().unwrap();
    assert_eq!(offenders.len(), 20);
    for offender in offenders {
        let process = &offender["process"];
        assert_eq!((&process["pid"], &process["name"]), (&leaky.child.id().into(), &leaky.name().into()));
        assert!(process["command"].as_str().unwrap().contains("python3 -c"), "{process}");
        let held = format!("/proc/{}/fd/{}", leaky.child.id(), offender["fd"]);
        assert!(fs::read_link(held).unwrap().to_str().unwrap().starts_with("socket:["), "{offender}");
        assert_eq!(offender["local"], format!("127.0.0.1:{port}"));
        let age = offender["age_seconds"].as_f64().unwrap();
        assert!(age <= began.elapsed().as_secs_f64() + TICK, "{offender}");
    }
    let fds: BTreeSet<_> = offenders.iter().map(|offender| offender["fd"].as_u64()).collect();
    assert_eq!(fds.len(), 20, "each its own");
    let metrics = watched.metrics();
    assert_eq!(metrics.sum("echoscope_listener_info", &[("port", &name), ("process", &leaky.name())]), 1.0);
    // Found by who was not there: since the last ACK at least, which was that of the FIN.
    let asked = Instant::now();
    let (code, reading) = once_json(&arguments);
    let found = service(&reading, "server", port).unwrap();
    let age = found["oldest_seconds"]["close_wait"].as_f64().unwrap();
    let (least, most) = (asked.duration_since(ended).as_secs_f64(), began.elapsed().as_secs_f64());
    assert!(age <= most + TICK && age >= least - TICK, "{age} is not within {least} and {most}");
    assert_eq!((code, &found["process"]["pid"]), (Some(1), &leaky.child.id().into()));
    assert!(found["at_least"].as_array().unwrap().contains(&"close_wait".into()), "{found}");
    let text = reading["findings"][0]["text"].as_str().unwrap();
    assert!(text.contains("100 CLOSE_WAIT, oldest at least "), "{text}");
    drop(watched);
}

#[test]
fn an_age_that_is_found_is_never_older_than_it_is() {
    let port = quiet_port();
    let mut leaky = Python::start(LEAKY, &[&port.to_string()]);
    let (_streams, began, _) = leak(port, 3);
    until("a second to pass", || (began.elapsed() > Duration::from_secs(1)).then_some(()));
    // The application sends, and we acknowledge: that is the last ACK now.
    let reminded = Instant::now();
    leaky.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    leaky.hear("sent");
    let (_, reading) = once_json(&["--port", &port.to_string()]);
    let age = service(&reading, "server", port).unwrap()["oldest_seconds"]["close_wait"].as_f64().unwrap();
    let most = began.elapsed().as_secs_f64();
    assert!(age <= reminded.elapsed().as_secs_f64() + TICK && age < most, "{age} of {most}");
}

#[test]
fn a_restart_does_not_make_a_leak_young() {
    let port = quiet_port();
    let name = port.to_string();
    let _leaky = Python::start(LEAKY, &[&name]);
    let (_streams, began, _) = leak(port, 10);
    let labels = [("role", "server"), ("port", name.as_str()), ("state", "close_wait")];
    let mut last = 0.0;
    for _ in 0..3 {
        let watch = watch(&["--port", &name, "--interval", "100ms"]);
        let next = last + 0.3;
        last = until("the leak to grow old", || {
            let age = watch.metrics().sum("echoscope_tcp_oldest_seconds", &labels);
            assert!(age + TICK >= last, "{age} after {last}: it has become younger");
            (age > next).then_some(age)
        });
        assert!(last <= began.elapsed().as_secs_f64() + TICK);
        watch.signal("TERM");
        let (status, stdout, _) = watch.wait();
        assert_eq!((status.code(), stdout.as_str()), (Some(0), ""));
    }
}

#[test]
fn once_is_a_check() {
    let port = quiet_port();
    let name = port.to_string();
    let leaky = Python::start(LEAKY, &[&name]);
    let (_streams, began, _) = leak(port, 7);
    until("the leak to be a second old", || (began.elapsed() > Duration::from_millis(1100)).then_some(()));
    for (warn, crit, code, verdict) in
        [("1h", "2h", 0, "OK nothing looks wrong"), ("1s", "1h", 1, "WARNING  port"), ("1s", "1s", 2, "CRITICAL port")]
    {
        let arguments = ["--port", &name, "--warn", warn, "--crit", crit];
        let out = once(&arguments);
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(code), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), if code == 0 { 4 } else { 11 }, "{text}");
        assert!(lines[2].contains("PORT") && lines[2].contains("OLDEST CLOSE-WAIT"), "{text}");
        let cells: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(cells[..8], ["in", &name, &leaky.name(), "0", "7", "0", "0", "0"], "{text}");
        assert!(lines[0].starts_with(verdict) && lines[1].is_empty(), "a monitor shows the first line: {text}");
        if code > 0 {
            let words = |line: usize| lines[line].split_whitespace().collect::<Vec<_>>();
            assert_eq!(words(5), ["OLDEST", "CLOSE-WAIT", "PID", "FD", "LOCAL", "PEER", "COMMAND"], "{text}");
            let (mut fds, local) = (BTreeSet::new(), format!("127.0.0.1:{port}"));
            for line in 6..11 {
                let [_, _, "s", pid, fd, at, _, program, "-c", ..] = words(line)[..] else { panic!("{text}") };
                assert_eq!((pid, at), (leaky.child.id().to_string().as_str(), local.as_str()), "{text}");
                assert!(program.ends_with("python3"), "{text}");
                let held = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
                assert!(held.to_str().unwrap().starts_with("socket:["), "{text}");
                fds.insert(fd);
            }
            assert_eq!(fds.len(), 5, "the worst five: {text}");
        }
        assert_eq!(String::from_utf8(out.stderr).unwrap(), "", "nothing to complain of");
        let (code_of_json, reading) = once_json(&arguments);
        assert_eq!(code_of_json, Some(code));
        assert_eq!(reading["findings"].as_array().unwrap().len(), usize::from(code > 0), "{reading:#}");
        assert_eq!((&reading["observer"], &reading["services"].as_array().unwrap().len()), (&"sock_diag".into(), &1));
    }
    let out = once(&["--warn", "2h", "--crit", "1h"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(out.stdout.is_empty(), "usage");
}

#[test]
fn of_a_leak_that_nobody_accepted_it_says_so() {
    let port = quiet_port();
    let _listener = listen(&format!("127.0.0.1:{port}"), false);
    let (streams, ..) = leak(port, 1);
    let out = once(&["--port", &name_of(port), "--warn", "0s"]);
    let text = String::from_utf8(out.stdout).unwrap();
    let peer = streams[0].local_addr().unwrap().to_string();
    let words: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
    let local = format!("127.0.0.1:{port}");
    assert_eq!(words[2..], ["s", "-", "-", &local, &peer, "not", "accepted", "yet"], "{text}");
}

#[test]
fn a_check_that_cannot_look_says_so() {
    for (output, said) in [("text", true), ("json", false)] {
        let mut check = command();
        check.args(["--observer", "sock_diag", "watch", "--once", "--output", output]);
        let (status, stdout, lines) = without_netlink(check).wait();
        let reason = "read the kernel's socket table: open netlink sock_diag socket: Operation not permitted";
        assert_eq!(status.code(), Some(3), "neither well nor wrong: {stdout}");
        assert_eq!(stdout.starts_with(&format!("UNKNOWN {reason}")) && stdout.lines().count() == 1, said, "{stdout}");
        let logged = lines.iter().any(|line| line["error"].as_str().is_some_and(|error| error.starts_with(reason)));
        assert_eq!((stdout.is_empty(), logged), (!said, !said), "{lines:?}");
    }
    // Whoever is to watch, and cannot, has failed.
    let mut serve = command();
    serve.args(["--web.listen-address", "127.0.0.1:0", "--observer", "sock_diag", "watch"]);
    assert_eq!(without_netlink(serve).wait().0.code(), Some(1));
}

#[test]
fn of_listeners_that_share_a_port_the_one_that_is_full_is_told() {
    let port = quiet_port();
    let name = name_of(port);
    // Each has a queue of its own, and the kernel chooses by the peer's address: some find no place while others would.
    let listener = |backlog| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
        socket.listen(backlog).unwrap();
        socket
    };
    let _listeners = [listener(1), listener(4000), listener(4000)];
    let watch = watch(&["--port", &name, "--interval", "50ms"]);
    let mut streams = Vec::new();
    let reading = until("the small queue to be full", || {
        let stream = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        stream.set_nonblocking(true).unwrap();
        let _ = stream.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into());
        streams.push(stream);
        let reading = sockets(&watch, "");
        let full = serde_json::json!({ "length": 2, "limit": 1 });
        (service(&reading, "server", port).unwrap()["accept_queue"] == full).then_some(reading)
    });
    let said = reading["findings"][0]["text"].as_str().unwrap();
    let (begin, end) = ("2 connections wait to be accepted at one of 3 listeners", "and the kernel drops handshakes");
    assert!(said.contains(begin) && said.ends_with(end), "{said}");
    let metrics = watch.metrics();
    let of = |name| metrics.sum(name, &[("port", name_of(port).as_str())]);
    assert_eq!((of("echoscope_accept_queue_length"), of("echoscope_accept_queue_limit")), (2.0, 1.0));
    assert_eq!(metrics.sockets("server", port, "listen"), 3.0);
}

#[test]
fn a_listener_that_outlives_its_process_gets_its_new_owner() {
    // The child holds the listener too, under another name, and the parent ends when it is told to.
    const FORKING: &str = "
import os, socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('127.0.0.1', int(sys.argv[1])))
listener.listen(9)
def call_it(name):
    open('/proc/self/comm', 'w').write(name)
alive, dying = os.pipe()
ready, go = os.pipe()
if os.fork() == 0:
    os.close(dying)
    call_it('heir')
    os.write(go, b'x')
    os.read(alive, 1)
    os.read(0, 1)
else:
    call_it('founder')
    os.read(ready, 1)
    print('listening', flush=True)
    sys.stdin.readline()
";
    let port = quiet_port();
    let name = name_of(port);
    let mut founder = Python::start(FORKING, &[&name]);
    let watch = watch(&["--port", &name, "--interval", "50ms"]);
    let owner = || {
        let reading = sockets(&watch, "");
        service(&reading, "server", port).unwrap()["process"].clone()
    };
    assert_eq!((&owner()["name"], &owner()["pid"]), (&"founder".into(), &founder.child.id().into()));
    founder.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    // Not wait(): that would close the heir's stdin too.
    assert!(until("the founder's end", || founder.child.try_wait().unwrap()).success());
    assert_ne!(owner()["name"], "founder", "it is gone");
    let heir = until("its heir", || Some(owner()).filter(|owner| owner["name"] == "heir"));
    assert_ne!(heir["pid"], founder.child.id());
    let metrics = watch.metrics();
    let told = |process| metrics.series("echoscope_listener_info", &[("port", &name), ("process", process)]).count();
    assert_eq!((told("founder"), told("heir")), (0, 1));
}

#[test]
fn a_port_that_was_named_is_told_of_though_nobody_listens() {
    let (port, remote) = (quiet_port(), quiet_port());
    let (name, remote_name) = (name_of(port), name_of(remote));
    let arguments = ["--port", &name, "--remote-port", &remote_name, "--interval", "20ms"];
    let watch = watch(&arguments);
    let zeros = || {
        let metrics = watch.metrics();
        for (role, port) in [("server", &name), ("client", &remote_name)] {
            for (state, _, _) in STATES {
                let labels = [("role", role), ("port", port.as_str()), ("state", state)];
                for series in ["echoscope_tcp_sockets", "echoscope_tcp_oldest_seconds"] {
                    assert_eq!(metrics.series(series, &labels).count(), 1, "{series} {labels:?}");
                    assert_eq!(metrics.sum(series, &labels), 0.0, "{series} {labels:?}");
                }
            }
        }
    };
    zeros();
    let said = |severity: &str, code: i32| {
        let (exit, reading) = once_json(&arguments);
        assert_eq!(exit, Some(code), "{reading:#}");
        assert_eq!(reading["findings"].as_array().unwrap().len(), usize::from(code > 0), "{reading:#}");
        let nobody = format!("port {port}: nobody listens, new connections are refused");
        assert!(code == 0 || reading["findings"][0] == serde_json::json!({ "severity": severity, "text": nobody }));
    };
    said("critical", 2);
    let listener = listen(&format!("127.0.0.1:{port}"), false);
    until("the listener", || (watch.metrics().sockets("server", port, "listen") == 1.0).then_some(()));
    said("ok", 0);
    drop(listener);
    until("no listener", || (watch.metrics().sockets("server", port, "listen") == 0.0).then_some(()));
    zeros();
    said("critical", 2);
    // Contradictory: nothing would be left to look at.
    let out = once(&["--port", &name, "--ignore-port", &name]);
    let complaint = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(complaint.contains("--ignore-port") && complaint.contains(&name), "{complaint}");
}

#[test]
#[ignore = "needs root, and setpriv (util-linux)"]
fn another_user_sees_the_same_less_the_names() {
    let port = quiet_port();
    let name = port.to_string();
    let leaky = Python::start(LEAKY, &[&name]);
    let (_streams, began, _) = leak(port, 100);
    until("the leak to be a second old", || (began.elapsed() > Duration::from_millis(1100)).then_some(()));
    // Where anybody may execute it.
    let place = std::env::temp_dir().join(format!("echoscope-watch-{}", std::process::id()));
    fs::create_dir_all(&place).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
    let binary = place.join("echoscope");
    fs::copy(env!("CARGO_BIN_EXE_echoscope"), &binary).unwrap();
    let out = Command::new("setpriv")
        .env_clear()
        .current_dir("/")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"])
        .arg(&binary)
        .args(["--log.format", "json", "watch", "--once", "--output", "json", "--port", &name, "--warn", "1s"])
        .output()
        .unwrap();
    fs::remove_dir_all(&place).unwrap();
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap().as_str()), (Some(1), ""));
    let theirs: Value = serde_json::from_slice(&out.stdout).unwrap();
    let (code, ours) = once_json(&["--port", &name, "--warn", "1s"]);
    assert_eq!(code, Some(1));
    let (theirs_of, ours_of) = (service(&theirs, "server", port).unwrap(), service(&ours, "server", port).unwrap());
    for field in ["sockets", "at_least", "accept_queue", "opened", "closed"] {
        assert_eq!(theirs_of[field], ours_of[field], "{field}");
    }
    assert_eq!((&theirs_of["process"], &ours_of["process"]["name"]), (&Value::Null, &leaky.name().into()));
    let said = |reading: &Value| reading["findings"][0]["text"].as_str().unwrap().to_owned();
    assert!(said(&theirs).starts_with(&format!("port {port}: 100 CLOSE_WAIT, oldest at least ")), "{theirs:#}");
    assert!(said(&ours).starts_with(&format!("port {port} ({}): 100 CLOSE_WAIT", leaky.name())), "{ours:#}");
}

/// Opened and closed at port 8001: server, client; and missed.
fn totals(metrics: &Metrics) -> ([f64; 2], [f64; 2], f64) {
    let of = |name, role| metrics.sum(name, &[("role", role), ("port", "8001")]);
    let both = |name| ["server", "client"].map(|role| of(name, role));
    let missed = metrics.sum("echoscope_sockets_missed_total", &[]);
    (both("echoscope_sockets_opened_total"), both("echoscope_sockets_closed_total"), missed)
}

#[test]
#[ignore = "needs root"]
fn short_connections_are_counted_to_the_last_one() {
    alone(|| {
        let stop = serve(listen("127.0.0.1:8001", false));
        let watch = watch(&["--interval", "200ms", "--remote-port", "8001"]);
        read_anew(&watch);
        // Whoever asks is counted too: over one connection, so that the count stands still.
        let mut web = KeptAlive::to(watch.web());
        let before = readings(&web.metrics());
        until("the end of those who asked before", || (readings(&web.metrics()) >= before + 2.0).then_some(()));
        short_lives("127.0.0.1:8001".parse().unwrap(), 12_000);
        // Whatever was lost is known to be missing; none is counted twice.
        let (opened, closed, missed) = until("all of them to be counted", || {
            let told = totals(&web.metrics());
            (told.0.iter().sum::<f64>() + told.2 >= 24_000.0).then_some(told)
        });
        let lost = web.metrics().sum("echoscope_observer_lost_events_total", &[]);
        if lost == 0.0 {
            assert_eq!((opened, closed, missed), ([12_000.0; 2], [12_000.0; 2], 0.0));
        }
        assert_eq!(opened.iter().sum::<f64>() + missed, 24_000.0, "{opened:?} and {missed}");
        let before = readings(&web.metrics());
        until("two more readings", || (readings(&web.metrics()) >= before + 2.0).then_some(()));
        assert_eq!(totals(&web.metrics()), (opened, closed, missed), "it stays so");
        stop();
    });
}

/// How many announcements the kernel has dropped in this namespace because somebody did not take them.
fn dropped() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    table.lines().skip(1).map(|line| line.split_whitespace().nth(8).unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
#[ignore = "needs root"]
fn what_is_lost_is_known_to_be_missing() {
    alone(|| {
        let stop = serve(listen("127.0.0.1:8001", false));
        let watch = watch(&["--interval", "200ms", "--remote-port", "8001"]);
        read_anew(&watch);
        assert_eq!(totals(&watch.metrics()).2, 0.0);
        // Whoever asks is counted too: over one connection, so that the count stands still.
        let mut web = KeptAlive::to(watch.web());
        let before = readings(&web.metrics());
        until("the end of those who asked before", || (readings(&web.metrics()) >= before + 2.0).then_some(()));
        // It hears nothing for a while, and the kernel does not wait for it.
        watch.signal("STOP");
        let status = format!("/proc/{}/status", watch.pid());
        until("it to be stopped", || fs::read_to_string(&status).unwrap().contains("State:\tT").then_some(()));
        let mut lives = 0;
        until("more than fits", || {
            short_lives("127.0.0.1:8001".parse().unwrap(), 2_000);
            lives += 2_000;
            (lives >= 20_000 && dropped() > 0).then_some(())
        });
        watch.signal("CONT");
        let both = 2.0 * f64::from(lives);
        let mut told = totals(&web.metrics());
        let all = try_until(|| {
            told = totals(&web.metrics());
            (told.0.iter().sum::<f64>() + told.2 >= both).then_some(())
        });
        assert!(all.is_some(), "{both} ends: {told:?}");
        let (opened, closed, missed) = told;
        assert!(web.metrics().sum("echoscope_observer_lost_events_total", &[("what", "destroy")]) >= 1.0);
        watch.line("a warning", |line| {
            line["level"] == "WARN" && line["message"].as_str().is_some_and(|m| m.contains("lost destroy events"))
        });
        assert!(missed > 0.0, "{opened:?}");
        assert_eq!(opened.iter().sum::<f64>() + missed, both, "{opened:?} and {missed}");
        // What comes later is counted as ever, and nothing more is missing.
        short_lives("127.0.0.1:8001".parse().unwrap(), 100);
        let (opened_now, closed_now, missed_now) = until("the next 100", || {
            let told = totals(&web.metrics());
            (told.0.iter().sum::<f64>() >= opened.iter().sum::<f64>() + 200.0).then_some(told)
        });
        assert_eq!(opened_now, opened.map(|n| n + 100.0));
        assert_eq!(closed_now, closed.map(|n| n + 100.0));
        assert_eq!(missed_now, missed);
        stop();
    });
}

#[test]
fn where_netlink_is_refused_it_counts_and_says_so() {
    let port = quiet_port();
    let name = port.to_string();
    let listener = listen(&format!("127.0.0.1:{port}"), false);
    let mut start = command();
    start.args(["--web.listen-address", "127.0.0.1:0", "watch", "--interval", "50ms"]);
    start.args(["--port", &name, "--remote-port", &name]);
    let watch = without_netlink(start);
    watch.line("a warning that netlink was refused", |line| {
        line["level"] == "WARN" && line["observer"] == "procfs" && line["error"].as_str().unwrap().contains("netlink")
    });
    read_anew(&watch);
    let mut streams: Vec<_> = (0..4).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let accepted: Vec<_> = (0..4).map(|_| listener.accept().unwrap().0).collect();
    streams[0].shutdown(Shutdown::Write).unwrap();
    let counted = |role, state| watch.metrics().sockets(role, port, state);
    until("3 ESTABLISHED and a CLOSE_WAIT", || {
        (counted("server", "established") == 3.0 && counted("server", "close_wait") == 1.0).then_some(())
    });
    let metrics = watch.metrics();
    assert_eq!(metrics.sum("echoscope_observer_info", &[("observer", "procfs")]), 1.0);
    assert_eq!((counted("server", "listen"), counted("client", "established")), (1.0, 3.0));
    // Their FIN_WAIT2 goes on to TIME_WAIT, which stays: closed for all that.
    drop(accepted);
    streams.clear();
    until("all to be closed", || {
        let metrics = watch.metrics();
        let of = |name, role| metrics.sum(name, &[("role", role), ("port", &name_of(port))]);
        let all = ["server", "client"]
            .map(|role| (of("echoscope_sockets_opened_total", role), of("echoscope_sockets_closed_total", role)));
        (all == [(4.0, 4.0); 2]).then_some(())
    });
    let reading = sockets(&watch, "");
    assert_eq!((&reading["observer"], &reading["local_ports"].is_array()), (&"procfs".into(), &true));
    assert_eq!(service(&reading, "server", port).unwrap()["accept_queue"]["limit"], Value::Null);
}

fn name_of(port: u16) -> String {
    port.to_string()
}

#[test]
#[ignore = "needs root"]
fn a_namespace_without_ipv6_is_watched_too() {
    alone(|| {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        assert!(TcpListener::bind("[::1]:0").is_err(), "IPv6 is off");
        let _listener = listen("127.0.0.1:8001", false);
        let _stream = TcpStream::connect("127.0.0.1:8001").unwrap();
        let watch = watch(&["--interval", "50ms", "--remote-port", "8001"]);
        let reading = sockets(&watch, "");
        assert_eq!(told(&reading, &[8001]), by_text(&[8001]));
        assert_eq!(told(&reading, &[8001]).len(), 3, "{reading:#}");
        let metrics = watch.metrics();
        for name in ["echoscope_observer_errors_total", "echoscope_observer_lost_events_total"] {
            assert_eq!(metrics.sum(name, &[]), 0.0, "{name}");
        }
    });
}

#[test]
fn only_what_was_asked_for_is_shown() {
    let ports: Vec<u16> = (0..3).map(|_| quiet_port()).collect();
    let names: Vec<String> = ports.iter().map(u16::to_string).collect();
    let listeners: Vec<_> = ports.iter().map(|port| listen(&format!("127.0.0.1:{port}"), false)).collect();
    let _streams: Vec<_> = listeners.iter().map(|l| TcpStream::connect(l.local_addr().unwrap()).unwrap()).collect();
    let shown = |arguments: &[&str]| {
        let (_, reading) = once_json(arguments);
        let shows = |role: &str| ports.iter().map(|port| service(&reading, role, *port).is_some()).collect::<Vec<_>>();
        (shows("server"), shows("client"))
    };
    let none = vec![false; 3];
    assert_eq!(shown(&[]), (vec![true; 3], none.clone()));
    assert_eq!(shown(&["--port", &names[0]]), (vec![true, false, false], none.clone()));
    assert_eq!(shown(&["--port", &names[0..2].join(",")]), (vec![true, true, false], none.clone()));
    assert_eq!(shown(&["--ignore-port", &names[0]]), (vec![false, true, true], none.clone()));
    assert_eq!(shown(&["--port", &names[0], "--port", &names[1], "--ignore-port", &names[0]]).0, [false, true, false]);
    let (servers, clients) = shown(&["--remote-port", &names[2], "--port", &names[0]]);
    assert_eq!((servers, clients), (vec![true, false, false], vec![false, false, true]));
    // Nor is its own web side, which listens too; and what it is asked must make sense.
    let watch = watch(&[]);
    let web = watch.web().port();
    let reading = sockets(&watch, "");
    assert!(service(&reading, "server", web).is_none() && service(&reading, "server", ports[0]).is_some());
    let own = web.to_string();
    let labels = [("role", "server"), ("port", own.as_str())];
    assert_eq!(watch.metrics().series("echoscope_tcp_sockets", &labels).count(), 0);
    let named = sockets(&watch, "?state=established");
    assert!(
        named.as_array().unwrap().iter().all(|s| (&s["role"], &s["port"]) != (&"server".into(), &own.clone().into()))
    );
    for query in ["state=", "state=closed_wait", "close_wait", "state=close_wait&x=1", "limit=1"] {
        assert_eq!(get(watch.web(), &format!("/api/sockets?{query}")).0, 400, "{query}");
    }
    for query in ["", "?", "?state=close_wait", "?state=CLOSE-WAIT", "?state=listen"] {
        assert_eq!(get(watch.web(), &format!("/api/sockets{query}")).0, 200, "{query}");
    }
    assert_eq!(get(watch.web(), "/api/connections").1, "[]");
    watch.signal("TERM");
    assert_eq!(watch.wait().0.code(), Some(0));
}

#[test]
fn a_listener_that_comes_and_goes() {
    let port = quiet_port();
    let name = name_of(port);
    let watch = watch(&["--interval", "20ms"]);
    let shown = || service(&sockets(&watch, ""), "server", port).cloned();
    assert!(shown().is_none());
    let listener = listen(&format!("127.0.0.1:{port}"), false);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let accepted = listener.accept().unwrap().0;
    until("a connection", || shown().filter(|service| service["sockets"]["established"] == 1));
    // Its connection outlives it.
    drop(listener);
    // Listeners are read a moment before the whole table: one that goes between the two still has its queue in that reading.
    let gone = |service: &Value| service["sockets"]["listen"] == 0 && service.get("accept_queue").is_none();
    let left = until("the listener to be gone", || shown().filter(gone));
    assert_eq!(left["sockets"]["established"], 1);
    // The peer closes first, so that nothing is left on this port.
    stream.shutdown(Shutdown::Write).unwrap();
    drop(accepted);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    until("the service to be gone", || shown().is_none().then_some(()));
    until("its series to be gone", || {
        let metrics = watch.metrics();
        (metrics.series("echoscope_sockets_opened_total", &[("port", &name)]).count() == 0).then_some(())
    });
}

#[test]
fn a_name_cannot_write_on_the_terminal() {
    // A control sequence and a line's end; writing turned around; two columns a character, and none. 15 bytes at most.
    for (comm, shown, columns) in [
        (r"a\x1b[31m\nb", r"a\u{1b}[31m\u{a}b", 17),
        (r"a\u202ebad\u200b", r"a\u{202e}bad\u{200b}", 20),
        (r"\u30c7\u30fc\u30bf", "データ", 6),
        (r"e\u0301t\u00e9", "e\u{301}té", 3),
    ] {
        let port = quiet_port();
        let name = name_of(port);
        let _named = Python::start(LEAKY, &[&name, comm]);
        let out = once(&["--port", &name]);
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(!text.chars().any(|c| c.is_control() && c != '\n') && text.lines().count() == 4, "{text:?}");
        // The next column begins where its head says.
        let (head, line) = (text.lines().nth(2).unwrap(), text.lines().nth(3).unwrap());
        let (before, after) = line.split_once(shown).unwrap_or_else(|| panic!("{text}"));
        let estab = head.find("ESTAB").unwrap() + "ESTAB".len();
        let zero = before.len() + columns + after.find('0').unwrap() + 1;
        assert_eq!(zero, estab, "{text}");
        let watch = watch(&["--port", &name]);
        let metrics = watch.metrics();
        assert_eq!(metrics.series("echoscope_listener_info", &[("port", &name)]).count(), 1);
        let label = shown.replace('\\', r"\\");
        let (_, page) = get(watch.web(), "/metrics");
        assert!(page.contains(&format!("process=\"{label}\"")), "{page}");
    }
}

#[test]
fn on_a_terminal_it_is_drawn_again_until_ctrl_c() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    const AGAIN: &str = "\x1b[H\x1b[J";
    let port = quiet_port();
    let _listener = listen(&format!("127.0.0.1:{port}"), false);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let slave = || fs::OpenOptions::new().read(true).write(true).open(&name).unwrap();
    let plain = command();
    // Its controlling terminal: Ctrl-C is the terminal's to make a signal of.
    let mut child = Command::new("setsid")
        .arg("--ctty")
        .arg(plain.get_program())
        .args(["watch", "--live", "--interval", "50ms", "--port", &port.to_string()])
        .stdin(slave())
        .stdout(slave())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut terminal = fs::File::from(master);
    let (mut shown, mut buffer) = (String::new(), [0; 4096]);
    while shown.matches(AGAIN).count() < 5 {
        let n = terminal.read(&mut buffer).unwrap();
        shown.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    terminal.write_all(b"\x03").unwrap();
    let status = until("it to end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    let screens: Vec<&str> = shown.split(AGAIN).collect();
    assert_eq!(screens[0], "");
    for screen in &screens[1..4] {
        assert!(screen.contains(&port.to_string()) && screen.contains("OK nothing looks wrong"), "{screen:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn two_hundred_readings_take_no_descriptor_and_no_memory() {
    alone(|| {
        let address = SocketAddr::from(([127, 0, 0, 1], 8001));
        let stop = serve(listen("127.0.0.1:8001", false));
        let watch = watch(&["--interval", "10ms", "--remote-port", "8001"]);
        let churning = Arc::new(AtomicBool::new(true));
        let goes_on = Arc::clone(&churning);
        // TIME_WAITs pile up for a minute, and with them what is remembered: a paced few.
        let churn = thread::spawn(move || {
            while goes_on.load(Ordering::Relaxed) {
                short_lives(address, 5);
                thread::sleep(Duration::from_millis(20));
            }
        });
        let after = |number: f64| until("readings", || (readings(&watch.metrics()) >= number).then_some(()));
        after(50.0);
        let (descriptors, memory) = (watch.descriptors(), watch.resident_kib());
        after(readings(&watch.metrics()) + 200.0);
        churning.store(false, Ordering::Relaxed);
        churn.join().unwrap();
        // A connection of ours to its web side may be under way.
        until("the descriptors of before", || (watch.descriptors() <= descriptors).then_some(()));
        let grown = watch.resident_kib().saturating_sub(memory);
        assert!(grown < 4096, "{grown} KiB more");
        stop();
    });
}
