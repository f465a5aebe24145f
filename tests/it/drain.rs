//! The graceful end: nothing that was acknowledged is lost, nobody is reset, and the verdict says so.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use echoscope::kernel::TcpInfo;
use echoscope::tcp::State;
use serde_json::Value;
use socket2::{Domain, SockFilter, SockRef, Socket, Type};

use crate::confined::command_without_capabilities;
use crate::support::{Echoscope, Metrics, PATIENCE, get, lives, until, walk};

const STOPPING: &str = "stopping; a second signal ends it at once";
const CLEAN: &str = "drained: nothing was cut short";
const CUT: &str = "drain cut short: connections were reset";

/// What a peer writes or reads at a time.
const CHUNK: usize = 64 * 1024;

const SERVED: u64 = 64;
const WAITING: u64 = 10;

#[test]
fn under_load_each_stream_comes_back_up_to_its_fin_and_nobody_is_reset() {
    let server = server_without_capabilities(&["--max-connections", "64", "--drain-timeout", "60s"]);
    let streams = stopped_under_load(&server);
    assert!(streams.iter().any(|s| s.received < s.sent), "nobody was stopped in mid-stream");
    clean_end(server, SERVED + WAITING);
}

#[test]
fn under_load_a_server_with_a_queue_for_each_worker_resets_nobody_either() {
    let shape = ["--runtime", "per-core", "--workers", "2", "--max-connections", "64", "--drain-timeout", "60s"];
    let server = server_without_capabilities(&shape);
    stopped_under_load(&server);
    clean_end(server, SERVED + WAITING);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN and CAP_NET_RAW"]
fn under_load_each_byte_comes_back_that_was_acknowledged_before_the_fin() {
    let server = server(&["--max-connections", "64", "--drain-timeout", "60s"]);
    let wire = Wire::tap(server.server());
    let streams = stopped_under_load(&server);
    let acknowledged = wire.acknowledged_by_fins();
    for Stream { port, received, .. } in streams {
        assert_eq!(Some(&received), acknowledged.get(&port), "port {port}: what came back, what the FIN acknowledged");
    }
    clean_end(server, SERVED + WAITING);
}

#[test]
fn what_was_acknowledged_before_the_signal_comes_back_whole() {
    let server = server_without_capabilities(&["--max-connections", "64"]);
    let address = server.server();
    // Two are owed more than the sockets hold, so that the server is blocked when the signal comes; the first of them
    // has sent its FIN.
    let blocking = [0, 1].map(|i| Peer::narrow(address, i));
    for peer in &blocking {
        peer.send_until_server_is_blocked(&server);
    }
    blocking[0].stream.shutdown(Shutdown::Write).unwrap();
    server.line("the FIN", |line| line["message"] == "state" && line["to"] == "CLOSE_WAIT");
    let (started, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let (paused, draining) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for i in 2..SERVED {
            let (started, enough, paused, draining) = (&started, &enough, &paused, &draining);
            scope.spawn(move || {
                let peer = Peer::connect(address, i);
                peer.echo(1);
                started.fetch_add(1, Ordering::Relaxed);
                while !enough.load(Ordering::Relaxed) {
                    peer.echo(16 * 1024);
                }
                let read = peer.sent();
                peer.send(150_000);
                peer.all_acknowledged();
                paused.fetch_add(1, Ordering::Relaxed);
                until("the drain", || draining.load(Ordering::Relaxed).then_some(()));
                assert_eq!(read + peer.read_back(read, u64::MAX), peer.sent());
                peer.close_after_fin();
            });
        }
        let all = |count: &AtomicU64| (count.load(Ordering::Relaxed) == SERVED - 2).then_some(());
        until("everybody to stream", || all(&started));
        let waiting = waiting(&server);
        enough.store(true, Ordering::Relaxed);
        until("everybody to pause", || all(&paused));
        server.signal("TERM");
        server.message(STOPPING);
        draining.store(true, Ordering::Relaxed);
        for peer in blocking.iter().chain(&waiting) {
            assert_eq!(peer.read_back(0, u64::MAX), peer.sent(), "peer {}", peer.number);
        }
        blocking[0].assert_not_reset();
        for peer in blocking[1..].iter().chain(&waiting) {
            peer.close_after_fin();
        }
    });
    // The one that sent its FIN first is not left in TIME_WAIT.
    clean_end_left(server, SERVED + WAITING, SERVED + WAITING - 1);
}

