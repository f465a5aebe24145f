//! Dashboards, rules, README and runbook name only what the program exports, and leave nothing of it out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use promql_parser::label::MatchOp;
use promql_parser::parser::{self, Expr, LabelModifier, VectorSelector};
use promql_parser::util::{ExprVisitor, walk_expr};
use serde_json::Value;

use crate::support::{Echoscope, file, get, root, until};

/// The labels that Prometheus adds to whatever it scrapes.
const ADDED: [&str; 2] = ["job", "instance"];

/// Metrics by name, each with its labels and their values.
#[derive(Default)]
struct Names(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Names {
    /// What a pair exports: everything that server and client do.
    fn of_pair(pair: &Echoscope) -> Names {
        Names::on(&get(pair.web(), "/metrics").1)
    }

    /// What a watch exports that sees this pair's ports, once it knows who listens there.
    fn of_watch(pair: &Echoscope) -> Names {
        let port = pair.server().port().to_string();
        let watch = Echoscope::start(&["watch", "--port", &port, "--remote-port", &port]);
        until("a listener's process", || {
            let names = Names::on(&get(watch.web(), "/metrics").1);
            names.0.contains_key("echoscope_listener_info").then_some(names)
        })
    }

    /// What the program exports, in whichever mode.
    fn exported() -> Names {
        let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0"]);
        Names::of_pair(&pair).and(Names::of_watch(&pair))
    }

    fn on(page: &str) -> Names {
        let mut names = Names::default();
        for line in page.lines().filter(|l| !l.starts_with('#')) {
            let series = line.rsplit_once(' ').unwrap().0;
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let entry = names.0.entry(name.to_owned()).or_default();
            for pair in labels.trim_end_matches('}').split(',').filter(|p| !p.is_empty()) {
                let (label, value) = pair.split_once('=').unwrap();
                entry.entry(label.to_owned()).or_default().insert(value.trim_matches('"').to_owned());
            }
        }
        names
    }

    /// These and those.
    fn and(mut self, others: Names) -> Names {
        for (name, labels) in others.0 {
            let entry = self.0.entry(name).or_default();
            for (label, values) in labels {
                entry.entry(label).or_default().extend(values);
            }
        }
        self
    }

    /// With what Prometheus makes itself: of a scrape, of alerts, and by recording rules.
    fn with_what_prometheus_makes(mut self) -> Names {
        for name in ["up", "scrape_duration_seconds"] {
            self.0.insert(name.to_owned(), BTreeMap::new());
        }
        let states = ["firing", "pending"].map(str::to_owned).into();
        let alerts = rules().into_iter().filter_map(|rule| rule.alert).collect();
        self.0
            .insert("ALERTS".to_owned(), [("alertstate".to_owned(), states), ("alertname".to_owned(), alerts)].into());
        for rule in rules() {
            if let Some(name) = rule.record {
                // The level that its name begins with says which labels it keeps.
                let level = name.split(':').next().unwrap().split('_').filter(|l| *l != "instance");
                let labels = level.map(|l| (l.to_owned(), BTreeSet::new())).collect();
                self.0.insert(name, labels);
            }
        }
        self
    }

    /// Names without what a histogram appends to them.
    fn families(&self) -> BTreeSet<&str> {
        let histogram = |name: &str| self.0.contains_key(&format!("{name}_bucket"));
        let family = |name: &'_ str| {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            base.filter(|base| histogram(base)).map_or(name.len(), str::len)
        };
        self.0.keys().map(|name| &name[..family(name)]).collect()
    }

    /// What of a query is not there.
    fn faults(&self, query: &str) -> Vec<String> {
        let query = query.replace("$__rate_interval", "1m").replace("$__range", "1m");
        match parser::parse(&query) {
            Ok(expr) => self.faults_of(&expr).into_iter().map(|fault| format!("{fault}: {query}")).collect(),
            Err(error) => vec![format!("{error}: {query}")],
        }
    }

    fn faults_of(&self, expr: &Expr) -> Vec<String> {
        struct Visitor<'a>(&'a Names, Vec<String>);
        impl ExprVisitor for Visitor<'_> {
            type Error = ();
            fn pre_visit(&mut self, expr: &Expr) -> Result<bool, ()> {
                let Visitor(names, faults) = self;
                match expr {
                    Expr::VectorSelector(selector) => faults.extend(names.faults_of_selector(selector)),
                    Expr::MatrixSelector(matrix) => faults.extend(names.faults_of_selector(&matrix.vs)),
                    Expr::Aggregate(aggregate) => faults.extend(names.unknown(aggregate.modifier.as_ref(), expr)),
                    Expr::Binary(binary) => {
                        let matching = binary.modifier.as_ref().and_then(|m| m.matching.as_ref());
                        faults.extend(names.unknown(matching, expr));
                    }
                    _ => {}
                }
                Ok(true)
            }
        }
        let mut visitor = Visitor(self, Vec::new());
        let _ = walk_expr(&mut visitor, expr);
        visitor.1
    }

    fn faults_of_selector(&self, selector: &VectorSelector) -> Vec<String> {
        let name = selector.name.as_deref().unwrap_or("");
        let Some(labels) = self.0.get(name) else { return vec![format!("no metric {name:?}")] };
        let mut faults = Vec::new();
        for matcher in &selector.matchers.matchers {
            if ADDED.contains(&matcher.name.as_str()) {
                continue;
            }
            let Some(values) = labels.get(&matcher.name) else {
                faults.push(format!("{name} has no label {}", matcher.name));
                continue;
            };
            let wanted: Vec<&str> = match matcher.op {
                MatchOp::Equal | MatchOp::NotEqual => vec![&matcher.value],
                MatchOp::Re(_) | MatchOp::NotRe(_) => matcher.value.split('|').collect(),
            };
            let literal = wanted.into_iter().filter(|v| !v.contains(['$', '.', '*']) && !v.is_empty());
            faults.extend(
                literal.filter(|v| !values.contains(*v)).map(|v| format!("{name}: {} is never {v}", matcher.name)),
            );
        }
        faults
    }

    /// Labels that are named by an operator, and that nothing under it has.
    fn unknown(&self, modifier: Option<&LabelModifier>, under: &Expr) -> Vec<String> {
        struct Selected(BTreeSet<String>);
        impl ExprVisitor for Selected {
            type Error = ();
            fn pre_visit(&mut self, expr: &Expr) -> Result<bool, ()> {
                let name = match expr {
                    Expr::VectorSelector(selector) => &selector.name,
                    Expr::MatrixSelector(matrix) => &matrix.vs.name,
                    _ => &None,
                };
                self.0.extend(name.clone());
                Ok(true)
            }
        }
        let Some(modifier) = modifier else { return Vec::new() };
        let mut selected = Selected(BTreeSet::new());
        let _ = walk_expr(&mut selected, under);
        let has = |label: &str| selected.0.iter().filter_map(|name| self.0.get(name)).any(|l| l.contains_key(label));
        let unknown = modifier.labels().labels.iter().filter(|l| !ADDED.contains(&l.as_str()) && !has(l));
        unknown.map(|label| format!("nothing has the label {label}")).collect()
    }
}

