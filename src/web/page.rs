//! The live page: plain HTML, CSS and ES modules, embedded as they are written. Nothing is built, and nothing is asked of
//! anybody else.

/// One file of the page.
pub(super) struct Asset {
    path: &'static str,
    pub(super) kind: &'static str,
    pub(super) content: &'static str,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! script {
    ($name:literal) => {
        Asset { path: concat!("/page/", $name), kind: SCRIPT, content: include_str!(concat!("page/", $name)) }
    };
}

const ASSETS: &[Asset] = &[
    Asset { path: "/", kind: "text/html; charset=utf-8", content: include_str!("page/index.html") },
    Asset { path: "/page/page.css", kind: "text/css; charset=utf-8", content: include_str!("page/page.css") },
    Asset { path: "/page/icon.svg", kind: "image/svg+xml", content: include_str!("page/icon.svg") },
    script!("app.js"),
    script!("charts.js"),
    script!("diagram.js"),
    script!("draw.js"),
    script!("facts.js"),
    script!("feed.js"),
    script!("holders.js"),
    script!("ladder.js"),
    script!("lives.js"),
    script!("log.js"),
    script!("segments.js"),
    script!("shape.js"),
    script!("sockets.js"),
    script!("words.js"),
];

/// The file at `path`, if it is one of the page's.
pub(super) fn asset(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn the_whole_page_is_small() {
        let all: usize = ASSETS.iter().map(|asset| asset.content.len()).sum();
        assert!(all < 100 * 1000, "{all} bytes");
    }

    #[test]
    fn every_file_is_served_and_every_name_in_it_is_a_file() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/web/page");
        let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files: BTreeSet<String> =
            files.filter(|name| name != "index.html").map(|name| format!("/page/{name}")).collect();
        let served: BTreeSet<String> = ASSETS.iter().skip(1).map(|asset| asset.path.to_owned()).collect();
        assert_eq!(served, files);
        for Asset { path, content, .. } in ASSETS {
            for (at, _) in content.match_indices("from './") {
                let name = content[at + "from './".len()..].split('\'').next().unwrap();
                assert!(asset(&format!("/page/{name}")).is_some(), "{path} imports {name}");
            }
            for (at, _) in content.match_indices("\"/page/") {
                let name = content[at + 1..].split('"').next().unwrap();
                assert!(asset(name).is_some(), "{path} names {name}");
            }
        }
    }

    #[test]
    fn nothing_is_written_into_the_page_that_runs_and_nothing_is_asked_elsewhere() {
        for Asset { path, content, .. } in ASSETS {
            for never in
                ["https://", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=\"", "javascript:"]
            {
                assert!(!content.contains(never), "{path}: {never}");
            }
            let elsewhere = content.matches("http://").count() - content.matches("http://www.w3.org/2000/svg").count();
            assert_eq!(elsewhere, 0, "{path}");
        }
    }
}