/// Who gets through the handshake is served, however close the end: new ones are refused or not answered, never
/// accepted and reset.
#[test]
#[ignore = "needs CAP_NET_ADMIN"]
fn nobody_who_connects_at_the_last_moment_is_reset() {
    let server = server(&[]);
    let address = server.server();
    let connected = AtomicU64::new(0);
    thread::scope(|scope| {
        for i in 0..8 {
            let connected = &connected;
            scope.spawn(move || {
                let refused = loop {
                    match TcpStream::connect(address) {
                        Ok(stream) => {
                            let peer = Peer::over(stream, i);
                            peer.send(64);
                            let received = peer.read_back(0, 64);
                            assert!(received == 0 || received == 64, "peer {i}: {received} of 64");
                            peer.stream.shutdown(Shutdown::Write).unwrap();
                            assert_eq!(peer.read_back(64, u64::MAX), 0);
                            peer.assert_not_reset();
                            connected.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => break error.kind(),
                    }
                };
                assert!(matches!(refused, ErrorKind::ConnectionRefused | ErrorKind::TimedOut), "{refused}");
            });
        }
        until("a storm", || (connected.load(Ordering::Relaxed) > 500).then_some(()));
        server.signal("TERM");
    });
    let (_, lines) = end(server, 0);
    assert_eq!(one(&lines, CLEAN)["aborted"], 0);
}

/// Peers that finished the handshake from their own side, while the queue was full and their ACKs were dropped: they
/// think to be connected, and they are right.
#[test]
#[ignore = "needs CAP_NET_ADMIN"]
fn who_is_connected_by_his_own_account_only_is_served_too() {
    let arguments = ["--max-connections", "1", "--accept-backlog", "8", "--drain-timeout", "60s"];
    for server in [server(&arguments), server_without_capabilities(&arguments)] {
        let address = server.server();
        // Their SYN+ACKs are lost, so that they are still in the handshake when the others fill the queue.
        let late: Vec<Socket> = (0..5).map(|_| half_open(address)).collect();
        let queued: Vec<Peer> = (0..10).map(|i| Peer::connect(address, i)).collect();
        until("a full queue", || (present(&server.metrics()) == 10.0).then_some(()));
        let late: Vec<Peer> = late
            .into_iter()
            .enumerate()
            .map(|(i, socket)| {
                socket.detach_filter().unwrap();
                until("a SYN+ACK", || (TcpInfo::of(socket.as_fd()).unwrap().state == State::Established).then_some(()));
                socket.set_nonblocking(false).unwrap();
                Peer::over(socket.into(), 100 + i as u64)
            })
            .collect();
        assert_eq!(server.metrics().sockets("server", address.port(), "syn_recv"), 5.0, "they are not in the queue");
        server.signal("TERM");
        server.message(STOPPING);
        // What is sent into a full queue is dropped and repeated seconds later: those who are in it go first.
        for peers in [&queued, &late] {
            thread::scope(|scope| {
                for peer in peers {
                    scope.spawn(|| {
                        peer.send(1000);
                        peer.stream.shutdown(Shutdown::Write).unwrap();
                        let received = peer.read_back(0, u64::MAX);
                        assert!(
                            [0, 1000].contains(&received),
                            "{received}: all of it, or nothing if the end came first"
                        );
                        peer.assert_not_reset();
                    });
                }
            });
        }
        let (_, lines) = end(server, 0);
        assert_nobody_reset(&lines);
        let verdict = one(&lines, CLEAN);
        assert_eq!((&verdict["open"], &verdict["unfinished"]), (&Value::from(15), &Value::from(0)), "{verdict}");
    }
}

/// A connection whose SYN+ACKs are lost, from the client's side: nobody is there, as after a port scan.
fn half_open(address: SocketAddr) -> Socket {
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)]).unwrap();
    socket.set_nonblocking(true).unwrap();
    let _in_progress = socket.connect(&address.into());
    socket
}

/// Without the privilege to refuse new connections, those that begin while the drain waits for somebody are served as
/// well; who is not there is not waited for until the deadline, and fails nothing.
#[test]
#[ignore = "needs CAP_NET_ADMIN"]
fn who_comes_during_the_drain_is_served_and_who_is_not_there_fails_nothing() {
    let server = server_without_capabilities(&["--drain-timeout", "60s"]);
    let address = server.server();
    let handshakes = |count: f64| {
        until("handshakes", || (server.metrics().sockets("server", address.port(), "syn_recv") == count).then_some(()));
    };
    let scan = half_open(address);
    handshakes(1.0);
    server.signal("TERM");
    server.message(STOPPING);
    let late: Vec<Socket> = (0..10).map(|_| half_open(address)).collect();
    handshakes(11.0);
    thread::scope(|scope| {
        for (i, socket) in late.into_iter().enumerate() {
            scope.spawn(move || {
                socket.detach_filter().unwrap();
                until("a SYN+ACK", || (TcpInfo::of(socket.as_fd()).unwrap().state == State::Established).then_some(()));
                socket.set_nonblocking(false).unwrap();
                let peer = Peer::over(socket.into(), i as u64);
                peer.send(1000);
                peer.stream.shutdown(Shutdown::Write).unwrap();
                peer.read_back(0, u64::MAX);
                peer.assert_not_reset();
            });
        }
    });
    let (_, lines) = end(server, 0);
    let verdict = one(&lines, CLEAN);
    assert_eq!((&verdict["open"], &verdict["unfinished"]), (&Value::from(10), &Value::from(0)), "{verdict}");
    assert!(verdict["seconds"].as_f64() < Some(30.0), "{verdict}");
    drop(scan);
}

