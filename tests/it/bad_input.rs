//! Wrong arguments, hostile peers, exhausted limits: a clear error or a counted outcome, and the service goes on.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use echoscope::tcp::ARROWS;
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use crate::support::{Change, Echoscope, Metrics, PATIENCE, command, lives, until, walk};
use crate::web::KeptAlive;

/// Every line is a log line (a panic is none). Every life is an unbroken walk along arrows that exist, from its role's
/// start; a way that nobody saw says so, and nothing is unexpected. Returns the lives of one role's connections.
fn sound_lives(lines: &[Value], wanted: &str) -> Vec<Vec<Change>> {
    for line in lines {
        assert!(line.is_object(), "not a log line: {line}");
    }
    let mut found = Vec::new();
    for ((role, _), changes) in lives(lines) {
        let states = walk(&changes);
        let listener = states.starts_with(&["CLOSED", "LISTEN"]);
        let start = if role == "client" || listener { "CLOSED" } else { "LISTEN" };
        assert_eq!(states[0], start, "{changes:#?}");
        assert!(!states[1..states.len() - 1].contains(&"CLOSED"), "a life after the end: {changes:#?}");
        for change in &changes {
            let is_arrow = ARROWS.iter().any(|a| (a.from.name(), a.to.name()) == (&change.from, &change.to));
            assert!(is_arrow || change.via.as_deref() == Some("unknown"), "{changes:#?}");
            assert!(change.via.is_none() || change.via.as_deref() == Some("unknown"), "{changes:#?}");
        }
        if role == wanted && !listener {
            found.push(changes);
        }
    }
    found
}

/// Starts echoscope with so many descriptors; the web side takes a free port.
fn limited(descriptors: u32, arguments: &[&str]) -> Echoscope {
    let inner = command();
    let mut shell = Command::new("/bin/sh");
    shell.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.arg("-c").arg(format!("ulimit -n {descriptors} && exec \"$0\" \"$@\""));
    shell.arg(inner.get_program()).args(inner.get_args()).args(["--web.listen-address", "127.0.0.1:0"]);
    Echoscope::spawn(shell.args(arguments))
}

/// An address of ours that nobody else can take, where nobody listens.
fn refusing() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// One whole echo, closed gracefully.
fn echo_once(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"is anybody there?").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "is anybody there?");
}

// ---- Arguments ----

#[test]
fn a_mistake_is_named_before_anything_is_bound() {
    // Both addresses are taken: whoever tried to bind them would say that instead.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (arguments, named) in [
        ("server --bogus", &["--bogus"][..]),
        ("server -x", &["-x"]),
        ("serve", &["serve"]),
        ("server stray", &["stray"]),
        ("server --max-connections many", &["--max-connections", "many"]),
        ("server --max-connections -1", &["-1"]),
        ("server --idle-timeout soon", &["--idle-timeout", "soon"]),
        ("server --idle-timeout 5", &["--idle-timeout", "5"]),
        ("server --accept-backlog 4294967296", &["--accept-backlog", "4294967296"]),
        ("server --workers 0", &["--workers", "0"]),
        ("server --runtime fast", &["--runtime", "fast"]),
        ("server --drain-timeout", &["--drain-timeout"]),
        ("server --log.level loud", &["--log.level", "loud"]),
        ("server --observer stars", &["--observer", "stars"]),
        ("server --follow-limit -1", &["-1"]),
        ("server --follow-limit 18446744073709551615", &["--follow-limit", "18446744073709551615"]),
        ("server --drain-timeout 18446744073709551615s", &["--drain-timeout", "18446744073709551615s"]),
        ("server --workers 99999", &["--workers", "99999"]),
        ("--count none", &["--count", "none"]),
        ("--bogus", &["--bogus"]),
        ("client a:1 --until-gone", &["--until-gone"]),
        ("pair --close sideways", &["--close", "sideways"]),
        ("pair --close server-first --idle-timeout 0s", &["--close server-first", "--idle-timeout 0s"]),
        ("client", &["HOST:PORT"]),
        ("client localhost", &["HOST:PORT", "localhost"]),
        ("client localhost:http", &["HOST:PORT", "localhost:http"]),
        ("client localhost:65536", &["HOST:PORT", "localhost:65536"]),
        ("client localhost:0", &["HOST:PORT", "localhost:0"]),
        ("client ::1:7", &["HOST:PORT", "::1:7"]),
        ("client [::1:7", &["HOST:PORT", "[::1:7"]),
        ("client a:1 b:2 a:1", &["a:1", "twice"]),
        ("client a:1 --rate fast", &["--rate", "fast"]),
        ("client a:1 --rate -1", &["--rate", "-1"]),
        ("client a:1 --count 0", &["--count", "0"]),
        ("client a:1 --connections 0", &["--connections", "0"]),
        ("client a:1 --message-size 2..1", &["--message-size", "2..1"]),
        ("client a:1 --message-size 99999999M", &["--message-size", "99999999M"]),
        ("client a:1 --retries -1", &["-1"]),
        ("client a:1 --output xml", &["--output", "xml"]),
        ("health ftp://localhost/", &["URL", "ftp://localhost/"]),
    ] {
        let mut echoscope = command();
        echoscope.args(arguments.split(' '));
        echoscope.env("ECHOSCOPE_LISTEN", &taken).env("ECHOSCOPE_WEB_LISTEN_ADDRESS", &taken);
        assert_usage(&mut echoscope, named);
    }
    for (arguments, named) in [
        ("server --listen nowhere", &["--listen", "nowhere"][..]),
        ("server --listen 127.0.0.1", &["--listen", "127.0.0.1"]),
        ("server --listen 127.0.0.256:1", &["--listen", "127.0.0.256:1"]),
        ("server --web.listen-address nowhere", &["--web.listen-address", "nowhere"]),
        ("server --web.listen-address 127.0.0.1:65536", &["--web.listen-address", "127.0.0.1:65536"]),
        ("health --web.listen-address none", &["--web.listen-address"]),
    ] {
        assert_usage(command().args(arguments.split(' ')), named);
    }
    // What comes from the environment is held to the same.
    for (variable, flag) in
        [("ECHOSCOPE_RATE", "--rate"), ("ECHOSCOPE_LISTEN", "--listen"), ("ECHOSCOPE_UNTIL_GONE", "--until-gone")]
    {
        let mut echoscope = command();
        assert_usage(echoscope.arg("pair").env(variable, "nonsense"), &[flag, "nonsense"]);
    }
}

