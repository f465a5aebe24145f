//! What was typed, and what it means: clap types in, plain role configurations out. Nobody else reads argv or the
//! environment.

mod args;
mod values;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, error::ErrorKind};
use tracing::Level;

use crate::kernel::Observer;
use crate::log::{Format, LogConfig};
use crate::shutdown::DrainConfig;
use crate::tcp::State;
use args::{Cli, ClientArgs, Command, LabArgs, Lifecycles, LoadArgs, LogFormat, PairArgs, ServeArgs, WatchArgs};
pub use args::{CloseMode, Output, PageFormat, RuntimeShape};
pub use values::TargetName;

/// Everything that one run needs to know.
#[derive(Debug)]
pub struct Config {
    /// What to do.
    pub mode: Mode,
    /// How to log.
    pub log: LogConfig,
    /// What all roles share.
    pub common: Common,
}

/// What all roles share.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    /// Where to serve metrics; `None`: nowhere.
    pub web: Option<SocketAddr>,
    /// How to read the socket table; `None`: the best permitted.
    pub observer: Option<Observer>,
    /// How many closed connections to follow at most.
    pub follow_limit: usize,
}

/// What to do.
#[derive(Debug)]
pub enum Mode {
    /// A server, a client, or both.
    Run(Box<Roles>),
    /// Play scenarios in the lab, or list them.
    Lab(LabConfig),
    /// Watch the sockets of others.
    Watch(WatchConfig),
    /// Explain a state, or all of them.
    Explain {
        /// Which; `None`: all.
        state: Option<State>,
        /// How to print it.
        format: PageFormat,
        /// Whether stdout is for colours.
        colour: bool,
    },
    /// Ask a running one whether it is ready.
    Health {
        /// Where to ask.
        url: String,
    },
}

/// How a watch tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchMode {
    /// To Prometheus, until it is stopped.
    Serve,
    /// Once, to stdout.
    Once,
    /// Again and again, to a terminal.
    Live,
}

/// The watch.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// Only these listening ports; none: every one.
    pub only: Vec<u16>,
    /// Not these.
    pub ignore: Vec<u16>,
    /// The remote ports that are told apart.
    pub remote: Vec<u16>,
    /// How often the table is read.
    pub interval: Duration,
    /// How it tells.
    pub mode: WatchMode,
    /// From which age on CLOSE_WAIT looks wrong.
    pub warn: Duration,
    /// From which age on it is bad.
    pub crit: Duration,
    /// How it is printed once.
    pub output: Output,
}

/// The lab.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// The scenarios' names, as they were typed; none: list them.
    pub scenarios: Vec<String>,
    /// How long to hold each picture.
    pub hold: Duration,
    /// How to print the verdicts.
    pub output: Output,
}

/// The roles of this process.
#[derive(Debug)]
pub struct Roles {
    /// The echo service, if any.
    pub server: Option<ServerConfig>,
    /// The client, if any.
    pub client: Option<ClientConfig>,
    /// How the end is timed.
    pub drain: DrainConfig,
}

/// The echo service.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Whether that is the default, which gives way to IPv4 where there is no IPv6.
    pub listen_is_default: bool,
    /// Connections served at once; more wait in the backlog. `None`: what the descriptor limit allows.
    pub max_connections: Option<usize>,
    /// How long a silent peer is kept.
    pub idle_timeout: Option<Duration>,
    /// How many connections may wait for accept(2), for each listening socket.
    pub backlog: u32,
    /// How long to stay in CLOSE_WAIT before our own FIN.
    pub close_delay: Duration,
    /// Whether connections are observed, or served and counted only.
    pub lifecycles: bool,
    /// One shared runtime, or one for each worker.
    pub shape: RuntimeShape,
    /// How many workers.
    pub workers: usize,
}

/// The client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where to connect. Empty for the pair, which connects to itself.
    pub targets: Vec<TargetName>,
    /// How many connections at once.
    pub connections: usize,
    /// Opens a second; `None`: as many as go.
    pub rate: Option<f64>,
    /// Echoes on each connection.
    pub messages: u64,
    /// Payload bytes of each.
    pub message_size: RangeInclusive<usize>,
    /// Pause between echoes.
    pub think_time: Duration,
    /// How long to stay open after the last echo.
    pub hold: Duration,
    /// Opens in all.
    pub count: Option<u64>,
    /// How long to open.
    pub duration: Option<Duration>,
    /// How to close.
    pub close: CloseMode,
    /// For the handshake.
    pub connect_timeout: Duration,
    /// For each echo.
    pub echo_timeout: Duration,
    /// For the peer's FIN.
    pub close_timeout: Duration,
    /// How often a refused open is tried again.
    pub retries: u32,
    /// How long a resolved name is good.
    pub resolve_interval: Duration,
    /// Whether to wait, at the end, until the kernel has let go of every socket.
    pub until_gone: bool,
    /// How to print the summary.
    pub output: Output,
}

