//! An event as a line.

use std::cell::RefCell;
use std::time::SystemTime;

use tracing::Event;

/// For whom the lines are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For a person: aligned, and coloured if asked for.
    Terminal {
        /// Whether to colour.
        colour: bool,
    },
    /// For a program: one JSON object a line, every field at top level.
    Json,
}

thread_local! {
    static LINE: RefCell<String> = RefCell::new(String::with_capacity(512));
}

/// Calls `push` with the event as one line, newline included.
pub(super) fn with_line(format: Format, event: &Event<'_>, push: impl FnOnce(&[u8])) {
    LINE.with(|line| match line.try_borrow_mut() {
        Ok(mut line) => write_line(format, event, &mut line, push),
        // An event inside the formatting of another (a Display that logs): seldom enough for a line of its own.
        Err(_) => write_line(format, event, &mut String::new(), push),
    });
}

fn write_line(format: Format, event: &Event<'_>, line: &mut String, push: impl FnOnce(&[u8])) {
    line.clear();
    match format {
        Format::Json => super::json::event(event, line),
        Format::Terminal { colour } if event.metadata().target() == super::STATES => {
            super::terminal::state(event, colour, line);
        }
        Format::Terminal { colour } if event.metadata().target() == super::STEPS => {
            super::terminal::step(event, colour, line);
        }
        Format::Terminal { colour } => super::terminal::plain(event, colour, line),
    }
    line.push('\n');
    push(line.as_bytes());
}

/// The line that tells of `count` lost ones. It does not go through the queue, which may be full.
pub(super) fn warn_lost(format: Format, count: u64, batch: &mut Vec<u8>) {
    let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    let line = match format {
        Format::Json => format!(
            "{{\"timestamp\":\"{time}\",\"level\":\"WARN\",\"target\":\"echoscope::log\",\"message\":\"log lines lost\",\"lost\":{count}}}\n"
        ),
        Format::Terminal { .. } => format!("{} WARN  log lines lost  lost={count}\n", super::time::clock_of(&time)),
    };
    batch.extend_from_slice(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    struct Capture(Format, Arc<Mutex<Vec<u8>>>);

    impl<S: tracing::Subscriber> Layer<S> for Capture {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            with_line(self.0, event, |line| self.1.lock().unwrap().extend_from_slice(line));
        }
    }

    fn lines(format: Format, log: impl FnOnce()) -> String {
        let out = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Capture(format, Arc::clone(&out)));
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(out.lock().unwrap().clone()).unwrap()
    }

    fn a_state() {
        tracing::info!(
            target: "echoscope::tcp",
            at_us = 1_700_000_001_123_456u64,
            conn = %"3f2a",
            role = "client",
            local = %"127.0.0.1:40000",
            peer = %"127.0.0.1:7007",
            from = "ESTABLISHED",
            to = "FIN_WAIT1",
            after_s = Some(1.002),
            evidence = "tcp_info",
            cause = Some("shutdown"),
            via = None::<&str>,
            retransmits = None::<u32>,
            "state"
        );
    }

    #[test]
    fn what_was_sent_again_is_told_where_there_is_any() {
        let line = |format| {
            let sent_again = || tracing::info!(target: "echoscope::tcp", at_us = 1u64, evidence = "tracepoint", retransmits = Some(2u32), "state");
            lines(format, sent_again)
        };
        assert!(line(Format::Json).contains(r#""evidence":"tracepoint","retransmits":2"#));
        let told = line(Format::Terminal { colour: false });
        assert!(told.starts_with("00:00:00.000") && told.contains("[tracepoint, 2 retransmitted]"), "{told}");
    }

    #[test]
    fn a_state_on_a_terminal() {
        assert_eq!(
            lines(Format::Terminal { colour: false }, a_state),
            "22:13:21.123 client 3f2a   ESTABLISHED → FIN_WAIT1   after 1.002s   shutdown  [tcp_info]   127.0.0.1:40000 → 127.0.0.1:7007\n"
        );
    }

    #[test]
    fn a_state_as_json() {
        assert_eq!(
            lines(Format::Json, a_state),
            concat!(
                r#"{"timestamp":"2023-11-14T22:13:21.123456Z","level":"INFO","target":"echoscope::tcp","message":"state","#,
                r#""conn":"3f2a","role":"client","local":"127.0.0.1:40000","peer":"127.0.0.1:7007","from":"ESTABLISHED","#,
                r#""to":"FIN_WAIT1","after_s":1.002000,"evidence":"tcp_info","cause":"shutdown"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn hostile_text_stays_inside_its_field() {
        let text = "a\"b\\c\nd\u{1b}[31m\u{7f}é";
        let json = lines(Format::Json, || tracing::warn!(text, count = 3, ratio = f64::NAN, "odd"));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["text"], text);
        assert_eq!((value["count"].as_i64(), value["ratio"].is_null()), (Some(3), true));
        let terminal = lines(Format::Terminal { colour: false }, || tracing::warn!(text, "odd"));
        assert_eq!(terminal.matches(char::is_control).count(), 1, "only the newline: {terminal:?}");
    }
}
