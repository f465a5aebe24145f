//! Where the sandbox refuses netlink, the table is read as text, and says so.

use std::process::Command;

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use crate::confined::spawn_refusing;
use crate::support::{Echoscope, command, lives, until, walk};

/// Starts `command` where socket(AF_NETLINK) gives EPERM.
pub fn without_netlink(mut command: Command) -> Echoscope {
    command.env("ECHOSCOPE_OBSERVER", "auto");
    let netlink = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_NETLINK as u64).unwrap();
    spawn_refusing(command, libc::SYS_socket, vec![SeccompRule::new(vec![netlink]).unwrap()])
}

#[test]
fn whole_lives_by_text() {
    let mut pair = command();
    pair.args([
        "--web.listen-address",
        "127.0.0.1:0",
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--count",
        "20",
        "--until-gone",
    ]);
    let pair = without_netlink(pair);
    pair.line("a warning that netlink was refused", |line| {
        line["level"] == "WARN" && line["observer"] == "procfs" && line["error"].as_str().unwrap().contains("netlink")
    });
    let metrics = until("20 in TIME_WAIT", || {
        let metrics = pair.metrics();
        let waiting = metrics.sum("echoscope_tcp_sockets", &[("role", "client"), ("state", "time_wait")]);
        (waiting == 20.0).then_some(metrics)
    });
    assert_eq!(metrics.sum("echoscope_observer_info", &[("observer", "procfs")]), 1.0);
    let refused = [("observer", "sock_diag"), ("reason", "refused")];
    assert_eq!(metrics.sum("echoscope_observer_unavailable", &refused), 1.0);
    assert_eq!(metrics.sum("echoscope_observer_unavailable", &[("observer", "ebpf")]), 1.0, "and why it is not eBPF");
    metrics.assert_nothing_lost();
    let lives = until("20 lives in TIME_WAIT in the log", || {
        let lives = lives(&pair.lines());
        let waiting = lives.values().filter(|c| c.last().unwrap().to == "TIME_WAIT").count();
        (waiting == 20).then_some(lives)
    });
    for ((_, _), changes) in lives.iter().filter(|((role, _), _)| role == "client") {
        assert_eq!(walk(changes), ["CLOSED", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"]);
        assert_eq!(changes.last().unwrap().evidence, "procfs", "the weaker evidence says so");
    }
}

#[test]
fn a_listener_by_text() {
    let mut server = command();
    server.args(["--web.listen-address", "127.0.0.1:0", "server", "--listen", "[::]:0"]);
    let server = without_netlink(server);
    let waiting = std::net::TcpStream::connect(server.server()).unwrap();
    let metrics = server.metrics();
    assert_eq!(metrics.sockets("server", waiting.peer_addr().unwrap().port(), "listen"), 1.0);
    assert_eq!(metrics.sum("echoscope_accept_queue_length", &[]), 0.0);
    assert_eq!(metrics.series("echoscope_accept_queue_limit", &[]).count(), 0, "text does not tell the limit");
    assert_eq!(metrics.sockets("server", waiting.peer_addr().unwrap().port(), "established"), 1.0);
}

#[test]
fn what_is_asked_for_and_refused_is_an_error() {
    let mut server = command();
    server.args(["--web.listen-address", "none", "--observer", "sock_diag", "server", "--listen", "127.0.0.1:0"]);
    let (status, _, lines) = without_netlink(server).wait();
    assert_eq!(status.code(), Some(1));
    let text = format!("{lines:?}");
    assert!(text.contains("netlink") && text.contains("Operation not permitted"), "{text}");
}
