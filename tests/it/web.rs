//! The web side: its pages, and those who abuse it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{Echoscope, Metrics, PATIENCE, command, get, until};

const STATES: [&str; 11] = [
    "close",
    "close_wait",
    "closing",
    "established",
    "fin_wait1",
    "fin_wait2",
    "last_ack",
    "listen",
    "syn_recv",
    "syn_sent",
    "time_wait",
];

/// An HTTP answer; header names in lower case.
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

/// An HTTP connection that is kept alive.
pub struct KeptAlive(BufReader<TcpStream>);

impl KeptAlive {
    pub fn to(address: SocketAddr) -> KeptAlive {
        let stream = TcpStream::connect(address).expect("connect to the web side");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        KeptAlive(BufReader::new(stream))
    }

    /// `/metrics`, parsed.
    pub fn metrics(&mut self) -> Metrics {
        let answer = self.ask("GET", "/metrics");
        assert_eq!(answer.status, 200);
        Metrics::parse(&answer.body)
    }

    fn ask(&mut self, method: &str, path: &str) -> Answer {
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes());
        let mut line = || {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("a line of the answer");
            line.trim_end().to_owned()
        };
        let status = line();
        let status = status.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{status:?}"));
        let mut headers = BTreeMap::new();
        while let Some((name, value)) = line().split_once(':') {
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let length = if method == "HEAD" { 0 } else { headers["content-length"].parse().expect("a length") };
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).expect("a body");
        Answer { status, headers, body: String::from_utf8(body).expect("text") }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("ask");
    }

    /// What comes until the other end closes.
    fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is a close too: the peer did not want the rest of what it was sent.
        let _ = self.0.read_to_end(&mut rest);
        rest
    }
}

