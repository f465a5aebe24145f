//! An event as one JSON object, every field at top level.

use std::fmt::{self, Write as _};
use std::time::Duration;

use tracing::Event;
use tracing::field::{Field, Visit};

use super::time::{put_seconds, put_timestamp};
use crate::kernel::clock;

pub(super) fn event(event: &Event<'_>, line: &mut String) {
    struct Fields<'a> {
        rest: &'a mut String,
        /// Nothing can need escaping: names of ours, numbers and addresses.
        plain: bool,
    }
    impl Fields<'_> {
        fn key(&mut self, field: &Field) {
            self.rest.push_str(",\"");
            self.rest.push_str(field.name());
            self.rest.push_str("\":");
        }
    }
    impl Visit for Fields<'_> {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            self.key(field);
            self.rest.push('"');
            put!(Escaped(self.rest), "{value:?}");
            self.rest.push('"');
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.key(field);
            self.rest.push('"');
            if self.plain {
                self.rest.push_str(value);
            } else {
                escape(value, self.rest);
            }
            self.rest.push('"');
        }
        fn record_u64(&mut self, field: &Field, value: u64) {
            if field.name() != "at_us" {
                self.key(field);
                self.rest.push_str(itoa::Buffer::new().format(value));
            }
        }
        fn record_i64(&mut self, field: &Field, value: i64) {
            self.key(field);
            put!(self.rest, "{value}");
        }
        fn record_f64(&mut self, field: &Field, value: f64) {
            self.key(field);
            match Duration::try_from_secs_f64(value + 0.5e-6) {
                Ok(seconds) if value >= 0.0 => put_seconds(seconds, self.rest),
                _ if value.is_finite() => put!(self.rest, "{value:.6}"),
                _ => self.rest.push_str("null"),
            }
        }
        fn record_bool(&mut self, field: &Field, value: bool) {
            self.key(field);
            put!(self.rest, "{value}");
        }
    }
    let metadata = event.metadata();
    line.push_str("{\"timestamp\":\"");
    put_timestamp(when(event), line);
    for part in ["\",\"level\":\"", metadata.level().as_str(), "\",\"target\":\"", metadata.target(), "\""] {
        line.push_str(part);
    }
    event.record(&mut Fields { rest: line, plain: metadata.target() == super::STATES });
    line.push('}');
}

/// A state line says itself when the state was entered; all others are of now.
fn when(event: &Event<'_>) -> Duration {
    struct At(Option<Duration>);
    impl Visit for At {
        fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
        fn record_u64(&mut self, field: &Field, value: u64) {
            if field.name() == "at_us" {
                self.0 = Some(Duration::from_micros(value));
            }
        }
    }
    let mut at = At(None);
    event.record(&mut at);
    at.0.unwrap_or_else(clock::unix)
}

/// Writes text into a JSON string (RFC 8259 section 7).
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escape(text, self.0);
        Ok(())
    }
}

fn escape(mut text: &str, out: &mut String) {
    let special = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    while let Some(at) = text.bytes().position(special) {
        out.push_str(&text[..at]);
        match text.as_bytes()[at] {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            other => put!(out, "\\u{other:04x}"),
        }
        text = &text[at + 1..];
    }
    out.push_str(text);
}