/// It must end with 2 and name these.
fn assert_usage(command: &mut Command, named: &[&str]) {
    let out = command.output().expect("run echoscope");
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{command:?}: {said}");
    for name in named {
        assert!(said.contains(name), "{command:?}: no {name:?} in {said}");
    }
    assert!(out.stdout.is_empty(), "{command:?}");
}

/// What is said on stderr by a run that cannot start, without the state lines.
fn cannot_start(arguments: &[&str]) -> String {
    let (status, out, lines) = Echoscope::start(arguments).wait();
    assert_eq!((status.code(), out.as_str()), (Some(1), ""), "{lines:#?}");
    let [line] = &lines[..] else { panic!("one message was expected: {lines:#?}") };
    assert_eq!(line["level"], "ERROR");
    assert_eq!(line["message"], "cannot go on");
    line["error"].as_str().expect("an error").to_owned()
}

#[test]
fn an_address_that_cannot_be_had_is_named() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let (echo, web) = (format!("echo listener on {taken}"), format!("web listener on {taken}"));
    let taken = taken.to_string();
    for (arguments, what) in [
        (&["server", "--listen", &taken][..], &echo),
        (&["server", "--listen", &taken, "--runtime", "per-core"], &echo),
        (&["pair", "--listen", &taken], &echo),
        (&["server", "--listen", "127.0.0.1:0", "--web.listen-address", &taken], &web),
        (&["client", "127.0.0.1:9", "--web.listen-address", &taken], &web),
    ] {
        assert_eq!(
            cannot_start(arguments),
            format!("bind {what}: Address already in use (os error 98)"),
            "{arguments:?}"
        );
    }
    // TEST-NET-1 (RFC 5737) is nobody's address.
    let foreign = cannot_start(&["server", "--listen", "192.0.2.1:7007"]);
    assert_eq!(foreign, "bind echo listener on 192.0.2.1:7007: Cannot assign requested address (os error 99)");
    // The holder has noticed nothing.
    let stream = TcpStream::connect(holder.local_addr().unwrap()).unwrap();
    assert_eq!(holder.accept().unwrap().1, stream.local_addr().unwrap());
}

// ---- The client and its targets ----

/// A bounded client's end.
struct Ended {
    code: Option<i32>,
    summary: Value,
    lines: Vec<Value>,
    /// Its connections' lives.
    lives: Vec<Vec<Change>>,
}

/// Runs a client to its end.
fn run_client(target: &str, arguments: &[&str]) -> Ended {
    let common = ["client", target, "--web.listen-address", "none", "--output", "json"];
    ended(Echoscope::start(&[&common, arguments].concat()))
}

