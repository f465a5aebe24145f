//! What can be typed. The text of `--help` is here, and every default.

use std::net::SocketAddr;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::values::{Rate, Sizes, Span, StateName, TargetName, WebAddress};
use crate::kernel::Observer;
use crate::shutdown::DrainConfig;

/// See every TCP connection live its life.
///
/// An echo server and a client make real connections and close them gracefully; every state change is logged with who
/// saw it, every socket is counted by state from the kernel's own table, as Prometheus metrics. Without a command:
/// pair.
#[derive(Debug, Parser)]
#[command(name = "echoscope", version, max_term_width = 110)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: GlobalArgs,
    #[command(subcommand)]
    pub(super) command: Option<Command>,
}

#[derive(Debug, Args)]
pub(super) struct GlobalArgs {
    /// Where to serve metrics and health: IP:PORT, :PORT for every address, or none.
    #[arg(
        long = "web.listen-address",
        env = "ECHOSCOPE_WEB_LISTEN_ADDRESS",
        default_value = "127.0.0.1:9907",
        value_name = "ADDRESS",
        global = true
    )]
    pub(super) web_listen_address: WebAddress,
    /// The least severe level that is logged; state changes are at info.
    #[arg(
        long = "log.level",
        env = "ECHOSCOPE_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL",
        global = true
    )]
    pub(super) log_level: LogLevel,
    /// How to log to stderr; auto: terminal where it is one, else json.
    #[arg(
        long = "log.format",
        env = "ECHOSCOPE_LOG_FORMAT",
        default_value = "auto",
        value_name = "FORMAT",
        global = true
    )]
    pub(super) log_format: LogFormat,
    /// Who sees what the sockets do: the kernel's own announcements (ebpf: CAP_BPF and CAP_PERFMON), its socket table by
    /// netlink (sock_diag) or as text (procfs); auto: the best permitted.
    #[arg(long, env = "ECHOSCOPE_OBSERVER", default_value = "auto", global = true)]
    pub(super) observer: ObserverArg,
    /// How many closed connections to follow to their end at once (about 700 bytes each); 0: none.
    #[arg(long, env = "ECHOSCOPE_FOLLOW_LIMIT", default_value_t = 200_000, value_name = "N", value_parser = up_to::<0, 100_000_000>, global = true)]
    pub(super) follow_limit: usize,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Server and client in one process over loopback, at a human pace.
    Pair(PairArgs),
    /// The echo service (RFC 862).
    Server(ServerArgs),
    /// One or many targets, connected to again and again, every echo verified.
    Client(ClientArgs),
    /// Count and age the sockets of every listener in this network namespace, whoever owns them.
    Watch(WatchArgs),
    /// Make a real kernel show a state or a failure, and explain it; without a name: what there is to see.
    Lab(LabArgs),
    /// What a state means: who waits for whom, how long it may last here, what piles it up, what to do.
    Explain {
        /// TIME_WAIT, time-wait, timewait, …; without one: the state diagram.
        state: Option<StateName>,
        /// How to print it; markdown leaves out what this machine's settings are.
        #[arg(long, env = "ECHOSCOPE_OUTPUT", default_value = "text", value_name = "FORMAT")]
        output: PageFormat,
    },
    /// Exit 0 when a running echoscope is ready, 1 when it is not: for a container's healthcheck.
    Health {
        /// What to ask; without it, /-/ready at --web.listen-address.
        url: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Only these listening ports [default: every one], told of though nobody listens; the web side's own is left out.
    #[arg(long = "port", env = "ECHOSCOPE_WATCH_PORTS", value_name = "PORT", value_delimiter = ',')]
    pub(super) ports: Vec<u16>,
    /// Not these listening ports.
    #[arg(long = "ignore-port", env = "ECHOSCOPE_IGNORE_PORTS", value_name = "PORT", value_delimiter = ',')]
    pub(super) ignore_ports: Vec<u16>,
    /// Tell connections going out to this remote port apart; all others are counted together, as port other.
    #[arg(long = "remote-port", env = "ECHOSCOPE_REMOTE_PORTS", value_name = "PORT", value_delimiter = ',')]
    pub(super) remote_ports: Vec<u16>,
    /// How often the table is read.
    #[arg(long, env = "ECHOSCOPE_INTERVAL", default_value = "1s", value_name = "DURATION")]
    pub(super) interval: Span,
    /// Print one reading and what looks wrong in it, and exit: 0 nothing, 1 something, 2 something bad, 3 it could not look.
    #[arg(long, env = "ECHOSCOPE_ONCE", value_parser = BoolishValueParser::new(), conflicts_with = "live")]
    pub(super) once: bool,
    /// Print readings again and again on a terminal.
    #[arg(long, env = "ECHOSCOPE_LIVE", value_parser = BoolishValueParser::new())]
    pub(super) live: bool,
    /// A socket in CLOSE_WAIT for so long looks wrong.
    #[arg(long, env = "ECHOSCOPE_WARN", default_value = "1m", value_name = "DURATION")]
    pub(super) warn: Span,
    /// A socket in CLOSE_WAIT for so long is bad.
    #[arg(long, env = "ECHOSCOPE_CRIT", default_value = "15m", value_name = "DURATION")]
    pub(super) crit: Span,
    /// How to print with --once.
    #[arg(long, env = "ECHOSCOPE_OUTPUT", default_value = "text", value_name = "FORMAT")]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct LabArgs {
    /// Which scenarios to play, one after the other; all: every one.
    #[arg(value_name = "SCENARIO")]
    pub(super) scenarios: Vec<String>,
    /// Hold each picture for so long, to look at it from elsewhere.
    #[arg(long, env = "ECHOSCOPE_HOLD", default_value = "0s", value_name = "DURATION")]
    pub(super) hold: Span,
    /// How to print the verdict to stdout.
    #[arg(long, env = "ECHOSCOPE_OUTPUT", default_value = "text", value_name = "FORMAT")]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct PairArgs {
    /// Where the server listens; port 0 picks a free one.
    #[arg(long, env = "ECHOSCOPE_LISTEN", default_value = "127.0.0.1:7007", value_name = "IP:PORT")]
    pub(super) listen: SocketAddr,
    #[command(flatten)]
    pub(super) serve: ServeArgs,
    #[command(flatten)]
    pub(super) load: LoadArgs,
    #[command(flatten)]
    pub(super) drain: DrainArgs,
}

