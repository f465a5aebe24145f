//! What the compose file and the files that its services mount say of each other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_yaml_ng::Value;

use crate::support::{file, root};

fn yaml(path: &str) -> Value {
    let mut value: Value = serde_yaml_ng::from_str(&file(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    value.apply_merge().unwrap();
    value
}

fn services() -> BTreeMap<String, Value> {
    let compose = yaml("docker-compose.yml");
    compose["services"].as_mapping().unwrap().iter().map(|(k, v)| (k.as_str().unwrap().to_owned(), v.clone())).collect()
}

/// A list of strings; nothing where there is none.
fn strings(value: &Value) -> Vec<&str> {
    value.as_sequence().into_iter().flatten().map(|v| v.as_str().unwrap()).collect()
}

/// Where a service finds a file of ours that it knows by this path.
fn mounted(service: &Value, path: &str) -> Option<PathBuf> {
    strings(&service["volumes"]).into_iter().find_map(|volume| {
        let mut parts = volume.split(':');
        let (from, to) = (parts.next()?, parts.next()?);
        let rest = Path::new(path).strip_prefix(to).ok()?;
        from.starts_with("./").then(|| root().join(from).join(rest))
    })
}

/// The ports on which a service of ours listens, by its command and its environment: for echoes, and for the web.
fn listens(service: &Value) -> Vec<String> {
    let command = strings(&service["command"]);
    let web = service["environment"]["ECHOSCOPE_WEB_LISTEN_ADDRESS"].as_str().unwrap_or(":9907");
    let echo = (command[0] == "server").then(|| "7007".to_owned());
    echo.into_iter().chain([web.trim_start_matches(':').to_owned()]).collect()
}

#[test]
fn one_service_builds_the_image_and_nobody_asks_a_registry_for_it() {
    let services = services();
    let builders: Vec<&str> = services.iter().filter(|(_, s)| !s["build"].is_null()).map(|(n, _)| n.as_str()).collect();
    assert_eq!(builders, ["server"]);
    let image = &services["server"]["image"];
    let ours: Vec<_> = services.iter().filter(|(_, s)| s["image"] == *image).collect();
    assert!(ours.len() > 5, "{ours:?}");
    for (name, service) in ours {
        assert_eq!(service["pull_policy"], "never", "{name}");
        // Compose v1 takes services in the order in which they depend on each other.
        let depends = &service["depends_on"];
        let after: Vec<&str> = match depends.as_mapping() {
            Some(on) => on.keys().map(|k| k.as_str().unwrap()).collect(),
            None => strings(depends),
        };
        let on_server = |name: &&str| *name == "server" || strings(&services[*name]["depends_on"]).contains(&"server");
        assert!(name == "server" || after.iter().any(on_server), "{name} may come before its image: {after:?}");
    }
    for (name, service) in services {
        let tag = service["image"].as_str().unwrap();
        assert!(tag.starts_with("${") && tag.contains(":-") && tag.ends_with('}'), "{name}: {tag}");
    }
}

#[test]
fn everything_is_published_on_this_machine_only() {
    let mut published = 0;
    for (name, service) in services() {
        for port in strings(&service["ports"]) {
            assert!(port.starts_with("127.0.0.1:${"), "{name}: {port} can be reached from elsewhere, or not be moved");
            published += 1;
        }
    }
    assert!(published > 5, "{published}");
}

#[test]
fn prometheus_scrapes_services_that_are_there_and_finds_its_files() {
    let services = services();
    let prometheus = &services["prometheus"];
    let configuration = strings(&prometheus["command"]).into_iter().find_map(|c| c.strip_prefix("--config.file="));
    assert_eq!(mounted(prometheus, configuration.unwrap()), Some(root().join("./deploy/prometheus/prometheus.yml")));
    let configuration = yaml("deploy/prometheus/prometheus.yml");
    let (mut known, mut found) = (Vec::new(), Vec::new());
    for job in configuration["scrape_configs"].as_sequence().unwrap() {
        for target in job["static_configs"].as_sequence().into_iter().flatten().flat_map(|c| strings(&c["targets"])) {
            let (name, port) = target.split_once(':').unwrap();
            if name == "localhost" {
                assert!(prometheus["ports"][0].as_str().unwrap().ends_with(&format!(":{port}")));
                continue;
            }
            // One that lives in another's network has the other's name.
            let within = format!("service:{name}");
            let there = services.iter().filter(|(n, s)| *n == name || s["network_mode"] == *within);
            assert!(there.flat_map(|(_, s)| listens(s)).any(|p| p == port), "nobody is {target}");
            known.push(target.to_owned());
        }
        for dns in job["dns_sd_configs"].as_sequence().into_iter().flatten() {
            for name in strings(&dns["names"]) {
                let name = name.strip_suffix('.').unwrap();
                assert_eq!(listens(&services[name]).last().unwrap(), &dns["port"].as_u64().unwrap().to_string());
                assert!(!services[name]["profiles"].is_null(), "{name} is always there");
                found.push(name.to_owned());
            }
        }
    }
    let in_profiles = services.iter().filter(|(_, s)| !s["profiles"].is_null()).map(|(n, _)| n.clone());
    found.sort();
    assert_eq!(in_profiles.collect::<Vec<_>>(), found, "what a profile adds is scraped");
    assert_eq!(known, ["server:9907", "client:9907", "server:9917"]);
}

#[test]
fn grafana_finds_its_home_page_its_dashboards_and_its_prometheus() {
    let services = services();
    let grafana = &services["grafana"];
    let home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].as_str().unwrap();
    let home = mounted(grafana, home).unwrap_or_else(|| panic!("{home} is in no volume"));
    assert!(home.ends_with("dashboards/tcp-lifecycle.json") && home.is_file(), "{home:?}");
    for kind in ["datasources", "dashboards"] {
        let directory = mounted(grafana, &format!("/etc/grafana/provisioning/{kind}")).unwrap();
        assert!(directory.ends_with(format!("dashboards/provisioning/{kind}")) && directory.is_dir(), "{directory:?}");
    }
    let provider = yaml("dashboards/provisioning/dashboards/echoscope.yml");
    let directory = mounted(grafana, provider["providers"][0]["options"]["path"].as_str().unwrap()).unwrap();
    assert_eq!(directory.canonicalize().unwrap(), root().join("dashboards"));
    let source = &yaml("dashboards/provisioning/datasources/prometheus.yml")["datasources"][0];
    let (name, port) = source["url"].as_str().unwrap().strip_prefix("http://").unwrap().split_once(':').unwrap();
    let published = strings(&services[name]["ports"]);
    assert!(published.iter().any(|p| p.ends_with(&format!(":{port}"))), "{name}:{port}, {published:?}");
    let interval = &yaml("deploy/prometheus/prometheus.yml")["global"]["scrape_interval"];
    assert_eq!(&source["jsonData"]["timeInterval"], interval, "$__rate_interval follows from it");
    for setting in ["GF_AUTH_ANONYMOUS_ENABLED", "GF_AUTH_DISABLE_LOGIN_FORM"] {
        assert_eq!(grafana["environment"][setting], "true", "nothing to click");
    }
}
