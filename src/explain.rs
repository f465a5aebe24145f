//! What a state means: one table of facts, told as text, as Markdown (docs/states.md) or as JSON.
//!
//! Must not know: connections, sockets, who asks. The facts are the same everywhere; the values of the kernel's
//! settings are read where and when they are told.

mod active;
mod clock;
mod diagram;
mod facts;
mod markdown;
mod opening;
mod passive;
mod sysctls;
mod text;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::config::PageFormat;
use crate::kernel::sysctl;
use crate::tcp::State;

pub use clock::Clock;
pub use diagram::{CLIENT, DRAWING, SERVER};
pub use facts::{FACTS, Facts, Lasts, Limit, Query, Way, facts};
pub use sysctls::Sysctl;
pub use text::wrapped;

/// How a setting is read, by its path under /proc/sys.
type Read<'a> = &'a dyn Fn(&str) -> io::Result<String>;

/// The facts of one state, and what this machine makes of them.
#[derive(Serialize)]
pub struct Told {
    #[serde(flatten)]
    facts: &'static Facts,
    /// The state as metrics spell it.
    label: &'static str,
    here: Here,
}

#[derive(Serialize)]
struct Here {
    /// By path; null where it cannot be read.
    sysctls: BTreeMap<&'static str, Option<String>>,
    /// In seconds, by condition; null where a setting is not known.
    limits: BTreeMap<&'static str, Option<f64>>,
}

/// All states, and both textbook paths.
#[derive(Serialize)]
pub struct Everything {
    states: Vec<Told>,
    client: [&'static str; 7],
    server: [&'static str; 7],
}

impl Everything {
    /// All that is known, with the values of this moment.
    #[must_use]
    pub fn now() -> Everything {
        Everything::with(&sysctl::read)
    }

    fn with(read: Read<'_>) -> Everything {
        Everything {
            states: FACTS.iter().map(|facts| Told::with(facts, read)).collect(),
            client: CLIENT.map(State::name),
            server: SERVER.map(State::name),
        }
    }
}

impl Told {
    /// What is known of `state`, with the values of this moment.
    #[must_use]
    pub fn now(state: State) -> Told {
        Told::with(facts(state), &sysctl::read)
    }

    fn with(facts: &'static Facts, read: Read<'_>) -> Told {
        let values = facts.sysctls.iter().map(|sysctl| (sysctl.path, read(sysctl.path).ok()));
        let limits = facts.lasts.limits.iter().map(|limit| {
            let time = limit.clock.limit(|path| number(read, path));
            (limit.when, time.map(|time| time.as_secs_f64()))
        });
        let here = Here { sysctls: values.collect(), limits: limits.collect() };
        Told { facts, label: facts.state.label(), here }
    }
}

/// Prints what is known of a state, or of all, to stdout.
///
/// # Errors
/// When stdout takes nothing more, unless the reader has simply seen enough (`| head`).
pub fn print(state: Option<State>, format: PageFormat, colour: bool) -> io::Result<()> {
    let answer = answer(state, format, colour, &sysctl::read)?;
    let mut out = io::stdout().lock();
    match out.write_all(answer.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

fn answer(state: Option<State>, format: PageFormat, colour: bool, read: Read<'_>) -> io::Result<String> {
    Ok(match (state, format) {
        (Some(state), PageFormat::Text) => text::state(facts(state), read, colour),
        (None, PageFormat::Text) => text::overview(colour),
        (Some(state), PageFormat::Markdown) => markdown::section(facts(state)),
        (None, PageFormat::Markdown) => markdown::document(),
        (Some(state), PageFormat::Json) => json(&Told::with(facts(state), read))?,
        (None, PageFormat::Json) => json(&Everything::with(read))?,
    })
}

fn json(told: &impl Serialize) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(told)? + "\n")
}

/// The number that a setting is, where it can be read and is one.
fn number(read: Read<'_>, path: &str) -> Option<u64> {
    read(path).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unreadable(_: &str) -> io::Result<String> {
        Err(ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn what_cannot_be_read_is_said_and_no_error() {
        for state in State::ALL {
            let page = answer(Some(state), PageFormat::Text, false, &unreadable).unwrap();
            let told = page.matches("= cannot be read: permission denied").count();
            assert_eq!(told, facts(state).sysctls.len(), "{page}");
            let json = answer(Some(state), PageFormat::Json, false, &unreadable).unwrap();
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let values = json["here"]["sysctls"].as_object().unwrap();
            assert!(values.len() == told && values.values().all(serde_json::Value::is_null), "{values:?}");
        }
    }

    #[test]
    fn markdown_asks_nothing_of_this_machine() {
        let never = |path: &str| panic!("{path} was read");
        answer(None, PageFormat::Markdown, false, &never).unwrap();
        answer(Some(State::TimeWait), PageFormat::Markdown, false, &never).unwrap();
    }

    #[test]
    fn colour_changes_no_letter() {
        for state in [None, Some(State::TimeWait)] {
            let plain = answer(state, PageFormat::Text, false, &unreadable).unwrap();
            let coloured = answer(state, PageFormat::Text, true, &unreadable).unwrap();
            assert!(!plain.contains('\x1b') && coloured.contains("\x1b["));
            let mut bare = String::new();
            for (i, part) in coloured.split("\x1b[").enumerate() {
                bare.push_str(if i == 0 { part } else { part.split_once('m').unwrap().1 });
            }
            assert_eq!(bare.lines().map(str::trim_end).collect::<Vec<_>>(), plain.lines().collect::<Vec<_>>());
        }
    }
}