impl Config {
    /// How many threads the shared runtime needs: the server's workers, when they share it.
    #[must_use]
    pub fn workers(&self) -> usize {
        let server = match &self.mode {
            Mode::Run(roles) => roles.server.as_ref(),
            Mode::Lab(_) | Mode::Watch(_) | Mode::Explain { .. } | Mode::Health { .. } => None,
        };
        server.filter(|server| server.shape == RuntimeShape::Shared).map_or(2, |server| server.workers)
    }

    /// Reads the command line and the environment.
    ///
    /// # Errors
    /// What clap says: also for `--help` and `--version`. Its `exit()` prints it and ends with 2 for a mistake.
    pub fn from_env() -> Result<Config, clap::Error> {
        Config::parse(std::env::args_os())
    }

    fn parse(argv: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Config, clap::Error> {
        let argv: Vec<_> = argv.into_iter().collect();
        // Without a command it is the pair; parsed as such, so that its flags and their environment count too.
        let as_pair = || read(argv.iter().take(1).cloned().chain(["pair".into()]).chain(argv.iter().skip(1).cloned()));
        let cli = match read(argv.iter().cloned()) {
            Ok(Cli { command: None, .. }) => as_pair()?,
            Err(error) if error.kind() == ErrorKind::UnknownArgument => match as_pair() {
                Err(second) if second.kind() == ErrorKind::UnknownArgument => return Err(error),
                read_as_pair => read_as_pair?,
            },
            read => read?,
        };
        let command = cli.command.ok_or_else(|| mistake("no command"))?;
        let global = cli.global;
        let stderr_is_terminal = std::io::stderr().is_terminal();
        let format = match global.log_format {
            LogFormat::Json => Format::Json,
            LogFormat::Auto if !stderr_is_terminal => Format::Json,
            LogFormat::Auto | LogFormat::Terminal => Format::Terminal { colour: coloured(stderr_is_terminal) },
        };
        let web = global.web_listen_address.0;
        Ok(Config {
            mode: command.into_mode(web)?,
            log: LogConfig { level: Level::from(global.log_level), format },
            common: Common { web, observer: global.observer.into(), follow_limit: global.follow_limit },
        })
    }
}

/// Whether to use colours on an output that is a terminal, or is not (<https://no-color.org>: any
/// value that is not empty).
fn coloured(is_terminal: bool) -> bool {
    is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn read(argv: impl Iterator<Item = std::ffi::OsString>) -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&definition().try_get_matches_from(argv)?)
}

/// The command line, where a variable that is set to nothing is not set: deployment files often cannot leave one out.
fn definition() -> clap::Command {
    fn heed(arg: clap::Arg) -> clap::Arg {
        let empty = arg.get_env().is_some_and(|name| std::env::var_os(name).is_some_and(|value| value.is_empty()));
        if empty { arg.env(None::<&'static str>) } else { arg }
    }
    Cli::command().mut_args(heed).mut_subcommands(|command| command.mut_args(heed))
}

impl Command {
    fn into_mode(self, web: Option<SocketAddr>) -> Result<Mode, clap::Error> {
        Ok(match self {
            Command::Pair(args) => pair(args)?,
            Command::Server(args) => {
                let default = "[::]:7007";
                let listen_is_default = args.listen.is_none();
                let listen = args.listen.map_or_else(|| default.parse().map_err(|_| mistake(default)), Ok)?;
                let idle = optional(args.serve.idle_timeout.map(Duration::from));
                let server = ServerConfig {
                    lifecycles: args.lifecycles == Lifecycles::On,
                    ..server(&args.serve, listen, listen_is_default, idle, Duration::ZERO)
                };
                Mode::Run(Box::new(Roles { server: Some(server), client: None, drain: args.drain.into() }))
            }
            Command::Client(ClientArgs { targets, load, drain }) => {
                let client = client(&load, targets)?;
                Mode::Run(Box::new(Roles { server: None, client: Some(client), drain: drain.into() }))
            }
            Command::Watch(args) => Mode::Watch(watch(args)?),
            Command::Lab(LabArgs { scenarios, hold, output }) => {
                Mode::Lab(LabConfig { scenarios, hold: hold.into(), output })
            }
            Command::Explain { state, output } => Mode::Explain {
                state: state.map(|name| name.0),
                format: output,
                colour: coloured(std::io::stdout().is_terminal()),
            },
            Command::Health { url: Some(url) } => {
                if !url.starts_with("http://") {
                    return Err(mistake(&format!("invalid value '{url}' for '[URL]': only http:// is spoken here")));
                }
                Mode::Health { url }
            }
            Command::Health { url: None } => {
                let Some(address) = web else {
                    return Err(mistake("health needs a URL when --web.listen-address is none"));
                };
                Mode::Health { url: format!("http://{}/-/ready", reachable(address)) }
            }
        })
    }
}

/// The address by which this host reaches a listener on `address`.
#[must_use]
pub fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        // A dual-stack listener answers IPv4 too, also where the host has no IPv6 loopback.
        return SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, address.port()));
    }
    address
}

