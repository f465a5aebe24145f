//! What is told, as server-sent events (HTML standard, section 9.2).

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use crate::metrics::Walk;
use crate::tcp::{Cause, Identity, Transition};

/// How far the telling has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The number of the last batch.
    pub(super) batch: u64,
    /// How many changes there were up to its end, since the process began.
    pub(super) changes: u64,
}

impl Place {
    /// The event's id, for those who come back.
    pub(super) fn name(self, epoch: u64) -> String {
        format!("{epoch:x}-{}-{}", self.batch, self.changes)
    }

    /// The place that an id names; `None` when this process did not give it out.
    pub(super) fn named(id: &str, epoch: u64) -> Option<Place> {
        let mut parts = id.split('-');
        let ours = u64::from_str_radix(parts.next()?, 16).ok()? == epoch;
        let place = Place { batch: parts.next()?.parse().ok()?, changes: parts.next()?.parse().ok()? };
        (ours && parts.next().is_none()).then_some(place)
    }
}

/// What happened in one moment, ready to be sent.
pub(super) struct Batch {
    /// How many changes there were before it.
    pub(super) before: u64,
    /// At its end.
    pub(super) place: Place,
    pub(super) text: Bytes,
}

/// role, from, to, evidence, how often: as short as it can be read.
type Counted = (&'static str, &'static str, &'static str, &'static str, u64);

fn counted(&(Walk { role, from, to, evidence }, count): &(Walk, u64)) -> Counted {
    (role.label(), from.name(), to.name(), evidence.label(), count)
}

#[derive(Serialize)]
struct Walked {
    /// Unix time.
    at: f64,
    walks: Vec<Counted>,
    lines: Vec<Line>,
    /// How many changes there were beyond these lines.
    more: u64,
}

/// One state change, as the log has it.
#[derive(Serialize)]
struct Line {
    /// Unix time.
    at: f64,
    conn: String,
    role: &'static str,
    local: String,
    peer: String,
    from: &'static str,
    to: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<f64>,
    evidence: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<&'static str>,
    #[serde(skip_serializing_if = "is_zero")]
    retransmits: u32,
}

#[derive(Serialize)]
struct Hello {
    version: &'static str,
    /// Whether state changes are seen at all.
    transitions: bool,
    /// Whether they are this process's own connections', whose lives are kept.
    lives: bool,
    /// Whether the viewer came from a process before this one, so that nobody knows what it missed.
    restarted: bool,
    /// Since the process began.
    walked: Vec<Counted>,
}

/// A batch, told at `unix`; `offset` is what Unix time is ahead of the monotonic clock.
pub(super) fn walked(
    id: &str,
    unix: Duration,
    offset: Duration,
    walks: &[(Walk, u64)],
    lines: &[(Identity, Transition)],
    more: u64,
) -> Bytes {
    let line = |(id, t): &(Identity, Transition)| {
        let flow = id.flow.canonical();
        Line {
            at: (offset + t.at).as_secs_f64(),
            conn: format!("{:x}", id.cookie),
            role: id.role.label(),
            local: flow.local.to_string(),
            peer: flow.peer.to_string(),
            from: t.from.name(),
            to: t.to.name(),
            after: t.after.map(|after| after.as_secs_f64()),
            evidence: t.evidence.label(),
            cause: t.cause.map(Cause::label),
            via: t.step.via(),
            retransmits: t.retransmits,
        }
    };
    let walks = walks.iter().map(counted).collect();
    event(Some(id), "walked", &Walked { at: unix.as_secs_f64(), walks, lines: lines.iter().map(line).collect(), more })
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What there was so far.
pub(super) fn hello(id: &str, transitions: bool, lives: bool, restarted: bool, walked: &[(Walk, u64)]) -> Bytes {
    let walked = walked.iter().map(counted).collect();
    event(Some(id), "hello", &Hello { version: env!("CARGO_PKG_VERSION"), transitions, lives, restarted, walked })
}

/// How many changes a viewer was not told of.
pub(super) fn missed(id: &str, transitions: u64) -> Bytes {
    #[derive(Serialize)]
    struct Missed {
        transitions: u64,
    }
    event(Some(id), "missed", &Missed { transitions })
}

fn event(id: Option<&str>, name: &str, data: &impl Serialize) -> Bytes {
    // Numbers and text: nothing that cannot be JSON, and JSON on one line.
    let data = serde_json::to_string(data).unwrap_or_default();
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    Bytes::from(format!("{id}event: {name}\ndata: {data}\n\n"))
}