fn ended(client: Echoscope) -> Ended {
    let (status, out, lines) = client.wait();
    let summary = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out:?}, {lines:#?}"));
    let lives = sound_lives(&lines, "client");
    Ended { code: status.code(), summary, lines, lives }
}

impl Ended {
    /// How turns ended, and how many did so.
    fn outcomes(&self) -> BTreeMap<&str, u64> {
        let all = self.summary["outcomes"].as_object().unwrap().iter();
        all.map(|(outcome, count)| (outcome.as_str(), count.as_u64().unwrap())).filter(|(_, n)| *n > 0).collect()
    }

    /// Every turn ended so, and the exit code says whether that is well. A failure is warned of once a minute.
    fn assert_all(&self, outcome: &str, count: u64) {
        assert_eq!(self.outcomes(), BTreeMap::from([(outcome, count)]));
        assert_eq!(self.code, Some(i32::from(outcome != "ok")));
        let warnings = self.lines.iter().filter(|line| line["message"] == "connection failed").count();
        assert_eq!(warnings, usize::from(outcome != "ok"));
        let left = self.summary["still_in_kernel"]["TIME_WAIT"].as_u64().is_some();
        assert_eq!(left, self.ends_in("TIME_WAIT"), "{}", self.summary);
    }

    fn ends_in(&self, state: &str) -> bool {
        self.lives.iter().any(|changes| changes.last().unwrap().to == state)
    }

    /// Every life began so, and its last change came from this state to CLOSED for this cause.
    fn assert_walks(&self, begin: &[&str], last: (&str, &str)) {
        for changes in &self.lives {
            assert_eq!(walk(changes)[..begin.len()], *begin, "{changes:#?}");
            let end = changes.last().unwrap();
            let said = (end.from.as_str(), end.to.as_str(), end.cause.as_deref());
            assert_eq!(said, (last.0, "CLOSED", Some(last.1)), "{changes:#?}");
        }
    }
}

const OPEN: [&str; 3] = ["CLOSED", "SYN_SENT", "ESTABLISHED"];

#[test]
fn a_name_without_an_address_is_unresolved() {
    // .invalid never has one (RFC 2606). A resolver that nobody answers must not hold up the test.
    let mut client = command();
    client.args(["client", "nosuch.invalid:7", "--retries", "0", "--count", "3", "--output", "json"]);
    client.args(["--web.listen-address", "none"]).env("RES_OPTIONS", "timeout:1 attempts:1");
    let end = ended(Echoscope::spawn(&mut client));
    end.assert_all("unresolved", 3);
    assert_eq!((end.summary["retries"].as_u64(), end.lives.len()), (Some(0), 0));
    assert_eq!(end.summary["connections"], 3);
}

#[test]
fn a_refused_open_is_tried_again_with_longer_and_longer_pauses() {
    let (_held, address) = refusing();
    let end = run_client(&address.to_string(), &["--count", "2", "--connections", "2", "--retries", "3"]);
    end.assert_all("refused", 2);
    assert_eq!(end.summary["retries"], 6);
    assert_eq!(end.lives.len(), 8, "one life for each try");
    for changes in &end.lives {
        assert_eq!(walk(changes), ["CLOSED", "SYN_SENT", "CLOSED"]);
        assert_eq!((changes[1].cause.as_deref(), &changes[1].via), (Some("refused"), &None));
    }
    // 100, 200 and 400 ms, each less up to a quarter.
    let seconds = end.summary["seconds"].as_f64().unwrap();
    assert!((0.525..5.0).contains(&seconds), "{seconds} s");
    assert_eq!(end.summary["bytes_sent"], 0);
}

#[test]
fn a_target_that_comes_up_late_is_reached() {
    let (held, address) = refusing();
    let arguments = ["client", &address.to_string(), "--count", "1", "--retries", "9", "--output", "json"];
    let client = Echoscope::start(&arguments);
    client.line("a refusal", |line| line["cause"] == "refused");
    held.listen(8).unwrap();
    let target = Target::serve(held.into(), echo_all);
    let end = ended(client);
    end.assert_all("ok", 1);
    assert!(end.summary["retries"].as_u64().unwrap() >= 1);
    assert_eq!(target.served(), 1);
}

/// A target of our own, that treats each of its connections in some way.
struct Target {
    listener: Arc<TcpListener>,
    served: Arc<AtomicUsize>,
    /// What to do: can be changed while it serves.
    manner: Arc<Mutex<Manner>>,
}

type Manner = fn(&mut TcpStream) -> std::io::Result<()>;

