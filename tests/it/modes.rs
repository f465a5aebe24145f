//! What the flags make of a life: who closes first, who waits, who is reset, over IPv4 and IPv6.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Change, Echoscope, Metrics, PATIENCE, lives, until, walk};

/// The end that closes first waits in TIME_WAIT, the other one is gone.
const CLIENT_FIRST: [&str; 6] = ["CLOSED", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"];
const SERVER_SECOND: [&str; 6] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];
const SERVER_FIRST: [&str; 6] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"];
const CLIENT_SECOND: [&str; 6] = ["CLOSED", "SYN_SENT", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];
const CLIENT_RESET: [&str; 4] = ["CLOSED", "SYN_SENT", "ESTABLISHED", "CLOSED"];
const SERVER_RESET: [&str; 4] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSED"];

// ---- --idle-timeout ----

/// Long enough that a loaded machine does not make a talker silent.
const IDLE: Duration = Duration::from_secs(2);

#[test]
fn a_silent_peer_gets_the_servers_fin_and_one_that_talks_does_not() {
    let server = server(&["--idle-timeout", "2s"]);
    let address = server.server();
    let talker = thread::spawn(move || {
        let mut stream = connect(address);
        let began = Instant::now();
        while began.elapsed() < 3 * IDLE {
            echo(&mut stream);
            // Time is the subject: a pause that is none to the server.
            thread::sleep(IDLE / 20);
        }
        close(&stream);
    });
    let began = Instant::now();
    let mut silent = connect(address);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "a FIN was expected");
    assert!(began.elapsed() >= IDLE, "the FIN came after {:?}", began.elapsed());
    server.line("FIN_WAIT2", |line| line["to"] == "FIN_WAIT2");
    silent.shutdown(Shutdown::Write).unwrap();
    server.line("TIME_WAIT", |line| line["to"] == "TIME_WAIT");
    talker.join().expect("the talker was served to its end");
    until("both ends", || (closed(&server, &["idle", "graceful"]) == [1.0, 1.0]).then_some(()));
    let lives = connections(&stopped(server), "server");
    let mut walks: Vec<_> = lives.iter().map(|life| sure_walk(life)).collect();
    walks.sort();
    assert_eq!(walks, [SERVER_SECOND, SERVER_FIRST]);
}

#[test]
fn a_peer_that_never_closes_is_left_to_the_kernel_and_followed() {
    let server = server(&["--idle-timeout", "2s"]);
    let (port, began) = (server.server().port(), Instant::now());
    let mut stubborn = connect(server.server());
    echo(&mut stubborn);
    assert_eq!(stubborn.read(&mut [0]).unwrap(), 0, "a FIN was expected");
    until("the descriptor to be closed", || {
        let metrics = server.metrics();
        let left = [metrics.sockets("server", port, "fin_wait2"), metrics.sum("echoscope_following", &[])];
        (open(&metrics) == 0.0 && left == [1.0, 1.0]).then_some(())
    });
    assert!(began.elapsed() >= 2 * IDLE, "it had only {:?} to close", began.elapsed());
    assert_eq!(closed(&server, &["idle"]), [1.0]);
    stubborn.shutdown(Shutdown::Write).unwrap();
    server.line("TIME_WAIT", |line| line["to"] == "TIME_WAIT");
    let lives = connections(&stopped(server), "server");
    assert_eq!(lives.iter().map(|life| sure_walk(life)).collect::<Vec<_>>(), [SERVER_FIRST]);
    let seen: Vec<&str> = lives[0][3..].iter().map(|change| change.evidence.as_str()).collect();
    assert_eq!(seen, ["tcp_info", "sock_diag"], "FIN_WAIT2 by the descriptor, what came after it by the table");
}

#[test]
fn a_peer_that_takes_nothing_of_what_it_is_owed_is_reset() {
    let server = server(&["--idle-timeout", "2s"]);
    let mut greedy = connect(server.server());
    let began = Instant::now();
    let chunk = vec![b'x'; 64 * 1024];
    // Both ends' buffers are full at some time: then this waits, and so does the server.
    let error = loop {
        if let Err(error) = greedy.write_all(&chunk) {
            break error;
        }
    };
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    assert!(began.elapsed() >= IDLE, "reset after {:?}", began.elapsed());
    until("its end", || (closed(&server, &["idle"]) == [1.0]).then_some(()));
    assert_eq!(open(&server.metrics()), 0.0);
    let lives = connections(&stopped(server), "server");
    assert_eq!(lives.len(), 1);
    assert_aborted(&lives[0], SERVER_RESET);
}

