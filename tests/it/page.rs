//! The live page's events: their form, their bounds, and who comes back.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{Echoscope, PATIENCE, get, until};

/// So many may look at a time.
const VIEWERS: usize = 16;

/// A viewer: the events of one connection.
struct Viewer {
    stream: BufReader<TcpStream>,
    headers: String,
    /// Of the last event that had one.
    id: String,
    /// Bytes of events.
    read: usize,
    /// A census comes each second: only this ends a wait for something that never happens.
    deadline: Instant,
}

#[derive(Debug)]
struct Event {
    name: String,
    data: Value,
}

impl Viewer {
    fn of(web: SocketAddr) -> Viewer {
        Viewer::after(web, None)
    }

    /// One that comes back: `id` is what it was told last.
    fn after(web: SocketAddr, id: Option<&str>) -> Viewer {
        let id = id.map(|id| format!("Last-Event-ID: {id}\r\n")).unwrap_or_default();
        Viewer::on(
            TcpStream::connect(web).expect("connect"),
            &format!("GET /events HTTP/1.1\r\nHost: test\r\n{id}\r\n"),
        )
    }

    fn on(mut stream: TcpStream, request: &str) -> Viewer {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).expect("ask");
        let mut viewer = Viewer {
            stream: BufReader::new(stream),
            headers: String::new(),
            id: String::new(),
            read: 0,
            deadline: Instant::now() + PATIENCE,
        };
        loop {
            let mut line = String::new();
            viewer.stream.read_line(&mut line).expect("a header");
            if line == "\r\n" || line.is_empty() {
                return viewer;
            }
            viewer.headers += &line.to_lowercase();
        }
    }

    /// The next chunk of the body (RFC 9112 section 7.1); `None` at the end.
    fn chunk(&mut self) -> Option<String> {
        let mut size = String::new();
        self.stream.read_line(&mut size).ok()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).ok()?;
        chunk.truncate(size);
        self.read += size;
        (size > 0).then(|| String::from_utf8(chunk).expect("text"))
    }

    /// The next event; `None` when the stream has ended. Each comes in a chunk of its own, whole.
    fn next(&mut self) -> Option<Event> {
        loop {
            assert!(Instant::now() < self.deadline, "waited {PATIENCE:?}");
            let chunk = self.chunk()?;
            let mut lines = chunk.strip_suffix("\n\n").expect("an empty line ends an event").lines().peekable();
            if chunk == "retry: 1000\n\n" {
                continue;
            }
            if let Some(id) = lines.next_if(|line| line.starts_with("id: ")) {
                id["id: ".len()..].clone_into(&mut self.id);
            }
            let mut field = |name: &str| lines.next().and_then(|line| line.strip_prefix(name)).expect(name).to_owned();
            let (name, data) = (field("event: "), field("data: "));
            assert_eq!(lines.next(), None, "{chunk}");
            return Some(Event { name, data: serde_json::from_str(&data).expect("JSON") });
        }
    }

    /// The next event of this name.
    fn next_of(&mut self, name: &str) -> Event {
        loop {
            let event = self.next().unwrap_or_else(|| panic!("the stream ended before '{name}'"));
            if event.name == name {
                return event;
            }
        }
    }

    fn status(&self) -> &str {
        self.headers.split(' ').nth(1).unwrap_or_default()
    }
}

/// How many state changes these walks are.
fn walks(walks: &Value) -> u64 {
    walks.as_array().expect("walks").iter().map(|walk| walk[4].as_u64().unwrap()).sum()
}

/// A server whose listener's own change of state is counted.
fn server() -> Echoscope {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0"]);
    let listens = || server.metrics().sum("echoscope_tcp_transitions_total", &[("to", "listen")]) == 1.0;
    until("the listener's life to begin", || listens().then_some(()));
    server
}