/// Sends `bytes` on a connection of their own; returns what comes until the other end closes.
fn send(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut connection = KeptAlive::to(address);
    connection.send(bytes);
    connection.rest()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn server() -> Echoscope {
    Echoscope::start(&["server", "--listen", "127.0.0.1:0"])
}

/// A pair that has made `count` connections and now waits until the kernel lets go of their TIME_WAITs, for a minute;
/// its listener is closed.
fn pair_after(count: &str) -> Echoscope {
    let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0", "--count", count, "--until-gone"]);
    let expected: f64 = count.parse().unwrap();
    until("every life to reach TIME_WAIT", || {
        let metrics = pair.metrics();
        let entered = |role, to| metrics.sum("echoscope_tcp_transitions_total", &[("role", role), ("to", to)]);
        (entered("client", "time_wait") == expected && entered("server", "close") == expected + 1.0).then_some(())
    });
    pair
}

fn health(arguments: &[&str]) -> Output {
    command().arg("health").args(arguments).output().expect("run health")
}

#[test]
fn every_route_answers_with_its_status_and_type() {
    let server = server();
    let mut web = KeptAlive::to(server.web());
    let (text, metrics, json) = ("text/plain; charset=utf-8", "text/plain; version=0.0.4", "application/json");
    for (path, status, kind) in [
        ("/", 200, "text/html; charset=utf-8"),
        ("/metrics", 200, metrics),
        ("/metrics?name[]=up", 200, metrics),
        ("/healthz", 200, text),
        ("/-/healthy", 200, text),
        ("/readyz", 200, text),
        ("/-/ready", 200, text),
        ("/api/sockets", 200, json),
        ("/api/connections", 200, json),
        ("/api/connections?limit=1", 200, json),
        ("/api/connections?limit=10000", 200, json),
        ("/api/connections?role=server&state=time-wait&outcome=open&order=longest", 200, json),
        ("/api/connections?conn=2a", 200, json),
        ("/api/states", 200, json),
        ("/page/page.css", 200, "text/css; charset=utf-8"),
        ("/page/app.js", 200, "text/javascript; charset=utf-8"),
        ("/page/icon.svg", 200, "image/svg+xml"),
        ("/api/connections?limit=0", 400, text),
        ("/api/connections?limit=10001", 400, text),
        ("/api/connections?limit=-1", 400, text),
        ("/api/connections?limit=", 400, text),
        ("/api/connections?limit=99999999999999999999", 400, text),
        ("/api/connections?role=peer", 400, text),
        ("/api/connections?state=open", 400, text),
        ("/api/connections?outcome=fine", 400, text),
        ("/api/connections?order=oldest", 400, text),
        ("/api/connections?peer=127.0.0.1", 400, text),
        ("/api/connections?conn=2a&limit=1", 400, text),
        ("/events?before=1", 400, text),
        ("/page/", 404, text),
        ("/page/nothing.js", 404, text),
        ("/page/../api/sockets", 404, text),
        ("/metrics/", 404, text),
        ("/favicon.ico", 404, text),
        ("/../etc/passwd", 404, text),
        ("/%6detrics", 404, text),
    ] {
        // One connection for them all: errors do not end it.
        let got = web.ask("GET", path);
        assert_eq!((got.status, got.headers["content-type"].as_str()), (status, kind), "{path}");
        assert_eq!(got.headers["cache-control"], "no-store", "{path}");
        assert_eq!(got.headers["x-content-type-options"], "nosniff", "{path}");
        let policy = &got.headers["content-security-policy"];
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"), "{path}: {policy}");
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{path}: {policy}");
        assert!(!got.body.is_empty(), "{path}");
        let head = web.ask("HEAD", path);
        assert_eq!((head.status, head.headers["content-type"].as_str()), (status, kind), "HEAD {path}");
        assert!(head.headers["content-length"].parse::<usize>().unwrap() > 0, "HEAD {path}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let got = web.ask(method, path);
            let expected = if status == 404 { 404 } else { 405 };
            assert_eq!(got.status, expected, "{method} {path}");
            let allow = got.headers.get("allow").map(String::as_str);
            assert_eq!(allow, (expected == 405).then_some("GET, HEAD"), "{method} {path}");
        }
    }
}

#[test]
fn two_requests_on_one_connection_and_two_at_once() {
    let server = server();
    let mut web = KeptAlive::to(server.web());
    assert_eq!(web.ask("GET", "/healthz").body, "healthy\n");
    assert_eq!(web.ask("GET", "/readyz").body, "ready\n");
    // Pipelined (RFC 9112 section 9.3.2): the answers come in order.
    web.send(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n");
    assert_eq!(web.ask("GET", "/readyz").body, "healthy\n");
    web.send(b"GET /metrics HTTP/1.0\r\n\r\n");
    let rest = String::from_utf8(web.rest()).unwrap();
    let position = |what: &str| rest.find(what).unwrap_or_else(|| panic!("no {what:?} in {rest:?}"));
    assert!(position("ready\n") < position("echoscope_build_info"));
}

#[test]
fn the_metrics_page_is_well_formed() {
    let pair = pair_after("3");
    let (mut types, mut helped, mut series) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut histograms: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let page = get(pair.web(), "/metrics").1;
    assert!(page.ends_with('\n'));
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a help text");
            assert!(!text.is_empty() && helped.insert(name), "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert!(helped.contains(name) && types.insert(name, kind).is_none(), "{line}");
            assert!(name.starts_with("echoscope_") || name.starts_with("process_"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            continue;
        }
        let (of, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().expect("a number");
        assert!(value.is_finite() && series.insert(of), "{line}");
        let name = of.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix).filter(|family| types.get(family) == Some(&"histogram")))
            .unwrap_or(name);
        assert!(types.contains_key(family), "no type before {line}");
        if family != name && !name.ends_with("_sum") {
            // Buckets grow and the last one is the count.
            let labels = of.split_once('{').map_or("", |(_, labels)| labels);
            let labels: Vec<&str> = labels.trim_end_matches('}').split(',').filter(|l| !l.starts_with("le=")).collect();
            histograms.entry(format!("{family} {labels:?}")).or_default().push(value);
        }
    }
    assert!(histograms.len() > 10, "{}", histograms.len());
    for (of, counts) in histograms {
        assert!(counts.is_sorted() && counts[counts.len() - 1] == counts[counts.len() - 2], "{of}: {counts:?}");
    }
    for port in ["port=\"0\"", "127.0.0.1:0"] {
        assert!(!page.contains(port), "a label from before the port was known");
    }
}

#[test]
#[ignore = "needs promtool"]
fn promtool_has_nothing_to_say() {
    let pair = pair_after("3");
    let page = get(pair.web(), "/metrics").1;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool (Debian package prometheus)");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let out = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn the_census_as_json_has_every_state_of_each_service() {
    let pair = pair_after("3");
    let port = u64::from(pair.server().port());
    let census = until("a reading after the listener's end", || {
        let census = json(&get(pair.web(), "/api/sockets").1);
        (census["services"][0]["sockets"]["listen"] == 0).then_some(census)
    });
    assert_eq!(census["observer"], "sock_diag");
    assert!(census["seconds"].as_f64().unwrap() > 0.0);
    let services = census["services"].as_array().unwrap();
    assert_eq!(services.len(), 2);
    assert_service(&services[0], ("server", port), ("listen", 0));
    assert_service(&services[1], ("client", port), ("time_wait", 3));
    assert!(services[1]["oldest_seconds"]["time_wait"].as_f64().unwrap() >= 0.0);
    let target = &census["targets"][0];
    assert_eq!((&target["target"], &target["local_ports_used"]), (&format!("127.0.0.1:{port}").into(), &3.into()));
    assert!(target["local_ports_limit"].as_u64().unwrap() > 1000);

    let server = server();
    let census = json(&get(server.web(), "/api/sockets").1);
    assert_service(&census["services"][0], ("server", server.server().port().into()), ("listen", 1));
    assert_eq!(census["services"][0]["accept_queue"], serde_json::json!({ "length": 0, "limit": 1024 }));
    assert_eq!(census["targets"], serde_json::json!([]));
}

/// The service of this role and port has all states, and sockets in no other than `held`.
fn assert_service(service: &Value, of: (&str, u64), held: (&str, u64)) {
    assert_eq!((service["role"].as_str().unwrap(), service["port"].as_u64().unwrap()), of);
    let sockets = service["sockets"].as_object().unwrap();
    assert_eq!(sockets.keys().collect::<Vec<_>>(), STATES);
    for (state, count) in sockets {
        assert_eq!(count.as_u64().unwrap(), if state == held.0 { held.1 } else { 0 }, "{service}");
    }
}

#[test]
fn connections_as_json_are_whole_lives_with_evidence() {
    let pair = pair_after("3");
    let lives = json(&get(pair.web(), "/api/connections").1);
    let lives = lives.as_array().unwrap();
    let mut walks: Vec<(&str, Vec<&str>)> = Vec::new();
    for life in lives {
        let steps = life["steps"].as_array().unwrap();
        let mut last = life["opened"].as_f64().unwrap();
        for step in steps {
            let at = step["at"].as_f64().unwrap();
            assert!(at + 1e-3 >= last, "time runs backwards: {life}");
            last = at;
            assert!(["tcp_info", "sock_diag", "inferred"].contains(&step["evidence"].as_str().unwrap()), "{life}");
            assert!(step.get("via").is_none(), "{life}");
        }
        assert!((life["since"].as_f64().unwrap() - last).abs() < 1e-3, "{life}");
        assert_eq!((&life["state"], &life["followed"]), (&steps.last().unwrap()["to"], &Value::Bool(true)), "{life}");
        walks.push((life["role"].as_str().unwrap(), steps.iter().map(|s| s["to"].as_str().unwrap()).collect()));
        if life["peer"] != "0.0.0.0:0" {
            assert_eq!(life["reason"], "graceful", "{life}");
            // Each end once, under the same pair of addresses.
            let other = |l: &&Value| l["local"] == life["peer"] && l["peer"] == life["local"];
            assert_eq!(lives.iter().filter(other).count(), 1, "{life}");
        }
    }
    walks.sort();
    let client = ("client", vec!["SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"]);
    let server = ("server", vec!["SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"]);
    let listener = ("server", vec!["LISTEN", "CLOSED"]);
    let expected = [&client, &client, &client, &listener, &server, &server, &server];
    assert!(walks.iter().eq(expected), "{walks:#?}");
    let youngest = json(&get(pair.web(), "/api/connections?limit=2").1);
    let opened = |life: &Value| life["opened"].as_f64().unwrap();
    let youngest: Vec<f64> = youngest.as_array().unwrap().iter().map(opened).collect();
    let mut all: Vec<f64> = lives.iter().map(opened).collect();
    all.sort_by(|a, b| b.total_cmp(a));
    assert!(
        youngest.iter().zip(&all).all(|(a, b)| (a - b).abs() < 1e-3) && youngest.len() == 2,
        "{youngest:?} {all:?}"
    );
}

#[test]
fn garbage_is_answered_with_an_error_or_a_close_and_the_service_goes_on() {
    let server = server();
    let web = server.web();
    let mut kept = KeptAlive::to(web);
    assert_eq!(kept.ask("GET", "/healthz").status, 200);
    let before = server.descriptors();
    let noise: Vec<u8> = {
        let mut random = fastrand::Rng::with_seed(7);
        (0..100_000).map(|_| random.u8(..)).collect()
    };
    let long = |before: &str, after: &str| format!("{before}{}{after}", "a".repeat(70_000)).into_bytes();
    let many: String = (0..500).map(|n| ["h", &n.to_string(), ": v\r\n"].concat()).collect();
    let garbage: [(&str, Vec<u8>); 14] = [
        ("noise", noise),
        ("zeros", vec![0; 1000]),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaaaaaaaaaaaaaa\r\n\r\n".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("HTTP/0.9", b"GET /\r\n\r\n".to_vec()),
        ("HTTP/3.0", b"GET / HTTP/3.0\r\n\r\n".to_vec()),
        ("a long path", long("GET /", " HTTP/1.1\r\n\r\n")),
        ("a long header", long("GET / HTTP/1.1\r\nh: ", "\r\n\r\n")),
        ("a header without an end", long("GET / HTTP/1.1\r\nh", "")),
        ("many headers", format!("GET / HTTP/1.1\r\n{many}\r\n").into_bytes()),
        ("a folded header", b"GET / HTTP/1.1\r\n Foo: x\r\n\r\n".to_vec()),
        ("a bad length", b"GET /x HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_vec()),
        ("two lengths", b"GET /x HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_vec()),
        ("a body that never comes", b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx".to_vec()),
    ];
    for (what, bytes) in &garbage {
        let mut peer = KeptAlive::to(web);
        // It may close before it has read everything.
        let _ = peer.0.get_mut().write_all(bytes);
        let answer = peer.rest();
        let status = answer.strip_prefix(b"HTTP/1.1 ").map(|rest| String::from_utf8_lossy(&rest[..3]).into_owned());
        assert!(status.as_deref().is_none_or(|s| s.starts_with('4')), "{what}: {status:?}");
        assert_eq!(kept.ask("GET", "/healthz").status, 200, "after {what}");
    }
    assert_eq!(&send(web, b"nonsense\r\n\r\n")[..12], b"HTTP/1.1 400");
    // Those that go away in the middle of a request.
    for end in [Shutdown::Write, Shutdown::Both] {
        for part in [&b""[..], b"G", b"GET / HTTP/1.1\r\nHost:"] {
            let mut peer = KeptAlive::to(web);
            peer.send(part);
            peer.0.get_ref().shutdown(end).unwrap();
            assert!(peer.rest().is_empty());
        }
    }
    assert_eq!(kept.ask("GET", "/healthz").status, 200);
    until("the descriptors to return", || (server.descriptors() <= before).then_some(()));
    assert!(server.lines().iter().all(Value::is_object), "{:#?}", server.lines());
}

/// `count` connections that send a byte of a header a second, until the sender is dropped. Their SYNs go out in order.
fn slow_headers(web: SocketAddr, count: usize) -> mpsc::Sender<()> {
    let open = |_| {
        let socket = Socket::new(Domain::for_address(web), Type::STREAM.nonblocking(), None).unwrap();
        // In progress; those that the backlog has no place for go on trying.
        let _ = socket.connect(&web.into());
        TcpStream::from(socket)
    };
    let peers: Vec<TcpStream> = (0..count).map(open).collect();
    let (stop, stopped) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        for byte in b"GET /metrics HTTP/1.1\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'a')) {
            for mut peer in &peers {
                let _ = peer.write(&[*byte]);
            }
            if stopped.recv_timeout(Duration::from_secs(1)) == Err(mpsc::RecvTimeoutError::Disconnected) {
                return;
            }
        }
    });
    stop
}

#[test]
fn two_hundred_slow_ones_keep_nobody_waiting() {
    let server = server();
    let web = server.web();
    let mut kept = KeptAlive::to(web);
    assert_eq!(kept.ask("GET", "/healthz").status, 200);
    let before = server.descriptors();
    let began = Instant::now();
    let mut slow = Vec::new();
    // They come again and again, as they are shown out.
    for _ in 0..3 {
        slow.push(slow_headers(web, 200));
        let asked = Instant::now();
        assert_eq!(KeptAlive::to(web).ask("GET", "/metrics").status, 200);
        let out = health(&[&format!("http://{web}/-/ready")]);
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
        // Who was there before is not shown out for them.
        kept.metrics();
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        // Of all that connected 64 are held; while they change places a listing of the descriptors may show both.
        let held = server.descriptors();
        assert!(held <= before + 100, "{held} descriptors, {before} before");
    }
    // They are shown out though nobody needs their place, if not all at once, then when they have had their time.
    until("the descriptors to return", || (server.descriptors() <= before).then_some(()));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop(slow);
    assert_eq!(get(web, "/readyz").0, 200);
}

#[test]
fn fifty_scrapers_at_once_cost_one_reading() {
    let server = server();
    let web = server.web();
    let readings = |metrics: &Metrics| metrics.sum("echoscope_observer_duration_seconds_count", &[("what", "census")]);
    let before = readings(&server.metrics());
    assert!(before >= 1.0);
    let ready = Barrier::new(50);
    let began = Instant::now();
    let most = std::thread::scope(|scope| {
        let scrape = || {
            let mut kept = KeptAlive::to(web);
            ready.wait();
            readings(&kept.metrics())
        };
        let scrapers: Vec<_> = (0..50).map(|_| scope.spawn(scrape)).collect();
        scrapers.into_iter().map(|s| s.join().unwrap()).fold(0.0, f64::max)
    });
    // One for every half second begun, and one of before that may still be fresh or not.
    let allowed = 1.0 + (began.elapsed().as_secs_f64() / 0.5).ceil();
    assert!(most - before <= allowed, "{} readings, {allowed} allowed", most - before);
    until("a new reading after the old one", || (readings(&server.metrics()) > most).then_some(()));
}

#[test]
fn health_says_by_its_exit_code_whether_it_is_ready() {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0", "--drain-delay", "1m"]);
    let web = server.web();
    let told = web.to_string();
    for arguments in [
        vec![format!("http://{told}/-/ready")],
        vec![format!("http://{told}/healthz")],
        vec![format!("http://localhost:{}/readyz", web.port())],
        vec!["--web.listen-address".into(), told.clone()],
        vec!["--web.listen-address".into(), format!(":{}", web.port())],
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let out = health(&arguments);
        assert_eq!(out.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(out.stdout.is_empty() && out.stderr.is_empty(), "silent when all is well");
    }
    let six = Echoscope::start(&["server", "--listen", "127.0.0.1:0", "--web.listen-address", "[::1]:0"]);
    assert_eq!(health(&[&format!("http://[::1]:{}/-/ready", six.web().port())]).status.code(), Some(0));
    assert_eq!(health(&["--web.listen-address", &six.web().to_string()]).status.code(), Some(0));

    // Draining is alive but not ready.
    server.signal("TERM");
    server.message("stopping; a second signal ends it at once");
    until("not to be ready", || (get(web, "/readyz").0 == 503).then_some(()));
    assert_eq!(get(web, "/healthz").0, 200);
    let out = health(&[&format!("http://{told}/-/ready")]);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && said.contains("503") && said.contains(&told), "{said}");
}

#[test]
fn health_fails_when_nobody_answers_or_not_as_it_should() {
    // Taken, but nobody listens.
    let refusing = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    refusing.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let refusing_address = refusing.local_addr().unwrap().as_socket().unwrap();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let rude = TcpListener::bind("127.0.0.1:0").unwrap();
    let rude_address = rude.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut peer, _) = rude.accept().unwrap();
        let _ = peer.read(&mut [0; 1000]);
        let _ = peer.write_all(b"go away\r\n\r\n");
    });
    for (address, expected) in [
        (refusing_address.to_string(), "refused"),
        (mute.local_addr().unwrap().to_string(), "no answer within"),
        (rude_address.to_string(), "ask http://"),
    ] {
        let out = health(&[&format!("http://{address}/-/ready")]);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains(expected) && said.contains(&address) && !said.contains("panicked"), "{said}");
    }
}