// ---- --close ----

/// A pair's whole run: its port, its summary and its log.
fn pair(arguments: &[&str]) -> (u16, Value, Vec<Value>) {
    let pair = Echoscope::start(&[&["pair", "--listen", "127.0.0.1:0", "--output", "json"], arguments].concat());
    let port = pair.server().port();
    let (summary, lines) = ended(pair, 0);
    (port, summary, lines)
}

#[test]
fn closed_by_a_reset_neither_end_waits() {
    let (port, summary, lines) = pair(&["--close", "reset", "--connections", "4", "--count", "40"]);
    assert_eq!((&summary["connections"], &summary["outcomes"]["ok"]), (&json!(40), &json!(40)));
    assert_eq!(summary["client_states"], json!({"SYN_SENT": 40, "ESTABLISHED": 40, "CLOSED": 40}));
    // The listener is CLOSED at the end too.
    assert_eq!(summary["server_states"], json!({"LISTEN": 1, "SYN_RECV": 40, "ESTABLISHED": 40, "CLOSED": 41}));
    assert_eq!(summary["still_in_kernel"], json!({}));
    assert_eq!(time_waits(port), [0, 0]);
    let [clients, servers] = ["client", "server"].map(|role| connections(&lines, role));
    assert_eq!((clients.len(), servers.len()), (40, 40));
    for life in &clients {
        assert_aborted(life, CLIENT_RESET);
    }
    for life in &servers {
        // The error that the RST leaves says that no FIN had come.
        assert_eq!(sure_walk(life), SERVER_RESET);
        let end = life.last().unwrap();
        assert_eq!((end.cause.as_deref(), end.evidence.as_str()), (Some("reset"), "tcp_info"), "{end:?}");
    }
}

#[test]
fn when_the_server_closes_first_it_is_the_one_that_waits() {
    let (port, summary, lines) = pair(&["--close", "server-first", "--connections", "8", "--count", "16"]);
    assert_eq!((&summary["connections"], &summary["outcomes"]["ok"]), (&json!(16), &json!(16)));
    assert_eq!(
        summary["client_states"],
        json!({"SYN_SENT": 16, "ESTABLISHED": 16, "CLOSE_WAIT": 16, "LAST_ACK": 16, "CLOSED": 16})
    );
    assert_eq!(
        summary["server_states"],
        json!({"LISTEN": 1, "SYN_RECV": 16, "ESTABLISHED": 16, "FIN_WAIT1": 16, "FIN_WAIT2": 16, "TIME_WAIT": 16,
            "CLOSED": 1})
    );
    assert_eq!(summary["still_in_kernel"], json!({"TIME_WAIT": 16}));
    assert_all_walk(&lines, "client", CLIENT_SECOND, 16);
    assert_all_walk(&lines, "server", SERVER_FIRST, 16);
    // A reading of the text may pass over rows while others move.
    until("the kernel to say the same", || (time_waits(port) == [16, 0]).then_some(()));
}

/// How many TIME_WAITs the kernel's own text shows (proc(5)) at the server's end and at the client's.
fn time_waits(port: u16) -> [usize; 2] {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let ends = format!(":{port:04X}");
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    [1, 2].map(|column| rows.iter().filter(|row| row[column].ends_with(&ends) && row[3] == "06").count())
}

// ---- Targets and messages ----

#[test]
fn targets_are_taken_in_turn_and_one_that_refuses_does_not_stop_the_others() {
    let [a, b, c] = [(); 3].map(|()| server(&[]));
    let targets = [&a, &b, &c].map(|server| server.server().to_string());
    assert_eq!(take_turns(&targets, 0), [10, 10, 10]);
    all_served(b, 10);
    assert_eq!(take_turns(&targets, 1), [10, 0, 10]);
    all_served(a, 20);
    all_served(c, 20);
}