/// One connection that ends with the client's close; five changes at the server.
fn life(server: SocketAddr) {
    let mut stream = TcpStream::connect(server).expect("connect");
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

/// Reads on until so many more changes were told of, or missed; returns how many were told.
fn read_changes(viewer: &mut Viewer, wanted: u64) -> (u64, u64) {
    let (mut told, mut missed) = (0, 0);
    while told + missed < wanted {
        let event = viewer.next().expect("another event");
        match event.name.as_str() {
            "walked" => told += walks(&event.data["walks"]),
            "missed" => missed += event.data["transitions"].as_u64().unwrap(),
            _ => {}
        }
    }
    (told, missed)
}

#[test]
fn a_viewer_is_told_what_there_is_and_then_what_happens() {
    let server = server();
    let web = server.web();
    let mut viewer = Viewer::of(web);
    assert_eq!(viewer.status(), "200");
    for header in
        ["content-type: text/event-stream", "cache-control: no-store", "content-security-policy: default-src 'none'"]
    {
        assert!(viewer.headers.contains(header), "{}", viewer.headers);
    }
    let hello = viewer.next().unwrap();
    assert_eq!(
        (hello.name.as_str(), &hello.data["transitions"], &hello.data["restarted"]),
        ("hello", &true.into(), &false.into())
    );
    assert_eq!(walks(&hello.data["walked"]), 1, "the listener's own");
    let census = viewer.next_of("sockets");
    let api: Value = serde_json::from_str(&get(web, "/api/sockets").1).unwrap();
    assert_eq!(census.data["sockets"]["services"], api["services"]);
    assert_eq!(census.data["ready"], true);
    assert_eq!(census.data["lost"], serde_json::json!({ "events": 0, "log_lines": 0, "not_followed": 0 }));

    for _ in 0..20 {
        life(server.server());
    }
    let (mut lines, mut counts) = (Vec::new(), Value::Array(Vec::new()));
    while walks(&counts) < 100 {
        let batch = viewer.next_of("walked").data;
        assert!(batch["lines"].as_array().unwrap().len() <= 50);
        lines.extend(batch["lines"].as_array().unwrap().clone());
        counts.as_array_mut().unwrap().extend(batch["walks"].as_array().unwrap().clone());
    }
    assert_eq!(walks(&counts), 100);
    let counted = server.metrics().sum("echoscope_tcp_transitions_total", &[]);
    assert_eq!(counted, 101.0, "and the listener's own");
    let line = lines.iter().find(|line| line["to"] == "ESTABLISHED").expect("a line");
    assert_eq!(
        (&line["role"], &line["from"], &line["evidence"]),
        (&"server".into(), &"SYN_RECV".into(), &"tcp_info".into())
    );
    // The log tells the same.
    let logged = server.line("the same line", |logged| logged["conn"] == line["conn"] && logged["to"] == line["to"]);
    assert_eq!((&logged["local"], &logged["peer"], &logged["cause"]), (&line["local"], &line["peer"], &line["cause"]));
}

#[test]
fn there_are_ten_batches_a_second_at_most_and_a_census_each_second() {
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--rate",
        "500",
        "--think-time",
        "0s",
        "--close-delay",
        "0s",
    ]);
    let mut viewer = Viewer::of(pair.web());
    viewer.next_of("sockets");
    let began = Instant::now();
    let (mut batches, mut censuses, mut changes) = (0, 0, 0);
    while censuses < 4 {
        let event = viewer.next().expect("another event");
        match event.name.as_str() {
            "walked" => {
                batches += 1;
                changes += walks(&event.data["walks"]);
                let told = event.data["lines"].as_array().unwrap().len() as u64 + event.data["more"].as_u64().unwrap();
                assert!(told > 0 && event.data["lines"].as_array().unwrap().len() <= 50, "{told}");
            }
            "sockets" => censuses += 1,
            other => panic!("{other}"),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    assert!(f64::from(batches) <= seconds * 10.0 + 2.0, "{batches} in {seconds} s");
    assert!((3.0..30.0).contains(&seconds), "{seconds} s for four censuses");
    assert!(changes > 100, "{changes}");
}

#[test]
fn so_many_may_look_and_one_more_is_told_so() {
    let server = server();
    let web = server.web();
    assert!(get(web, "/healthz").0 == 200);
    let (descriptors, viewers) =
        (server.descriptors(), |server: &Echoscope| server.metrics().sum("echoscope_viewers", &[]));
    let mut all: Vec<Viewer> = (0..VIEWERS).map(|_| Viewer::of(web)).collect();
    for viewer in &mut all {
        assert_eq!(viewer.next().unwrap().name, "hello");
    }
    assert_eq!(viewers(&server), VIEWERS as f64);
    let (status, said) = get(web, "/events");
    assert_eq!((status, said.as_str()), (503, "16 viewers already: close one, or try again\n"));
    let mut asked = TcpStream::connect(web).unwrap();
    asked.write_all(b"HEAD /events HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    asked.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    // Everybody else is served as before.
    assert_eq!(get(web, "/readyz").0, 200);
    drop(all.pop());
    let mut late = until("a place", || Some(Viewer::of(web)).filter(|viewer| viewer.status() == "200"));
    assert_eq!(late.next().unwrap().name, "hello");
    drop((all, late));
    until("all to have left", || (viewers(&server) == 0.0).then_some(()));
    until("the descriptors to return", || (server.descriptors() <= descriptors).then_some(()));
    // A question does not take a place.
    let mut asked = TcpStream::connect(web).unwrap();
    asked.write_all(b"HEAD /events HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    asked.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("text/event-stream"), "{answer}");
    assert_eq!(viewers(&server), 0.0);
}

#[test]
fn who_reads_nothing_skips_and_is_told_how_much() {
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--rate",
        "400",
        "--think-time",
        "0s",
        "--close-delay",
        "0s",
    ]);
    let web = pair.web();
    // Little room at both ends: it is full soon.
    let socket = Socket::new(Domain::for_address(web), Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&web.into()).unwrap();
    let mut slow = Viewer::on(socket.into(), "GET /events HTTP/1.1\r\nHost: test\r\n\r\n");
    let hello = slow.next_of("hello");
    let first = walks(&hello.data["walked"]);
    let mut other = Viewer::of(web);
    // It reads again when ten times what finds room on its way was told to somebody else: who reads all the time is told all.
    while other.read < 10 * 96 * 1024 {
        assert_ne!(other.next().expect("another event").name, "missed");
    }
    let mut told = first;
    let missed = loop {
        let event = slow.next().expect("another event");
        match event.name.as_str() {
            "walked" => told += walks(&event.data["walks"]),
            "missed" => break event.data["transitions"].as_u64().unwrap(),
            _ => {}
        }
    };
    assert!(missed > 100, "{missed}");
    assert_eq!(pair.metrics().sum("echoscope_viewers_skipped_total", &[]), missed as f64);
    // The sum that follows accounts for every change: what was told, what was not, and what came after.
    let hello = loop {
        let event = slow.next().expect("another event");
        match event.name.as_str() {
            "walked" => told += walks(&event.data["walks"]),
            "hello" => break event,
            _ => {}
        }
    };
    assert_eq!(walks(&hello.data["walked"]), told + missed);
}

#[test]
fn who_takes_nothing_for_long_is_shown_out() {
    let pair = Echoscope::start(&[
        "pair",
        "--listen",
        "127.0.0.1:0",
        "--rate",
        "100",
        "--think-time",
        "0s",
        "--close-delay",
        "0s",
    ]);
    let web = pair.web();
    let mut reads = Viewer::of(web);
    let mute: Vec<Viewer> = (0..3).map(|_| Viewer::of(web)).collect();
    let viewers = || pair.metrics().sum("echoscope_viewers", &[]);
    assert_eq!(viewers(), 4.0);
    let deadline = Instant::now() + 2 * PATIENCE;
    while viewers() > 1.0 {
        assert!(Instant::now() < deadline, "{} viewers", viewers());
        // Who reads stays, however long it looks.
        reads.deadline = deadline;
        reads.next_of("sockets");
    }
    drop(mute);
    assert_eq!(reads.next_of("sockets").data["ready"], true);
}

#[test]
fn who_comes_back_is_told_what_it_missed() {
    let server = server();
    let web = server.web();
    let mut viewer = Viewer::of(web);
    viewer.next_of("hello");
    life(server.server());
    let (told, missed) = read_changes(&mut viewer, 5);
    assert_eq!((told, missed), (5, 0));
    let last = viewer.id.clone();
    drop(viewer);
    let mut witness = Viewer::of(web);
    witness.next_of("hello");
    for _ in 0..3 {
        life(server.server());
    }
    assert_eq!(read_changes(&mut witness, 15), (15, 0));
    let mut back = Viewer::after(web, Some(&last));
    assert_eq!(read_changes(&mut back, 15), (15, 0));
    let hello = back.next_of("hello");
    assert_eq!((walks(&hello.data["walked"]), &hello.data["restarted"]), (21, &false.into()));
    // A page that begins again by itself can say it too.
    let stream = TcpStream::connect(web).unwrap();
    let mut back = Viewer::on(stream, &format!("GET /events?after={last} HTTP/1.1\r\nHost: test\r\n\r\n"));
    assert_eq!(read_changes(&mut back, 15), (15, 0));
    // Of another process nothing is known.
    let mut strange = Viewer::after(web, Some("123-4-5"));
    let hello = strange.next().unwrap();
    assert_eq!((hello.name.as_str(), &hello.data["restarted"]), ("hello", &true.into()));
}

#[test]
fn the_end_ends_viewers_after_the_drain_was_shown() {
    let server = Echoscope::start(&["server", "--listen", "127.0.0.1:0", "--drain-delay", "1500ms"]);
    let mut viewer = Viewer::of(server.web());
    // One that never reads does not hold it up.
    let _mute = Viewer::of(server.web());
    assert_eq!(viewer.next_of("sockets").data["ready"], true);
    server.signal("TERM");
    let began = Instant::now();
    let mut drains = 0;
    let end = loop {
        let event = viewer.next().expect("a last event");
        match event.name.as_str() {
            "sockets" if event.data["ready"] == false => drains += 1,
            "end" => break event,
            _ => {}
        }
    };
    assert!(drains > 0, "the drain is seen: {end:?}");
    assert!(viewer.next().is_none(), "nothing comes after the end");
    let (status, _, _) = server.wait();
    assert_eq!(status.code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_watch_has_viewers_too_and_says_that_it_follows_nobody() {
    let server = server();
    let port = server.server().port().to_string();
    let watch = Echoscope::start(&["watch", "--port", &port]);
    let mut viewer = Viewer::of(watch.web());
    let hello = viewer.next().unwrap();
    let told = (&hello.data["transitions"], &hello.data["lives"]);
    assert_eq!((hello.name.as_str(), told), ("hello", (&false.into(), &false.into())));
    let census = viewer.next_of("sockets").data;
    let services = census["sockets"]["services"].as_array().unwrap();
    assert!(
        services.iter().any(|service| service["role"] == "server" && service["port"] == port.as_str()),
        "{services:?}"
    );
    assert!(census["lost"]["missed"].is_u64(), "{census}");
    assert_eq!(watch.metrics().sum("echoscope_viewers", &[]), 1.0);
    for path in ["/", "/api/states", "/page/app.js"] {
        assert_eq!(get(watch.web(), path).0, 200, "{path}");
    }
}

#[test]
#[ignore = "needs CAP_BPF and CAP_PERFMON"]
fn a_watch_to_which_the_kernel_announces_tells_each_change_of_others() {
    let server = server();
    let address = server.server();
    let port = address.port().to_string();
    let watch = Echoscope::start(&["--observer", "ebpf", "watch", "--port", &port]);
    let mut viewer = Viewer::of(watch.web());
    let hello = viewer.next_of("hello").data;
    assert_eq!((&hello["transitions"], &hello["lives"]), (&true.into(), &false.into()));
    drop(TcpStream::connect(address).unwrap());
    let mut lines = Vec::new();
    while !lines.contains(&("LAST_ACK".to_owned(), "CLOSED".to_owned())) {
        let batch = viewer.next_of("walked").data;
        let walks = batch["walks"].as_array().unwrap();
        assert!(walks.iter().all(|walk| walk[3] == "tracepoint"), "{walks:?}");
        let text = |line: &Value, name: &str| line[name].as_str().unwrap().to_owned();
        lines.extend(batch["lines"].as_array().unwrap().iter().map(|l| (text(l, "from"), text(l, "to"))));
    }
    let steps = ["LISTEN", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSED"];
    let expected: Vec<_> = steps.windows(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect();
    assert_eq!(lines, expected, "of the port that is watched, and of nothing else");
}

#[test]
fn both_ends_of_a_connection_are_found_by_either() {
    let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0", "--count", "3", "--until-gone"]);
    let lives = |query: &str| -> Vec<Value> {
        serde_json::from_str(&get(pair.web(), &format!("/api/connections?{query}")).1).unwrap()
    };
    until("three lives at both ends", || {
        (lives("role=server&state=CLOSED&outcome=graceful").len() == 3
            && lives("role=client&state=TIME_WAIT").len() == 3)
            .then_some(())
    });
    for client in lives("role=client") {
        let both = lives(&format!("conn={}", client["conn"].as_str().unwrap()));
        assert_eq!(both.len(), 2, "{both:?}");
        assert_eq!(
            (&both[0]["conn"], &both[0]["local"], &both[0]["began"]),
            (&client["conn"], &both[1]["peer"], &"CLOSED".into())
        );
        let back = lives(&format!("conn={}", both[1]["conn"].as_str().unwrap()));
        assert_eq!((back.len(), &back[1]["conn"], &back[0]["began"]), (2, &client["conn"], &"LISTEN".into()));
    }
    assert!(lives("conn=0").is_empty() && lives("outcome=reset").is_empty());
}