#[test]
fn while_it_drains_it_is_not_ready_but_can_be_scraped() {
    let server = server(&[]);
    let web = server.web();
    until("ready", || (get(web, "/-/ready").0 == 200).then_some(()));
    let peer = Peer::connect(server.server(), 1);
    peer.echo(1000);
    server.signal("TERM");
    assert_eq!(peer.read_back(1000, u64::MAX), 0);
    for (path, status) in
        [("/-/ready", 503), ("/readyz", 503), ("/-/healthy", 200), ("/healthz", 200), ("/metrics", 200)]
    {
        assert_eq!(get(web, path).0, status, "{path}");
    }
    let port = server.server().port();
    let metrics = until("a drain to be seen", || {
        let metrics = server.metrics();
        let draining = metrics.sum("echoscope_drain_duration_seconds", &[]) > 0.2;
        let ours = ["fin_wait2", "listen"].map(|state| metrics.sockets("server", port, state));
        (draining && ours == [1.0, 0.0]).then_some(metrics)
    });
    assert_eq!(metrics.sum("echoscope_drain_aborted_total", &[]), 0.0);
    peer.close_after_fin();
    let seconds = clean_end(server, 1)["seconds"].as_f64().unwrap();
    assert!(seconds > 0.2, "{seconds}");
}

#[test]
fn during_the_drain_delay_it_still_accepts() {
    let server = server(&["--drain-delay", "2s"]);
    let web = server.web();
    let old = Peer::connect(server.server(), 1);
    old.echo(1000);
    assert_eq!(server.metrics().sum("echoscope_ready", &[]), 1.0);
    let signalled = Instant::now();
    server.signal("TERM");
    until("503", || (get(web, "/-/ready").0 == 503).then_some(()));
    assert_eq!(server.metrics().sum("echoscope_ready", &[]), 0.0);
    let new = Peer::connect(server.server(), 2);
    new.echo(1000);
    new.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(new.read_back(1000, u64::MAX), 0);
    old.echo(1000);
    assert_eq!(get(web, "/metrics").0, 200);
    assert_eq!(old.read_back(2000, u64::MAX), 0);
    assert!(signalled.elapsed() >= Duration::from_secs(2), "the FIN came after {:?}", signalled.elapsed());
    old.close_after_fin();
    clean_end(server, 1);
}

#[test]
fn peers_that_never_close_and_never_read_are_reset_at_the_deadline_and_counted() {
    let server = server(&["--drain-timeout", "1s"]);
    let (open, unread) = (Peer::connect(server.server(), 1), Peer::narrow(server.server(), 2));
    open.echo(1000);
    unread.send_until_server_is_blocked(&server);
    let signalled = Instant::now();
    server.signal("TERM");
    assert_eq!(open.read_back(1000, u64::MAX), 0);
    // tcp_reset() says EPIPE where a FIN had come before.
    assert_eq!(open.reset_with(), ErrorKind::BrokenPipe);
    assert_eq!(unread.reset_with(), ErrorKind::ConnectionReset);
    assert!(signalled.elapsed() >= Duration::from_secs(1), "reset after {:?}", signalled.elapsed());
    let verdict = cut_short(server, 2);
    assert_eq!((&verdict["open"], &verdict["timeout_s"]), (&Value::from(2), &Value::from(1.0)), "{verdict}");
}

#[test]
fn who_still_waits_at_the_deadline_is_reset_and_counted_too() {
    let server = server(&["--max-connections", "1", "--drain-timeout", "1s"]);
    let served = Peer::connect(server.server(), 1);
    served.echo(1000);
    let waiting = waiting(&server);
    server.signal("TERM");
    assert_eq!(served.read_back(1000, u64::MAX), 0);
    for peer in waiting.iter().chain([&served]) {
        peer.reset_with();
    }
    let verdict = cut_short(server, 1 + WAITING);
    assert_eq!(verdict["open"], 1 + WAITING, "{verdict}");
}

/// Each worker's own queue, and nobody twice.
#[test]
fn who_still_waits_in_the_queue_of_a_worker_is_counted_once() {
    const PEERS: u64 = 30;
    let shape = ["--runtime", "per-core", "--workers", "2", "--max-connections", "2", "--drain-timeout", "1s"];
    let server = server(&shape);
    let peers: Vec<Peer> = (0..PEERS).map(|i| Peer::connect(server.server(), i)).collect();
    until("two to be served and the others to wait", || (present(&server.metrics()) == PEERS as f64).then_some(()));
    server.signal("TERM");
    for peer in &peers {
        peer.reset_with();
    }
    let verdict = cut_short(server, PEERS);
    assert_eq!(verdict["open"], PEERS, "{verdict}");
}

/// They read, and go on sending after the server's FIN.
#[test]
fn peers_that_never_stop_sending_do_not_outlast_the_deadline() {
    let server = server_without_capabilities(&["--drain-timeout", "1s"]);
    let address = server.server();
    thread::scope(|scope| {
        for i in 0..SERVED {
            scope.spawn(move || {
                let peer = Peer::connect(address, i);
                thread::scope(|scope| {
                    scope.spawn(|| while peer.write(CHUNK).is_ok() {});
                    let mut buffer = vec![0; CHUNK];
                    while (&peer.stream).read(&mut buffer).is_ok_and(|n| n > 0) {}
                });
            });
        }
        all_stream(&server, SERVED);
        server.signal("TERM");
        let verdict = cut_short(server, SERVED);
        // The margin is for a busy machine: at the deadline nothing is left to wait for.
        assert!((1.0..6.0).contains(&verdict["seconds"].as_f64().unwrap()), "{verdict}");
    });
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for (first, second) in [("TERM", "TERM"), ("INT", "INT"), ("TERM", "INT")] {
        let server = server(&["--drain-timeout", "60s"]);
        let peer = Peer::connect(server.server(), 1);
        peer.echo(1000);
        server.signal(first);
        assert_eq!(server.message(STOPPING)["signal"], format!("SIG{first}"));
        assert_eq!(peer.read_back(1000, u64::MAX), 0);
        server.signal(second);
        assert_eq!(server.message("second signal: ending now")["signal"], format!("SIG{second}"));
        assert_eq!(peer.reset_with(), ErrorKind::BrokenPipe);
        cut_by_second_signal(server, 1);
    }
}