/// Thirty turns, one at a time, by a client that must end with this code. Returns how often each target was connected
/// to, by its histogram; three times as many echoes and as many closes must have been measured.
fn take_turns(targets: &[String; 3], code: i32) -> [u64; 3] {
    let flags = ["--connections", "1", "--count", "30", "--retries", "0", "--until-gone"];
    let client = client(targets, &flags);
    until("thirty turns", || {
        let ended = client.metrics().sum("echoscope_outcomes_total", &[]);
        (ended == 30.0).then_some(())
    });
    // A page is not of one moment: what came before those ends is surely on the next one.
    let metrics = client.metrics();
    let connects = targets.each_ref().map(|target| {
        let count = |what| metrics.sum(&format!("echoscope_{what}_duration_seconds_count"), &[("target", target)]);
        assert_eq!([count("echo"), count("close")], [3.0, 1.0].map(|n| n * count("connect")), "{target}");
        let ended = |how| metrics.sum("echoscope_outcomes_total", &[("target", target), ("outcome", how)]);
        assert_eq!([ended("ok"), ended("refused")], [count("connect"), 10.0 - count("connect")], "{target}");
        count("connect") as u64
    });
    // It waits for its TIME_WAITs, so that there was somebody to ask.
    client.signal("TERM");
    let (summary, lines) = ended(client, code);
    let ok = connects.iter().sum::<u64>();
    assert_eq!((&summary["outcomes"]["ok"], &summary["outcomes"]["refused"]), (&json!(ok), &json!(30 - ok)));
    let opened = lines.iter().filter(|line| line["to"] == "SYN_SENT").map(|line| line["peer"].as_str().unwrap());
    assert!(opened.eq(targets.iter().cycle().take(30)), "in turn: {targets:?}");
    connects
}

#[test]
fn messages_of_many_sizes_come_back_whole() {
    const CONNECTIONS: u64 = 8;
    const MESSAGES: u64 = 20;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // One after the other; of each connection it is known how many bytes it brought.
    let target = thread::spawn(move || {
        let echo_all = |_| {
            let (stream, _) = listener.accept().unwrap();
            std::io::copy(&mut &stream, &mut &stream).unwrap()
        };
        (0..CONNECTIONS).map(echo_all).collect::<Vec<u64>>()
    });
    let shape = ["--connections", "1", "--count", "8", "--messages", "20", "--message-size", "1..3000"];
    let (summary, _) = ended(client(&[address], &shape), 0);
    let each = target.join().unwrap();
    let sent = each.iter().sum::<u64>();
    let all = CONNECTIONS * MESSAGES;
    assert_eq!((&summary["outcomes"]["ok"], &summary["echoes"]), (&json!(CONNECTIONS), &json!(all)));
    assert_eq!((&summary["bytes_sent"], &summary["bytes_received"]), (&json!(sent), &json!(sent)));
    // Drawn evenly, 160 sizes are 1500 on average, and to be wrong by 500 is seven times their deviation.
    assert!((1000 * all..2000 * all).contains(&sent), "{sent} bytes in {all} messages");
    // Messages of one size would make each of these a multiple of their number.
    assert!(each.iter().any(|bytes| bytes % MESSAGES != 0), "{each:?}");
}

// ---- --close-delay, --duration, --max-connections ----

/// The ledger knows neither: the one was never accepted, the other nobody watches.
#[test]
fn a_close_wait_that_is_not_in_the_ledger_has_an_age_too() {
    let queued = server(&["--max-connections", "1"]);
    let unwatched = server(&["--lifecycles", "off", "--close-delay", "1h"]);
    let mut first = connect(queued.server());
    echo(&mut first);
    let peers = [queued.server(), unwatched.server()].map(connect);
    for (server, mut peer) in [&queued, &unwatched].into_iter().zip(&peers) {
        peer.write_all(b"x").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let port = server.server().port();
        let labels = [("role", "server"), ("port", &port.to_string()), ("state", "close_wait")];
        let began = Instant::now();
        let age = until("an age", || {
            let metrics = server.metrics();
            let ages: Vec<f64> = metrics.series("echoscope_tcp_oldest_seconds", &labels).collect();
            let age = ages.first().copied().filter(|age| *age > 0.3)?;
            (metrics.sockets("server", port, "close_wait") == 1.0).then_some(age)
        });
        let most = began.elapsed().as_secs_f64() + 0.1;
        assert!(age <= most, "{age} s old, and the FIN was sent {most} s ago at most");
    }
}