impl Target {
    fn start(manner: Manner) -> Target {
        Target::serve(TcpListener::bind("127.0.0.1:0").unwrap(), manner)
    }

    fn serve(listener: TcpListener, manner: Manner) -> Target {
        let (listener, served) = (Arc::new(listener), Arc::new(AtomicUsize::new(0)));
        let target = Target { listener, served, manner: Arc::new(Mutex::new(manner)) };
        let (listener, served) = (Arc::clone(&target.listener), Arc::clone(&target.served));
        let manner = Arc::clone(&target.manner);
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let (manner, served) = (*manner.lock().unwrap(), Arc::clone(&served));
                stream.set_nodelay(true).unwrap();
                std::thread::spawn(move || {
                    // The other end hangs up when it has had enough.
                    let _ = manner(&mut stream);
                    drop(stream);
                    served.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        target
    }

    /// From the next connection on.
    fn behave(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    /// Refuses from now on. The port stays taken.
    fn hang_up(&self) {
        // Wakes accept(2), which then fails.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// How many connections it is done with.
    fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.hang_up();
    }
}

fn echo_all(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

/// A RST, with what was sent unread or read.
fn reset(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.peek(&mut [0])?;
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO))
}

fn reset_later(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    reset(stream)
}

/// To close with unread data sends a RST too (RFC 9293 section 3.10.4).
fn close_unread(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.peek(&mut [0]).map(drop)
}

fn garble(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    message[63] ^= 1;
    stream.write_all(&message)?;
    until_end(stream)
}

/// Says more than it heard.
fn say_more(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    stream.write_all(b"and more")?;
    until_end(stream)
}

/// Says more than it heard for as long as anybody listens.
fn say_more_for_ever(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    loop {
        stream.write_all(&[b'x'; 16 * 1024])?;
    }
}

/// Hears everything and says nothing.
fn until_end(stream: &mut TcpStream) -> std::io::Result<()> {
    std::io::copy(stream, &mut std::io::sink()).map(drop)
}

/// Neither hears nor says anything.
#[expect(clippy::unnecessary_wraps, reason = "one of several manners, which can fail")]
fn until_reset(stream: &mut TcpStream) -> std::io::Result<()> {
    until("the peer to reset", || stream.take_error().expect("SO_ERROR"));
    Ok(())
}

fn close_early(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    stream.write_all(&message[..32])?;
    stream.shutdown(Shutdown::Write)?;
    until_end(stream)
}

fn never_close(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut message = [0; 64];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    until_reset(stream)
}

/// Six turns of one message, three at a time.
fn against(manner: Manner, arguments: &[&str]) -> Ended {
    let target = Target::start(manner);
    let messages = if arguments.contains(&"--messages") { &[][..] } else { &["--messages", "1"] };
    let common = [&["--count", "6", "--connections", "3", "--retries", "0"], messages].concat();
    let end = run_client(&target.address(), &[&common, arguments].concat());
    assert_eq!(end.lives.len(), 6);
    end
}

#[test]
fn a_target_that_resets() {
    for manner in [reset, close_unread] {
        let end = against(manner, &[]);
        end.assert_all("reset", 6);
        end.assert_walks(&OPEN, ("ESTABLISHED", "reset"));
        assert!(end.lives.iter().flatten().all(|c| c.via.is_none()), "{:#?}", end.lives);
    }
    let end = against(reset_later, &["--messages", "2", "--think-time", "1ms"]);
    end.assert_all("reset", 6);
    end.assert_walks(&OPEN, ("ESTABLISHED", "reset"));
    assert_eq!(end.summary["echoes"], 6);
}

#[test]
fn a_target_that_garbles() {
    let end = against(garble, &[]);
    end.assert_all("mismatch", 6);
    end.assert_walks(&OPEN, ("ESTABLISHED", "abort"));
    let told: Vec<&Value> = end.lines.iter().filter(|line| line["message"] == "echo mismatch").collect();
    assert!(told.len() == 6 && told.iter().all(|line| line["error"] == "byte 63 came back different"), "{told:#?}");
}

#[test]
fn a_target_that_says_more_than_it_heard() {
    let end = against(say_more, &[]);
    end.assert_all("mismatch", 6);
    // The second message's echo begins with the surplus of the first.
    let end = against(say_more, &["--messages", "2"]);
    end.assert_all("mismatch", 6);
    end.assert_walks(&OPEN, ("ESTABLISHED", "abort"));
    // One that never ends must not be listened to for ever.
    let end = against(say_more_for_ever, &["--close-timeout", "200ms"]);
    assert_eq!((end.outcomes().values().sum::<u64>(), end.code), (6, Some(1)));
    assert!(end.outcomes().keys().all(|o| ["close_timeout", "mismatch"].contains(o)), "{:?}", end.outcomes());
}

#[test]
fn a_target_that_stalls() {
    for (manner, size) in [(until_end as Manner, "64"), (until_reset, "64"), (until_reset, "64M")] {
        let end = against(manner, &["--echo-timeout", "200ms", "--message-size", size]);
        end.assert_all("echo_timeout", 6);
        end.assert_walks(&OPEN, ("ESTABLISHED", "abort"));
        // Our RST ended it, but a FIN could have come just before: how long it was ESTABLISHED is not claimed.
        let last = |changes: &Vec<Change>| changes.last().unwrap().clone();
        assert!(end.lives.iter().map(last).all(|c| c.via.is_some() && c.after.is_none()), "{:?}", end.lives);
        assert_eq!(end.summary["echoes"], 0);
    }
}

#[test]
fn a_target_that_closes_early() {
    let end = against(close_early, &[]);
    end.assert_all("short", 6);
    for changes in &end.lives {
        assert_eq!(walk(changes), ["CLOSED", "SYN_SENT", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"]);
        assert_eq!(changes[2].cause.as_deref(), Some("peer_fin"));
    }
}

#[test]
fn a_target_that_never_closes() {
    let end = against(never_close, &["--close-timeout", "300ms"]);
    end.assert_all("close_timeout", 6);
    end.assert_walks(&["CLOSED", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2"], ("FIN_WAIT2", "abort"));
    assert_eq!(end.summary["echoes"], 6);
}

#[test]
fn a_target_that_does_not_answer_the_handshake() {
    let (held, address) = refusing();
    held.listen(0).unwrap();
    // A backlog of 0 holds one connection that nobody accepts; further SYNs go unanswered.
    let _filler = TcpStream::connect(address).unwrap();
    let arguments = ["--connect-timeout", "300ms", "--count", "3", "--connections", "3"];
    let end = run_client(&address.to_string(), &arguments);
    end.assert_all("connect_timeout", 3);
    assert_eq!((end.lives.len(), end.summary["retries"].as_u64()), (3, Some(0)));
    for changes in &end.lives {
        assert_eq!(walk(changes), ["CLOSED", "SYN_SENT", "CLOSED"]);
        assert_eq!((changes[1].cause.as_deref(), &changes[1].via), (Some("timeout"), &None));
        assert!((0.3..5.0).contains(&changes[1].after.unwrap()), "{changes:?}");
    }
}

/// One client that outlives a target which goes through every bad manner, with a good one in between.
#[test]
fn a_client_that_goes_on_leaks_nothing_whatever_its_target_does() {
    let (held, address) = refusing();
    let address = address.to_string();
    let pace = ["--connections", "1", "--rate", "30", "--messages", "1", "--retries", "0", "--output", "json"];
    let patience = ["--echo-timeout", "100ms", "--close-timeout", "100ms"];
    let client = Echoscope::start(&[&["client", &address], &pace[..], &patience].concat());
    client.line("a refusal", |line| line["cause"] == "refused");
    let before = client.descriptors();
    held.listen(16).unwrap();
    let target = Target::serve(held.into(), echo_all);
    let five_more = |reason| {
        let labels = [("role", "client"), ("reason", reason)];
        let closed = || client.metrics().sum("echoscope_connections_closed_total", &labels);
        let so_far = closed();
        until(reason, || (closed() >= so_far + 5.0).then_some(()));
        // The one that may be open.
        until("the descriptors to return", || (client.descriptors() <= before + 1).then_some(()));
    };
    let bad: [(Manner, &str); 9] = [
        (reset, "reset"),
        (close_unread, "reset"),
        (reset_later, "reset"),
        (garble, "mismatch"),
        (say_more, "mismatch"),
        (until_end, "timeout"),
        (until_reset, "timeout"),
        (never_close, "timeout"),
        (close_early, "error"),
    ];
    for (manner, reason) in bad {
        target.behave(manner);
        five_more(reason);
        target.behave(echo_all);
        five_more("graceful");
    }
    target.hang_up();
    five_more("refused");
    until("the descriptors to return", || (client.descriptors() <= before).then_some(()));
    assert!(client.metrics().sum("echoscope_echo_mismatch_total", &[]) >= 10.0);
    client.signal("TERM");
    let end = ended(client);
    assert_eq!(end.code, Some(1));
    let expected = ["close_timeout", "echo_timeout", "mismatch", "ok", "refused", "reset", "short"];
    assert!(end.outcomes().keys().eq(&expected), "{:?}", end.outcomes());
    assert_eq!(end.summary["connections"], end.lives.len(), "one life for each turn");
}

#[test]
fn a_client_with_64_descriptors_and_200_connections_counts_what_it_cannot_have() {
    let target = Target::start(echo_all);
    let address = target.address();
    let arguments = [
        "client",
        &address,
        "--connections",
        "200",
        "--count",
        "400",
        "--retries",
        "0",
        "--hold",
        "500ms",
        "--output",
        "json",
    ];
    let end = ended(limited(64, &arguments));
    let outcomes = end.outcomes();
    assert_eq!((outcomes.values().sum::<u64>(), end.code), (400, Some(1)));
    assert!(outcomes.keys().eq(["no_descriptor", "ok"].iter()), "{outcomes:?}");
    assert!((20..64).contains(&outcomes["ok"]), "{outcomes:?}");
    assert_eq!(end.lives.len() as u64, outcomes["ok"], "without a descriptor no life begins");
}

// ---- The server and its peers ----

fn closed(metrics: &Metrics, reason: &str) -> f64 {
    metrics.sum("echoscope_connections_closed_total", &[("role", "server"), ("reason", reason)])
}

/// Waits until nothing is open any more and the descriptors are as they were; then everything was closed for `reasons`
/// and nothing else.
fn assert_served(server: &Echoscope, before: usize, reasons: &[(&str, f64)]) {
    let total: f64 = reasons.iter().map(|r| r.1).sum();
    let metrics = until("every connection to be closed", || {
        let metrics = server.metrics();
        let all = metrics.sum("echoscope_connections_closed_total", &[("role", "server")]) == total;
        let done = all && metrics.sum("echoscope_following", &[]) == 0.0;
        done.then_some(metrics)
    });
    for (reason, count) in reasons {
        assert_eq!(closed(&metrics, reason), *count, "{reason}");
    }
    assert_eq!(metrics.sum("echoscope_connections_opened_total", &[("role", "server")]), total);
    assert_eq!(metrics.sum("echoscope_connections_open", &[("role", "server")]), 0.0);
    metrics.assert_nothing_lost();
    until("the descriptors to return", || (server.descriptors() <= before).then_some(()));
}

/// Ends a server well; returns its connections' lives.
fn ended_server(server: Echoscope) -> Vec<Vec<Change>> {
    server.signal("TERM");
    let (status, _, lines) = server.wait();
    assert_eq!(status.code(), Some(0), "{lines:#?}");
    sound_lives(&lines, "server")
}

fn server(arguments: &[&str]) -> (Echoscope, SocketAddr, usize) {
    let server = Echoscope::start(&[&["server", "--listen", "127.0.0.1:0"], arguments].concat());
    let address = server.server();
    // One scrape first: what it takes for good is not a leak.
    server.metrics();
    let before = server.descriptors();
    (server, address, before)
}

const PASSIVE: [&str; 6] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];

#[test]
fn peers_that_send_and_never_read_are_held_back_and_hold_up_nobody() {
    const PEERS: usize = 16;
    const FAR_TOO_MUCH: usize = 128 << 20;
    let (server, address, before) = server(&[]);
    let memory = server.resident_kib();
    let connect = |_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Small buffers at this end: what more is taken, the server's end takes.
        socket.set_send_buffer_size(64 * 1024).unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        socket.connect(&address.into()).unwrap();
        socket.set_nonblocking(true).unwrap();
        TcpStream::from(socket)
    };
    let peers: Vec<TcpStream> = (0..PEERS).map(connect).collect();
    let chunk = vec![b'x'; 64 * 1024];
    let mut sent = vec![0; PEERS];
    let received =
        |metrics: &Metrics| metrics.sum("echoscope_bytes_total", &[("role", "server"), ("direction", "received")]);
    let mut last = -1.0;
    until("the server to take no more", || {
        let mut progress = false;
        for (mut peer, sent) in peers.iter().zip(&mut sent) {
            match peer.write(&chunk) {
                Ok(n) => (*sent, progress) = (*sent + n, true),
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
            assert!(*sent < FAR_TOO_MUCH, "the server takes in what it cannot give back");
        }
        let now = received(&server.metrics());
        let still = !progress && now == last;
        last = now;
        still.then_some(())
    });
    let grown = server.resident_kib().saturating_sub(memory);
    // 128 KiB for each at most, and as much for all together.
    assert!(grown < 16 * 1024, "{grown} KiB more");
    assert_eq!(server.metrics().sum("echoscope_connections_open", &[("role", "server")]), PEERS as f64);
    (0..20).for_each(|_| echo_once(address));
    // With what they never read they leave by a RST.
    drop(peers);
    assert_served(&server, before, &[("reset", PEERS as f64), ("graceful", 20.0)]);
    let lives = ended_server(server);
    let reset = lives.iter().filter(|changes| changes.last().unwrap().cause.as_deref() == Some("reset"));
    assert!(
        reset.clone().count() == PEERS
            && reset.clone().all(|c| walk(c) == ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSED"])
    );
}

#[test]
fn peers_that_reset_in_the_middle_of_the_stream() {
    let (server, address, before) = server(&[]);
    for n in 0..20 {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"hello").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        // Half of them with more under way, so that the server meets the reset while it writes.
        if n % 2 == 0 {
            stream.write_all(&vec![b'x'; 200_000]).unwrap();
        }
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    assert_served(&server, before, &[("reset", 20.0)]);
    let lives = ended_server(server);
    assert_eq!(lives.len(), 20);
    for changes in &lives {
        assert_eq!(walk(changes), ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSED"]);
        assert_eq!((changes[2].cause.as_deref(), &changes[2].via), (Some("reset"), &None), "{changes:#?}");
    }
}

#[test]
fn peers_that_say_nothing_and_peers_that_say_it_a_byte_at_a_time() {
    let (server, address, before) = server(&[]);
    for _ in 0..20 {
        drop(TcpStream::connect(address).unwrap());
    }
    let mut dribble = TcpStream::connect(address).unwrap();
    dribble.set_nodelay(true).unwrap();
    for byte in 0..=255 {
        dribble.write_all(&[byte]).unwrap();
        let mut back = [0];
        dribble.read_exact(&mut back).unwrap();
        assert_eq!(back, [byte]);
    }
    // Without waiting for each.
    (0..=255).for_each(|byte| dribble.write_all(&[byte]).unwrap());
    dribble.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    dribble.read_to_end(&mut back).unwrap();
    assert!(back.iter().copied().eq(0..=255));
    assert_served(&server, before, &[("graceful", 21.0)]);
    let lives = ended_server(server);
    assert!(lives.len() == 21 && lives.iter().all(|changes| walk(changes) == PASSIVE), "{lives:#?}");
}

/// A server of one connection at a time: the others' fates are sealed in the accept queue.
#[test]
fn peers_that_are_gone_before_they_are_accepted() {
    let (server, address, before) = server(&["--max-connections", "1"]);
    let mut holder = TcpStream::connect(address).unwrap();
    holder.write_all(b"x").unwrap();
    holder.read_exact(&mut [0]).unwrap();
    let queue = || TcpStream::connect(address).unwrap();
    let with_reset = |stream: TcpStream| SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    with_reset(queue());
    let mut data = queue();
    data.write_all(b"unheard").unwrap();
    with_reset(data);
    let mut data = queue();
    data.write_all(b"unheard").unwrap();
    data.shutdown(Shutdown::Write).unwrap();
    with_reset(data);
    drop(queue());
    let mut patient = queue();
    patient.write_all(b"heard").unwrap();
    patient.shutdown(Shutdown::Write).unwrap();
    until("five to wait", || (server.metrics().sum("echoscope_accept_queue_length", &[]) == 5.0).then_some(()));
    drop(holder);
    let mut back = String::new();
    patient.read_to_string(&mut back).unwrap();
    assert_eq!(back, "heard");
    assert_served(&server, before, &[("reset", 3.0), ("graceful", 3.0)]);
    let lives = ended_server(server);
    let mut walks: Vec<_> = lives.iter().map(|c| (walk(c), c.last().unwrap().cause.clone().unwrap())).collect();
    walks.sort();
    let (ack, reset) = ("ack".to_owned(), "reset".to_owned());
    let after_fin = vec!["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "CLOSED"];
    let at_once = vec!["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSED"];
    let whole = (PASSIVE.to_vec(), ack);
    let expected = [
        (at_once.clone(), reset.clone()),
        (at_once, reset.clone()),
        (after_fin, reset),
        whole.clone(),
        whole.clone(),
        whole,
    ];
    assert_eq!(walks, expected);
}

const MANY: usize = 5000;

/// Not all fit into the accept queue, but the kernel keeps the handshake of each that does not. If those were more than
/// the backlog it would answer by SYN cookies, and then it takes any late ACK of a peer that has sent as much as it has
/// received, as is the way of an echo, for the end of such a handshake: one more connection, but nobody is there.
const BACKLOG: [&str; 2] = ["--accept-backlog", "4096"];

async fn peer(address: SocketAddr, mut released: watch::Receiver<bool>) -> std::io::Result<bool> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let _ = released.wait_for(|released| *released).await;
    let (message, mut back) = (stream.local_addr()?.to_string(), String::new());
    stream.write_all(message.as_bytes()).await?;
    stream.shutdown().await?;
    stream.read_to_string(&mut back).await?;
    Ok(back == message)
}

/// Peers that connect at once, with patience, echo a message when they are released, and close. The thread ends with
/// how many were echoed.
fn peers(address: SocketAddr, released: watch::Receiver<bool>) -> JoinHandle<usize> {
    assert!(echoscope::kernel::limits::raise_descriptor_limit().is_none_or(|n| n > 2 * MANY as u64), "ulimit -n");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut peers = tokio::task::JoinSet::new();
            (0..MANY).for_each(|_| drop(peers.spawn(peer(address, released.clone()))));
            peers.join_all().await.into_iter().filter(|echoed| *echoed.as_ref().expect("a peer")).count()
        })
    })
}

#[test]
fn five_thousand_on_256_descriptors_are_all_served_in_their_turn() {
    let server = limited(256, &[&["server", "--listen", "127.0.0.1:0"], &BACKLOG[..]].concat());
    let limit = server.message("echo server listening")["max_connections"].as_f64().unwrap();
    let (address, web) = (server.server(), server.web());
    server.metrics();
    let before = server.descriptors();
    let (release, released) = watch::channel(false);
    let peers = peers(address, released);
    until("a full house and a full queue", || {
        let metrics = server.metrics();
        let (length, most) = ("echoscope_accept_queue_length", "echoscope_accept_queue_limit");
        let full = metrics.sum("echoscope_connections_open", &[("role", "server")]) == limit
            && metrics.sum(length, &[]) > metrics.sum(most, &[]);
        full.then_some(())
    });
    // What is kept in reserve is enough for a full web side.
    let mut scrapers = Vec::new();
    for _ in 0..64 {
        let mut scraper = KeptAlive::to(web);
        assert_eq!(scraper.metrics().sum("echoscope_connections_open", &[("role", "server")]), limit);
        scrapers.push(scraper);
    }
    assert!(server.descriptors() < 256, "{}", server.descriptors());
    drop(scrapers);
    release.send(true).unwrap();
    assert_eq!(peers.join().unwrap(), MANY);
    assert_served(&server, before, &[("graceful", MANY as f64)]);
    assert_eq!(server.metrics().sum("echoscope_accept_errors_total", &[]), 0.0);
    let lives = ended_server(server);
    assert!(lives.len() == MANY && lives.iter().all(|changes| walk(changes) == PASSIVE));
}

#[test]
fn a_server_without_descriptors_waits_for_them_and_goes_on() {
    let arguments = ["server", "--listen", "127.0.0.1:0", "--max-connections", "100000"];
    let server = limited(256, &[&arguments, &BACKLOG[..]].concat());
    let address = server.server();
    let mut web = KeptAlive::to(server.web());
    let failures = |metrics: &Metrics| {
        let other = ["memory", "connection", "other"];
        let of = |reason| metrics.sum("echoscope_accept_errors_total", &[("reason", reason)]);
        assert_eq!(other.map(of), [0.0; 3]);
        of("descriptors")
    };
    assert_eq!(failures(&web.metrics()), 0.0);
    let before = server.descriptors();
    let (release, released) = watch::channel(false);
    let peers = peers(address, released);
    let first = until("a failed accept", || Some(failures(&web.metrics())).filter(|n| *n > 0.0));
    // For a moment a reading of /proc may hold some.
    until("every descriptor to be taken", || (server.descriptors() == 256).then_some(()));
    until("another one", || (failures(&web.metrics()) > first).then_some(()));
    release.send(true).unwrap();
    assert_eq!(peers.join().unwrap(), MANY, "nobody was turned away");
    echo_once(address);
    drop(web);
    assert_served(&server, before - 1, &[("graceful", MANY as f64 + 1.0)]);
    let said = |line: &&Value| line["message"] == "cannot accept; connections wait in the backlog";
    let warnings: Vec<Value> = server.lines().iter().filter(said).cloned().collect();
    let [warning] = &warnings[..] else { panic!("one a minute: {warnings:#?}") };
    assert_eq!((&warning["level"], &warning["service"]), (&"WARN".into(), &"echo".into()));
    assert_eq!(warning["error"], "Too many open files (os error 24)");
    let lives = ended_server(server);
    assert!(lives.len() == MANY + 1 && lives.iter().all(|changes| walk(changes) == PASSIVE));
}
