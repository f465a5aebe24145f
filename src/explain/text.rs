//! The facts for a person at a terminal, with the values of this machine.

use std::fmt::Write;
use std::time::Duration;

use super::diagram;
use super::facts::{FACTS, Facts};
use super::{Read, number};

/// No line is longer.
const WIDTH: usize = 100;
/// Where the text beside the headings begins.
const INDENT: usize = 14;

/// Everything about one state.
pub(super) fn state(facts: &Facts, read: Read<'_>, colour: bool) -> String {
    let mut page = Page::new(colour);
    page.line(&format!("{}  {}", page.bold(facts.state.name()), facts.meaning));
    page.heading("Who waits");
    page.text("", facts.waiting);
    page.heading("Begins");
    for (from, way) in facts.begins() {
        page.text(&format!("from {from:<13}"), &way.on.join(" · "));
    }
    page.heading("Ends");
    for way in facts.ends {
        page.text(&format!("to {:<13}", way.to), &way.on.join(" · "));
    }

    page.heading("How long");
    page.text("", facts.lasts.words);
    for limit in facts.lasts.limits {
        let told = match limit.clock.limit(|path| number(read, path)) {
            Some(time) if limit.clock.is_least() => format!("at least {} when {}.", rounded(time), limit.when),
            Some(time) => format!("{} when {}.", rounded(time), limit.when),
            None => format!("not known, when {}: a setting cannot be read.", limit.when),
        };
        page.text("Here: ", &told);
    }
    page.text("", facts.lasts.differs);
    page.text("Sources: ", &format!("{}.", facts.lasts.sources.join("; ")));

    page.heading("Sysctls");
    for sysctl in facts.sysctls {
        let value = match read(sysctl.path) {
            Ok(value) if value.is_empty() => "(nothing set)".to_owned(),
            Ok(value) => value,
            Err(error) => format!("cannot be read: {error}"),
        };
        page.unbroken(&format!("{} = {value}  ({})", sysctl.name(), sysctl.unit));
        page.text("    ", sysctl.does);
    }

    page.heading("Piles up by");
    page.items(facts.piles_up);
    for (heading, queries) in [("Confirm", facts.commands), ("PromQL", facts.queries)] {
        page.heading(heading);
        for query in queries {
            page.unbroken(query.text);
            page.text("    ", query.shows);
        }
    }
    page.heading("What to do");
    page.items(facts.remedies);
    if !facts.alerts.is_empty() {
        page.heading("Alerts");
        page.text("", &format!("{} (docs/runbook.md)", facts.alerts.join(", ")));
    }
    page.out
}

/// The diagram, the ways to CLOSED, and a line for each state.
pub(super) fn overview(colour: bool) -> String {
    let mut page = Page::new(colour);
    for line in diagram::DRAWING.lines().chain([""]).chain(diagram::LEGEND.iter().copied()) {
        page.line(&if colour { diagram::coloured(line) } else { line.to_owned() });
    }
    page.line("");
    page.line(&page.bold("Every way to CLOSED, the sudden ones too"));
    for (from, on) in diagram::endings() {
        page.line_beside(from.name(), &on.join(" · "));
    }
    page.line("");
    page.line(&page.bold("The states; more of each: echoscope explain STATE"));
    for facts in FACTS {
        page.line_beside(facts.state.name(), facts.meaning);
    }
    page.out
}

/// As far as the kernel's timers are exact.
fn rounded(time: Duration) -> String {
    humantime::format_duration(Duration::from_secs(time.as_secs())).to_string()
}

/// A page that grows line by line: headings at the left, text beside them.
struct Page {
    out: String,
    colour: bool,
    /// The next line stands beside a heading that is written already.
    begun: bool,
}

impl Page {
    fn new(colour: bool) -> Page {
        Page { out: String::new(), colour, begun: false }
    }

    fn bold(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn line(&mut self, text: &str) {
        self.out.push_str(text.trim_end());
        self.out.push('\n');
    }

    fn heading(&mut self, heading: &str) {
        self.out.push('\n');
        self.out.push_str(&self.bold(&format!("{heading:INDENT$}")));
        self.begun = true;
    }

    /// A name in the place of a heading, and text beside it.
    fn line_beside(&mut self, name: &str, text: &str) {
        let _ = write!(self.out, "  {name:<0$}", INDENT - 2);
        self.begun = true;
        self.text("", text);
    }

    /// One line beside the heading, however long: a command that is broken cannot be copied.
    fn unbroken(&mut self, text: &str) {
        if !std::mem::take(&mut self.begun) {
            self.out.push_str(&" ".repeat(INDENT));
        }
        self.line(text);
    }

    /// `lead`, and the text wrapped beside it.
    fn text(&mut self, lead: &str, text: &str) {
        let width = lead.chars().count();
        for (i, line) in wrapped(text, WIDTH - INDENT - width).iter().enumerate() {
            let lead = if i == 0 { lead } else { &" ".repeat(width) };
            self.unbroken(&format!("{lead}{line}"));
        }
    }

    fn items(&mut self, items: &[&str]) {
        for item in items {
            self.text("- ", item);
        }
    }
}

/// The text in lines of at most `width` characters, broken between words.
#[must_use]
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
