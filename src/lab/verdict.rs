//! Whether a scenario has shown what it should: read from the ledger, where every observed life is.

use std::time::Duration;

use super::{About, Expect};
use crate::ledger::Life;
use crate::tcp::{Evidence, Role, State, Step};

/// How something that was expected was shown, the better the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shown {
    /// Both states are certain; that nothing lay between them is not.
    Apart(Evidence),
    /// Nobody saw it, and nothing else was possible.
    Inferred,
    /// By somebody who saw it.
    By(Evidence),
    /// By the scenario itself.
    AsFact,
}

/// One thing that was expected.
#[derive(Clone, Debug)]
pub struct Item {
    /// What.
    pub(super) expect: Expect,
    /// How it was shown, if it was.
    pub(super) shown: Option<Shown>,
}

/// What a scenario has shown.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Of which.
    pub(super) about: &'static About,
    port: u16,
    pub(super) items: Vec<Item>,
    /// Steps whose way nobody knows: both states are certain, what lies between them is not.
    pub(super) unknown: Vec<(Role, State, State)>,
    /// What went wrong, if something did.
    pub(super) error: Option<String>,
    pub(super) took: Duration,
}

impl Verdict {
    pub(super) fn new(
        about: &'static About,
        port: u16,
        facts: &[(&'static str, bool)],
        error: Option<String>,
    ) -> Verdict {
        let item = |expect: &Expect| {
            let holds = match expect {
                // Every time that it was looked at.
                Expect::Fact(fact) => {
                    let mut told = facts.iter().filter(|(f, _)| f == fact).map(|(_, holds)| *holds).peekable();
                    told.peek().is_some() && told.all(|holds| holds)
                }
                _ => false,
            };
            Item { expect: *expect, shown: holds.then_some(Shown::AsFact) }
        };
        let items = about.expects.iter().map(item).collect();
        Verdict { about, port, items, unknown: Vec::new(), error, took: Duration::ZERO }
    }

    /// Takes note of what the lives show: those of this scenario's port.
    pub(super) fn read(&mut self, lives: &[Life]) {
        self.unknown.clear();
        for life in lives.iter().filter(|life| life.port == self.port) {
            let mut from = life.began();
            for taken in life.steps() {
                if taken.step != Step::Arrow {
                    self.unknown.push((life.role, from, taken.to));
                }
                for item in &mut self.items {
                    let (Expect::Arrow(role, left, entered) | Expect::Later(role, left, entered)) = item.expect else {
                        continue;
                    };
                    if (role, left, entered) == (life.role, from, taken.to) {
                        let shown = match (taken.step, taken.evidence) {
                            (Step::Arrow, Evidence::Inferred) => Shown::Inferred,
                            (Step::Arrow, evidence) => Shown::By(evidence),
                            (_, evidence) => Shown::Apart(evidence),
                        };
                        // Of several lives the one counts that shows it best.
                        item.shown = item.shown.max(Some(shown));
                    }
                }
                from = taken.to;
            }
        }
    }

    /// Whether all is there, but for what takes a minute unless `later`.
    pub(super) fn is_complete(&self, later: bool) -> bool {
        let awaited = |item: &&Item| match item.expect {
            Expect::Arrow(..) => true,
            Expect::Later(..) => later,
            Expect::Fact(_) => false,
        };
        self.items.iter().filter(awaited).all(|item| item.shown.is_some())
    }

    /// Whether something is expected that takes a minute, and is not there yet.
    pub(super) fn waits(&self) -> bool {
        self.items.iter().any(|item| item.shown.is_none() && matches!(item.expect, Expect::Later(..)))
    }

    /// Whether everything was shown.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.error.is_none() && self.items.iter().all(|item| item.shown.is_some())
    }

    /// For the log.
    pub(super) fn in_a_line(&self) -> String {
        let shown = self.items.iter().filter(|item| item.shown.is_some()).count();
        let of = self.items.len();
        match &self.error {
            Some(error) => format!("failed: {error}"),
            None if shown == of => format!("shown: all {of}"),
            None => format!("shown: {shown} of {of}{}", if self.waits() { ", the rest takes a minute" } else { "" }),
        }
    }
}