#[test]
fn a_second_signal_ends_the_drain_delay_too() {
    let server = server(&["--drain-delay", "60s"]);
    let peer = Peer::connect(server.server(), 1);
    peer.echo(1000);
    server.signal("TERM");
    server.message(STOPPING);
    peer.echo(1000);
    server.signal("TERM");
    cut_by_second_signal(server, 1);
}

#[test]
fn sigint_drains_as_sigterm_does() {
    let server = server(&[]);
    let peer = Peer::connect(server.server(), 1);
    peer.echo(1000);
    server.signal("INT");
    assert_eq!(peer.read_back(1000, u64::MAX), 0);
    peer.close_after_fin();
    clean_end(server, 1);
}

#[test]
fn a_paced_client_finishes_what_is_in_flight() {
    let server = server(&[]);
    let address = server.server().to_string();
    let client = Echoscope::start(&[
        "client",
        &address,
        "--connections",
        "16",
        "--rate",
        "50",
        "--think-time",
        "50ms",
        "--output",
        "json",
    ]);
    until("connections in flight", || {
        let metrics = client.metrics();
        let [opened, open] = ["echoscope_connections_opened_total", "echoscope_connections_open"]
            .map(|name| metrics.sum(name, &[("role", "client")]));
        (opened > 30.0 && open > 1.0).then_some(())
    });
    client.signal("TERM");
    let summary = clean_summary(client, 64);
    assert!(summary["connections"].as_u64() > Some(30), "{summary}");
    assert_saw_no_reset(server, &summary);
}

#[test]
fn a_client_finishes_the_message_that_is_under_way() {
    const SIZE: u64 = 8 << 20;
    let server = server(&[]);
    let (address, size) = (server.server().to_string(), SIZE.to_string());
    let client = Echoscope::start(&[
        "client",
        &address,
        "--connections",
        "1",
        "--message-size",
        &size,
        "--messages",
        "1000000",
        "--think-time",
        "0s",
        "--output",
        "json",
    ]);
    until("a message under way", || {
        let received = bytes(&server, "received") as u64;
        (received > SIZE && !received.is_multiple_of(SIZE)).then_some(())
    });
    client.signal("TERM");
    let summary = clean_summary(client, SIZE);
    assert!(summary["echoes"].as_u64() > Some(1), "{summary}");
    assert_saw_no_reset(server, &summary);
}

#[test]
fn a_client_that_holds_its_connections_lets_go_of_them() {
    let server = server(&[]);
    let address = server.server().to_string();
    let client = Echoscope::start(&["client", &address, "--count", "2", "--hold", "1h", "--output", "json"]);
    until("the last echo", || {
        let received = [("role", "client"), ("direction", "received")];
        (client.metrics().sum("echoscope_bytes_total", &received) == f64::from(2 * 3 * 64)).then_some(())
    });
    client.signal("INT");
    let summary = clean_summary(client, 64);
    assert_eq!((&summary["connections"], &summary["echoes"]), (&Value::from(2), &Value::from(6)));
    assert_saw_no_reset(server, &summary);
}

#[test]
fn a_client_whose_echo_never_comes_is_cut_short_at_the_deadline() {
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let client = Echoscope::start(&[
        "client",
        &address,
        "--count",
        "2",
        "--echo-timeout",
        "60s",
        "--drain-timeout",
        "1s",
        "--output",
        "json",
    ]);
    let accepted = [mute.accept().unwrap().0, mute.accept().unwrap().0];
    for connection in &accepted {
        // The kernel accepts before the client knows: it does when it has sent something.
        assert_eq!(connection.peek(&mut [0]).unwrap(), 1);
    }
    let signalled = Instant::now();
    client.signal("TERM");
    let (status, summary, lines) = client.wait();
    assert!(signalled.elapsed() >= Duration::from_secs(1), "ended after {:?}", signalled.elapsed());
    assert_eq!(status.code(), Some(1), "{lines:#?}");
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["cut_short"], 2, "{summary}");
    let verdict = one(&lines, CUT);
    assert_eq!(
        (&verdict["role"], &verdict["open"], &verdict["aborted"]),
        (&Value::from("client"), &Value::from(2), &Value::from(2))
    );
    drop(accepted);
}