#[test]
fn a_close_delay_is_seen_as_an_ageing_close_wait_and_ends_with_the_server() {
    let server = server(&["--close-delay", "1h"]);
    let port = server.server().port();
    let mut peer = connect(server.server());
    echo(&mut peer);
    peer.shutdown(Shutdown::Write).unwrap();
    let labels = [("role", "server"), ("port", &port.to_string()), ("state", "close_wait")];
    let older_than = |age: f64| {
        until("an older CLOSE_WAIT", || {
            let metrics = server.metrics();
            let oldest = metrics.sum("echoscope_tcp_oldest_seconds", &labels);
            (metrics.sockets("server", port, "close_wait") == 1.0 && oldest > age).then_some(oldest)
        })
    };
    let young = older_than(0.0);
    let old = older_than(young + 0.5);
    assert_hears_nothing(&peer);
    server.signal("TERM");
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the server's FIN");
    let lines = stopped(server);
    let verdict = lines.iter().find(|line| line["message"] == "drained: nothing was cut short").expect("a verdict");
    assert_eq!((&verdict["open"], &verdict["left_in_kernel"]), (&json!(1), &json!("nothing")), "{verdict}");
    assert_all_walk(&lines, "server", SERVER_SECOND, 1);
    let life = &connections(&lines, "server")[0];
    let stayed = life.iter().find(|change| change.from == "CLOSE_WAIT").and_then(|change| change.after).unwrap();
    assert!((old..PATIENCE.as_secs_f64()).contains(&stayed), "it was {old} s old, and left after {stayed} s");
}

#[test]
fn a_duration_ends_opening_and_what_was_due_is_counted() {
    let (_, summary, lines) = pair(&["--duration", "1s", "--rate", "50", "--connections", "1", "--hold", "100ms"]);
    let number = |name: &str| summary[name].as_u64().unwrap_or_else(|| panic!("{name} in {summary}"));
    let opened = number("connections");
    // At the human pace one takes 0.9 s: two pauses between three echoes, the hold, and the server's close delay.
    assert!((1..=2).contains(&opened), "{summary}");
    assert_eq!(opened + number("unopened"), 50, "one each 20 ms was due");
    assert_eq!((number("cut_short"), &summary["outcomes"]["ok"]), (0, &json!(opened)));
    let seconds = summary["seconds"].as_f64().unwrap();
    assert!((0.9..10.0).contains(&seconds), "{seconds}");
    assert_all_walk(&lines, "client", CLIENT_FIRST, opened as usize);
}

#[test]
fn beyond_max_connections_they_wait_in_the_queue_and_are_served_in_turn() {
    const PEERS: usize = 6;
    let server = server(&["--max-connections", "2"]);
    let port = server.server().port();
    let peers: Vec<TcpStream> = (0..PEERS).map(|_| connect(server.server())).collect();
    for mut peer in &peers {
        peer.write_all(b"x").unwrap();
    }
    for (i, mut peer) in peers.iter().enumerate() {
        let left = PEERS - i;
        until("two to be served and the others to wait", || {
            let metrics = server.metrics();
            assert!(open(&metrics) <= 2.0, "{} at once", open(&metrics));
            let queued = metrics.sum("echoscope_accept_queue_length", &[]);
            let counts = [open(&metrics), queued, metrics.sockets("server", port, "established")];
            (counts == [left.min(2), left.saturating_sub(2), left].map(|n| n as f64)).then_some(())
        });
        peer.read_exact(&mut [0]).unwrap();
        peers[PEERS.min(i + 2)..].iter().for_each(assert_hears_nothing);
        close(peer);
    }
    all_served(server, PEERS);
}

// ---- Addresses ----

/// Six connections until somebody ends them.
const HELD: [&str; 6] = ["--connections", "6", "--count", "6", "--hold", "1h"];

