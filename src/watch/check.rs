//! What looks wrong in a reading, in words, and how bad it is.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::kernel::owners::Owners;
use crate::survey::{Port, Reading, Service, Sight};
use crate::tcp::{Role, State};

/// From which age on CLOSE_WAIT is a leak.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Worth a look.
    pub warn: Duration,
    /// Worth waking somebody.
    pub crit: Duration,
}

/// How bad, as Nagios numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Severity {
    /// Nothing is wrong.
    Ok = 0,
    /// Worth a look.
    Warning = 1,
    /// Worth waking somebody.
    Critical = 2,
}

/// Something that looks wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What, and where.
    pub text: String,
}

/// What looks wrong, the worst first.
pub(super) fn findings(reading: &Reading, owners: &Owners, thresholds: Thresholds) -> Vec<Finding> {
    let mut found = Vec::new();
    for (service, sight) in &reading.services {
        found.extend(leak(*service, sight, owners, thresholds));
        found.extend(queue(*service, sight, owners));
    }
    if let (Some(limit), Some((local, peer, used))) = (reading.ports_limit.filter(|n| *n > 0), reading.fullest.first())
    {
        let share = f64::from(*used) / f64::from(limit);
        let severity = match share {
            share if share >= 0.95 => Severity::Critical,
            share if share >= 0.8 => Severity::Warning,
            _ => Severity::Ok,
        };
        let text =
            format!("{used} of {limit} local ports are taken from {local} to {peer}: soon nothing can connect there");
        found.push(Finding { severity, text });
    }
    found.retain(|finding| finding.severity > Severity::Ok);
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

fn leak(service: Service, sight: &Sight, owners: &Owners, thresholds: Thresholds) -> Option<Finding> {
    let count = sight.count(State::CloseWait);
    let (age, at_least) = sight.oldest(State::CloseWait);
    if count == 0 || age < thresholds.warn {
        return None;
    }
    let severity = if age >= thresholds.crit { Severity::Critical } else { Severity::Warning };
    let text = format!(
        "{}: {count} CLOSE_WAIT, oldest {}{}: the application got FIN and never closed",
        Name(service, sight, owners),
        if at_least { "at least " } else { "" },
        Age(age),
    );
    Some(Finding { severity, text })
}

fn queue(service: Service, sight: &Sight, owners: &Owners) -> Option<Finding> {
    let queue = sight.queue?;
    let limit = queue.limit?;
    let severity = match queue.length {
        0 => return None,
        length if length > limit => Severity::Critical,
        length if u64::from(length) * 2 > u64::from(limit) => Severity::Warning,
        _ => return None,
    };
    let text = format!(
        "{}: {} connections wait to be accepted, {limit} may: the application accepts too slowly{}",
        Name(service, sight, owners),
        queue.length,
        if severity == Severity::Critical { ", and the kernel drops handshakes" } else { "" },
    );
    Some(Finding { severity, text })
}

/// A service as one would call it.
struct Name<'a>(Service, &'a Sight, &'a Owners);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Name(service, sight, owners) = self;
        match (service.role, service.port) {
            (Role::Server, port) => write!(f, "port {port}")?,
            (Role::Client, Port::Other) => write!(f, "connections going out")?,
            (Role::Client, port) => write!(f, "connections to port {port}")?,
        }
        match sight.queue.and_then(|queue| owners.get(&queue.inode)) {
            Some(owner) => write!(f, " ({})", owner.name),
            None => Ok(()),
        }
    }
}

/// An age as a person says it: 42 s, 3 min 5 s, 3 h 12 min, 2 d 4 h.
pub(super) struct Age(pub(super) Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0.as_secs() {
            s @ 0..60 => format!("{s} s"),
            s @ 60..3600 => format!("{} min {} s", s / 60, s % 60),
            s @ 3600..86400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
            s => format!("{} d {} h", s / 86400, s % 86400 / 3600),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_people_say_them() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (11_520, "3 h 12 min"), (187_200, "2 d 4 h")]
        {
            assert_eq!(Age(Duration::from_secs(seconds)).to_string(), text);
        }
    }
}
