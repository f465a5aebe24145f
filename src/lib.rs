//! echoscope: see every TCP connection live its life.
//!
//! An echo server and a client make real connections and close them gracefully. Every state change is logged with who
//! saw it, every socket is counted by state from the kernel's own table, and both are exported for Prometheus.
//!
//! # The floors; imports only go down
//! ```text
//! 4  main.rs        parse, start the logs, run, exit code
//! 3  app.rs         the life of the process: bind, observe, start the roles, wait, drain, stop
//! 2  server.rs      accept, echo, half-close, drain            the five never import each other
//!    client.rs      connect, send, verify, close; pacing; summary
//!    lab.rs         scenarios: a real kernel shows a state or a failure on demand
//!    watch.rs       every other service's sockets, for Prometheus, scripts and people
//!    web.rs         metrics, health, census and lives as JSON, the live page and its events
//! 1  conn.rs        Conn: a TCP stream that narrates its own life; all roles use it
//!    afterlife.rs   follows a connection after close(2): LAST_ACK, FIN_WAIT2, TIME_WAIT, really gone
//!    census.rs      sockets counted by (role, port, state), one reading for any number of scrapers
//!    survey.rs      the sockets of every listener in this namespace, whoever owns them
//!    journal.rs     THE choke point: a transition in, its log line, counters, ledger entry and live event out
//!    live.rs        what happens, in batches, for whoever looks
//!    lives.rs       whole lives, driven by what the kernel itself announces (eBPF)
//!    ledger.rs      who is alive, in which state since when; the last lives that ended
//!    scope.rs       what this process looks at: its roles, their ports, its targets
//!    metrics.rs     every metric, made once against its own registry
//!    listener.rs    listening sockets, and accepting from them whatever happens
//!    explain.rs     what each state means: one table, told as text, Markdown or JSON
//!    source.rs      what a web side tells of, whatever is looked at
//!    config.rs      what was typed → plain role configurations
//!    progress.rs    the bar of a bounded run that somebody watches
//!    shutdown.rs    signals, the stop token
//!    thread.rs      threads with an event loop of their own
//!    log.rs         the subscriber: terminal and JSON, a bounded queue
//! 0  tcp.rs         State, Evidence, Transition, Lifecycle: pure, no clock, no I/O
//!    kernel.rs      the only `unsafe`: TCP_INFO, SO_COOKIE, sock_diag, eBPF, /proc, BPF filters
//! ```
//!
//! # How an observation travels
//! ```text
//! kernel ──TCP_INFO──▶ Conn ─────▶ Lifecycle::observe ──Transitions──▶ Journal ──▶ log line
//!    │                   │ close(2)                                      │ ├─────▶ counters, histograms
//!    │                   │                                               │ ├─────▶ Live ──▶ /events, ten times a second
//!    ├──sock_diag──▶ Afterlife ──▶ Lifecycle::observe ──Transitions──────┘ └─────▶ Ledger ──▶ /api/connections
//!    └──sock_diag──▶ Census ──────────────────────────────────────────▶ gauges at scrape time, /events once a second
//! ```
//! Where the kernel announces each change (eBPF), it comes by one way instead:
//! ```text
//! kernel ──ring──▶ Afterlife's witness ──▶ Lives ──▶ Lifecycle::observe ──Transitions──▶ Journal ──▶ …
//!    └────counts──▶ Tally ──▶ Census ──▶ gauges at scrape time
//! ```
//!
//! # Reading order
//! [`tcp`] (what can happen), [`conn`] (how it is seen), [`afterlife`] (what happens after close), [`server`], [`app`].

#[cfg(not(target_os = "linux"))]
compile_error!("echoscope reads the Linux kernel's own tables: it builds on Linux only");

pub mod afterlife;
pub mod app;
pub mod census;
pub mod client;
pub mod config;
pub mod conn;
pub mod explain;
pub mod journal;
pub mod kernel;
pub mod lab;
pub mod ledger;
pub mod listener;
pub mod live;
mod lives;
pub mod log;
pub mod metrics;
pub mod progress;
pub mod scope;
pub mod server;
pub mod shutdown;
pub mod source;
pub mod survey;
pub mod tcp;
mod thread;
pub mod watch;
pub mod web;