#[derive(Debug, Args)]
pub(super) struct ServerArgs {
    /// Where to listen; an IPv6 wildcard takes IPv4 too. Default: every address, port 7007, IPv4 only where there is
    /// no IPv6.
    #[arg(long, env = "ECHOSCOPE_LISTEN", value_name = "IP:PORT")]
    pub(super) listen: Option<SocketAddr>,
    /// Observe and narrate the states of each connection. Off, connections are served and counted only: the difference
    /// is what watching costs.
    #[arg(long, env = "ECHOSCOPE_LIFECYCLES", default_value = "on", value_name = "ON|OFF")]
    pub(super) lifecycles: Lifecycles,
    #[command(flatten)]
    pub(super) serve: ServeArgs,
    #[command(flatten)]
    pub(super) drain: DrainArgs,
}

#[derive(Debug, Args)]
pub(super) struct ClientArgs {
    /// Where to connect; names are resolved again and again.
    #[arg(value_name = "HOST:PORT", required = true, env = "ECHOSCOPE_TARGETS", value_delimiter = ',')]
    pub(super) targets: Vec<TargetName>,
    #[command(flatten)]
    pub(super) load: LoadArgs,
    #[command(flatten)]
    pub(super) drain: DrainArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub(super) struct ServeArgs {
    /// Connections served at once; more wait in the backlog. 0: the descriptor limit less a reserve for the rest of
    /// the process.
    #[arg(long, env = "ECHOSCOPE_MAX_CONNECTIONS", default_value_t = 0, value_name = "N")]
    pub(super) max_connections: usize,
    /// Close connections whose peer has been silent for so long [default: never].
    #[arg(long, env = "ECHOSCOPE_IDLE_TIMEOUT", value_name = "DURATION")]
    pub(super) idle_timeout: Option<Span>,
    /// How many connections may wait for accept; the kernel caps it at net.core.somaxconn.
    #[arg(long, env = "ECHOSCOPE_ACCEPT_BACKLOG", default_value_t = 1024, value_name = "N")]
    pub(super) accept_backlog: u32,
    /// Stay in CLOSE_WAIT for so long before answering a FIN [default: 300ms for a pair that somebody watches, else
    /// 0s].
    #[arg(long, env = "ECHOSCOPE_CLOSE_DELAY", value_name = "DURATION")]
    pub(super) close_delay: Option<Span>,
    /// One runtime shared by all workers (cores are shared), or one for each with a listening socket of its own
    /// (cores are ours).
    #[arg(long, env = "ECHOSCOPE_RUNTIME", default_value = "shared", value_name = "SHAPE")]
    pub(super) runtime: RuntimeShape,
    /// How many workers [default: one a core, at least two when shared: a single one is unfair at many connections].
    #[arg(long, env = "ECHOSCOPE_WORKERS", value_name = "N", value_parser = up_to::<1, 1024>)]
    pub(super) workers: Option<usize>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Client")]
pub(super) struct LoadArgs {
    /// How many connections at once.
    #[arg(long, env = "ECHOSCOPE_CONNECTIONS", default_value_t = 2, value_name = "N", value_parser = up_to::<1, 1_000_000>)]
    pub(super) connections: usize,
    /// Opens a second over all connections, or max. Late opens are measured from when they were due [default: 1 for
    /// each of --connections; max with --count].
    #[arg(long, env = "ECHOSCOPE_RATE", value_name = "N", allow_hyphen_values = true)]
    pub(super) rate: Option<Rate>,
    /// Echoes on each connection.
    #[arg(long, env = "ECHOSCOPE_MESSAGES", default_value_t = 3, value_name = "N")]
    pub(super) messages: u64,
    /// Payload bytes of each: 64, 16k, 1M, or a range to draw from, 64..1024.
    #[arg(long, env = "ECHOSCOPE_MESSAGE_SIZE", default_value = "64", value_name = "BYTES")]
    pub(super) message_size: Sizes,
    /// Pause between two echoes [default: 250ms; 0s with --count].
    #[arg(long, env = "ECHOSCOPE_THINK_TIME", value_name = "DURATION")]
    pub(super) think_time: Option<Span>,
    /// Stay open for so long after the last echo.
    #[arg(long, env = "ECHOSCOPE_HOLD", default_value = "0s", value_name = "DURATION")]
    pub(super) hold: Span,
    /// Open so many connections in all, then end.
    #[arg(long, env = "ECHOSCOPE_COUNT", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) count: Option<u64>,
    /// Open connections for so long, then end.
    #[arg(long, env = "ECHOSCOPE_DURATION", value_name = "DURATION")]
    pub(super) duration: Option<Span>,
    /// How to close.
    #[arg(long, env = "ECHOSCOPE_CLOSE", default_value = "graceful", value_name = "MODE")]
    pub(super) close: CloseMode,
    /// How long a handshake may take.
    #[arg(long, env = "ECHOSCOPE_CONNECT_TIMEOUT", default_value = "5s", value_name = "DURATION")]
    pub(super) connect_timeout: Span,
    /// How long an echo may take.
    #[arg(long, env = "ECHOSCOPE_ECHO_TIMEOUT", default_value = "10s", value_name = "DURATION")]
    pub(super) echo_timeout: Span,
    /// How long to wait for the peer's FIN.
    #[arg(long, env = "ECHOSCOPE_CLOSE_TIMEOUT", default_value = "10s", value_name = "DURATION")]
    pub(super) close_timeout: Span,
    /// How often a refused open is tried again, after 100 ms, 200 ms, 400 ms and so on up to 5 s.
    #[arg(long, env = "ECHOSCOPE_RETRIES", default_value_t = 5, value_name = "N")]
    pub(super) retries: u32,
    /// How long a resolved name is used before it is resolved again; a failed open resolves at once.
    #[arg(long, env = "ECHOSCOPE_RESOLVE_INTERVAL", default_value = "30s", value_name = "DURATION")]
    pub(super) resolve_interval: Span,
    /// At the end, wait until the kernel has let go of every socket (TIME_WAIT: a minute).
    #[arg(long, env = "ECHOSCOPE_UNTIL_GONE", value_parser = BoolishValueParser::new())]
    pub(super) until_gone: bool,
    /// How to print the summary to stdout.
    #[arg(long, env = "ECHOSCOPE_OUTPUT", default_value = "text", value_name = "FORMAT")]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Shutdown")]
pub(super) struct DrainArgs {
    /// After SIGTERM, go on as usual for so long, not ready, so that load balancers notice.
    #[arg(long, env = "ECHOSCOPE_DRAIN_DELAY", default_value = "0s", value_name = "DURATION")]
    drain_delay: Span,
    /// Then finish within so long; what is left is reset, counted, and makes the exit code 1.
    #[arg(long, env = "ECHOSCOPE_DRAIN_TIMEOUT", default_value = "10s", value_name = "DURATION")]
    drain_timeout: Span,
}

impl From<DrainArgs> for DrainConfig {
    fn from(args: DrainArgs) -> DrainConfig {
        DrainConfig { delay: args.drain_delay.into(), timeout: args.drain_timeout.into() }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> tracing::Level {
        match level {
            LogLevel::Trace => tracing::Level::TRACE,
            LogLevel::Debug => tracing::Level::DEBUG,
            LogLevel::Info => tracing::Level::INFO,
            LogLevel::Warn => tracing::Level::WARN,
            LogLevel::Error => tracing::Level::ERROR,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum LogFormat {
    Auto,
    Terminal,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum ObserverArg {
    Auto,
    Ebpf,
    #[value(name = "sock_diag")]
    SockDiag,
    Procfs,
}

impl From<ObserverArg> for Option<Observer> {
    fn from(arg: ObserverArg) -> Option<Observer> {
        match arg {
            ObserverArg::Auto => None,
            ObserverArg::Ebpf => Some(Observer::Ebpf),
            ObserverArg::SockDiag => Some(Observer::SockDiag),
            ObserverArg::Procfs => Some(Observer::Procfs),
        }
    }
}

/// How the server's work is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RuntimeShape {
    /// One runtime, its workers share everything.
    Shared,
    /// One runtime for each worker, each with its own listening socket (SO_REUSEPORT).
    PerCore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Lifecycles {
    On,
    Off,
}

/// How the client closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CloseMode {
    /// Our FIN first: this end waits in TIME_WAIT.
    Graceful,
    /// A RST: no TIME_WAIT at either end.
    Reset,
    /// Wait for the server's FIN (its --idle-timeout): it waits in TIME_WAIT.
    ServerFirst,
}

/// How the summary is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For a person.
    Text,
    /// For a script.
    Json,
}

/// How an explanation is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PageFormat {
    /// For a person at a terminal.
    Text,
    /// For a document.
    Markdown,
    /// For a script.
    Json,
}

/// A number between two bounds, both included.
fn up_to<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (LEAST..=MOST).contains(n));
    number.ok_or_else(|| format!("expected a number from {LEAST} to {MOST}"))
}
