//! The kernel's own announcements (eBPF): whole lives by them, counts that are the table's, what was there before, what is
//! lost, and how they are refused.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use aya::maps::{Array, Map, MapData, loaded_maps};
use aya::programs::loaded_programs;
use echoscope::kernel::{Table, TcpInfo, Wanted, filter};
use echoscope::tcp::{Role, State, StateSet};
use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use serde_json::Value;
use socket2::SockRef;

use crate::confined::{spawn_failing, spawn_refusing};
use crate::support::{Echoscope, Metrics, command, lives, quiet_port, until, walk};

const CLIENT: [&str; 6] = ["CLOSED", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"];
const SERVER: [&str; 6] = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];

/// Whatever the kernel's table has on `port`, by role and state.
fn by_table(port: u16) -> Vec<(Role, State, u64)> {
    let (mut table, _) = Table::open(None).unwrap();
    let mut counts = [[0; State::SLOTS]; 2];
    table
        .each(&Wanted::new(StateSet::of(&State::ALL), &[port], &[port]), |row| {
            let role = if row.flow.local.port() == port { Role::Server } else { Role::Client };
            counts[role as usize][row.state.shown() as usize] += 1;
        })
        .unwrap();
    let pairs = Role::ALL.into_iter().flat_map(|role| State::ALL.into_iter().map(move |state| (role, state)));
    pairs.map(|(role, state)| (role, state, counts[role as usize][state as usize])).collect()
}

/// Waits until the metrics say of `port` what the table says at the same time.
fn until_equal(process: &Echoscope, port: u16) {
    let mut apart = Vec::new();
    let equal = crate::support::try_until(|| {
        let before = by_table(port);
        let metrics = process.metrics();
        if by_table(port) != before {
            return None;
        }
        let of = |role: Role, state: State| metrics.sockets(role.label(), port, state.label()) as u64;
        let told = before.into_iter().map(|(role, state, n)| (role, state, n, of(role, state)));
        apart = told.filter(|(.., table, metrics)| table != metrics).collect();
        apart.is_empty().then_some(())
    });
    assert!(equal.is_some(), "the table, and the metrics: {apart:?}");
}

/// The same of those who look at the clients of `port` only.
fn until_clients_equal(process: &Echoscope, port: u16) {
    until("as the table has it", || {
        let table = by_table(port);
        let client = table.iter().filter(|(role, ..)| *role == Role::Client);
        let metrics = process.metrics();
        client.into_iter().all(|(_, s, n)| metrics.sockets("client", port, s.label()) == *n as f64).then_some(())
    });
}

/// Both ends of `count` connections to `listener`.
fn connected(listener: &TcpListener, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let address = listener.local_addr().unwrap();
    let pair = |_| (TcpStream::connect(address).unwrap(), listener.accept().unwrap().0);
    (0..count).map(pair).collect()
}

/// A process that only looks at what others send to `port`: where its own client goes nobody listens, and it tries once an
/// hour.
fn looks_at(port: u16) -> Echoscope {
    let target = format!("127.0.0.2:{port}");
    let looks = ["--observer", "ebpf", "client", &target, "--rate", "0.0003", "--connections", "1", "--retries", "0"];
    let process = Echoscope::start(&looks);
    process.line("a refusal", |l| l["message"] == "state" && l["cause"] == "refused");
    process
}

/// How many of the kernel's announcements were lost, as far as that is known.
fn lost(metrics: &Metrics) -> f64 {
    metrics.sum("echoscope_observer_lost_events_total", &[])
}

fn until_lost(process: &Echoscope) -> f64 {
    until("a loss", || Some(lost(&process.metrics())).filter(|lost| *lost > 0.0))
}

/// A kernel may hide what happens while some process is at work (docs/ebpf.md, Losses): that is counted, and rare.
fn assert_hardly_anything_lost(metrics: &Metrics) {
    let lost = lost(metrics);
    assert!(lost <= 2.0, "{lost} events lost");
    assert_eq!(metrics.sum("echoscope_observer_errors_total", &[]), 0.0);
}

