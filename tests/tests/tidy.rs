//! The style of the repository, and the arrows between its rooms.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const LINES_MAX: usize = 800;
const COLUMNS_MAX: usize = 100;
/// Written in two halves, so that this file does not find itself.
const UNFINISHED: [&str; 3] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
];

/// Which rooms a room may know, in this order from the lowest floor up. Tests may know all.
const ARROWS: [(&str, &[&str]); 11] = [
    ("afterimage-blockdev", &[]),
    ("afterimage-export", &["afterimage-blockdev"]),
    ("afterimage-nbd", &["afterimage-blockdev"]),
    ("afterimage-vhost", &["afterimage-blockdev"]),
    ("afterimage-cache", &["afterimage-blockdev"]),
    ("afterimage-protocol", &["afterimage-blockdev"]),
    (
        "afterimage-seed",
        &["afterimage-blockdev", "afterimage-cache"],
    ),
    ("afterimage-bulk", &["afterimage-blockdev"]),
    (
        "afterimage-agent",
        &[
            "afterimage-blockdev",
            "afterimage-cache",
            "afterimage-export",
            "afterimage-protocol",
        ],
    ),
    (
        "afterimage-server",
        &[
            "afterimage-blockdev",
            "afterimage-bulk",
            "afterimage-cache",
            "afterimage-export",
            "afterimage-nbd",
            "afterimage-protocol",
            "afterimage-seed",
            "afterimage-vhost",
        ],
    ),
    (
        "aft",
        &[
            "afterimage-blockdev",
            "afterimage-bulk",
            "afterimage-cache",
            "afterimage-protocol",
            "afterimage-seed",
        ],
    ),
];
/// Tools that may use whatever they measure.
const FREE: [&str; 2] = ["afterimage-bench", "afterimage-tests"];

/// Licences that ask for no more than a notice.
const PERMISSIVE: [&str; 16] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "NCSA",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_owned()
}

/// All files that git knows or would add, but for what others wrote.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "-co", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(
        output.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("names are UTF-8");
    // What was deleted but not committed yet is still listed.
    text.lines()
        .map(|name| root().join(name))
        .filter(|path| path.is_file())
        .collect()
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    path.extension()
        .is_some_and(|ending| endings.iter().any(|known| ending == *known))
}

fn is_script(path: &Path, text: &str) -> bool {
    path.extension().is_none() && text.starts_with("#!")
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for path in files() {
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        if has_ending(&path, &["rs", "py", "sh"]) || is_script(&path, &text) {
            found.push((path, text));
        }
    }
    found
}

fn fail_if_any(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn files_are_short_and_lines_too() {
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            complaints.push(format!(
                "{}: {lines} lines, at most {LINES_MAX}",
                path.display()
            ));
        }
        for (number, line) in (1..).zip(text.lines()) {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                complaints.push(format!("{}:{number}: {columns} columns", path.display()));
            }
            if line.ends_with(' ') || line.ends_with('\t') {
                complaints.push(format!("{}:{number}: space at the end", path.display()));
            }
        }
    }
    fail_if_any(&complaints);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        for (number, line) in (1..).zip(text.lines()) {
            if UNFINISHED.iter().any(|word| line.contains(word)) {
                complaints.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    fail_if_any(&complaints);
}

/// The lint denies `unwrap`; here it is seen to that nobody allows it outside of tests.
#[test]
fn the_lint_against_unwrap_is_not_allowed_away() {
    let allowed = concat!("allow(clippy::unwrap", "_used");
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        let is_test = path.components().any(|part| part.as_os_str() == "tests")
            || path.file_name().is_some_and(|name| name == "tests.rs");
        if !is_test && text.contains(allowed) {
            complaints.push(path.display().to_string());
        }
    }
    fail_if_any(&complaints);
}

/// `unsafe` stands in few places, and each says why it is right.
#[test]
fn unsafe_stands_where_it_may_and_says_why() {
    let may = ["blockdev/core", "blockdev/export", "appliance/agent"];
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        let local = path.strip_prefix(root()).expect("below the root");
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            let is_meant = has_ending(&path, &["rs"])
                && !code.starts_with("//")
                && (code.contains(concat!("unsafe", " {"))
                    || code.starts_with(concat!("unsafe", " impl")));
            if !is_meant {
                continue;
            }
            let place = format!("{}:{}", local.display(), index + 1);
            if !may.iter().any(|room| local.starts_with(room)) {
                complaints.push(format!("{place}: no unsafe in this room"));
            }
            let before = &lines[index.saturating_sub(8)..index];
            if !before.iter().any(|line| line.contains("SAFETY:")) {
                complaints.push(format!("{place}: no SAFETY argument"));
            }
        }
    }
    fail_if_any(&complaints);
}

fn metadata(arguments: &[&str]) -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().expect("a package has a name")
}

/// A room knows only lower ones; test code may use more.
#[test]
fn arrows_between_rooms_go_one_way() {
    let metadata = metadata(&["--no-deps"]);
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let rooms: BTreeSet<&str> = packages(&metadata).map(name).collect();
    let mut complaints = Vec::new();
    for package in packages(&metadata) {
        let from = name(package);
        if FREE.contains(&from) {
            continue;
        }
        let Some(may) = arrows.get(from) else {
            complaints.push(format!("{from}: a new room; say here what it may know"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = name(dependency);
            let is_for_tests = dependency["kind"] == "dev";
            if rooms.contains(to) && !is_for_tests && !may.contains(&to) {
                complaints.push(format!("{from} must not know {to}"));
            }
        }
    }
    fail_if_any(&complaints);
}

/// Every alternative of a licence expression is one part of `A OR B`; all of `A AND B` must hold.
fn is_permissive(expression: &str) -> bool {
    let expression = expression.replace(['(', ')'], " ").replace('/', " OR ");
    expression.split(" OR ").any(|choice| {
        choice
            .split(" AND ")
            .all(|licence| PERMISSIVE.contains(&licence.trim()))
    })
}

#[test]
fn all_licences_are_permissive() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let mut complaints = Vec::new();
    for package in packages(&metadata) {
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_permissive(licence) {
            complaints.push(format!("{}: {licence}", name(package)));
        }
    }
    fail_if_any(&complaints);
}

/// Every promise of the README names a check that exists.
#[test]
fn every_promise_has_its_check() {
    let output = Command::new(root().join("tools/check"))
        .arg("--list")
        .current_dir(root())
        .output()
        .expect("tools/check runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
