//! The state diagram: RFC 9293 figure 5 as Linux walks it, with both textbook paths.
//!
//! Each kind of line has characters of its own: the paths can be told apart without colour, and coloured without knowing
//! where they run. A test follows the lines, and holds them against the arrows.

use super::facts::FACTS;
use crate::tcp::{ARROWS, State, Trigger};

/// The states of a client that closes first.
pub const CLIENT: [State; 7] =
    [State::Close, State::SynSent, State::Established, State::FinWait1, State::FinWait2, State::TimeWait, State::Close];

/// The states of its server.
pub const SERVER: [State; 7] =
    [State::Close, State::Listen, State::SynRecv, State::Established, State::CloseWait, State::LastAck, State::Close];

/// Every arrow but the sudden ends. `c` and heavy lines are the client's path, `s` and double lines the server's.
pub const DRAWING: &str = include_str!("diagram.txt");

/// What the drawing cannot say.
pub(super) const LEGEND: &[&str] = &[
    "c ━━▶ a client that closes first     s ══▷ its server     ──→ other ways",
    "close: close(2), or shutdown(2) for writing. ACK and FIN in one segment are two steps.",
];

const HEAVY: &str = "━┃┏┓┗┛▶▼◀";
const DOUBLE: &str = "═║╔╗╚╝▷▽◁";

const CLIENT_COLOUR: &str = "\x1b[1;36m";
const SERVER_COLOUR: &str = "\x1b[1;33m";
const PLAIN: &str = "\x1b[0m";

/// A line of the drawing or its legend with the two paths in colour.
pub(super) fn coloured(line: &str) -> String {
    let mut out = String::new();
    let mut now = PLAIN;
    for c in line.chars() {
        let wanted = match c {
            c if HEAVY.contains(c) => CLIENT_COLOUR,
            c if DOUBLE.contains(c) => SERVER_COLOUR,
            _ => PLAIN,
        };
        if wanted != now {
            out.push_str(wanted);
            now = wanted;
        }
        out.push(c);
    }
    if now != PLAIN {
        out.push_str(PLAIN);
    }
    out
}

/// The ways to CLOSED, most of which the drawing leaves out: from where, and what makes the kernel walk them.
pub(super) fn endings() -> impl Iterator<Item = (State, &'static [&'static str])> {
    let ends = |from| ARROWS.iter().any(|a| a.from == from && a.to == State::Close && a.trigger == Trigger::End);
    FACTS.iter().filter(move |f| ends(f.state)).flat_map(|f| {
        let to_closed = f.ends.iter().filter(|way| way.to == State::Close);
        to_closed.map(|way| (f.state, way.on))
    })
}