#[test]
fn a_pair_ends_as_one() {
    for signal in ["TERM", "INT"] {
        let pair = Echoscope::start(&[
            "pair",
            "--listen",
            "127.0.0.1:0",
            "--connections",
            "8",
            "--rate",
            "100",
            "--think-time",
            "20ms",
            "--output",
            "json",
        ]);
        until("connections in flight", || {
            let metrics = pair.metrics();
            let [opened, open] = ["echoscope_connections_opened_total", "echoscope_connections_open"]
                .map(|name| metrics.sum(name, &[("role", "client")]));
            (opened > 10.0 && open > 1.0).then_some(())
        });
        pair.signal(signal);
        let (status, summary, lines) = pair.wait();
        assert_eq!(status.code(), Some(0), "{lines:#?}");
        assert_eq!(one(&lines, STOPPING)["signal"], format!("SIG{signal}"));
        for role in ["client", "server"] {
            let verdict: Vec<_> = lines.iter().filter(|l| l["message"] == CLEAN && l["role"] == role).collect();
            assert_eq!(verdict.len(), 1, "{role}: {verdict:?}");
            assert_eq!(verdict[0]["aborted"], 0, "{verdict:?}");
        }
        assert_all_came_back(&serde_json::from_str(&summary).unwrap(), 64);
        assert_nobody_reset(&lines);
    }
}

/// RFC 862 by way of RFC 9293 section 3.6: who has sent its FIN still gets everything back.
#[test]
fn a_hundred_megabytes_come_back_after_the_fin() {
    const SIZE: u64 = 100_000_000;
    let server = server(&[]);
    let peer = Peer::connect(server.server(), 1);
    thread::scope(|scope| {
        scope.spawn(|| {
            peer.send(SIZE);
            peer.stream.shutdown(Shutdown::Write).unwrap();
        });
        // Nobody reads: back-pressure, from our receive buffer through the server to our send buffer.
        let mut still = 0;
        let mut before = 0;
        until("the back-pressure to reach the sender", || {
            still = if before > 0 && peer.sent() == before { still + 1 } else { 0 };
            before = peer.sent();
            (still == 50).then_some(())
        });
        let sent = peer.sent();
        assert!(sent < SIZE, "all of it was taken in, and nobody had read");
        assert!(bytes(&server, "received") < sent as f64);
        assert_eq!(peer.read_back(0, u64::MAX), SIZE);
    });
    let peak = peak_kib(&server);
    assert!(peak < 64 * 1024, "the server's memory grew to {peak} KiB");
    peer.assert_not_reset();
    until("the end", || {
        let graceful = [("role", "server"), ("reason", "graceful")];
        (server.metrics().sum("echoscope_connections_closed_total", &graceful) == 1.0).then_some(())
    });
    server.signal("TERM");
    assert_passive_close(&clean_end_left(server, 0, 0));
}

#[test]
fn a_fin_is_noticed_while_the_server_is_blocked_writing() {
    let server = server(&[]);
    let peer = Peer::narrow(server.server(), 1);
    peer.send_until_server_is_blocked(&server);
    assert!(peer.sent() > 1_000_000, "only {} bytes fill the sockets", peer.sent());
    let taken = bytes(&server, "received");
    peer.stream.shutdown(Shutdown::Write).unwrap();
    let noticed = server.line("the FIN", |line| line["message"] == "state" && line["to"] == "CLOSE_WAIT");
    assert_eq!((&noticed["from"], &noticed["evidence"]), (&"ESTABLISHED".into(), &"tcp_info".into()));
    assert_eq!(bytes(&server, "received"), taken, "the server read on although it was blocked");
    assert!(taken < peer.sent() as f64, "the FIN was read, not noticed");
    assert_eq!(peer.read_back(0, u64::MAX), peer.sent());
    peer.assert_not_reset();
    server.line("the end", |line| line["message"] == "state" && line["from"] == "LAST_ACK");
    server.signal("TERM");
    assert_passive_close(&clean_end_left(server, 0, 0));
}

#[test]
fn descriptors_return_to_what_they_were() {
    let server = server(&["--drain-timeout", "1s"]);
    let address = server.server();
    until("ready", || (get(server.web(), "/-/ready").0 == 200).then_some(()));
    let mut before = 0;
    until("the web side's descriptor to be closed", || {
        let count = server.descriptors();
        (std::mem::replace(&mut before, count) == count).then_some(())
    });
    for round in 0..2 {
        let peers: Vec<Peer> = (0..200).map(|i| Peer::connect(address, i)).collect();
        for peer in &peers {
            peer.echo(1000);
        }
        assert_eq!(server.descriptors(), before + peers.len(), "round {round}");
        for (i, peer) in peers.into_iter().enumerate() {
            match i % 4 {
                0 => peer.stream.shutdown(Shutdown::Write).unwrap(),
                1 => SockRef::from(&peer.stream).set_linger(Some(Duration::ZERO)).unwrap(),
                2 => peer.send(100_000),
                _ => {}
            }
        }
        until("the descriptors to be closed", || (server.descriptors() == before).then_some(()));
    }
    server.signal("TERM");
    let (_, lines) = end(server, 0);
    assert_eq!(one(&lines, CLEAN)["open"], 0);
}

fn server(arguments: &[&str]) -> Echoscope {
    scraped(Echoscope::start(&with_server(arguments)))
}

/// Somebody asks for its metrics again and again, so that a drain that is cut short waits to be asked once more.
fn scraped(server: Echoscope) -> Echoscope {
    for _ in 0..2 {
        server.metrics();
    }
    server
}

/// What the server does by CAP_NET_ADMIN it must do without it too, as well as it can: also when the tests run as root.
fn server_without_capabilities(arguments: &[&str]) -> Echoscope {
    let mut command = command_without_capabilities();
    command.args(["--web.listen-address", "127.0.0.1:0"]).args(with_server(arguments));
    scraped(Echoscope::spawn(&mut command))
}

