//! Imports only go down, and only the lowest floor may say `unsafe`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::root;

/// The floor of each module at the top of src/; what is not listed fails the test.
const FLOORS: &[(&str, u8)] = &[
    ("main", 4),
    ("app", 3),
    ("server", 2),
    ("client", 2),
    ("web", 2),
    ("lab", 2),
    ("watch", 2),
    ("conn", 1),
    ("afterlife", 1),
    ("lives", 1),
    ("census", 1),
    ("survey", 1),
    ("source", 1),
    ("journal", 1),
    ("ledger", 1),
    ("listener", 1),
    ("live", 1),
    ("metrics", 1),
    ("scope", 1),
    ("progress", 1),
    ("explain", 1),
    ("config", 1),
    ("shutdown", 1),
    ("log", 1),
    ("thread", 1),
    ("tcp", 0),
    ("kernel", 0),
];

fn floor(module: &str) -> u8 {
    FLOORS.iter().find(|f| f.0 == module).unwrap_or_else(|| panic!("module {module} is on no floor")).1
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn imports_only_go_down() {
    let src = root().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut checked = 0;
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (prefix, _) in code.match_indices("crate::").chain(code.match_indices("echoscope::")) {
            let path = &code[prefix..];
            let after = &path[path.find("::").unwrap() + 2..];
            // `use echoscope::{app, …}` of main: each name in the braces.
            let names: Vec<&str> = match after.strip_prefix('{') {
                Some(list) => list.split('}').next().unwrap().split(',').map(str::trim).collect(),
                None => vec![after],
            };
            for name in names {
                let imported: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if imported == module || imported == "tcp" && code[..prefix].ends_with("\"echoscope::") {
                    continue;
                }
                if code[..prefix].ends_with('"') {
                    continue; // a log target, not a path
                }
                let (here, there) = (floor(module), floor(&imported));
                let ok = if here >= 2 { there < here } else { there <= here };
                assert!(ok, "{} (floor {here}) imports {imported} (floor {there})", relative.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "only {checked} imports were looked at: the test looks in the wrong place");
}

#[test]
fn unsafe_is_said_in_the_kernel_floor_only() {
    let src = root().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    for file in files {
        let inside = file.strip_prefix(&src).unwrap().starts_with("kernel");
        let text = fs::read_to_string(&file).unwrap();
        let blocks = text.matches("unsafe {").count();
        assert!(inside || blocks == 0, "{} says unsafe", file.display());
        assert_eq!(blocks, text.matches("// SAFETY:").count(), "{}: each block has its reason", file.display());
    }
}
