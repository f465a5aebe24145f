//! The facts as docs/states.md: the same on every machine.

use std::fmt::Write;

use super::diagram;
use super::facts::{FACTS, Facts, Query};
use super::text::wrapped;

/// Lines of paragraphs are not longer, so that a change of a word changes few of them.
const WIDTH: usize = 140;

const OPENING: &str = "Made by `echoscope explain --output markdown`; a test keeps it in step. Do not edit: change the \
                       table in src/explain.";

const ABOUT: &str = "What each state of a TCP connection means on Linux 6.x: who waits for whom, how long it may last \
                     and which setting says so, what piles it up, how to be sure, what to do. `echoscope explain \
                     STATE` tells the same with the values of the machine it runs on.";

const NOTES: &[&str] = &[
    "The drawing leaves out the sudden ends, by a RST, a timer or an abort: [CLOSED](#closed) has them all.",
    "Capitals in a command are yours to fill in; [the runbook](runbook.md) says where from. Only root sees everybody's \
     processes in `ss -p`.",
    "Sockets and most settings belong to a network namespace: ask in the right one (`nsenter -t PID -n`). Settings \
     under net.ipv4 hold for IPv6 too.",
    "Times are the kernel's sums. Its timers fire a little later, by up to an eighth of the last pause.",
];

/// The whole document.
pub(super) fn document() -> String {
    let mut out = String::from("# The states\n\n");
    put(&mut out, "", OPENING);
    out.push('\n');
    put(&mut out, "", ABOUT);
    let _ = write!(out, "\n```text\n{}\n", diagram::DRAWING);
    for line in diagram::LEGEND {
        let _ = writeln!(out, "{line}");
    }
    out.push_str("```\n\n| state | |\n|---|---|\n");
    for facts in FACTS {
        let name = facts.state.name();
        let _ = writeln!(out, "| [{name}](#{}) | {} |", name.to_lowercase(), facts.meaning);
    }
    out.push('\n');
    for note in NOTES {
        put(&mut out, "- ", note);
    }
    for facts in FACTS {
        out.push('\n');
        out.push_str(&section(facts));
    }
    out
}

/// One state.
pub(super) fn section(facts: &Facts) -> String {
    let mut out = format!("## {}\n\n", facts.state);
    put(&mut out, "", &format!("**{}** {}", facts.meaning, facts.waiting));
    out.push('\n');
    put(&mut out, "", &format!("**How long.** {} {}", facts.lasts.words, facts.lasts.differs));
    out.push('\n');
    put(&mut out, "", &format!("*Sources: {}.*", facts.lasts.sources.join("; ")));
    out.push_str("\n| way | on |\n|---|---|\n");
    for (from, way) in facts.begins() {
        let _ = writeln!(out, "| from {from} | {} |", way.on.join(" · "));
    }
    for way in facts.ends {
        let _ = writeln!(out, "| to {} | {} |", way.to, way.on.join(" · "));
    }
    out.push_str("\n| sysctl | unit | |\n|---|---|---|\n");
    for sysctl in facts.sysctls {
        let _ = writeln!(out, "| `{}` | {} | {} |", sysctl.name(), sysctl.unit, sysctl.does);
    }
    list(&mut out, "What piles it up", facts.piles_up);
    out.push_str("\n**Confirm**\n");
    code(&mut out, "sh", facts.commands);
    code(&mut out, "promql", facts.queries);
    list(&mut out, "What to do", facts.remedies);
    if !facts.alerts.is_empty() {
        let link = |alert: &&str| format!("[{alert}](runbook.md#{})", alert.to_lowercase());
        out.push('\n');
        put(&mut out, "", &format!("Alerts: {}", facts.alerts.iter().map(link).collect::<Vec<_>>().join(", ")));
    }
    out
}

fn list(out: &mut String, heading: &str, items: &[&str]) {
    let _ = write!(out, "\n**{heading}**\n\n");
    for item in items {
        put(out, "- ", item);
    }
}

fn code(out: &mut String, language: &str, queries: &[Query]) {
    let _ = write!(out, "\n```{language}\n");
    for Query { text, shows } in queries {
        let _ = write!(out, "# {shows}\n{text}\n");
    }
    out.push_str("```\n");
}

/// A wrapped paragraph or item.
fn put(out: &mut String, bullet: &str, text: &str) {
    for (i, line) in wrapped(text, WIDTH - bullet.len()).iter().enumerate() {
        let before = if i == 0 { bullet } else { &"  "[..bullet.len()] };
        let _ = writeln!(out, "{before}{line}");
    }
}