fn with_server<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["server", "--listen", "127.0.0.1:0"], arguments].concat()
}

/// How a stream ended that went on until the server's FIN.
struct Stream {
    port: u16,
    sent: u64,
    received: u64,
}

/// 64 peers stream as fast as they can and 10 wait with bytes of their own when the signal comes. Whoever is reset, or
/// gets other bytes back than it sent, panics.
fn stopped_under_load(server: &Echoscope) -> Vec<Stream> {
    let address = server.server();
    thread::scope(|scope| {
        let streams: Vec<_> = (0..SERVED)
            .map(|i| {
                scope.spawn(move || {
                    let peer = Peer::connect(address, i);
                    let stream = peer.stream_until_fin();
                    assert!(stream.received <= stream.sent, "peer {i} got back more than it sent");
                    peer.close_after_fin();
                    stream
                })
            })
            .collect();
        all_stream(server, SERVED);
        let waiting = waiting(server);
        server.signal("TERM");
        for peer in waiting {
            assert_eq!(peer.read_back(0, u64::MAX), peer.sent(), "peer {} waited", peer.number);
            peer.close_after_fin();
        }
        streams.into_iter().map(|stream| stream.join().expect("a stream")).collect()
    })
}

/// Waits until so many are connected and the server is busy with them.
fn all_stream(server: &Echoscope, count: u64) {
    until("streams", || {
        let metrics = server.metrics();
        let received = [("role", "server"), ("direction", "received")];
        let busy = metrics.sum("echoscope_bytes_total", &received) > (count << 20) as f64;
        (busy && present(&metrics) == count as f64).then_some(())
    });
}

/// Connections that are served, and those that wait to be.
fn present(metrics: &Metrics) -> f64 {
    let state = |state| metrics.sum("echoscope_tcp_sockets", &[("role", "server"), ("state", state)]);
    state("established") + state("close_wait")
}

/// Peers that nobody accepts, for the house is full, with bytes that the kernel has taken in for it.
fn waiting(server: &Echoscope) -> Vec<Peer> {
    let peers: Vec<Peer> = (0..WAITING).map(|i| Peer::connect(server.server(), 1000 + i)).collect();
    for (i, peer) in peers.iter().enumerate() {
        peer.send(1000 * (i as u64 + 1));
        peer.all_acknowledged();
    }
    peers
}

/// A connection whose every byte is known by its place: no two peers send the same, and a byte that is lost, doubled or
/// moved shows.
struct Peer {
    stream: TcpStream,
    number: u64,
    sent: AtomicU64,
}

impl Peer {
    fn connect(address: SocketAddr, number: u64) -> Peer {
        Peer::over(TcpStream::connect(address).expect("connect"), number)
    }

    /// One whose kernel takes little before somebody reads.
    fn narrow(address: SocketAddr, number: u64) -> Peer {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(CHUNK).unwrap();
        socket.connect(&address.into()).expect("connect");
        Peer::over(socket.into(), number)
    }

    fn over(stream: TcpStream, number: u64) -> Peer {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Peer { stream, number, sent: AtomicU64::new(0) }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The stream from its byte `at` on.
    fn pattern(&self, at: u64, len: usize) -> &'static [u8] {
        const PERIOD: usize = 1_048_573;
        static TWICE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let mut bytes = vec![0; PERIOD];
            fastrand::Rng::with_seed(862).fill(&mut bytes);
            bytes.repeat(2)
        });
        let from = (self.number * 4099 + at) as usize % PERIOD;
        &TWICE[from..from + len]
    }

    /// Writes once, a chunk at most.
    fn write(&self, len: usize) -> std::io::Result<()> {
        let written = (&self.stream).write(self.pattern(self.sent(), len.min(CHUNK)))?;
        self.sent.fetch_add(written as u64, Ordering::Relaxed);
        Ok(())
    }

    fn send(&self, len: u64) {
        let end = self.sent() + len;
        while self.sent() < end {
            let len = usize::try_from(end - self.sent()).unwrap();
            self.write(len).unwrap_or_else(|e| panic!("peer {} writes after {}: {e}", self.number, self.sent()));
        }
    }

    /// Reads up to `len` bytes from byte `at` on, fewer if the stream ends. Each must be as it was sent. Returns how
    /// many came.
    fn read_back(&self, at: u64, len: u64) -> u64 {
        let mut buffer = vec![0; CHUNK];
        let mut received = 0;
        while received < len {
            let wanted = (len - received).min(CHUNK as u64) as usize;
            let read = (&self.stream).read(&mut buffer[..wanted]);
            let n = read.unwrap_or_else(|e| panic!("peer {} reads after {received}: {e}", self.number));
            if n == 0 {
                break;
            }
            let as_sent = buffer[..n] == *self.pattern(at + received, n);
            assert!(as_sent, "peer {}: other bytes came back after {received}", self.number);
            received += n as u64;
        }
        received
    }

    fn echo(&self, len: u64) {
        let at = self.sent();
        self.send(len);
        assert_eq!(self.read_back(at, len), len, "peer {}: the stream ended", self.number);
    }

    /// Sends as fast as it goes and reads at the same time, until the server's FIN.
    fn stream_until_fin(&self) -> Stream {
        let fin = AtomicBool::new(false);
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                while !fin.load(Ordering::Relaxed) {
                    self.send(CHUNK as u64);
                }
            });
            let received = self.read_back(0, u64::MAX);
            fin.store(true, Ordering::Relaxed);
            received
        });
        Stream { port: self.stream.local_addr().unwrap().port(), sent: self.sent(), received }
    }

    /// Sends without reading until the server can write no more and leaves the rest in its receive buffer, where all
    /// of it is acknowledged. Nobody else may be sending.
    fn send_until_server_is_blocked(&self, server: &Echoscope) {
        let before = bytes(server, "received");
        let mut blocked = false;
        while !blocked {
            self.send(CHUNK as u64);
            self.all_acknowledged();
            let (mut last, mut still) = (before, 0);
            blocked = until("the server to read, or not", || {
                let read = bytes(server, "received");
                still = if read == last { still + 1 } else { 0 };
                last = read;
                let all = read - before == self.sent() as f64;
                (all || still == 20).then_some(!all)
            });
        }
    }

    fn info(&self) -> TcpInfo {
        TcpInfo::of(self.stream.as_fd()).expect("TCP_INFO")
    }

    /// How many of our bytes the server's kernel has taken in; `bytes_acked` counts the SYN too.
    fn acknowledged(&self) -> u64 {
        self.info().bytes_acked - 1
    }

    fn all_acknowledged(&self) {
        until("everything to be acknowledged", || (self.acknowledged() == self.sent()).then_some(()));
    }

    /// Our FIN, after the server's.
    fn close_after_fin(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap_or_else(|e| panic!("peer {} shuts down: {e}", self.number));
        until("the last ACK", || (self.info().state == State::Close).then_some(()));
        self.assert_not_reset();
    }

    fn assert_not_reset(&self) {
        assert_eq!(self.stream.take_error().unwrap().map(|e| e.kind()), None, "peer {} was reset", self.number);
    }

    /// Waits for the RST; returns what it is told as.
    fn reset_with(&self) -> ErrorKind {
        let kind = until("a RST", || self.stream.take_error().unwrap()).kind();
        assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "peer {}: {kind}", self.number);
        kind
    }
}

