//! Tools for a store whose daemon is stopped, and the scrub of one that runs.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use afterimage_protocol::rest::scrub::{ScrubResult, ScrubStatus};
use afterimage_tests::process::damage::{Damaged, Kind, files, flip, flip_commit};
use afterimage_tests::process::{MIB, Outcome, Scene, Setup, require, run, until};
use serde_json::Value;

const DISK_BYTES: u64 = 32 * MIB;

/// What the disk holds at each point, as a hash.
type Hashes = BTreeMap<String, String>;

fn noise(device: &Path, from_mib: u64, mib: u64) {
    let of = format!("of={}", device.display());
    let (seek, count) = (format!("seek={from_mib}"), format!("count={mib}"));
    let always = ["if=/dev/urandom", "bs=1M", "oflag=direct", "conv=fsync"];
    run(
        "dd",
        &[&always[..], &[&of, &seek, &count, "status=none"]].concat(),
    );
}

fn copy(from: &Path, to: &Path) {
    run("cp", &["-a".as_ref(), from.as_os_str(), to.as_os_str()]);
}

fn hash_at(scene: &Scene, point: &str) -> String {
    let view = scene.view(&format!("web1/disk@{point}"));
    let said = run("sha256sum", &[&view.device]);
    said.split(' ').next().unwrap().to_owned()
}

fn hashes(scene: &Scene) -> Hashes {
    let names = ["one", "two", "three"];
    names
        .map(|name| (name.to_owned(), hash_at(scene, name)))
        .into()
}

/// The manifest file that counts.
fn manifest(data_dir: &Path) -> PathBuf {
    data_dir.join(files(data_dir, "manifest").pop().unwrap())
}

/// A stopped store with three points, and copies of its manifest at two times.
struct Store {
    scene: Scene,
    hashes: Hashes,
    /// Before the disk was known.
    early: PathBuf,
    /// Behind the second point.
    late: PathBuf,
}

impl Store {
    fn new() -> Self {
        require(&["dd", "cp", "sha256sum"]);
        let setup = Setup {
            server: "segment_bytes = 20971520\nrun_flush_entries = 500\n\
                     scrub_bytes_per_second = 16777216\n"
                .to_owned(),
            ..Setup::default()
        };
        let scene = Scene::start(&setup);
        let (early, late) = (scene.root.join("early"), scene.root.join("late"));
        copy(&manifest(&scene.data_dir), &early);
        let source = scene.image("disk.img", DISK_BYTES);
        let device = scene.attach(&source, "disk");
        noise(&device, 0, 20);
        scene.protect("disk");
        for (place, name) in (0..).zip(["one", "two", "three"]) {
            noise(&device, 4 * place, 24);
            scene.caught_up();
            let _said = scene.aft_ok(&["point", "create", "web1", "--name", name]);
            if name == "two" {
                copy(&manifest(&scene.data_dir), &late);
            }
        }
        scene.assert_replica_equals("disk");
        let hashes = hashes(&scene);
        let distinct: std::collections::BTreeSet<_> = hashes.values().collect();
        assert_eq!(distinct.len(), 3, "{hashes:?}");
        Self {
            scene,
            hashes,
            early,
            late,
        }
    }

    fn stop(&mut self) {
        self.scene.stop_agent();
        self.scene.stop_server();
    }

    fn offline(&self, command: &str, data_dir: &Path, more: &[&str]) -> Outcome {
        let dir = data_dir.display().to_string();
        let first = ["--json", "store", command, "--data-dir", &dir];
        self.scene.aft(&[&first, more].concat())
    }

    fn findings(&self, command: &str, data_dir: &Path) -> Vec<Value> {
        let outcome = self.offline(command, data_dir, &[]);
        let said: Value = serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|error| panic!("{command}: {error}: {outcome:?}"));
        let findings = said["findings"].as_array().unwrap().clone();
        let wanted = if findings.is_empty() { 0 } else { 6 };
        assert_eq!(outcome.code, wanted, "{outcome:?}");
        findings
    }

    /// Puts a copy of the store in place of it, and gives what it replaced.
    fn put(&self, pristine: &Path) {
        fs::remove_dir_all(&self.scene.data_dir).unwrap();
        copy(pristine, &self.scene.data_dir);
    }

    fn assert_same_points(&mut self) {
        self.scene.start_server();
        let found = hashes(&self.scene);
        assert_eq!(found, self.hashes);
        self.scene.stop_server();
    }
}

