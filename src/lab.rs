//! The lab: makes a real kernel show a state or a failure, on demand, and tells what happens.
//!
//! Each scenario plays both ends of real connections on a port of its own, in a network namespace of its own where
//! that is allowed; the network's faults are filters on the scenario's own sockets. What the ends do is observed,
//! logged and counted like any other connection. Must not know: server, client, web.

mod ground;
mod report;
mod scenarios;
mod stage;
mod verdict;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::afterlife::Afterlife;
use crate::kernel::Table;
use crate::log::STEPS;
use crate::scope::Target;
use crate::shutdown::Stop;
use crate::tcp::{Role, State};
pub use ground::Ground;
pub use report::{as_json, list};
pub use scenarios::ALL;
use stage::Stage;
pub use verdict::Verdict;

/// What a scenario must show. An arrow counts when the life of an end has walked it, seen or inferred; which of the
/// two it was is told.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// An end of this role goes from one state to another.
    Arrow(Role, State, State),
    /// The same, a minute later: it is waited for when all else is done.
    Later(Role, State, State),
    /// Something that no arrow shows.
    Fact(&'static str),
}

/// What there is to say of a scenario.
#[derive(Debug)]
pub struct About {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub shows: &'static str,
    /// How long it takes, about.
    pub takes: Duration,
    /// What must be seen.
    pub expects: &'static [Expect],
    /// How to find it on a machine of one's own.
    pub confirm: &'static str,
    /// Why it happens in the field.
    pub why: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

/// A scenario at play.
pub type Play<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>>;

/// One thing that the lab can show.
pub trait Scenario: Sync {
    /// What there is to say of it.
    fn about(&self) -> &'static About;

    /// Makes it happen.
    fn play<'a>(&'a self, stage: &'a Stage) -> Play<'a>;
}

/// What to play.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which scenarios, by their place in [`ALL`].
    scenarios: Vec<usize>,
    /// How long to hold each picture.
    hold: Duration,
}

/// How long the kernel keeps TIME_WAIT, and the follower's look at it, at the very most.
const A_MINUTE: Duration = Duration::from_secs(75);

impl Plan {
    /// Finds scenarios by their names; `all` is every one.
    ///
    /// # Errors
    /// The first name that none has.
    pub fn new(names: &[String], hold: Duration) -> Result<Plan, String> {
        let mut scenarios = Vec::new();
        for name in names {
            if name == "all" {
                scenarios.extend(0..ALL.len());
            } else {
                let found = ALL.iter().position(|scenario| scenario.about().name == name);
                scenarios.push(found.ok_or_else(|| name.clone())?);
            }
        }
        // Each once, at its first mention: what one play leaves behind on its port (TIME_WAIT, lives) is not the next one's.
        let mut mentioned = BTreeSet::new();
        scenarios.retain(|index| mentioned.insert(*index));
        Ok(Plan { scenarios, hold })
    }

    /// The listening ports and the targets of its scenarios, for the census.
    #[must_use]
    pub fn services(&self) -> (Vec<u16>, Vec<Arc<Target>>) {
        let service = |&index: &usize| {
            let address = stage::address(index);
            let target = Target::new(ALL[index].about().name.to_owned(), address.port());
            target.resolved(&[address]);
            (address.port(), Arc::new(target))
        };
        self.scenarios.iter().map(service).unzip()
    }
}

/// Plays scenarios one after the other until `stop`, and returns what each has shown. What takes a minute is waited
/// for at the end, for all at once.
pub async fn run(plan: &Plan, afterlife: Afterlife, table: Table, stop: &Stop) -> Vec<Verdict> {
    let table = Arc::new(Mutex::new(table));
    let mut verdicts = Vec::new();
    for &index in &plan.scenarios {
        let scenario = ALL[index];
        let about = scenario.about();
        let stage = Stage {
            name: about.name,
            address: stage::address(index),
            afterlife: afterlife.clone(),
            table: Arc::clone(&table),
            hold: plan.hold,
            facts: Mutex::default(),
        };
        tracing::info!(target: STEPS, scenario = about.name, port = stage.address.port(), "{}", about.shows);
        let began = Instant::now();
        // Nothing in a scenario waits for ever, but the whole must end too.
        let limit = about.takes + plan.hold * 4 + stage::PATIENCE * 6;
        let error = tokio::select! {
            played = timeout(limit, scenario.play(&stage)) => match played {
                Ok(played) => played.err().map(|error| format!("{error:#}")),
                Err(_elapsed) => Some(format!("not done after {limit:?}")),
            },
            () = stop.begun() => Some("interrupted".to_owned()),
        };
        afterlife.all_seen().await;
        let mut verdict = Verdict::new(about, stage.address.port(), &stage::lock(&stage.facts), error);
        settle(&mut verdict, &afterlife, false, stage::PATIENCE).await;
        if stop.has_begun() && verdicts.len() + 1 < plan.scenarios.len() {
            verdict.error.get_or_insert_with(|| "interrupted".to_owned());
        }
        verdict.took = began.elapsed();
        tracing::info!(target: STEPS, scenario = about.name, "{}", verdict.in_a_line());
        verdicts.push(verdict);
        if stop.has_begun() {
            break;
        }
    }
    if verdicts.iter().any(|v| v.error.is_none() && v.waits()) {
        tracing::info!(target: STEPS, "waiting for TIME_WAIT to end: a minute from when it began");
    }
    let began = Instant::now();
    for verdict in &mut verdicts {
        tokio::select! {
            () = settle(verdict, &afterlife, true, A_MINUTE.saturating_sub(began.elapsed())) => {}
            () = stop.begun() => {
                if verdict.waits() {
                    verdict.error.get_or_insert_with(|| "interrupted".to_owned());
                }
            }
        }
    }
    verdicts
}

/// Reads the ledger until all is there that is expected, or the patience is over.
async fn settle(verdict: &mut Verdict, afterlife: &Afterlife, later: bool, patience: Duration) {
    let began = Instant::now();
    loop {
        verdict.read(&afterlife.journal().ledger().recent(usize::MAX));
        if verdict.is_complete(later) || verdict.error.is_some() || began.elapsed() >= patience {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
}
