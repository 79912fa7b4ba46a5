//! Stores of the crash campaign, rebuilt from their segments alone.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use aft::offline::{Order, Store, rebuild};
use afterimage_tests::crash_store::golden::compare;
use afterimage_tests::crash_store::{
    REBUILD_MUST_OCCUR, REBUILD_REGRESSIONS, rebuild_campaign, rebuild_seed,
};
use afterimage_tests::golden::directory;

fn rebuild_in_place(directory: &Path) -> Result<(), String> {
    let store = Store::open(directory).map_err(|error| error.to_string())?;
    let order = Order {
        manifest: None,
        to: None,
    };
    match rebuild(&store, &order) {
        // What is newer than the notes of a store that was cut may be missing.
        Ok(rebuilt) if rebuilt.findings.is_empty() => Ok(()),
        Ok(rebuilt) => panic!("{rebuilt:?}"),
        Err(error) => Err(error.to_string()),
    }
}

/// Images to make; more for a soak.
fn images() -> u64 {
    let asked = std::env::var("AFTERIMAGE_REBUILDS").ok();
    asked.and_then(|asked| asked.parse().ok()).unwrap_or(240)
}

#[test]
fn stores_are_rebuilt_from_segments_alone() {
    let report = rebuild_campaign(1, images(), &rebuild_in_place);
    let missing = report.missing(REBUILD_MUST_OCCUR);
    assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    println!("{report}");
}

/// Log and seed segments of a golden store, with more of it.
fn golden(name: &str, more: &[&str]) -> tempfile::TempDir {
    let from = directory(name);
    let to = tempfile::tempdir().unwrap();
    std::fs::write(to.path().join("store.key"), [9; 32]).unwrap();
    std::fs::copy(from.join("expected.txt"), to.path().join("expected.txt")).unwrap();
    for room in ["log", "segments"].iter().chain(more) {
        let inner = to.path().join(room);
        std::fs::create_dir(&inner).unwrap();
        for entry in std::fs::read_dir(from.join(room)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), inner.join(entry.file_name())).unwrap();
        }
    }
    to
}

#[test]
fn a_store_of_version_1_is_rebuilt_by_its_notes() {
    for more in [&[][..], &["runs"], &["manifest"], &["manifest", "runs"]] {
        let store = golden("store-v1-notes", more);
        rebuild_in_place(store.path()).unwrap();
        assert!(compare(store.path()) > 8, "{more:?}");
    }
}

#[test]
fn without_notes_a_store_that_moved_its_log_is_not_rebuilt() {
    for more in [&[][..], &["manifest"], &["manifest", "runs"]] {
        let store = golden("store-v1", more);
        let why = rebuild_in_place(store.path()).unwrap_err();
        assert!(why.contains("notes"), "{more:?}: {why}");
        assert!(!store.path().join("manifest.before-rebuild-1").exists());
    }
}

#[test]
fn seeds_that_once_failed_hold() {
    for seed in REBUILD_REGRESSIONS {
        assert!(rebuild_seed(*seed, &rebuild_in_place).images > 0);
    }
}
