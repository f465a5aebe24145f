//! The census equals the kernel's table.

use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;

use echoscope::kernel::{Table, sockopt};
use echoscope::tcp::Flow;
use socket2::{Domain, Socket, Type};

use crate::support::{Echoscope, try_until, until};

/// By our name, by that of ss, and by the number in /proc/net/tcp.
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

/// What somebody else counts on this port: local port for a server, remote for a client.
type Count = fn(role: &str, port: u16) -> [usize; STATES.len()];

/// By `ss -tan`.
fn ss(role: &str, port: u16) -> [usize; STATES.len()] {
    let out = Command::new("ss").args(["-tan"]).output().expect("ss (iproute2)");
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).unwrap();
    let ends = format!(":{port}");
    let column = if role == "server" { 3 } else { 4 };
    STATES.map(|(_, state, _)| {
        let of_port = |l: &&str| l.split_whitespace().nth(column).is_some_and(|a| a.ends_with(&ends));
        text.lines().filter(|l| l.split_whitespace().next() == Some(state)).filter(of_port).count()
    })
}

/// By the kernel's table as text (proc(5)), which needs no program.
fn text(role: &str, port: u16) -> [usize; STATES.len()] {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|file| std::fs::read_to_string(file).unwrap_or_default());
    let ends = format!(":{port:04X}");
    let column = if role == "server" { 1 } else { 2 };
    let rows: Vec<Vec<&str>> = tables.iter().flat_map(|t| t.lines()).map(|l| l.split_whitespace().collect()).collect();
    let of_port = |row: &&Vec<&str>| row.get(column).is_some_and(|address| address.ends_with(&ends));
    STATES.map(|(_, _, number)| rows.iter().filter(of_port).filter(|row| row.get(3) == Some(&number)).count())
}

/// How many wait at each listener of this port, by the kernel's table as text.
fn queues_of(port: u16) -> Vec<u32> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&format!(":{port:04X}")) && row[3] == "0A")
        .map(|row| u32::from_str_radix(row[4].split_once(':').unwrap().1, 16).unwrap())
        .collect()
}

#[test]
fn every_state_is_present_at_zero_before_the_first_connection() {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0"]);
    let port = server.server().port();
    let metrics = server.metrics();
    for (state, _, _) in STATES {
        let expected = if state == "listen" { 1.0 } else { 0.0 };
        assert_eq!(metrics.sockets("server", port, state), expected, "{state}");
    }
    assert_eq!(metrics.sum("echoscope_observer_info", &[("observer", "sock_diag")]), 1.0);
    assert_eq!(metrics.sum("echoscope_tcp_transitions_total", &[("from", "established"), ("to", "close_wait")]), 0.0);
}

#[test]
fn known_numbers_read_the_same_here_and_in_the_kernels_text() {
    hold_and_compare(text);
}

#[test]
#[ignore = "needs ss (iproute2)"]
fn known_numbers_read_the_same_here_and_in_ss() {
    hold_and_compare(ss);
}

/// A connection that we close first, and that is in TIME_WAIT then; by what its socket is known.
fn close_first(from: SocketAddr, to: SocketAddr) -> (Flow, u64) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&from.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let local = socket.local_addr().unwrap().as_socket().unwrap();
    let cookie = sockopt::cookie(socket.as_fd()).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&socket).read(&mut [0]).unwrap(), 0);
    (Flow { local, peer: to }, cookie)
}

/// 200 ESTABLISHED, 50 CLOSE_WAIT, 300 TIME_WAIT, 3 LISTEN, held while both look.
fn hold_and_compare(count: Count) {
    // Three workers with a listening socket each, two connections served by each, one of all by the pair's own client
    // for good. All others that are held wait in the accept queues: ESTABLISHED or CLOSE_WAIT as their peers make
    // them, for nobody accepts them.
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--runtime",
        "per-core",
        "--workers",
        "3",
        "--max-connections",
        "6",
        "--close-delay",
        "0s",
        "--connections",
        "1",
        "--rate",
        "0.001",
        "--hold",
        "1h",
    ]);
    let address = pair.server();
    let port = address.port();
    // We close first: TIME_WAIT is ours, the server's end is gone. A TIME_WAIT may end at once: where the server's FIN and an
    // ACK of its cross, ours to that ACK finds nobody, and the RST that answers it ends the TIME_WAIT (RFC 1337). Then
    // another one takes its place. Each has an address of its own: after a second the kernel gives a TIME_WAIT's port to the
    // next connection between the same two addresses.
    let mut addresses = (1u8..=250).flat_map(|c| (1u8..=250).map(move |d| SocketAddr::from(([127, 1, c, d], 0))));
    let (mut table, _) = Table::open(None).unwrap();
    let mut waiting: Vec<(Flow, u64)> = Vec::new();
    until("300 TIME_WAITs", || {
        waiting.retain(|(flow, cookie)| table.find(flow, *cookie).unwrap().is_some());
        (waiting.len() == 300).then_some(()).or_else(|| {
            waiting.extend((waiting.len()..300).map(|_| close_first(addresses.next().unwrap(), address)));
            None
        })
    });
    let established: Vec<TcpStream> = (0..199).map(|_| TcpStream::connect(address).unwrap()).collect();
    let half_closed: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in &half_closed {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    let held = |state: &str| match state {
        "established" => [200, 200],
        "close_wait" => [50, 0],
        "fin_wait2" => [0, 50],
        "time_wait" => [0, 300],
        "listen" => [3, 0],
        _ => [0, 0],
    };
    let (mut numbers, mut queues) = Default::default();
    let metrics = try_until(|| {
        let metrics = pair.metrics();
        numbers = STATES
            .map(|(state, _, _)| (state, ["server", "client"].map(|role| metrics.sockets(role, port, state) as usize)));
        // All wait in the queues but those that are served; told is the longest.
        queues = queues_of(port);
        let queued = queues.iter().sum::<u32>() == 199 + 1 + 50 - 6
            && queues.iter().max().map(|n| f64::from(*n)) == Some(metrics.sum("echoscope_accept_queue_length", &[]));
        (queued && numbers.iter().all(|(state, now)| held(state) == *now)).then_some(metrics)
    });
    let metrics = metrics.unwrap_or_else(|| panic!("the numbers never stood: {numbers:?}, {queues:?}"));
    for (i, role) in ["server", "client"].into_iter().enumerate() {
        let ours = STATES.map(|(state, _, _)| metrics.sockets(role, port, state) as usize);
        // The text may double a row, or pass over it, while other tests open and close (proc(5) reads it in pieces):
        // then it is read again.
        let mut theirs = count(role, port);
        let same = try_until(|| {
            theirs = count(role, port);
            (theirs == ours).then_some(())
        });
        assert!(same.is_some(), "{role}: ours {ours:?}, theirs {theirs:?}");
        assert_eq!(ours, STATES.map(|(state, _, _)| held(state)[i]), "{role}");
    }
    drop((established, half_closed));
}
