//! An event as a line for a person.

use std::fmt::{self, Write as _};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use super::time::{clock_of, put_timestamp};
use crate::kernel::clock;

/// `12:00:01.123 client 3f2a  ESTABLISHED → FIN_WAIT1   after 1.002s  shutdown  [tcp_info]  local → peer`
pub(super) fn state(event: &Event<'_>, colour: bool, line: &mut String) {
    #[derive(Default)]
    struct Fields {
        at: Option<Duration>,
        after: Option<f64>,
        conn: String,
        role: String,
        local: String,
        peer: String,
        from: String,
        to: String,
        evidence: String,
        cause: String,
        via: String,
        retransmits: u64,
    }
    impl Fields {
        fn slot(&mut self, field: &Field) -> Option<&mut String> {
            Some(match field.name() {
                "conn" => &mut self.conn,
                "role" => &mut self.role,
                "local" => &mut self.local,
                "peer" => &mut self.peer,
                "from" => &mut self.from,
                "to" => &mut self.to,
                "evidence" => &mut self.evidence,
                "cause" => &mut self.cause,
                "via" => &mut self.via,
                _ => return None,
            })
        }
    }
    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            if let Some(slot) = self.slot(field) {
                put!(slot, "{value:?}");
            }
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            if let Some(slot) = self.slot(field) {
                slot.push_str(value);
            }
        }
        fn record_u64(&mut self, field: &Field, value: u64) {
            match field.name() {
                "retransmits" => self.retransmits = value,
                _ => self.at = Some(Duration::from_micros(value)),
            }
        }
        fn record_f64(&mut self, _: &Field, value: f64) {
            self.after = Some(value);
        }
    }
    let mut f = Fields::default();
    event.record(&mut f);
    let mut time = String::new();
    put_timestamp(f.at.unwrap_or_else(clock::unix), &mut time);
    let paint = Paint(colour);
    let role = paint.of(if f.role == "server" { "35" } else { "36" });
    let dim = paint.of("2");
    let inferred = if f.evidence == "inferred" { paint.of("2") } else { "" };
    let end = paint.end();
    put!(line, "{dim}{}{end} {role}{:<6} {:<6}{end} ", clock_of(&time), f.role, f.conn);
    put!(line, "{inferred}{:>11} → {:<11}{end} ", f.from, f.to);
    match f.after {
        Some(seconds) => put!(line, "after {:<8} ", Stay(seconds).to_string()),
        None => put!(line, "{:<14} ", ""),
    }
    let mut evidence = format!("[{}", f.evidence);
    if !f.via.is_empty() {
        put!(evidence, ", way {}", f.via);
    }
    if f.retransmits > 0 {
        put!(evidence, ", {} retransmitted", f.retransmits);
    }
    evidence.push(']');
    put!(line, "{:<9} {inferred}{evidence:<12}{end} {dim}{} → {}{end}", f.cause, f.local, f.peer);
}

/// Seconds as a person reads them.
struct Stay(f64);

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            s if s < 0.001 => write!(f, "{:.0}µs", s * 1e6),
            s if s < 1.0 => write!(f, "{:.1}ms", s * 1e3),
            s => write!(f, "{s:.3}s"),
        }
    }
}

/// ANSI codes, or none.
struct Paint(bool);

impl Paint {
    fn of(&self, code: &str) -> &'static str {
        match code {
            _ if !self.0 => "",
            "2" => "\x1b[2m",
            "31" => "\x1b[31m",
            "33" => "\x1b[33m",
            "35" => "\x1b[35m",
            "36" => "\x1b[36m",
            _ => "",
        }
    }

    fn end(&self) -> &'static str {
        if self.0 { "\x1b[0m" } else { "" }
    }
}

/// `12:00:01.123 ── what happens next`
pub(super) fn step(event: &Event<'_>, colour: bool, line: &mut String) {
    struct Message(String);
    impl Visit for Message {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            if field.name() == "message" {
                put!(self.0, "{value:?}");
            }
        }
    }
    let mut message = Message(String::new());
    event.record(&mut message);
    let paint = Paint(colour);
    let mut time = String::new();
    put_timestamp(clock::unix(), &mut time);
    put!(line, "{}{}{} {}── ", paint.of("2"), clock_of(&time), paint.end(), paint.of("33"));
    line.extend(message.0.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }));
    line.push_str(paint.end());
}

/// `12:00:01.123 WARN  message  key=value`
pub(super) fn plain(event: &Event<'_>, colour: bool, line: &mut String) {
    #[derive(Default)]
    struct Fields {
        message: String,
        rest: String,
    }
    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            if field.name() == "message" {
                put!(self.message, "{value:?}");
            } else {
                put!(self.rest, "  {}={value:?}", field.name());
            }
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            put!(self.rest, "  {}={value}", field.name());
        }
        fn record_f64(&mut self, field: &Field, value: f64) {
            put!(self.rest, "  {}={value:.3}", field.name());
        }
    }
    let level = *event.metadata().level();
    let paint = Paint(colour);
    let code = match level {
        Level::ERROR => "31",
        Level::WARN => "33",
        _ => "2",
    };
    let mut time = String::new();
    put_timestamp(clock::unix(), &mut time);
    put!(line, "{}{}{} ", paint.of("2"), clock_of(&time), paint.end());
    put!(line, "{}{:<5}{} ", paint.of(code), level.as_str(), paint.end());
    let mut fields = Fields::default();
    event.record(&mut fields);
    // A control character from outside (an error's text, a name) must not move the reader's cursor.
    let text = fields.message.chars().chain(fields.rest.chars());
    line.extend(text.map(|c| if c.is_control() { '\u{fffd}' } else { c }));
}
