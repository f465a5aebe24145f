//! Transition counters, resolved at first use and then found by index.

use std::sync::OnceLock;

use prometheus::{IntCounter, IntCounterVec};

use crate::kernel::Observer;
use crate::scope::Scope;
use crate::tcp::{ARROWS, Evidence, Role, State, Transition};

/// A way from one state to another as one role walks it, and who saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Walk {
    /// Whose.
    pub role: Role,
    /// The state that was left.
    pub from: State,
    /// The state that was entered.
    pub to: State,
    /// Who saw that.
    pub evidence: Evidence,
}

/// Transition counters, resolved at first use and then found by index.
pub(super) struct Transitions {
    family: IntCounterVec,
    children: Vec<OnceLock<IntCounter>>,
}

impl Transitions {
    /// Counters that appear with their first step.
    pub(super) fn none_yet(family: IntCounterVec) -> Transitions {
        let each = 0..Role::ALL.len() * State::SLOTS * State::SLOTS * Evidence::ALL.len();
        Transitions { family, children: each.map(|_| OnceLock::new()).collect() }
    }

    pub(super) fn new(family: IntCounterVec, scope: &Scope, observer: Observer) -> Transitions {
        let transitions = Transitions::none_yet(family);
        // Present at zero, so that a first increase is an increase: the arrows of each role in use, by each kind of
        // evidence in use.
        for role in Role::ALL.into_iter().filter(|role| scope.has(*role)) {
            let strange = if role == Role::Client { State::Listen } else { State::SynSent };
            for arrow in ARROWS.iter().filter(|arrow| arrow.from != strange && arrow.to != strange) {
                for evidence in [Evidence::TcpInfo, observer.evidence(), Evidence::Inferred] {
                    transitions.resolve(role, arrow.from, arrow.to, evidence);
                }
            }
        }
        transitions
    }

    pub(super) fn child(&self, role: Role, t: &Transition) -> &IntCounter {
        self.resolve(role, t.from, t.to, t.evidence)
    }

    fn resolve(&self, role: Role, from: State, to: State, evidence: Evidence) -> &IntCounter {
        self.children[Self::index(role, from, to, evidence)]
            .get_or_init(|| self.family.with_label_values(&[role.label(), from.label(), to.label(), evidence.label()]))
    }

    fn index(role: Role, from: State, to: State, evidence: Evidence) -> usize {
        let pair = (role as usize * State::SLOTS + from as usize) * State::SLOTS + to as usize;
        pair * Evidence::ALL.len() + evidence as usize
    }

    /// Each walk that was ever counted, and how often.
    pub(super) fn walked(&self) -> Vec<(Walk, u64)> {
        let counted = |(i, child): (usize, &OnceLock<IntCounter>)| {
            let count = child.get()?.get();
            let (pair, evidence) = (i / Evidence::ALL.len(), Evidence::ALL[i % Evidence::ALL.len()]);
            let (role, from) = (pair / State::SLOTS / State::SLOTS, pair / State::SLOTS % State::SLOTS);
            let state = |n: usize| State::from_kernel(n as u8);
            let walk = Walk { role: Role::ALL[role], from: state(from)?, to: state(pair % State::SLOTS)?, evidence };
            (count > 0).then_some((walk, count))
        };
        self.children.iter().enumerate().filter_map(counted).collect()
    }

    pub(super) fn entered(&self, role: Role, to: State) -> u64 {
        let each = State::ALL.into_iter().flat_map(|from| Evidence::ALL.into_iter().map(move |e| (from, e)));
        each.filter_map(|(from, e)| self.children[Self::index(role, from, to, e)].get()).map(IntCounter::get).sum()
    }
}