/// On both protocols. It answers a FIN later than a delayed ACK comes (40 ms), so that its peer sees FIN_WAIT2.
const DUAL_STACK: [&str; 5] = ["server", "--listen", "[::]:0", "--close-delay", "500ms"];

/// Waits until the six are held. Each end is counted once, under its role, and nothing else beside them but listeners.
fn all_held(process: &Echoscope, roles: &[&str], port: u16) {
    let held = |metrics: &Metrics| roles.iter().all(|role| metrics.sockets(role, port, "established") == 6.0);
    let metrics = until("all to be held", || Some(process.metrics()).filter(held));
    let listeners: f64 = metrics.series("echoscope_tcp_sockets", &[("state", "listen")]).sum();
    assert_eq!(listeners, if roles.contains(&"server") { 1.0 } else { 0.0 });
    assert_eq!(metrics.sum("echoscope_tcp_sockets", &[]), 6.0 * roles.len() as f64 + listeners, "{roles:?}");
}

/// The addresses of this role's connections, without ports, as the log writes them; over loopback both ends' are alike.
fn addresses(lines: &[Value], role: &str) -> Vec<String> {
    let host = |address: &Value| address.as_str().unwrap().rsplit_once(':').unwrap().0.to_owned();
    // A listener never gets there.
    let connections = lines.iter().filter(|line| line["role"] == role && line["to"] == "ESTABLISHED");
    let alike = |line: &Value| (host(&line["local"]) == host(&line["peer"])).then(|| host(&line["local"]));
    let mut addresses: Vec<_> = connections.map(|line| alike(line).unwrap_or_else(|| panic!("{line}"))).collect();
    addresses.sort();
    addresses
}

#[test]
fn a_pair_over_ipv6_and_over_both() {
    // The pair's own client reaches the wildcard by IPv4: its server's end is an IPv4-mapped address to the kernel.
    for (listen, host) in [("[::1]:0", "[::1]"), ("[::]:0", "127.0.0.1")] {
        let pair = Echoscope::start(&[&["pair", "--listen", listen, "--output", "json"], &HELD[..]].concat());
        all_held(&pair, &["server", "client"], pair.server().port());
        pair.signal("TERM");
        let (summary, lines) = ended(pair, 0);
        assert_eq!(summary["outcomes"]["ok"], 6);
        for (role, states) in [("client", CLIENT_FIRST), ("server", SERVER_SECOND)] {
            assert_all_walk(&lines, role, states, 6);
            assert_eq!(addresses(&lines, role), [host; 6], "{role} of {listen}");
        }
    }
}

#[test]
fn one_listener_is_reached_by_ipv4_and_by_ipv6() {
    let server = Echoscope::start(&DUAL_STACK);
    let port = server.server().port();
    let targets = ["127.0.0.1", "[::1]"].map(|host| format!("{host}:{port}"));
    let client = client(&targets, &HELD);
    all_held(&server, &["server"], port);
    all_held(&client, &["client"], port);
    let metrics = client.metrics();
    let used = targets.each_ref().map(|target| metrics.sum("echoscope_local_ports_used", &[("target", target)]));
    assert_eq!(used, [3.0, 3.0]);
    client.signal("TERM");
    let (_, client) = ended(client, 0);
    assert_all_walk(&client, "client", CLIENT_FIRST, 6);
    for (lines, role) in [(client, "client"), (all_served(server, 6), "server")] {
        assert_eq!(addresses(&lines, role), [["127.0.0.1"; 3], ["[::1]"; 3]].concat(), "{role}");
    }
}

#[test]
fn the_wildcard_as_a_target_is_this_host_and_its_time_wait_is_followed() {
    let server = Echoscope::start(&DUAL_STACK);
    let port = server.server().port();
    let targets = ["0.0.0.0", "[::]"].map(|host| format!("{host}:{port}"));
    let client = client(&targets, &["--connections", "4", "--count", "4", "--until-gone"]);
    until("four in TIME_WAIT, followed", || {
        let metrics = client.metrics();
        let counts = [metrics.sockets("client", port, "time_wait"), metrics.sum("echoscope_following", &[])];
        (counts == [4.0, 4.0]).then_some(())
    });
    client.signal("TERM");
    let (summary, lines) = ended(client, 0);
    assert_eq!(summary["still_in_kernel"], json!({"TIME_WAIT": 4}));
    assert_all_walk(&lines, "client", CLIENT_FIRST, 4);
    assert_eq!(addresses(&lines, "client"), [["127.0.0.1"; 2], ["[::1]"; 2]].concat());
    all_served(server, 4);
}

