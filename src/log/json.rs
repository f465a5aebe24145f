//! An event as one JSON object, every field at top level.

use std::fmt::{self, Write as _};
use std::time::Duration;

use tracing::Event;
use tracing::field::{Field, Visit};

use super::time::timestamp;
use crate::kernel::clock;

pub(super) fn event(event: &Event<'_>, line: &mut String) {
    struct Fields<'a> {
        rest: &'a mut String,
        at: Option<Duration>,
    }
    impl Fields<'_> {
        fn key(&mut self, field: &Field) {
            put!(self.rest, ",\"{}\":", field.name());
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
            put!(Escaped(self.rest), "{value}");
            self.rest.push('"');
        }
        fn record_u64(&mut self, field: &Field, value: u64) {
            if field.name() == "at_us" {
                self.at = Some(Duration::from_micros(value));
            } else {
                self.key(field);
                put!(self.rest, "{value}");
            }
        }
        fn record_i64(&mut self, field: &Field, value: i64) {
            self.key(field);
            put!(self.rest, "{value}");
        }
        fn record_f64(&mut self, field: &Field, value: f64) {
            self.key(field);
            if value.is_finite() {
                put!(self.rest, "{value:.6}");
            } else {
                self.rest.push_str("null");
            }
        }
        fn record_bool(&mut self, field: &Field, value: bool) {
            self.key(field);
            put!(self.rest, "{value}");
        }
    }
    // The timestamp comes first but is known last: the fields are written behind a hole of its fixed width.
    const HOLE: &str = "YYYY-MM-DDThh:mm:ss.uuuuuuZ";
    let metadata = event.metadata();
    line.push_str("{\"timestamp\":\"");
    let start = line.len();
    put!(line, "{HOLE}\",\"level\":\"{}\",\"target\":\"{}\"", metadata.level(), metadata.target());
    let mut fields = Fields { rest: line, at: None };
    event.record(&mut fields);
    let at = fields.at.unwrap_or_else(clock::unix);
    line.replace_range(start..start + HOLE.len(), &timestamp(at).to_string());
    line.push('}');
}

/// Writes text into a JSON string (RFC 8259 section 7).
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (i, byte) in text.bytes().enumerate() {
            if byte >= 0x20 && byte != b'"' && byte != b'\\' {
                continue;
            }
            self.0.push_str(&text[plain..i]);
            plain = i + 1;
            match byte {
                b'"' => self.0.push_str("\\\""),
                b'\\' => self.0.push_str("\\\\"),
                b'\n' => self.0.push_str("\\n"),
                b'\r' => self.0.push_str("\\r"),
                b'\t' => self.0.push_str("\\t"),
                other => write!(self.0, "\\u{other:04x}")?,
            }
        }
        self.0.push_str(&text[plain..]);
        Ok(())
    }
}
