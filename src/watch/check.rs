//! What looks wrong in a reading, in words, and how bad it is.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::kernel::owners::Owners;
use crate::survey::{Listeners, Port, Reading, Service, Sight};
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
        found.extend(deserted(*service, sight, reading));
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

/// A port that somebody named, because there should be a listener.
fn deserted(service: Service, sight: &Sight, reading: &Reading) -> Option<Finding> {
    let named =
        matches!(service, Service { role: Role::Server, port: Port::Number(port) } if reading.named.contains(&port));
    (named && sight.listeners.is_none()).then(|| Finding {
        severity: Severity::Critical,
        text: format!("port {}: nobody listens, new connections are refused", service.port),
    })
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
    let Listeners { queue, inodes } = sight.listeners.as_ref()?;
    let limit = queue.limit?;
    let severity = match queue.length {
        0 => return None,
        length if length > limit => Severity::Critical,
        length if u64::from(length) * 2 > u64::from(limit) => Severity::Warning,
        _ => return None,
    };
    // Each has a queue of its own: who is slow is the process behind the fullest.
    let of = match (inodes.len(), owners.get(&queue.inode)) {
        (1, _) => String::new(),
        (many, None) => format!(" at one of {many} listeners"),
        (many, Some(owner)) => format!(" at one of {many} listeners, PID {}", owner.pid),
    };
    let text = format!(
        "{}: {} {} to be accepted{of}, {limit} may: the application accepts too slowly{}",
        Name(service, sight, owners),
        queue.length,
        if queue.length == 1 { "connection waits" } else { "connections wait" },
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
        let names: Vec<&str> = super::names(sight, owners).collect();
        if names.is_empty() { Ok(()) } else { write!(f, " ({})", names.join(", ")) }
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
    use crate::kernel::owners::Owner;
    use crate::kernel::{AcceptQueue, Observer};
    use Severity::{Critical, Warning};

    const THRESHOLDS: Thresholds = Thresholds { warn: Duration::from_mins(1), crit: Duration::from_mins(15) };
    const SERVER: Service = Service { role: Role::Server, port: Port::Number(8080) };

    /// CLOSE_WAIT of these ages, and whether they may be older.
    fn leaking(ages: &[(u64, bool)]) -> Sight {
        let mut sight = Sight::default();
        for (seconds, at_least) in ages {
            sight.add(State::CloseWait, Duration::from_secs(*seconds), *at_least);
        }
        sight
    }

    fn listening(mut sight: Sight, queue: AcceptQueue, inodes: &[u32]) -> Sight {
        sight.listeners = Some(Listeners { queue, inodes: inodes.into() });
        sight
    }

    fn waiting(length: u32, limit: Option<u32>) -> Sight {
        listening(Sight::default(), AcceptQueue { length, limit, inode: 7 }, &[7])
    }

    fn reading(services: &[(Service, &Sight)]) -> Reading {
        Reading {
            services: services.iter().map(|(service, sight)| (*service, (*sight).clone())).collect(),
            fullest: Vec::new(),
            ports_limit: Some(100),
            named: Vec::new(),
            observer: Observer::SockDiag,
            took: Duration::ZERO,
        }
    }

    fn told(reading: &Reading) -> Vec<(Severity, String)> {
        let owner = |pid, name: &str| Owner { pid, fd: 3, name: name.into(), command: "leaky --now".into() };
        let owners = Owners::from([(7, owner(1, "leaky")), (9, owner(2, "leaky")), (10, owner(3, "another"))]);
        let found = findings(reading, &owners, THRESHOLDS);
        found.into_iter().map(|finding| (finding.severity, finding.text)).collect()
    }

    fn of(sight: &Sight) -> Vec<(Severity, String)> {
        told(&reading(&[(SERVER, sight)]))
    }

    #[test]
    fn a_leak_is_as_bad_as_its_oldest() {
        let said =
            |age: &str| format!("port 8080: 2 CLOSE_WAIT, oldest {age}: the application got FIN and never closed");
        assert_eq!(of(&leaking(&[])), []);
        assert_eq!(of(&leaking(&[(59, false), (3, false)])), []);
        assert_eq!(of(&leaking(&[(60, false), (3, false)])), [(Warning, said("1 min 0 s"))]);
        assert_eq!(of(&leaking(&[(3, false), (899, false)])), [(Warning, said("14 min 59 s"))]);
        assert_eq!(of(&leaking(&[(900, false), (3, false)])), [(Critical, said("15 min 0 s"))]);
        assert_eq!(of(&leaking(&[(11_520, true), (3, false)])), [(Critical, said("at least 3 h 12 min"))]);
        // Other states grow old in peace.
        let mut idle = Sight::default();
        idle.add(State::Established, Duration::from_hours(999), true);
        assert_eq!(of(&idle), []);
    }

    #[test]
    fn a_service_is_called_by_its_name() {
        let leak = leaking(&[(60, false)]);
        let said = |service: Service, sight: &Sight| {
            let told = told(&reading(&[(service, sight)])).remove(0).1;
            told.split_once(": ").unwrap().0.to_owned()
        };
        let of = |inodes| listening(leak.clone(), AcceptQueue::default(), inodes);
        let client = |port| Service { role: Role::Client, port };
        assert_eq!(said(SERVER, &of(&[7])), "port 8080 (leaky)");
        assert_eq!(said(SERVER, &of(&[8])), "port 8080");
        assert_eq!(said(SERVER, &of(&[7, 8, 9])), "port 8080 (leaky)", "two workers, and one that nobody knows");
        assert_eq!(said(SERVER, &of(&[7, 9, 10])), "port 8080 (another, leaky)");
        assert_eq!(said(client(Port::Number(443)), &leak), "connections to port 443");
        assert_eq!(said(client(Port::Other), &leak), "connections going out");
    }

    #[test]
    fn a_queue_that_is_more_than_half_full_is_slow_and_one_over_its_limit_drops() {
        let slow = |what: &str| format!("port 8080 (leaky): {what} may: the application accepts too slowly");
        for (length, limit) in [(0, Some(0)), (0, Some(9)), (1, Some(2)), (64, Some(128)), (9999, None)] {
            assert_eq!(of(&waiting(length, limit)), [], "{length} {limit:?}");
        }
        assert_eq!(of(&waiting(65, Some(128))), [(Warning, slow("65 connections wait to be accepted, 128"))]);
        assert_eq!(of(&waiting(128, Some(128))), [(Warning, slow("128 connections wait to be accepted, 128"))]);
        let drops = |what: &str| (Critical, slow(what) + ", and the kernel drops handshakes");
        assert_eq!(of(&waiting(129, Some(128))), [drops("129 connections wait to be accepted, 128")]);
        assert_eq!(of(&waiting(1, Some(0))), [drops("1 connection waits to be accepted, 0")]);
        assert_eq!(of(&waiting(u32::MAX, Some(u32::MAX)))[0].0, Warning);
    }

    #[test]
    fn of_several_queues_the_fullest_is_told_and_whose_it_is() {
        let said = |inode, inodes: &[u32]| {
            let queue = AcceptQueue { length: 5, limit: Some(4), inode };
            of(&listening(Sight::default(), queue, inodes)).remove(0).1
        };
        let ends = ", 4 may: the application accepts too slowly, and the kernel drops handshakes";
        let known = "port 8080 (leaky): 5 connections wait to be accepted at one of 2 listeners, PID 2".to_owned();
        assert_eq!(said(9, &[7, 9]), known + ends);
        let unknown = "port 8080: 5 connections wait to be accepted at one of 3 listeners".to_owned();
        assert_eq!(said(8, &[8, 11, 12]), unknown + ends);
    }

    #[test]
    fn a_port_that_was_named_should_be_listened_on() {
        let (left, leaving) = (Sight::default(), leaking(&[(3, false)]));
        let idle = waiting(0, Some(128));
        let client = Service { role: Role::Client, port: Port::Number(8080) };
        let told_of =
            |service, sight, named: &[u16]| told(&Reading { named: named.into(), ..reading(&[(service, sight)]) });
        let said = [(Critical, "port 8080: nobody listens, new connections are refused".to_owned())];
        assert_eq!(told_of(SERVER, &left, &[80, 8080]), said);
        assert_eq!(told_of(SERVER, &leaving, &[8080]), said, "whatever is left of it");
        assert_eq!(told_of(SERVER, &idle, &[8080]), []);
        assert_eq!(told_of(SERVER, &left, &[]), [], "nobody asked for it: it has gone, as ports may");
        assert_eq!(told_of(client, &left, &[8080]), []);
    }

    #[test]
    fn local_ports_run_out() {
        let taken = |used, limit| {
            let mut reading = reading(&[]);
            reading.fullest = vec![
                ("10.0.0.1".parse().unwrap(), "10.0.0.2:443".parse().unwrap(), used),
                ("10.0.0.1".parse().unwrap(), "10.0.0.3:443".parse().unwrap(), 1),
            ];
            reading.ports_limit = limit;
            told(&reading)
        };
        let said = |used: u32| {
            format!("{used} of 100 local ports are taken from 10.0.0.1 to 10.0.0.2:443: soon nothing can connect there")
        };
        assert_eq!(taken(79, Some(100)), []);
        assert_eq!(taken(80, Some(100)), [(Warning, said(80))]);
        assert_eq!(taken(94, Some(100)), [(Warning, said(94))]);
        assert_eq!(taken(95, Some(100)), [(Critical, said(95))]);
        assert_eq!(taken(120, Some(100)), [(Critical, said(120))]);
        assert_eq!(taken(99, None), [], "the limit is not known");
        assert_eq!(taken(99, Some(0)), []);
    }

    #[test]
    fn the_worst_comes_first() {
        let (old, older) = (leaking(&[(60, false)]), leaking(&[(901, true)]));
        let port = |port| Service { role: Role::Server, port: Port::Number(port) };
        let mut reading = reading(&[(port(1), &old), (port(2), &waiting(65, Some(128))), (port(3), &older)]);
        reading.fullest = vec![("10.0.0.1".parse().unwrap(), "10.0.0.2:443".parse().unwrap(), 95)];
        let told = told(&reading);
        let begin: Vec<_> = told.iter().map(|(severity, text)| (*severity, &text[..6])).collect();
        assert_eq!(begin, [(Critical, "port 3"), (Critical, "95 of "), (Warning, "port 1"), (Warning, "port 2")]);
        assert!(Critical > Warning && Warning > Severity::Ok);
        assert_eq!([Severity::Ok, Warning, Critical].map(|severity| severity as u8), [0, 1, 2]);
    }

    #[test]
    fn ages_read_as_people_say_them() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (11_520, "3 h 12 min"), (187_200, "2 d 4 h")]
        {
            assert_eq!(Age(Duration::from_secs(seconds)).to_string(), text);
        }
    }
}