#[test]
fn every_address_is_reached_over_both_protocols() {
    let server = Echoscope::start(&["server", "--listen", "[::]:0", "--web.listen-address", "[::]:0"]);
    let bound: SocketAddr = server.message("web side listening")["address"].as_str().unwrap().parse().unwrap();
    assert!(bound.is_ipv6() && bound.ip().is_unspecified());
    for host in ["127.0.0.1", "[::1]"] {
        let address = format!("{host}:{}", bound.port()).parse().unwrap();
        assert_eq!(get(address, "/readyz"), (200, "ready\n".to_owned()), "{host}");
    }
}

/// The ports that a process listens on, from its descriptors and the kernel's table.
fn listening_ports(pid: u32) -> Vec<u16> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let links: BTreeSet<String> = links.map(|l| l.display().to_string()).collect();
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6"] {
        for line in fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields[3] == "0A" && links.contains(&format!("socket:[{}]", fields[9])) {
                let (_, port) = fields[1].rsplit_once(':').unwrap();
                ports.push(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports.sort_unstable();
    ports
}

#[test]
fn without_a_web_side_only_the_echo_service_listens() {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0", "--web.listen-address", "none"]);
    let echo = server.server();
    assert_eq!(listening_ports(server.pid()), [echo.port()]);
    server.signal("TERM");
    let (status, _, lines) = server.wait();
    assert_eq!(status.code(), Some(0));
    assert!(!lines.iter().any(|line| line["message"] == "web side listening"), "{lines:#?}");

    let both = Echoscope::start(&["server", "--listen", "127.0.0.1:0"]);
    let mut expected = [both.server().port(), both.web().port()];
    expected.sort_unstable();
    assert_eq!(listening_ports(both.pid()), expected, "the test looks in the right place");
}