// ---- What they share ----

fn server(flags: &[&str]) -> Echoscope {
    Echoscope::start(&[&["server", "--listen", "127.0.0.1:0"], flags].concat())
}

fn client(targets: &[String], flags: &[&str]) -> Echoscope {
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    Echoscope::start(&[&["client", "--output", "json"], &targets[..], flags].concat())
}

/// A peer of the server, with patience.
fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn echo(stream: &mut TcpStream) {
    stream.write_all(b"is anybody there?").expect("send");
    let mut back = [0; 17];
    stream.read_exact(&mut back).expect("an echo");
    assert_eq!(&back, b"is anybody there?");
}

/// No byte has come, and no FIN.
fn assert_hears_nothing(mut stream: &TcpStream) {
    stream.set_nonblocking(true).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
}

/// Our FIN, and then the server's.
fn close(mut stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).expect("the server's FIN"), 0);
}

fn open(metrics: &Metrics) -> f64 {
    metrics.sum("echoscope_connections_open", &[("role", "server")])
}

/// How many the server has closed for each of these reasons; for others it must have closed none.
fn closed(server: &Echoscope, reasons: &[&str]) -> Vec<f64> {
    let metrics = server.metrics();
    let sum = |labels: &[(&str, &str)]| metrics.sum("echoscope_connections_closed_total", labels);
    let each: Vec<f64> = reasons.iter().map(|reason| sum(&[("role", "server"), ("reason", reason)])).collect();
    assert_eq!(each.iter().sum::<f64>(), sum(&[("role", "server")]), "others than {reasons:?}");
    each
}

/// Waits for the end, which must come with this code; returns the summary, if there is one, and the log.
fn ended(process: Echoscope, code: i32) -> (Value, Vec<Value>) {
    let (status, stdout, lines) = process.wait();
    assert_eq!(status.code(), Some(code), "{:#?}", &lines[lines.len().saturating_sub(20)..]);
    (serde_json::from_str(&stdout).unwrap_or_default(), lines)
}

/// Ends a server well; returns its log.
fn stopped(server: Echoscope) -> Vec<Value> {
    server.signal("TERM");
    ended(server, 0).1
}

/// Ends a server that has served so many, whose peers closed first; returns its log.
fn all_served(server: Echoscope, count: usize) -> Vec<Value> {
    until("the server's ends", || (closed(&server, &["graceful"]) == [count as f64]).then_some(()));
    let lines = stopped(server);
    assert_all_walk(&lines, "server", SERVER_SECOND, count);
    lines
}

/// The lives of one role's connections; a listener's is none.
fn connections(lines: &[Value], role: &str) -> Vec<Vec<Change>> {
    let of_role = lives(lines).into_iter().filter(|((of, _), life)| of == role && life[0].to != "LISTEN");
    of_role.map(|(_, life)| life).collect()
}

/// The states of a life of which every step is known.
fn sure_walk(life: &[Change]) -> Vec<&str> {
    assert!(life.iter().all(|change| change.via.is_none()), "{life:#?}");
    walk(life)
}

/// Ended by our own RST. A FIN may have come just before it, and nobody could have seen that: the way is not known.
fn assert_aborted(life: &[Change], states: [&str; 4]) {
    assert_eq!(walk(life), states);
    let end = life.last().unwrap();
    assert_eq!((end.cause.as_deref(), end.via.as_deref()), (Some("abort"), Some("unknown")), "{end:?}");
    assert_eq!((end.evidence.as_str(), end.after), ("sock_diag", None), "{end:?}");
}

fn assert_all_walk(lines: &[Value], role: &str, states: [&str; 6], count: usize) {
    let lives = connections(lines, role);
    assert_eq!(lives.len(), count, "{role}: {lives:#?}");
    for life in &lives {
        assert_eq!(sure_walk(life), states, "{role}: {life:#?}");
    }
}