/// How many of the kernel's announcements a log says were lost, at least.
pub fn said_lost(lines: &[Value]) -> u64 {
    let warnings = lines.iter().filter(|line| line["level"] == "WARN");
    let of =
        |line: &Value| ["ring", "missed", "connections"].iter().filter_map(|what| line[what].as_u64()).sum::<u64>();
    warnings.map(of).sum()
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn whole_lives_by_the_kernels_word_alone() {
    let pair =
        Echoscope::start(&["--observer", "ebpf", "pair", "--listen", "[::]:0", "--count", "200", "--rate", "max"]);
    let (status, _, lines) = pair.wait();
    assert!(status.success());
    let mut ends = [0, 0];
    for ((role, conn), changes) in lives(&lines) {
        if changes[0].to == "LISTEN" {
            continue;
        }
        let (index, path) = if role == "client" { (0, CLIENT) } else { (1, SERVER) };
        assert_eq!(walk(&changes), path, "{role} {conn}");
        assert!(changes.iter().all(|change| change.evidence == "tracepoint"), "{changes:?}");
        ends[index] += 1;
    }
    assert_eq!(ends, [200, 200]);
    // Every stay has both its ends by the kernel's clock, the shortest SYN_RECV too.
    let timeless = lines.iter().filter(|l| l["message"] == "state" && l["after_s"].is_null());
    let timeless: BTreeSet<_> = timeless.map(|l| l["from"].as_str().unwrap()).collect();
    assert_eq!(timeless, BTreeSet::from(["CLOSED", "LISTEN"]), "these have no beginning");
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn what_the_way_was_like_is_told_once_of_each_end() {
    let port = quiet_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let process = looks_at(port);
    let told = |name: &str| process.metrics().sum(name, &[("role", "client")]);
    // A full socket ends when TIME_WAIT goes on in its place, and that ends without one.
    drop(connected(&listener, 20));
    let (client, server) = connected(&listener, 1).pop().unwrap();
    until("twenty ways", || (told("echoscope_tcp_rtt_seconds_count") == 20.0).then_some(()));
    let seconds = told("echoscope_tcp_rtt_seconds_sum");
    assert!(seconds > 0.0 && seconds < 2.0, "twenty round trips on this machine take {seconds} s");
    assert_eq!(told("echoscope_tcp_retransmits_total"), 0.0);
    // Nothing that this one sends arrives.
    filter::lose(server.as_fd(), filter::Segment::Any).unwrap();
    (&client).write_all(b"?").unwrap();
    let again = until("two retransmits", || Some(TcpInfo::of(client.as_fd()).unwrap().retransmits).filter(|n| *n >= 2));
    SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    until("its way", || (told("echoscope_tcp_rtt_seconds_count") == 21.0).then_some(()));
    assert_eq!(told("echoscope_tcp_retransmits_total"), f64::from(again));
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn why_each_descriptor_was_closed_is_known_however_fast_they_come() {
    const COUNT: usize = 5000;
    let count = COUNT.to_string();
    let fast = ["--count", &count, "--rate", "max", "--connections", "16", "--messages", "1", "--until-gone"];
    let pair = Echoscope::start(&[&["--observer", "ebpf", "pair", "--listen", "127.0.0.1:0"], &fast[..]].concat());
    let port = pair.server().port();
    // A port that is chosen again after a second ends its TIME_WAIT (tcp_tw_reuse): there may be fewer than were opened.
    let waiting = until("all to be told of", || {
        let metrics = pair.metrics();
        let opened = metrics.sum("echoscope_connections_opened_total", &[("role", "client")]) == COUNT as f64;
        let waiting = metrics.sockets("client", port, "time_wait");
        let told = metrics.sum("echoscope_connections_open", &[]) == 0.0
            && metrics.sum("echoscope_following", &[]) == waiting
            && metrics.sockets("server", port, "last_ack") == 0.0;
        (opened && told).then_some(waiting as usize)
    });
    let (_, told) = crate::support::get(pair.web(), "/api/connections?state=time_wait&limit=10000");
    let told: Vec<Value> = serde_json::from_str(&told).unwrap();
    assert_eq!(told.len(), waiting);
    let without = told.iter().filter(|life| life["reason"].is_null()).count();
    assert_eq!(without, 0, "of so many nobody knows why they were closed");
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn what_was_there_before_is_counted_once_and_followed_to_its_end() {
    let port = quiet_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    // In as many states as there are without a fault.
    let mut pairs = connected(&listener, 12);
    for (client, _) in &pairs[0..3] {
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (client, server) in pairs.drain(9..12) {
        drop(client);
        drop(server);
    }
    for (client, _) in &pairs[6..8] {
        // FIN_WAIT2 without a descriptor for half a minute.
        client.shutdown(Shutdown::Write).unwrap();
    }
    let orphans: Vec<TcpStream> = pairs.drain(6..8).map(|(_, server)| server).collect();
    let process = looks_at(port);
    let of = |role, state: &str| process.metrics().sum("echoscope_tcp_sockets", &[("role", role), ("state", state)]);
    // This process's scope is its client's; the server's ends are somebody else's.
    until_clients_equal(&process, port);
    assert_eq!((of("client", "time_wait"), of("client", "fin_wait2")), (3.0, 5.0));
    // An orphan's FIN comes: FIN_WAIT2 → TIME_WAIT, of a minisocket that was there before.
    drop(orphans);
    until_clients_equal(&process, port);
    assert_eq!((of("client", "time_wait"), of("client", "fin_wait2")), (5.0, 3.0));
    // New ones, and the rest goes.
    pairs.extend(connected(&listener, 5));
    drop(pairs);
    until_clients_equal(&process, port);
    assert_eq!(of("client", "established"), 0.0);
    assert_hardly_anything_lost(&process.metrics());
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn counts_are_the_tables_whatever_happens() {
    let process = Echoscope::start(&["--observer", "ebpf", "pair", "--listen", "127.0.0.1:0", "--rate", "0.001"]);
    let address = process.server();
    let port = address.port();
    let mut kept: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    until_equal(&process, port);
    // Some reset, some close, some half close.
    for stream in kept.drain(..5) {
        SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    drop(kept.drain(..5));
    kept[0].shutdown(Shutdown::Write).unwrap();
    until_equal(&process, port);
    for _ in 0..500 {
        drop(TcpStream::connect(address).unwrap());
    }
    until_equal(&process, port);
    assert_hardly_anything_lost(&process.metrics());
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn after_a_loss_it_is_said_and_everything_is_right_again() {
    let port = quiet_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let stays = connected(&listener, 10);
    let process = looks_at(port);
    until("ten", || (process.metrics().sockets("client", port, "established") == 10.0).then_some(()));
    // More than the ring has room for, while nobody reads it.
    process.signal("STOP");
    let ends_before = stays.len();
    let serving = std::thread::spawn(move || {
        for stream in listener.incoming().take(40_000) {
            drop(stream.unwrap());
        }
        listener
    });
    for _ in 0..40_000 {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let _ = stream.read(&mut [0]);
    }
    let listener = serving.join().unwrap();
    drop(stays);
    process.signal("CONT");
    let lost = until_lost(&process);
    process.line("a warning", |l| l["message"] == "kernel events were lost; every connection is looked up");
    assert!(lost > 1000.0, "{lost}");
    until_clients_equal(&process, port);
    // Nobody who has gone is still alive, and who comes now is told of as ever.
    assert_eq!(ends_before, 10);
    until("nobody left in the ledger but who waits", || {
        let (_, told) = crate::support::get(process.web(), "/api/connections?limit=10000");
        let told: Vec<Value> = serde_json::from_str(&told).unwrap();
        told.iter().all(|life| life["state"] != "ESTABLISHED" && life["state"] != "CLOSE_WAIT").then_some(())
    });
    let again = connected(&listener, 3);
    until("three", || (process.metrics().sockets("client", port, "established") == 3.0).then_some(()));
    drop(again);
}

/// Does something while the program takes clients of `port` for somebody else's: it is not announced, and nobody knows.
fn unheard(process: &Echoscope, port: u16, what: impl FnOnce()) {
    let mut ports = ports_of(process);
    let places = ports.get(&port.into(), 0).unwrap();
    assert_ne!(places[Role::Client as usize], 0, "it is told of");
    ports.set(port.into(), [0, 0], 0).unwrap();
    what();
    ports.set(port.into(), places, 0).unwrap();
}

/// The program's table of ports, by which it decides what to tell of: by role, the place of a service.
fn ports_of(process: &Echoscope) -> Array<MapData, [u32; 2]> {
    let ours = maps_of(&open_in(process, "prog_id:"));
    let mut named = loaded_maps().flatten().filter(|map| map.name_as_str() == Some("ports"));
    let id = named.find_map(|map| ours.contains(&map.id()).then_some(map.id())).unwrap();
    Array::try_from(Map::Array(MapData::from_id(id).unwrap())).unwrap()
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn what_went_unheard_is_found_in_the_table_counted_and_made_good() {
    let port = quiet_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let mut kept = connected(&listener, 8);
    let process = looks_at(port);
    until("eight", || (process.metrics().sockets("client", port, "established") == 8.0).then_some(()));
    unheard(&process, port, || {
        drop(kept.drain(..3));
        kept.extend(connected(&listener, 2));
    });
    let lost = until_lost(&process);
    assert_eq!(lost, 5.0, "three that ended, and two that began");
    process.line("a warning", |l| {
        l["message"].as_str().is_some_and(|m| m.contains("elsewhere than the kernel has announced"))
            && l["connections"] == 5
    });
    until_clients_equal(&process, port);
    assert_eq!(process.metrics().sockets("client", port, "established"), 7.0);
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn a_step_in_the_middle_that_went_unheard_is_inferred_counted_and_made_good() {
    let port = quiet_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let (client, served) = connected(&listener, 1).pop().unwrap();
    let process = looks_at(port);
    until("one", || (process.metrics().sockets("client", port, "established") == 1.0).then_some(()));
    unheard(&process, port, || {
        drop(served);
        let info = || TcpInfo::of(client.as_fd()).unwrap();
        until("CLOSE_WAIT", || (info().state == State::CloseWait).then_some(()));
    });
    let name = format!("{:x}", rustix::net::sockopt::socket_cookie(client.as_fd()).unwrap());
    drop(client);
    let line =
        process.line("the step that went unheard", move |l| l["conn"] == name.as_str() && l["to"] == "CLOSE_WAIT");
    assert_eq!((&line["evidence"], &line["after_s"]), (&"inferred".into(), &Value::Null), "{line}");
    // Its counts were wrong: anew.
    process.line("a warning", |l| l["connections"] == 1);
    assert_eq!(lost(&process.metrics()), 1.0);
    until_clients_equal(&process, port);
}

#[test]
#[ignore = "needs root: a network namespace of its own"]
fn what_happens_in_another_namespace_is_not_told() {
    let port = quiet_port();
    let mut unshared = Command::new("unshare");
    let inner = command();
    unshared
        .env_clear()
        .args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(inner.get_program());
    unshared.args(["--log.format", "json", "--observer", "ebpf", "--web.listen-address", "none"]);
    unshared.args(["pair", "--listen", &format!("127.0.0.1:{port}"), "--count", "20", "--rate", "20"]);
    unshared.env("PATH", std::env::var_os("PATH").unwrap());
    // The same addresses, here.
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let there = Echoscope::spawn(&mut unshared);
    there.message("echo server listening");
    let mut here = BTreeSet::new();
    for _ in 0..200 {
        for (client, _) in connected(&listener, 1) {
            here.insert(format!("{:x}", rustix::net::sockopt::socket_cookie(client.as_fd()).unwrap()));
        }
    }
    let (status, _, lines) = there.wait();
    assert!(status.success());
    let told = lives(&lines);
    assert_eq!(told.keys().filter(|(role, _)| role == "client").count(), 20);
    assert!(told.keys().all(|(_, conn)| !here.contains(conn)));
}

/// The numbers of what `process` has open of one kind, by what the kernel says of its descriptors.
fn open_in(process: &Echoscope, field: &str) -> BTreeSet<u32> {
    let of = |entry: std::fs::DirEntry| {
        let info = std::fs::read_to_string(entry.path()).ok()?;
        info.lines().find_map(|line| line.strip_prefix(field))?.trim().parse().ok()
    };
    std::fs::read_dir(format!("/proc/{}/fdinfo", process.pid())).unwrap().flatten().filter_map(of).collect()
}

/// Every map that these programs use, open or not.
fn maps_of(programs: &BTreeSet<u32>) -> BTreeSet<u32> {
    let ours = loaded_programs().flatten().filter(|program| programs.contains(&program.id()));
    ours.flat_map(|program| program.map_ids().unwrap().expect("Linux 4.15")).collect()
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn nothing_stays_behind_not_even_after_sigkill() {
    for signal in ["TERM", "KILL"] {
        let process = looks_at(quiet_port());
        let (programs, maps) = (open_in(&process, "prog_id:"), open_in(&process, "map_id:"));
        assert_eq!(programs.len(), 8, "two for changes of state, two for timers, and four more");
        assert!(maps.len() >= 6, "{maps:?}");
        let held: BTreeSet<u32> = maps_of(&programs);
        assert!(maps.is_subset(&held), "{maps:?} of {held:?}");
        process.signal(signal);
        let _ = process.wait();
        until("every program and map to be gone", || {
            let programs_left: BTreeSet<u32> = loaded_programs().flatten().map(|program| program.id()).collect();
            let maps_left: BTreeSet<u32> = loaded_maps().flatten().map(|map| map.id()).collect();
            (programs_left.is_disjoint(&programs) && maps_left.is_disjoint(&held)).then_some(())
        });
    }
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn what_only_the_loading_needed_is_given_up() {
    let process = looks_at(quiet_port());
    for task in std::fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        for set in ["CapEff", "CapPrm"] {
            let line = status.lines().find_map(|line| line.strip_prefix(&format!("{set}:"))).unwrap();
            let bits = u64::from_str_radix(line.trim(), 16).unwrap();
            let (perfmon, bpf) = (38, 39);
            assert_eq!(bits & (1 << perfmon | 1 << bpf), 0, "{set} of a thread: {bits:x}");
        }
    }
}

/// What a short run says of its observer, by `auto`: which it is, why it is not eBPF, in one word and in one line.
fn observer_of(process: Echoscope) -> (String, String, Value) {
    let metrics = process.metrics();
    let used = ["ebpf", "sock_diag", "procfs"]
        .into_iter()
        .find(|name| metrics.series("echoscope_observer_info", &[("observer", name)]).eq([1.0]))
        .unwrap();
    let why: Vec<_> = ["not_asked_for", "not_permitted", "no_types", "no_namespace", "no_netlink", "refused"]
        .into_iter()
        .filter(|why| metrics.sum("echoscope_observer_unavailable", &[("observer", "ebpf"), ("reason", why)]) == 1.0)
        .collect();
    process.signal("TERM");
    let (_, _, lines) = process.wait();
    let said: Vec<_> =
        lines.into_iter().filter(|l| l["message"] == "no eBPF: changes are read, not announced").collect();
    let [line] = &said[..] else { panic!("one line, not {said:#?}") };
    (used.to_owned(), why.concat(), line.clone())
}

fn auto() -> Command {
    let mut command = command();
    command.env("ECHOSCOPE_OBSERVER", "auto");
    command.args(["--web.listen-address", "127.0.0.1:0", "server", "--listen", "127.0.0.1:0"]);
    command
}

#[test]
fn where_a_sandbox_refuses_it_one_line_says_so() {
    let refused = spawn_refusing(auto(), libc::SYS_bpf, Vec::new());
    let (used, why, line) = observer_of(refused);
    assert_eq!((used.as_str(), &line["level"]), ("sock_diag", &"INFO".into()));
    // Who lacks the capabilities does not even try.
    assert!(["refused", "not_permitted"].contains(&why.as_str()), "{why}: {line}");
}

#[test]
#[ignore = "needs root, and unshare (util-linux)"]
fn without_the_kernels_types_one_line_says_so() {
    let inner = auto();
    let mut command = Command::new("unshare");
    let hidden = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
    command.args(["--mount", "sh", "-c", hidden, "-"]).arg(inner.get_program()).args(inner.get_args());
    command.env("ECHOSCOPE_OBSERVER", "auto");
    let (used, why, line) = observer_of(Echoscope::spawn(&mut command));
    assert_eq!((used.as_str(), why.as_str()), ("sock_diag", "no_types"));
    assert!(line["reason"].as_str().unwrap().contains("/sys/kernel/btf/vmlinux"), "{line}");
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn on_a_kernel_that_does_not_name_namespaces_one_line_says_so() {
    let so_netns_cookie = 71;
    let asked = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, so_netns_cookie).unwrap();
    let when = vec![SeccompRule::new(vec![asked]).unwrap()];
    let older = spawn_failing(auto(), libc::SYS_getsockopt, when, libc::ENOPROTOOPT);
    let (used, why, line) = observer_of(older);
    assert_eq!((used.as_str(), why.as_str()), ("sock_diag", "no_namespace"));
    assert!(line["reason"].as_str().unwrap().contains("SO_NETNS_COOKIE"), "{line}");
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn with_too_many_services_one_line_says_so_and_who_asks_for_it_is_told() {
    let client = |observer: &str| {
        let mut command = command();
        command.args(["--observer", observer, "--web.listen-address", "127.0.0.1:0", "client", "--rate", "0.001"]);
        command.args((0..1100).map(|i| format!("127.0.0.2:{}", 20_000 + i)));
        command
    };
    let (used, why, line) = observer_of(Echoscope::spawn(&mut client("auto")));
    assert_eq!((used.as_str(), why.as_str()), ("sock_diag", "refused"));
    assert_eq!(line["reason"], "services to count: 1100 of at most 1024");
    let asked = client("ebpf").stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&asked.stderr);
    assert_eq!(asked.status.code(), Some(1), "{said}");
    assert!(
        said.contains("observer ebpf: services to count: 1100 of at most 1024") && !said.contains("announces"),
        "{said}"
    );
}

#[test]
#[ignore = "needs root, and setpriv (util-linux)"]
fn without_the_capabilities_one_line_says_so() {
    let inner = auto();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]).arg(inner.get_program());
    command.args(inner.get_args()).env("ECHOSCOPE_OBSERVER", "auto");
    let (used, why, line) = observer_of(Echoscope::spawn(&mut command));
    assert_eq!((used.as_str(), why.as_str()), ("sock_diag", "not_permitted"));
    assert_eq!(line["reason"], "not permitted: it takes CAP_BPF and CAP_PERFMON");
}

#[test]
#[ignore = "needs root, and setpriv (util-linux)"]
fn who_asks_for_it_and_may_not_is_told() {
    let inner = command();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]).arg(inner.get_program());
    command.args(["--observer", "ebpf", "server", "--listen", "127.0.0.1:0"]);
    let output = command.stdout(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.trim(), "echoscope: observer ebpf: not permitted: it takes CAP_BPF and CAP_PERFMON");
}

#[test]
#[ignore = "needs root, and setpriv (util-linux)"]
fn two_capabilities_are_enough() {
    let inner = auto();
    let mut command = Command::new("setpriv");
    let (both, only) = ("-all,+bpf,+perfmon", "--bounding-set=-all,+bpf,+perfmon");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", only]);
    command.args([&format!("--inh-caps={both}"), &format!("--ambient-caps={both}")]);
    command.arg(inner.get_program()).args(inner.get_args()).env("ECHOSCOPE_OBSERVER", "auto");
    let process = Echoscope::spawn(&mut command);
    let address: SocketAddr = process.server();
    drop(TcpStream::connect(address).unwrap());
    until("a whole life", || {
        let metrics = process.metrics();
        let over = [("role", "server"), ("from", "last_ack"), ("to", "close"), ("evidence", "tracepoint")];
        (metrics.sum("echoscope_tcp_transitions_total", &over) == 1.0).then_some(())
    });
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn of_others_too_every_open_every_end_and_its_cause_is_told() {
    let port = quiet_port();
    let name = port.to_string();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let before = connected(&listener, 1);
    let watch = Echoscope::start(&["watch", "--observer", "ebpf", "--port", &name, "--remote-port", &name]);
    watch.message("watching every listener of this network namespace");
    // Shorter than any reading: by the table alone, one that its own side resets has forgotten whose it was.
    for number in 0..300 {
        let (client, server) = connected(&listener, 1).remove(0);
        if number % 3 == 0 {
            SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        }
        let (first, second) = if number % 3 == 1 { (server, client) } else { (client, server) };
        drop(first);
        drop(second);
    }
    drop(before);
    let count = |metrics: &crate::support::Metrics, name: &str, role: &str, cause: Option<&str>| {
        let mut labels = vec![("role", role), ("port", port.to_string().leak() as &str)];
        labels.extend(cause.map(|cause| ("cause", cause)));
        metrics.series(name, &labels).sum::<f64>()
    };
    until("every end", || {
        let metrics = watch.metrics();
        let ended = |role| count(&metrics, "echoscope_sockets_ended_total", role, None);
        (ended("client") == 301.0 && ended("server") == 301.0).then_some(())
    });
    until("every open and close in a reading", || {
        let metrics = watch.metrics();
        let of = |name, role| count(&metrics, name, role, None);
        let told = ["client", "server"]
            .map(|role| (of("echoscope_sockets_opened_total", role), of("echoscope_sockets_closed_total", role)));
        (told == [(300.0, 301.0); 2]).then_some(())
    });
    let metrics = watch.metrics();
    let ended = |role, cause| count(&metrics, "echoscope_sockets_ended_total", role, Some(cause));
    // Reset by the client; closed first by the server; closed first by the client, the one from before among them.
    let told = ["abort", "reset", "ack", "peer_fin"].map(|cause| (ended("client", cause), ended("server", cause)));
    assert_eq!(told, [(100.0, 0.0), (0.0, 100.0), (100.0, 101.0), (101.0, 100.0)]);
    assert_hardly_anything_lost(&metrics);
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn time_wait_ends_by_its_timer_and_the_run_waits_for_it() {
    let run =
        ["--observer", "ebpf", "pair", "--listen", "127.0.0.1:0", "--count", "3", "--rate", "max", "--until-gone"];
    let (_, lines) = Echoscope::start(&run).until_end(std::time::Duration::from_secs(100));
    let ends: Vec<&Value> = lines.iter().filter(|l| l["from"] == "TIME_WAIT").collect();
    assert_eq!(ends.len(), 3);
    let (announced, looked_up): (Vec<&Value>, Vec<&Value>) = ends.iter().partition(|l| l["evidence"] == "tracepoint");
    // What the kernel did not announce is found by the table, and counted.
    assert!(looked_up.len() as u64 <= said_lost(&lines), "{looked_up:?}");
    for end in ends {
        assert_eq!((&end["to"], &end["cause"]), (&"CLOSED".into(), &"expired".into()));
    }
    for end in announced {
        // TCP_TIMEWAIT_LEN, and the grain of the timer wheel.
        assert!((60.0..64.0).contains(&end["after_s"].as_f64().unwrap()), "{end}");
    }
}