fn files(directory: &str, extension: &str) -> Vec<String> {
    let entries = fs::read_dir(root().join(directory)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> =
        names.filter(|name| name.ends_with(extension)).map(|n| format!("{directory}/{n}")).collect();
    found.sort();
    assert!(!found.is_empty(), "{directory} has no {extension}");
    found
}

#[derive(serde::Deserialize)]
struct Rule {
    alert: Option<String>,
    record: Option<String>,
    expr: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

fn rules() -> Vec<Rule> {
    #[derive(serde::Deserialize)]
    struct Group {
        rules: Vec<Rule>,
    }
    #[derive(serde::Deserialize)]
    struct Groups {
        groups: Vec<Group>,
    }
    let read = |path: String| serde_yaml_ng::from_str::<Groups>(&file(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    files("deploy/prometheus/rules", ".yml").into_iter().flat_map(|p| read(p).groups).flat_map(|g| g.rules).collect()
}

fn dashboards() -> Vec<(String, Value)> {
    let read = |path: &String| serde_json::from_str(&file(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    files("dashboards", ".json").into_iter().map(|path| (path.clone(), read(&path))).collect()
}

fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    let inner = |p: &Value| p["panels"].as_array().map_or(0, Vec::len);
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.iter().all(|p| inner(p) == 0), "rows are open: what is inside would not be looked at here");
    panels.iter()
}

fn queries(dashboard: &Value) -> Vec<String> {
    let of_panels = panels(dashboard).flat_map(|p| p["targets"].as_array().into_iter().flatten()).map(|t| &t["expr"]);
    let of_annotations = dashboard["annotations"]["list"].as_array().unwrap().iter().map(|a| &a["expr"]);
    of_panels.chain(of_annotations).filter_map(Value::as_str).map(str::to_owned).collect()
}

/// What the runbook asks of Prometheus: each line of its blocks is a query, and what is said of it behind a #.
fn queries_of_the_runbook() -> Vec<String> {
    let text = file("docs/runbook.md");
    let blocks = text.split("```promql\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).map(|line| line.split('#').next().unwrap().trim());
    // Capitals are the reader's to fill in.
    let filled_in =
        |line: &str| ["INSTANCE", "PORT"].iter().fold(line.to_owned(), |l, c| l.replace(&format!("\"{c}\""), "\".*\""));
    let queries: Vec<String> = lines.filter(|line| !line.is_empty()).map(filled_in).collect();
    assert!(queries.len() > 40, "{queries:?}");
    queries
}

/// Words of a text that begin like a metric of ours.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    words.filter(|w| w.starts_with("echoscope_") && !w.contains(':')).collect()
}

#[test]
fn dashboards_and_rules_name_only_what_is_there() {
    let names = Names::exported().with_what_prometheus_makes();
    let mut faults = Vec::new();
    for (path, dashboard) in dashboards() {
        faults.extend(queries(&dashboard).iter().flat_map(|q| names.faults(q)).map(|f| format!("{path}: {f}")));
        let variables = dashboard["templating"]["list"].as_array().unwrap();
        for query in variables.iter().filter_map(|v| v["query"]["query"].as_str()) {
            let (selector, label) =
                query.trim_start_matches("label_values(").trim_end_matches(')').rsplit_once(", ").unwrap();
            let counted =
                if ADDED.contains(&label) { selector.into() } else { format!("count by ({label}) ({selector})") };
            faults.extend(names.faults(&counted).into_iter().map(|f| format!("{path}: {f}")));
        }
    }
    for rule in rules() {
        let name = rule.alert.or(rule.record).unwrap();
        faults.extend(names.faults(&rule.expr).into_iter().map(|f| format!("{name}: {f}")));
    }
    for query in queries_of_the_runbook() {
        faults.extend(names.faults(&query).into_iter().map(|f| format!("docs/runbook.md: {f}")));
    }
    for facts in echoscope::explain::FACTS {
        let faults_of = |query: &str| names.faults(query).into_iter().map(|f| format!("{}: {f}", facts.state));
        faults.extend(facts.queries.iter().flat_map(|query| faults_of(query.text).collect::<Vec<_>>()));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn every_exported_metric_is_on_a_dashboard() {
    let names = Names::exported();
    let shown: String = dashboards().iter().flat_map(|(_, d)| queries(d)).collect::<Vec<_>>().join("\n");
    let shown = shown.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect::<BTreeSet<_>>();
    let suffixes = ["", "_bucket", "_sum", "_count"];
    let on_one = |family: &&str| suffixes.iter().any(|suffix| shown.contains(format!("{family}{suffix}").as_str()));
    let left_out: Vec<&str> = names.families().into_iter().filter(|f| !on_one(f)).collect();
    assert!(left_out.is_empty(), "{left_out:?}");
}

#[test]
fn documents_name_only_what_is_there_and_readme_names_all_of_it() {
    let pair = Echoscope::start(&["pair", "--listen", "127.0.0.1:0"]);
    let (of_pair, of_watch) = (Names::of_pair(&pair), Names::of_watch(&pair));
    let families_of = |names: &Names| names.families().into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    let watch_only = &families_of(&of_watch) - &families_of(&of_pair);
    let names = of_pair.and(of_watch);
    let families = names.families();
    let readme = file("README.md");
    for path in ["README.md", "docs/runbook.md", "docs/evidence.md", "docs/ebpf.md", "docs/states.md"] {
        let text = file(path);
        let unknown: Vec<_> =
            metrics_in(&text).into_iter().filter(|m| !families.contains(m) && !names.0.contains_key(*m)).collect();
        assert!(unknown.is_empty(), "{path}: {unknown:?}");
    }
    let named = metrics_in(&readme);
    // Who tells of the watch tells all of it.
    let watch_told = watch_only.iter().any(|family| named.contains(family.as_str()));
    let demanded = |family: &str| family.starts_with("echoscope_") && (watch_told || !watch_only.contains(family));
    let left_out: Vec<_> = families.iter().filter(|f| demanded(f) && !named.contains(*f)).collect();
    assert!(left_out.is_empty(), "README leaves out {left_out:?}");
    // The table of metrics: | names | type | labels | … |
    let rows: Vec<&str> = readme.lines().filter(|l| l.starts_with("| `echoscope_")).collect();
    assert!(rows.len() > 10, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let told: BTreeSet<&str> = cells[3].split([' ', ',']).filter(|l| !l.is_empty()).collect();
        let of_family = |family: &&str| {
            let names_of_it = names.0.iter().filter(move |(name, _)| name.starts_with(*family));
            names_of_it.flat_map(|(_, labels)| labels.keys()).map(String::as_str).collect::<BTreeSet<_>>()
        };
        let has: BTreeSet<&str> = metrics_in(cells[1]).iter().flat_map(of_family).filter(|l| *l != "le").collect();
        assert_eq!(told, has, "{row}");
    }
}

#[derive(serde::Deserialize)]
struct RuleTests {
    tests: Vec<RuleTest>,
}

#[derive(serde::Deserialize)]
struct RuleTest {
    #[serde(default)]
    alert_rule_test: Vec<AlertCase>,
    #[serde(default)]
    promql_expr_test: Vec<ExprCase>,
}

#[derive(serde::Deserialize)]
struct AlertCase {
    alertname: String,
    #[serde(default)]
    exp_alerts: Vec<serde_yaml_ng::Value>,
}

#[derive(serde::Deserialize)]
struct ExprCase {
    expr: String,
}

fn rule_tests(path: &str) -> Vec<RuleTest> {
    serde_yaml_ng::from_str::<RuleTests>(&file(path)).unwrap_or_else(|e| panic!("{path}: {e}")).tests
}

#[test]
fn queries_that_are_tested_are_the_dashboards() {
    let substituted = |query: String| ["$job", "$instance", "$role"].iter().fold(query, |q, v| q.replace(v, ".*"));
    let asked: Vec<String> =
        dashboards().iter().flat_map(|(_, dashboard)| queries(dashboard)).map(substituted).collect();
    let tests = rule_tests("deploy/prometheus/tests/dashboards.yml");
    let cases: Vec<_> = tests.into_iter().flat_map(|test| test.promql_expr_test).collect();
    assert!(!cases.is_empty());
    for ExprCase { expr } in cases {
        assert!(asked.iter().any(|query| expr == format!("count by (port) ({query})")), "no dashboard asks {expr}");
    }
}

#[test]
fn every_alert_is_tested_and_has_its_runbook() {
    // Where nothing is wrong at all, every alert is quiet: that is no near miss.
    let paths = files("deploy/prometheus/tests", ".yml").into_iter().filter(|path| !path.ends_with("healthy.yml"));
    let tests: Vec<RuleTest> = paths.flat_map(|path| rule_tests(&path)).collect();
    let runbook = file("docs/runbook.md");
    for rule in rules() {
        let Some(alert) = rule.alert else { continue };
        let cases = |test: &RuleTest| -> Vec<bool> {
            test.alert_rule_test.iter().filter(|c| c.alertname == alert).map(|c| !c.exp_alerts.is_empty()).collect()
        };
        let fires = tests.iter().any(|test| cases(test).contains(&true));
        // All along, and not only before or after it has fired.
        let quiet = tests.iter().map(cases).any(|cases| !cases.is_empty() && !cases.contains(&true));
        assert!(fires && quiet, "{alert}: tested firing {fires}, in a near miss {quiet}");
        for annotation in ["summary", "description"] {
            assert!(rule.annotations.get(annotation).is_some_and(|a| a.len() > 20), "{alert} has no {annotation}");
        }
        assert!(["warning", "critical"].contains(&rule.labels["severity"].as_str()), "{alert}");
        assert_eq!(rule.annotations["runbook_url"], format!("docs/runbook.md#{}", alert.to_lowercase()));
        assert!(runbook.lines().any(|l| l == format!("## {alert}")), "the runbook has no entry {alert}");
    }
}

#[test]
fn every_panel_says_what_a_bad_picture_means_and_has_its_place() {
    let mut uids = BTreeSet::new();
    for (path, dashboard) in dashboards() {
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()), "{path}: uid");
        let variables: Vec<&str> =
            dashboard["templating"]["list"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
        assert_eq!(variables, ["datasource", "job", "instance", "role"], "{path}");
        let annotations: Vec<&str> =
            dashboard["annotations"]["list"].as_array().unwrap().iter().filter_map(|a| a["name"].as_str()).collect();
        assert!(["Restarts", "Drains"].iter().all(|a| annotations.contains(a)), "{path}: {annotations:?}");
        let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{path}: {title}: id");
            let side = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            assert!(side("x") + side("w") <= 24, "{path}: {title} is out of the grid");
            for cell in
                (side("x")..side("x") + side("w")).flat_map(|x| (side("y")..side("y") + side("h")).map(move |y| (x, y)))
            {
                assert!(taken.insert(cell), "{path}: {title} covers another panel");
            }
            if panel["type"] == "row" {
                continue;
            }
            assert!(panel["description"].as_str().is_some_and(|d| d.len() > 40), "{path}: {title} says nothing");
            assert!(!panel["targets"].as_array().unwrap().is_empty(), "{path}: {title} asks nothing");
            for target in panel["targets"].as_array().unwrap() {
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{path}: {title}");
                let expr = target["expr"].as_str().unwrap();
                for variable in ["$job", "$instance"] {
                    assert!(expr.contains(variable), "{path}: {title} does not heed {variable}: {expr}");
                }
            }
        }
    }
}
