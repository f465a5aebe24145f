//! Ratios as an SVG: a dot for the median, a bar from the least to the most, a tick for the goal.

use std::fmt::Write as _;

use super::{Goal, Line};

const LEFT: f64 = 420.0;
const WIDTH: f64 = 1000.0;
const ROW: f64 = 26.0;
const TOP: f64 = 64.0;

pub fn svg(title: &str, lines: &[Line]) -> String {
    let goal = |l: &Line| l.goal.map_or(1.0, Goal::value);
    let step = 0.1;
    let least = (lines.iter().map(|l| l.ratio.min.min(goal(l))).fold(0.9, f64::min) / step).floor() * step;
    let most = lines.iter().map(|l| l.ratio.max.max(goal(l))).fold(1.1, f64::max);
    let scale = (WIDTH - LEFT - 40.0) / (most - least);
    let x = |ratio: f64| LEFT + (ratio - least) * scale;
    let height = TOP + ROW * lines.len() as f64 + 24.0;
    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| out.write_fmt(text).expect("writing to a string");
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n<text x=\"16\" y=\"26\" \
         font-size=\"16\" fill=\"#111\">{title}</text>\n"
    ));
    for i in 0..=((most - least) / step) as usize {
        let ratio = least + i as f64 * step;
        let (x, bottom, colour) =
            (x(ratio), height - 16.0, if (ratio - 1.0).abs() < 1e-9 { "#888" } else { "#e4e4e4" });
        put(format_args!(
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\n<text x=\"{x:.1}\" \
             y=\"{}\" text-anchor=\"middle\" fill=\"#666\" font-size=\"11\">{ratio:.1}</text>\n",
            TOP - 8.0
        ));
    }
    for (i, Line { what, ratio, goal, .. }) in lines.iter().enumerate() {
        let y = TOP + ROW * (i as f64 + 0.6);
        let met = goal.is_none_or(|goal| goal.met(ratio.median));
        let colour = if met { "#1b6ca8" } else { "#c0392b" };
        put(format_args!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#111\">{what}</text>\n<line x1=\"{:.1}\" y1=\"{y:.1}\" \
             x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" stroke-width=\"5\" stroke-opacity=\"0.35\"/>\n<circle \
             cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{colour}\"/>\n",
            LEFT - 14.0,
            y + 4.0,
            x(ratio.min),
            x(ratio.max),
            x(ratio.median)
        ));
        if let Some(goal) = goal {
            let goal = x(goal.value());
            put(format_args!(
                "<line x1=\"{goal:.1}\" y1=\"{:.1}\" x2=\"{goal:.1}\" y2=\"{:.1}\" stroke=\"#111\" stroke-width=\"2\"/>\n",
                y - 9.0,
                y + 9.0
            ));
        }
    }
    out.push_str("</svg>\n");
    out
}