/// How long the pair's server stays in CLOSE_WAIT at a human pace: longer than a delayed ACK (40 ms), so that
/// FIN_WAIT2 shows too.
const VISIBLE_CLOSE_DELAY: Duration = Duration::from_millis(300);

/// The idle timeout by which the pair's server closes first, when it is asked to and not told when.
const SERVER_FIRST_IDLE: Duration = Duration::from_millis(500);

fn pair(args: PairArgs) -> Result<Mode, clap::Error> {
    let client = client(&args.load, Vec::new())?;
    let listen = args.listen;
    let server_first = client.close == CloseMode::ServerFirst;
    let idle = match args.serve.idle_timeout.map(Duration::from) {
        Some(Duration::ZERO) if server_first => {
            return Err(mistake("'--close server-first' needs a server that closes: '--idle-timeout 0s' never does"));
        }
        None if server_first => Some(SERVER_FIRST_IDLE),
        given => optional(given),
    };
    let visible = if client.count.is_none() { VISIBLE_CLOSE_DELAY } else { Duration::ZERO };
    let server = server(&args.serve, listen, false, idle, visible);
    Ok(Mode::Run(Box::new(Roles { server: Some(server), client: Some(client), drain: args.drain.into() })))
}

fn watch(args: WatchArgs) -> Result<WatchConfig, clap::Error> {
    let (interval, warn, crit) = (Duration::from(args.interval), Duration::from(args.warn), Duration::from(args.crit));
    if interval < Duration::from_millis(10) {
        return Err(mistake(&format!("'--interval {interval:?}' is too short: 10ms at least")));
    }
    if warn > crit {
        return Err(mistake(&format!("'--warn {warn:?}' is longer than '--crit {crit:?}'")));
    }
    if !args.ports.is_empty() && args.ports.iter().all(|port| args.ignore_ports.contains(port)) {
        let port = args.ports[0];
        return Err(mistake(&format!("'--port {port}' and '--ignore-port {port}' leave nothing to watch")));
    }
    let mode = match (args.once, args.live) {
        (true, _) => WatchMode::Once,
        (_, true) => WatchMode::Live,
        _ => WatchMode::Serve,
    };
    Ok(WatchConfig {
        only: args.ports,
        ignore: args.ignore_ports,
        remote: args.remote_ports,
        interval,
        mode,
        warn,
        crit,
        output: args.output,
    })
}

fn optional(duration: Option<Duration>) -> Option<Duration> {
    duration.filter(|d| !d.is_zero())
}

fn server(
    args: &ServeArgs,
    listen: SocketAddr,
    listen_is_default: bool,
    idle_timeout: Option<Duration>,
    close_delay: Duration,
) -> ServerConfig {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let least = if args.runtime == RuntimeShape::Shared { 2 } else { 1 };
    ServerConfig {
        listen,
        listen_is_default,
        max_connections: Some(args.max_connections).filter(|n| *n > 0),
        idle_timeout,
        backlog: args.accept_backlog,
        close_delay: args.close_delay.map_or(close_delay, Duration::from),
        lifecycles: true,
        shape: args.runtime,
        workers: args.workers.unwrap_or(cores.max(least)),
    }
}

/// Opens a second of each of `--connections` at a human pace, and the pause between two echoes.
const HUMAN_RATE: f64 = 1.0;
const HUMAN_THINK_TIME: Duration = Duration::from_millis(250);

fn client(args: &LoadArgs, targets: Vec<TargetName>) -> Result<ClientConfig, clap::Error> {
    if args.until_gone && args.count.is_none() && args.duration.is_none() {
        return Err(mistake(
            "'--until-gone' waits at the end of a run, and this one has none: give '--count' or '--duration'",
        ));
    }
    // Without a number to reach, somebody watches: a human pace. With one, somebody waits.
    let watched = args.count.is_none();
    let human_rate = watched.then_some(HUMAN_RATE * args.connections as f64);
    let mut sorted = targets.clone();
    sorted.sort_unstable();
    let before = sorted.len();
    sorted.dedup();
    if sorted.len() < before {
        let given: Vec<String> = targets.iter().map(ToString::to_string).collect();
        return Err(mistake(&format!("a target is given twice: '{}'", given.join(" "))));
    }
    Ok(ClientConfig {
        targets,
        connections: args.connections,
        rate: args.rate.map_or(human_rate, |rate| rate.0),
        messages: args.messages,
        message_size: args.message_size.0.clone(),
        think_time: args.think_time.map_or(if watched { HUMAN_THINK_TIME } else { Duration::ZERO }, Duration::from),
        hold: args.hold.into(),
        count: args.count,
        duration: args.duration.map(Duration::from),
        close: args.close,
        connect_timeout: args.connect_timeout.into(),
        echo_timeout: args.echo_timeout.into(),
        close_timeout: args.close_timeout.into(),
        retries: args.retries,
        resolve_interval: args.resolve_interval.into(),
        until_gone: args.until_gone,
        output: args.output,
    })
}