#[test]
fn damage_is_named_by_its_file_and_nothing_else_is() {
    let mut store = Store::new();
    let data_dir = store.scene.data_dir.clone();
    store
        .offline("check", &data_dir, &[])
        .refuses(4, &["in use", "stop afterimaged"]);
    store.stop();
    for command in ["check", "verify"] {
        let clean = store.findings(command, &data_dir);
        assert!(clean.is_empty(), "{command}: {clean:?}");
    }
    for kind in Kind::all() {
        let damaged = Damaged::new(&data_dir, kind);
        let mut by = Vec::new();
        for command in ["check", "verify"] {
            let findings = store.findings(command, &data_dir);
            println!("{kind:?}, {command}: {findings:?}");
            for found in &findings {
                assert_eq!(found["file"], damaged.named.as_str(), "{kind:?} {command}");
            }
            by.push(!findings.is_empty());
        }
        assert_eq!(by, [kind.is_seen_by_check(), true], "{kind:?}");
    }
    let clean = store.findings("verify", &data_dir);
    assert!(clean.is_empty(), "all was put right: {clean:?}");
}

#[test]
fn a_dump_shows_what_is_there() {
    let mut store = Store::new();
    store.stop();
    let data_dir = store.scene.data_dir.clone();
    let lines = |more: &[&str]| {
        let outcome = store.offline("dump", &data_dir, more);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap();
        outcome.stdout.lines().map(parse).collect::<Vec<_>>()
    };
    let edits = lines(&["--manifest"]);
    let has = |name: &str| edits.iter().any(|edit| edit["edit"] == name);
    for name in [
        "store", "machine", "disk", "history", "segment", "run", "point",
    ] {
        assert!(has(name), "{name}");
    }
    let text = store.offline("dump", &data_dir, &[]).stdout;
    assert!(
        !text.contains("tag_key") && !text.contains("wrapped"),
        "secrets"
    );
    let points = lines(&["--points"]);
    for name in store.hashes.keys() {
        assert!(points.iter().any(|point| point["name"] == name.as_str()));
    }
    let number = |edit: &str, field: &str| {
        let found = edits.iter().rev().find(|found| found["edit"] == edit);
        found.unwrap()["fields"][field].to_string()
    };
    let slots = lines(&["--segment", &number("segment", "segment")]);
    assert!(
        slots
            .iter()
            .all(|slot| slot["offset"].as_u64() >= Some(4096))
    );
    assert!(!slots.is_empty());
    let sections = lines(&["--run", &number("run", "run")]);
    assert!(
        sections
            .iter()
            .any(|section| section["entries"].as_u64() > Some(0))
    );
    let commits = lines(&["--log"]);
    let sequences: Vec<_> = commits
        .iter()
        .map(|c| c["commit"].as_u64().unwrap())
        .collect();
    assert!(sequences.is_sorted() && sequences[0] == 1, "{sequences:?}");
}