/// What goes over the loopback to and from one server: SYNs and FINs.
struct Wire {
    socket: Socket,
    server: SocketAddr,
}

impl Wire {
    fn tap(server: SocketAddr) -> Wire {
        const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
        const LOAD_HALF: u16 = 0x28; // BPF_LD | BPF_H | BPF_ABS
        const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
        const JUMP_IF_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
        const RETURN: u16 = 0x06; // BPF_RET | BPF_K
        let port = u32::from(server.port());
        let filter = [
            SockFilter::new(LOAD_HALF, 0, 0, 20),
            SockFilter::new(JUMP_IF_EQUAL, 2, 0, port),
            SockFilter::new(LOAD_HALF, 0, 0, 22),
            SockFilter::new(JUMP_IF_EQUAL, 0, 3, port),
            SockFilter::new(LOAD_BYTE, 0, 0, 33),
            SockFilter::new(JUMP_IF_SET, 0, 1, 0x03),
            SockFilter::new(RETURN, 0, 0, 40),
            SockFilter::new(RETURN, 0, 0, 0),
        ];
        let ip = i32::from(u16::try_from(libc::ETH_P_IP).unwrap().to_be());
        let socket = Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(ip.into())).expect("CAP_NET_RAW");
        // A segment counts with all the payload that it came with.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 64 << 20).expect("CAP_NET_ADMIN");
        socket.attach_filter(&filter).unwrap();
        // What came before the filter.
        while (&socket).read(&mut [0; 64]).is_ok() {}
        Wire { socket, server }
    }

    /// By the peer's port: how many of its bytes the server's first FIN acknowledged.
    fn acknowledged_by_fins(mut self) -> BTreeMap<u16, u64> {
        const FIN: u8 = 0x01;
        let (mut first, mut acknowledged) = (BTreeMap::new(), BTreeMap::new());
        let mut packet = [0; 64];
        loop {
            match self.socket.read(&mut packet) {
                Ok(len) => assert_eq!(len, 40, "an IP and a TCP header"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return acknowledged,
                Err(error) => panic!("read from the wire: {error}"),
            }
            let half = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
            let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
            let (from, to, sequence, acknowledgment) = (half(20), half(22), word(24), word(28));
            let from_server = from == self.server.port();
            match (from_server, packet[33] & FIN != 0) {
                (false, false) => drop(first.entry(from).or_insert(sequence.wrapping_add(1))),
                (true, true) => {
                    let bytes = acknowledgment.wrapping_sub(first[&to]);
                    acknowledged.entry(to).or_insert(bytes.into());
                }
                _ => {}
            }
        }
    }
}

/// Payload that went through all of the server's connections.
fn bytes(server: &Echoscope, direction: &str) -> f64 {
    server.metrics().sum("echoscope_bytes_total", &[("role", "server"), ("direction", direction)])
}

/// The most that was ever resident.
fn peak_kib(server: &Echoscope) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("read status");
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// Waits for the end, which must come with this exit code; returns stdout and the log.
fn end(process: Echoscope, code: i32) -> (String, Vec<Value>) {
    let (status, stdout, lines) = process.wait();
    assert_eq!(status.code(), Some(code), "{:#?}", &lines[lines.len().saturating_sub(20)..]);
    (stdout, lines)
}