/// A mistake in what was typed; its `exit()` prints it and ends with 2.
#[must_use]
pub fn mistake(message: &str) -> clap::Error {
    Cli::command().error(ErrorKind::ArgumentConflict, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Config, clap::Error> {
        Config::parse(std::iter::once("echoscope").chain(line.split_whitespace()).map(Into::into))
    }

    fn roles(line: &str) -> Roles {
        match parse(line).unwrap().mode {
            Mode::Run(roles) => *roles,
            mode => panic!("a role was expected: {mode:?}"),
        }
    }

    #[test]
    fn alone_it_is_the_pair_at_a_human_pace() {
        let alone = roles("");
        let (server, client) = (alone.server.unwrap(), alone.client.unwrap());
        assert_eq!(client.rate, Some(client.connections as f64));
        assert!(server.close_delay > Duration::from_millis(40), "FIN_WAIT2 must show");
        assert_eq!(server.listen.to_string(), "127.0.0.1:7007");
    }

    #[test]
    fn alone_it_takes_the_flags_of_the_pair() {
        let bare = roles("--log.format json --count 7 --close-delay 1s");
        assert_eq!(bare.client.unwrap().count, Some(7));
        assert_eq!(bare.server.unwrap().close_delay, Duration::from_secs(1));
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let long = arg.get_long().unwrap_or_default();
                if !matches!(long, "help" | "version") {
                    // Lists are called so; and what ends with _PORT, Kubernetes itself sets beside a service of that name.
                    let long = match long {
                        "port" => "watch-ports",
                        "ignore-port" => "ignore-ports",
                        "remote-port" => "remote-ports",
                        other => other,
                    };
                    let expected = format!("ECHOSCOPE_{}", long.replace(['-', '.'], "_").to_uppercase());
                    assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(expected.as_str()), "--{long}");
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn with_a_count_it_goes_as_fast_as_it_can() {
        let bounded = roles("pair --connections 8 --count 200 --duration 30s");
        let (server, client) = (bounded.server.unwrap(), bounded.client.unwrap());
        assert_eq!((client.rate, client.think_time, server.close_delay), (None, Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn global_flags_work_on_both_sides_of_the_command() {
        for line in ["--web.listen-address none server", "server --web.listen-address none"] {
            assert_eq!(parse(line).unwrap().common.web, None, "{line}");
        }
    }

    #[test]
    fn mistakes_name_the_flag_and_the_value() {
        for (line, named) in [
            ("server --listen nowhere", "nowhere"),
            ("server --bogus", "--bogus"),
            ("client", "HOST:PORT"),
            ("client localhost", "localhost"),
            ("client localhost:0", "localhost:0"),
            ("client a:1 a:1", "a:1"),
            ("client a:1 --message-size 9..3", "9..3"),
            ("client a:1 --message-size 0", "--message-size"),
            ("client a:1 --rate -1", "--rate"),
            ("client a:1 --rate 0", "--rate"),
            ("client a:1 --count 0", "--count"),
            ("client a:1 --connections 0", "--connections"),
            ("client a:1 --duration soon", "soon"),
            ("pair --close server-first --idle-timeout 0s", "--idle-timeout"),
            ("client a:1 --until-gone", "--until-gone"),
            ("--count 0", "--count"),
            ("--count 5 --bogus", "--count"),
            ("--workers 100000", "--workers"),
            ("server --drain-timeout 18446744073709551615s", "--drain-timeout"),
            ("server --follow-limit 18446744073709551615", "--follow-limit"),
            ("client a:1 --connections 99999999", "--connections"),
            ("--web.listen-address none health", "--web.listen-address"),
            ("health ftp://x", "ftp://x"),
            ("explain ZUSTAND", "ZUSTAND"),
            ("explain listen --output csv", "csv"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn health_asks_where_the_web_side_listens() {
        let url = |line| match parse(line).unwrap().mode {
            Mode::Health { url } => url,
            mode => panic!("health was expected: {mode:?}"),
        };
        assert_eq!(url("health"), "http://127.0.0.1:9907/-/ready");
        assert_eq!(url("--web.listen-address [::]:80 health"), "http://127.0.0.1:80/-/ready");
        assert_eq!(url("health http://x/y"), "http://x/y");
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