#[test]
fn a_store_is_rebuilt_or_the_reason_is_said() {
    let mut store = Store::new();
    store.stop();
    let data_dir = store.scene.data_dir.clone();
    let pristine = store.scene.root.join("pristine");
    copy(&data_dir, &pristine);
    let (early, late) = (
        store.early.display().to_string(),
        store.late.display().to_string(),
    );
    let in_place = ["--in-place"];

    // Runs are gone: the map is made anew.
    // A rewrite that was cut off leaves a file that nothing names, and that does not count.
    let seed = data_dir.join(&files(&data_dir, "segments")[0]);
    let next = seed.display().to_string().replace("-0.seed", "-1.seed");
    copy(&seed, Path::new(&next));
    fs::remove_dir_all(data_dir.join("runs")).unwrap();
    assert!(!store.findings("check", &data_dir).is_empty());
    let outcome = store.offline("rebuild", &data_dir, &in_place);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    println!("without runs: {}", outcome.stdout);
    assert!(store.findings("verify", &data_dir).is_empty());
    store.assert_same_points();

    // The manifest is gone: notes know as much.
    store.put(&pristine);
    fs::remove_file(manifest(&data_dir)).unwrap();
    let outcome = store.offline("rebuild", &data_dir, &in_place);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let said: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(said["points_of_marks"], 0, "{said}");
    assert!(store.findings("verify", &data_dir).is_empty());
    store.assert_same_points();

    // Notes are gone as well, as in a store that never wrote any: keys are nowhere else.
    let without_notes = || {
        for name in files(&data_dir, "segments") {
            if name.ends_with(".notes") {
                fs::remove_file(data_dir.join(name)).unwrap();
            }
        }
    };
    store.put(&pristine);
    fs::remove_file(manifest(&data_dir)).unwrap();
    without_notes();
    let refused = store.offline("rebuild", &data_dir, &in_place);
    refused.refuses(3, &["keys of the disks", "--manifest"]);
    let with_early = ["--in-place", "--manifest", &early];
    let refused = store.offline("rebuild", &data_dir, &with_early);
    refused.refuses(3, &["newer than what manifest and notes know"]);

    // A copy that is older than the third point: that one comes back by its mark.
    let target = store.scene.root.join("new");
    let to = target.display().to_string();
    let outcome = store.offline("rebuild", &data_dir, &["--to", &to, "--manifest", &late]);
    println!("into a new directory: {}", outcome.stdout);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let said: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert!(said["points_of_marks"].as_u64() >= Some(1), "{said}");
    assert!(store.findings("verify", &target).is_empty());
    let with_late = ["--in-place", "--manifest", &late];
    let outcome = store.offline("rebuild", &data_dir, &with_late);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    store.assert_same_points();

    // Both copies of the commit that named the second point: it comes back by its mark.
    store.put(&pristine);
    without_notes();
    let path = manifest(&data_dir);
    let number = path.file_name().unwrap().to_owned();
    let dump = store.offline("dump", &data_dir, &[]).stdout;
    let mut edits = dump
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let second = edits.find(|edit| edit["fields"]["name"] == "two").unwrap();
    flip_commit(&path, second["offset"].as_u64().unwrap());
    assert!(!store.findings("check", &data_dir).is_empty());
    let outcome = store.offline("rebuild", &data_dir, &in_place);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let said: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(said["points_of_marks"], 1, "{said}");
    assert!(
        data_dir
            .join("manifest.before-rebuild-1")
            .join(number)
            .exists()
    );
    store.assert_same_points();

    // What would be shown wrong is refused, and nothing is changed.
    for (room, is_last) in [("segments", false), ("log", false), ("log", true)] {
        store.put(&pristine);
        let found = files(&data_dir, room);
        let place = if is_last { found.len() - 1 } else { 0 };
        let gone = data_dir.join(&found[place]);
        fs::remove_file(&gone).unwrap();
        for more in [&in_place[..], &with_late[..]] {
            let refused = store.offline("rebuild", &data_dir, more);
            refused.refuses(3, &[]);
        }
        assert!(!data_dir.join("manifest.rebuilt").exists());
        assert!(!data_dir.join("manifest.before-rebuild-1").exists());
    }
}

#[test]
fn a_scrub_names_damage_until_it_is_gone() {
    let mut store = Store::new();
    store.scene.stop_agent();
    let scrub = |scene: &Scene| scene.aft(&["--json", "store", "scrub"]);
    let clean = scrub(&store.scene);
    assert_eq!(clean.code, 0, "{clean:?}");
    let result: ScrubResult = serde_json::from_str(&clean.stdout).unwrap();
    assert!(result.bytes > 60 * MIB && result.slots > 1000, "{result:?}");

    // One that is stopped comes to no end.
    let api = store.scene.server_api();
    let status = || -> ScrubStatus { api.get("/v1/store/scrub") };
    let _begun = store.scene.aft_ok(&["store", "scrub", "--no-wait"]);
    assert!(status().is_running);
    let (code, _) = api.request("DELETE", "/v1/store/scrub", "").unwrap();
    assert_eq!(code, "200");
    until("the end of the scrub", || !status().is_running);
    assert_eq!(status().passes, 1);

    let name = files(&store.scene.data_dir, "segments")[0].clone();
    let path = store.scene.data_dir.join(&name);
    flip(&path, &[6000]);
    let hurt = scrub(&store.scene);
    assert_eq!(hurt.code, 6, "{hurt:?}");
    let result: ScrubResult = serde_json::from_str(&hurt.stdout).unwrap();
    println!("{:?}", result.damage);
    let is_named = |text: &String| text.contains(&name) && text.contains("may hurt");
    assert!(result.damage.len() == 1 && result.damage.iter().all(is_named));
    let kinds = |scene: &Scene, kind: &str| {
        let events = scene.events();
        events.iter().filter(|event| event.kind == kind).count()
    };
    until("the event", || kinds(&store.scene, "damaged") == 1);
    let is_said = |scene: &Scene| {
        let status = scene.status();
        status.health == "red" && status.causes.iter().any(|cause| cause.contains(&name))
    };
    assert!(is_said(&store.scene));

    // It is known after a restart, also while nobody has looked again.
    store.scene.stop_server();
    store.scene.start_server();
    assert!(is_said(&store.scene), "{:?}", store.scene.status());
    flip(&path, &[6000]);
    let clean = scrub(&store.scene);
    assert_eq!(clean.code, 0, "{clean:?}");
    assert!(!is_said(&store.scene));
    until("the event", || kinds(&store.scene, "damage-gone") == 1);
    let text = store.scene.aft_ok(&["status"]);
    assert!(text.contains("last scrub: "), "{text}");
}
