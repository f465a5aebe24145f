//! The lab's list and its verdicts, for a person and for a script.

use std::fmt::{self, Write as _};

use serde_json::{Value, json};

use super::verdict::{Item, Shown, Verdict};
use super::{ALL, About, Expect, Ground};
use crate::explain::wrapped;
use crate::tcp::{Evidence, State};

/// What there is to see.
#[must_use]
pub fn list() -> String {
    let mut out = String::new();
    let width = ALL.iter().map(|s| s.about().name.len()).max().unwrap_or(0);
    for scenario in ALL {
        let About { name, shows, takes, .. } = scenario.about();
        let states: Vec<&str> = states(scenario.about()).iter().map(|state| state.name()).collect();
        let _ = writeln!(out, "{name:<width$}  {:>3} s  {shows}", takes.as_secs().max(1));
        let _ = writeln!(out, "{:<width$}         {}", "", states.join(" "));
    }
    out.push_str("\n`echoscope lab NAME` plays one, `echoscope lab all` all of them.\n");
    out
}

/// Every state that a scenario enters, in the order of its arrows.
fn states(about: &About) -> Vec<State> {
    let mut states = Vec::new();
    for expect in about.expects {
        if let Expect::Arrow(_, from, to) | Expect::Later(_, from, to) = expect {
            for state in [from, to] {
                if !states.contains(state) {
                    states.push(*state);
                }
            }
        }
    }
    states
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = match self.shown {
            None => "NOT SHOWN".to_owned(),
            Some(Shown::AsFact) => "so it is".to_owned(),
            Some(Shown::Inferred) => "inferred".to_owned(),
            Some(Shown::By(evidence)) => format!("seen by {}", evidence.label()),
            Some(Shown::Apart(evidence)) => format!("{}, way unknown", evidence.label()),
        };
        match self.expect {
            Expect::Fact(fact) => write!(f, "{seen:<22} {fact}"),
            Expect::Arrow(role, from, to) | Expect::Later(role, from, to) => {
                write!(f, "{seen:<22} {:<6} {:>11} → {}", role.label(), from.name(), to.name())
            }
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let About { name, shows, confirm, why, remedy, .. } = self.about;
        writeln!(f, "\n{name}: {shows}")?;
        for item in &self.items {
            writeln!(f, "  {item}")?;
        }
        for (role, from, to) in &self.unknown {
            writeln!(f, "  way unknown            {:<6} {:>11} → {}", role.label(), from.name(), to.name())?;
        }
        for (what, text) in [("why", why), ("find it", confirm), ("do", remedy)] {
            for (i, line) in wrapped(text, 96).iter().enumerate() {
                writeln!(f, "  {:<9} {line}", if i == 0 { what } else { "" })?;
            }
        }
        let names: Vec<&str> = states(self.about).iter().map(|state| state.name()).collect();
        writeln!(f, "  {:<9} echoscope explain {}", "more", names.join("|"))?;
        match &self.error {
            Some(error) => writeln!(f, "  FAILED: {error}"),
            None if self.is_good() => writeln!(f, "  verdict: shown"),
            None => writeln!(f, "  verdict: NOT ALL SHOWN"),
        }
    }
}

/// All verdicts for a script.
#[must_use]
pub fn as_json(verdicts: &[Verdict], ground: Ground) -> Value {
    let item = |item: &Item| {
        let evidence = item.shown.and_then(|shown| match shown {
            Shown::AsFact => None,
            Shown::Inferred => Some(Evidence::Inferred.label()),
            Shown::By(evidence) | Shown::Apart(evidence) => Some(evidence.label()),
        });
        let apart = matches!(item.shown, Some(Shown::Apart(_)));
        match item.expect {
            Expect::Fact(fact) => json!({"fact": fact, "shown": item.shown.is_some()}),
            Expect::Arrow(role, from, to) | Expect::Later(role, from, to) => json!({
                "role": role.label(), "from": from.name(), "to": to.name(),
                "shown": item.shown.is_some(), "evidence": evidence, "way_known": !apart,
            }),
        }
    };
    let verdict = |v: &Verdict| {
        json!({
            "scenario": v.about.name,
            "shown": v.is_good(),
            "seconds": v.took.as_secs_f64(),
            "error": v.error,
            "expected": v.items.iter().map(item).collect::<Vec<_>>(),
            "way_unknown": v.unknown.iter().map(|(role, from, to)| json!({
                "role": role.label(), "from": from.name(), "to": to.name(),
            })).collect::<Vec<_>>(),
        })
    };
    json!({
        "shown": verdicts.iter().all(Verdict::is_good),
        "ground": ground.label(),
        "scenarios": verdicts.iter().map(verdict).collect::<Vec<_>>(),
    })
}
