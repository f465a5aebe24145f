//! What is known of each state: one table for the command line, docs/states.md, and whoever else explains a state.
//!
//! True for Linux 6.x. Must not know: this machine, how anything is printed.

use serde::{Serialize, Serializer};

use super::clock::Clock;
use super::sysctls::Sysctl;
use super::{active, opening, passive};
use crate::tcp::State;

/// Everything that is told of one state. No part is empty, but for `lasts.limits` where nothing limits it, and `alerts`
/// where none has to do with it.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which state.
    #[serde(serialize_with = "by_name")]
    pub state: State,
    /// What it means, in one sentence.
    pub meaning: &'static str,
    /// Who waits for whom.
    pub waiting: &'static str,
    /// What ends it, for each state that may follow.
    pub ends: &'static [Way],
    /// How long it may last.
    pub lasts: Lasts,
    /// The kernel's settings that bear on it.
    pub sysctls: &'static [Sysctl],
    /// What piles it up.
    pub piles_up: &'static [&'static str],
    /// How to see it: commands for a shell.
    pub commands: &'static [Query],
    /// How to see it: PromQL.
    pub queries: &'static [Query],
    /// What to do.
    pub remedies: &'static [&'static str],
    /// Alerts that have to do with it, each with its entry in the runbook.
    pub alerts: &'static [&'static str],
}

/// One way out of a state: an arrow, and what makes the kernel walk it.
#[derive(Debug, Serialize)]
pub struct Way {
    /// Where it leads.
    #[serde(serialize_with = "by_name")]
    pub to: State,
    /// Segments, calls, timers: any one of them.
    pub on: &'static [&'static str],
}

/// How long a state may last, and who says so.
#[derive(Debug, Serialize)]
pub struct Lasts {
    /// In words, with the kernel's defaults.
    pub words: &'static str,
    /// Limits that follow from sysctls.
    pub limits: &'static [Limit],
    /// Where the kernel differs from RFC 9293, or that it does not.
    pub differs: &'static str,
    /// RFC sections, man pages, functions and constants of the kernel.
    pub sources: &'static [&'static str],
}

/// A limit that can be reckoned on the machine where it counts.
#[derive(Debug, Serialize)]
pub struct Limit {
    /// Under which condition.
    pub when: &'static str,
    /// How it is reckoned.
    pub clock: Clock,
}

/// What limits a FIN that nobody acknowledges, in whichever state.
pub(super) const UNANSWERED: &[Limit] = &[
    Limit { when: "the descriptor is closed and nobody answers", clock: Clock::Orphan },
    Limit { when: "the descriptor is open and nobody answers", clock: Clock::Retransmission },
];

/// Something to ask, and what the answer shows. Words in capitals are for the reader to fill in.
#[derive(Debug, Serialize)]
pub struct Query {
    /// What to type.
    pub text: &'static str,
    /// What to look at in the answer.
    pub shows: &'static str,
}

/// All states, in the order of RFC 9293 section 3.3.2 but for CLOSED, where every life begins.
pub const FACTS: [&Facts; 11] = [
    &opening::CLOSED,
    &opening::LISTEN,
    &opening::SYN_SENT,
    &opening::SYN_RECV,
    &opening::ESTABLISHED,
    &active::FIN_WAIT1,
    &active::FIN_WAIT2,
    &passive::CLOSE_WAIT,
    &active::CLOSING,
    &passive::LAST_ACK,
    &active::TIME_WAIT,
];

/// What is known of `state`.
#[must_use]
pub fn facts(state: State) -> &'static Facts {
    match state {
        State::Close => &opening::CLOSED,
        State::Listen => &opening::LISTEN,
        State::SynSent => &opening::SYN_SENT,
        State::SynRecv | State::NewSynRecv => &opening::SYN_RECV,
        State::Established => &opening::ESTABLISHED,
        State::FinWait1 => &active::FIN_WAIT1,
        State::FinWait2 => &active::FIN_WAIT2,
        State::CloseWait => &passive::CLOSE_WAIT,
        State::Closing => &active::CLOSING,
        State::LastAck => &passive::LAST_ACK,
        State::TimeWait => &active::TIME_WAIT,
    }
}

impl Facts {
    /// The ways that lead here: where each begins, and what makes the kernel walk it.
    pub fn begins(&self) -> impl Iterator<Item = (State, &'static Way)> {
        let to = self.state;
        FACTS.iter().flat_map(move |f| f.ends.iter().filter(move |way| way.to == to).map(|way| (f.state, way)))
    }
}

// serde hands fields over by reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn by_name<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::ARROWS;

    #[test]
    fn each_state_has_its_facts_once() {
        for state in State::ALL {
            assert_eq!(facts(state).state, state);
            assert_eq!(FACTS.iter().filter(|f| f.state == state).count(), 1, "{state}");
        }
    }

    #[test]
    fn the_ways_out_are_the_arrows() {
        for facts in FACTS {
            let told: Vec<State> = facts.ends.iter().map(|way| way.to).collect();
            let walked: Vec<State> = ARROWS.iter().filter(|a| a.from == facts.state).map(|a| a.to).collect();
            assert_eq!(told, walked, "{}", facts.state);
        }
    }
}
