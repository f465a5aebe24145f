//! What cannot be told is counted: lines that nobody takes, connections beyond the follow limit.

use std::io::{Read, Write};
use std::process::Stdio;

use socket2::{Domain, SockRef, Socket, Type};

use crate::support::{Echoscope, Metrics, command, get, lives, quiet_port, until};

#[test]
fn beyond_the_follow_limit_connections_are_counted_not_followed() {
    let pair =
        Echoscope::start(&["pair", "--listen", "127.0.0.1:0", "--follow-limit", "10", "--count", "50", "--until-gone"]);
    let metrics = until("50 opened and closed", || {
        let metrics = pair.metrics();
        let closed = metrics.sum("echoscope_connections_closed_total", &[("role", "client")]);
        let settled = metrics.sum("echoscope_following", &[]) + metrics.sum("echoscope_follow_dropped_total", &[]);
        (closed == 50.0 && settled >= 50.0).then_some(metrics)
    });
    assert_eq!(metrics.sum("echoscope_following", &[]), 10.0);
    assert_eq!(metrics.sum("echoscope_follow_dropped_total", &[]), 40.0);
    pair.line("a warning", |line| line["level"] == "WARN" && line["limit"] == 10);
    let given_up = get(pair.web(), "/api/connections?limit=1000").1.matches("\"followed\":false").count();
    assert_eq!(given_up, 40);
}

/// The kernel announces the end of every socket of the namespace. Whoever does not listen fast enough is told that
/// something was lost: it is counted, said, and made good by looking.
#[test]
fn lost_destroy_events_are_counted_and_made_good() {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0", "--idle-timeout", "300ms"]);
    // A peer that sends more than it is ready to take back, and then falls silent: the server's FIN waits behind what
    // the peer does not read, long after the server has closed.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&server.server().into()).unwrap();
    let mut peer: std::net::TcpStream = socket.into();
    peer.write_all(&vec![7; 100_000]).unwrap();
    until("an orphan in FIN_WAIT1", || {
        let metrics = server.metrics();
        let orphan = metrics.sockets("server", server.server().port(), "fin_wait1") == 1.0
            && metrics.sum("echoscope_connections_open", &[("role", "server")]) == 0.0;
        orphan.then_some(())
    });
    // After its first look the follower listens; the second look shows that it does.
    until("the follower to listen", || {
        let looks = server.metrics().sum("echoscope_observer_duration_seconds_count", &[("what", "follow")]);
        (looks >= 2.0).then_some(())
    });
    let lost = || server.metrics().sum("echoscope_observer_lost_events_total", &[("what", "destroy")]);
    assert_eq!(lost(), 0.0);
    // While it cannot listen, more sockets end than its buffer holds events (about 10,000 with the largest buffer, which
    // only root gets).
    server.signal("STOP");
    let noise = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for _ in 0..20_000 {
        let client = std::net::TcpStream::connect(noise.local_addr().unwrap()).unwrap();
        SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop((client, noise.accept().unwrap()));
    }
    server.signal("CONT");
    until("the loss to be counted", || (lost() >= 1.0).then_some(()));
    server.line("a warning", |line| line["message"].as_str().is_some_and(|m| m.contains("lost destroy events")));
    // The orphan's end is seen all the same.
    let mut back = Vec::new();
    peer.read_to_end(&mut back).unwrap();
    assert_eq!(back.len(), 100_000);
    drop(peer);
    until("TIME_WAIT of the orphan", || {
        let lives = lives(&server.lines());
        lives.values().any(|life| life.last().unwrap().to == "TIME_WAIT").then_some(())
    });
}

/// The output is a pipe that nobody reads: nothing waits for it, everything that does not fit is counted.
#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], quiet_port()));
    let mut child = command()
        .args(["--web.listen-address", &free.to_string(), "pair", "--listen", "127.0.0.1:0"])
        .args(["--count", "6000", "--connections", "16", "--messages", "0", "--until-gone"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = until("6,000 lives", || {
        std::net::TcpStream::connect(free).ok()?;
        let metrics = Metrics::parse(&get(free, "/metrics").1);
        let closed = metrics.sum("echoscope_connections_closed_total", &[("role", "client")]);
        (closed == 6_000.0).then_some(metrics)
    });
    assert!(metrics.sum("echoscope_log_lost_total", &[]) > 0.0, "60,000 lines do not fit into the queue");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A terminal that takes nothing (Ctrl-S, a stalled ssh): the bar and the lines wait for it, and nothing else does.
#[test]
fn a_terminal_that_nobody_reads_stops_nothing() {
    let master = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let name = rustix::pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], quiet_port()));
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_echoscope"))
        .args(["--web.listen-address", &free.to_string(), "pair", "--listen", "127.0.0.1:0"])
        .args(["--count", "5000", "--connections", "16", "--messages", "1", "--until-gone"])
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(terminal)
        .spawn()
        .unwrap();
    until("5,000 lives", || {
        std::net::TcpStream::connect(free).ok()?;
        let metrics = Metrics::parse(&get(free, "/metrics").1);
        let closed = metrics.sum("echoscope_connections_closed_total", &[("role", "client")]);
        (closed == 5_000.0).then_some(())
    });
    let mut waiting = [0; 1024];
    assert!(rustix::io::read(&master, &mut waiting).unwrap() > 0, "it did write to the terminal");
    child.kill().unwrap();
    child.wait().unwrap();
}