/// The only line with this message.
fn one<'a>(lines: &'a [Value], message: &str) -> &'a Value {
    let found: Vec<&Value> = lines.iter().filter(|l| l["message"] == message).collect();
    assert_eq!(found.len(), 1, "{message}: {:#?}", &lines[lines.len().saturating_sub(20)..]);
    found[0]
}

/// Exit 0 and a verdict that agrees: so many were open, none was reset; returns it.
fn clean_end(server: Echoscope, open: u64) -> Value {
    one(&clean_end_left(server, open, open), CLEAN).clone()
}

/// The same; to so many of them the server's FIN was the first, so that they are left in TIME_WAIT. Returns the log.
fn clean_end_left(server: Echoscope, open: u64, active: u64) -> Vec<Value> {
    let (_, lines) = end(server, 0);
    assert_nobody_reset(&lines);
    let verdict = one(&lines, CLEAN);
    assert_eq!((&verdict["open"], &verdict["aborted"]), (&Value::from(open), &Value::from(0)), "{verdict}");
    assert!(verdict["seconds"].as_f64() > Some(0.0) && verdict["level"] == "INFO", "{verdict}");
    let lives = lives(&lines);
    let (left, gone): (Vec<_>, Vec<_>) = lives.values().partition(|life| walk(life).last() == Some(&"TIME_WAIT"));
    // Of many, a few may be gone already: a late duplicate ends a TIME_WAIT (RFC 1337).
    let left = left.len() as u64;
    assert!(left <= active && left + active / 10 >= active, "{left} of {active}; gone: {gone:#?}");
    let left_in_kernel = verdict["left_in_kernel"].as_str().unwrap();
    let named = if left == 0 { "nothing".to_owned() } else { format!("TIME_WAIT {left}") };
    assert_eq!(left_in_kernel, named, "{verdict}");
    lines
}

/// Exit 1 and a verdict that so many were reset; returns it.
fn cut_short(server: Echoscope, aborted: u64) -> Value {
    server.message(CUT);
    // What befell them can still be scraped, and then it ends.
    assert_eq!(server.metrics().sum("echoscope_drain_aborted_total", &[]), aborted as f64);
    let scraped = Instant::now();
    let (_, lines) = end(server, 1);
    assert!(scraped.elapsed() < Duration::from_secs(10), "it waited for a second scrape: {:?}", scraped.elapsed());
    verdict_of(&lines, aborted)
}

/// The same, where nobody waits for a scrape because somebody insists.
fn cut_by_second_signal(server: Echoscope, aborted: u64) -> Value {
    let (_, lines) = end(server, 1);
    verdict_of(&lines, aborted)
}

fn verdict_of(lines: &[Value], aborted: u64) -> Value {
    let verdict = one(lines, CUT).clone();
    assert_eq!((&verdict["aborted"], &verdict["level"]), (&Value::from(aborted), &Value::from("WARN")), "{verdict}");
    verdict
}

fn assert_nobody_reset(lines: &[Value]) {
    for ((role, conn), life) in lives(lines) {
        assert!(life.iter().all(|change| change.cause.as_deref() != Some("reset")), "{role} {conn}: {life:#?}");
    }
}

/// Of all lives but the listener's.
fn assert_passive_close(lines: &[Value]) {
    let mut connections = 0;
    for life in lives(lines).values().filter(|life| life[0].from == "LISTEN") {
        assert_eq!(walk(life), ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"]);
        connections += 1;
    }
    assert_eq!(connections, 1);
}

/// Exit 0 and a summary that says that all came back; returns it.
fn clean_summary(client: Echoscope, message_size: u64) -> Value {
    let (stdout, lines) = end(client, 0);
    assert_nobody_reset(&lines);
    if lines.iter().any(|line| line["message"] == STOPPING) {
        let verdict = one(&lines, CLEAN);
        assert_eq!((&verdict["role"], &verdict["aborted"]), (&Value::from("client"), &Value::from(0)), "{verdict}");
    }
    let summary = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"));
    assert_all_came_back(&summary, message_size);
    summary
}

fn assert_all_came_back(summary: &Value, message_size: u64) {
    let number = |name: &str| summary[name].as_u64().unwrap_or_else(|| panic!("{name} in {summary}"));
    assert_eq!(
        (summary["outcomes"]["ok"].as_u64(), number("cut_short")),
        (Some(number("connections")), 0),
        "{summary}"
    );
    assert_eq!(number("bytes_sent"), number("bytes_received"), "{summary}");
    assert_eq!(number("bytes_received"), number("echoes") * message_size, "{summary}");
}

/// The server saw every connection of the client end with FINs, and then ends well itself.
fn assert_saw_no_reset(server: Echoscope, summary: &Value) {
    let metrics = until("the server's ends", || {
        let metrics = server.metrics();
        (metrics.sum("echoscope_connections_open", &[("role", "server")]) == 0.0).then_some(metrics)
    });
    let closed = |reason| metrics.sum("echoscope_connections_closed_total", &[("role", "server"), ("reason", reason)]);
    assert_eq!((closed("graceful"), closed("reset")), (summary["connections"].as_f64().unwrap(), 0.0));
    server.signal("TERM");
    clean_end(server, 0);
}
