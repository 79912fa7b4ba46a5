//! A store whose log was moved to seed segments, and whose seed segments were rewritten, made anew
//! from its segments alone.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_tests::process::damage::files;
use afterimage_tests::process::{MIB, Outcome, Scene, Setup, require, run, until_within};
use serde_json::Value;

const DISK_BYTES: u64 = 48 * MIB;
const SERVER: &str = "segment_bytes = 20971520\nrun_flush_entries = 500\ncache_bytes = 0\n\
                      collect_interval_ms = 1000\nretention_interval_ms = 1000\n\
                      window_min_ms = 1000\n";
const POINTS: [&str; 3] = ["one", "two", "three"];
const PATIENCE: Duration = Duration::from_secs(120);

fn noise(device: &Path, from_mib: u64, mib: u64) {
    let of = format!("of={}", device.display());
    let (seek, count) = (format!("seek={from_mib}"), format!("count={mib}"));
    let always = ["if=/dev/urandom", "bs=1M", "oflag=direct", "conv=fsync"];
    run(
        "dd",
        &[&always[..], &[&of, &seek, &count, "status=none"]].concat(),
    );
}

fn discard(device: &Path, from: u64, bytes: u64) {
    let place = device.display().to_string();
    let (from, bytes) = (from.to_string(), bytes.to_string());
    run("blkdiscard", &["-o", &from, "-l", &bytes, &place]);
}

fn copy(from: &Path, to: &Path) {
    run("cp", &["-a".as_ref(), from.as_os_str(), to.as_os_str()]);
}

/// Generations of the seed segments that are there: of the log, and of bulk blocks.
fn generations(data_dir: &Path) -> (Vec<u32>, Vec<u32>) {
    let (mut of_log, mut of_bulk) = (Vec::new(), Vec::new());
    for name in files(data_dir, "segments") {
        let base = name.strip_prefix("segments/").unwrap();
        let Some((number, generation)) = base
            .strip_suffix(".seed")
            .and_then(|base| base.split_once('-'))
        else {
            continue;
        };
        let generation = generation.parse().unwrap();
        match number.starts_with('0') {
            true => of_log.push(generation),
            false => of_bulk.push(generation),
        }
    }
    (of_log, of_bulk)
}

fn has_rest(data_dir: &Path) -> bool {
    let names = files(data_dir, "segments");
    names.iter().any(|name| name.starts_with("segments/rest-"))
}

struct Store {
    scene: Scene,
    hashes: BTreeMap<String, String>,
}

impl Store {
    /// A stopped store of which the log was destaged and segments were rewritten, with the points
    /// one and three; two was deleted.
    fn new() -> Self {
        require(&["dd", "cp", "sha256sum", "blkdiscard"]);
        let setup = Setup {
            server: SERVER.to_owned(),
            ..Setup::default()
        };
        let scene = Scene::start(&setup);
        let source = scene.image("disk.img", DISK_BYTES);
        let device = scene.attach(&source, "disk");
        noise(&device, 0, 32);
        scene.protect("disk");
        let _said = scene.aft_ok(&["policy", "set", "web1", "--window", "1s"]);
        for (place, name) in (0..).zip(POINTS) {
            noise(&device, 6 * place, 18);
            discard(&device, (3 + 6 * place) * MIB + 4096, MIB + 8192);
            scene.caught_up();
            let _said = scene.aft_ok(&["point", "create", "web1", "--name", name]);
        }
        let _said = scene.aft_ok(&["point", "lock", "web1", "one", "--for", "2h"]);
        let _said = scene.aft_ok(&["point", "delete", "web1", "two"]);
        let mut round = 0;
        until_within(PATIENCE, "destaging and rewriting", || {
            round += 1;
            noise(&device, 4 + round % 3, 20);
            let (of_log, of_bulk) = generations(&scene.data_dir);
            let was_rewritten =
                of_log.iter().any(|found| *found > 1) || of_bulk.iter().any(|found| *found > 0);
            of_log.len() > 1 && was_rewritten && has_rest(&scene.data_dir)
        });
        scene.caught_up();
        scene.assert_replica_equals("disk");
        let names = ["one", "three"];
        let mut store = Self {
            hashes: names
                .map(|name| (name.to_owned(), hash_at(&scene, name)))
                .into(),
            scene,
        };
        store.scene.stop_agent();
        store.scene.stop_server();
        println!("{:?}", generations(&store.scene.data_dir));
        store.print_notes();
        store
    }

    /// What notes take, beside segments.
    fn print_notes(&self) {
        let (mut of_notes, mut of_segments) = (0, 0);
        for name in files(&self.scene.data_dir, "segments") {
            let bytes = fs::metadata(self.scene.data_dir.join(&name)).unwrap().len();
            match name.ends_with(".notes") {
                true => of_notes += bytes,
                false => of_segments += bytes,
            }
        }
        println!("{of_notes} bytes of notes, {of_segments} of seed segments");
    }

    fn rebuild(&self) -> Outcome {
        let dir = self.scene.data_dir.display().to_string();
        let order = [
            "--json",
            "store",
            "rebuild",
            "--data-dir",
            &dir,
            "--in-place",
        ];
        self.scene.aft(&order)
    }

    fn put(&self, pristine: &Path) {
        fs::remove_dir_all(&self.scene.data_dir).unwrap();
        copy(pristine, &self.scene.data_dir);
    }

    fn without_manifest_and_runs(&self) {
        for name in ["manifest", "runs"] {
            fs::remove_dir_all(self.scene.data_dir.join(name)).unwrap();
        }
    }

    fn the_only(&self, begin: &str) -> PathBuf {
        let names = files(&self.scene.data_dir, "segments");
        let name = names.iter().find(|name| name.starts_with(begin)).unwrap();
        self.scene.data_dir.join(name)
    }
}

fn hash_at(scene: &Scene, point: &str) -> String {
    let view = scene.view(&format!("web1/disk@{point}"));
    let said = run("sha256sum", &[&view.device]);
    said.split(' ').next().unwrap().to_owned()
}

fn json(scene: &Scene, arguments: &[&str]) -> Value {
    let said = scene.aft_ok(&[&["--json"], arguments].concat());
    serde_json::from_str(&said).unwrap()
}

#[test]
fn points_locks_and_policies_come_back_from_segments_alone() {
    let mut store = Store::new();
    let data_dir = store.scene.data_dir.clone();
    let pristine = store.scene.root.join("pristine");
    copy(&data_dir, &pristine);

    store.scene.start_server();
    let policy = json(&store.scene, &["policy", "show", "web1"]);
    store.scene.stop_server();
    store.put(&pristine);

    store.without_manifest_and_runs();
    let outcome = store.rebuild();
    println!("{}", outcome.stdout);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    store.scene.start_server();
    for (name, hash) in &store.hashes {
        assert_eq!(hash_at(&store.scene, name), *hash, "{name}");
    }
    let listed = store.scene.aft_ok(&["point", "list", "web1"]);
    assert!(listed.contains("one") && listed.contains("three"));
    assert!(!listed.contains("two"), "{listed}");
    assert_eq!(json(&store.scene, &["policy", "show", "web1"]), policy);
    let refused = store.scene.aft(&["point", "delete", "web1", "one"]);
    refused.refuses(3, &["locked"]);
    // It goes on as any other store does.
    store.scene.start_agent();
    store.scene.connected();
    noise(&store.scene.device("disk"), 2, 8);
    store.scene.caught_up();
    store.scene.assert_replica_equals("disk");
    store.scene.stop_agent();
    store.scene.stop_server();
    let clean = store.scene.aft(&[
        "store",
        "verify",
        "--data-dir",
        &data_dir.display().to_string(),
    ]);
    assert_eq!(clean.code, 0, "{clean:?}");

    // What tells of what was left out is missing: nothing is shown rather than something wrong.
    for (begin, words) in [
        ("segments/state-", &["notes"][..]),
        ("segments/rest-", &["old data"][..]),
        ("segments/0", &["missing"][..]),
        ("segments/2", &["missing"][..]),
    ] {
        store.put(&pristine);
        store.without_manifest_and_runs();
        fs::remove_file(store.the_only(begin)).unwrap();
        store.rebuild().refuses(3, words);
        assert!(!data_dir.join("manifest").exists());
    }

    // With the manifest whole, runs alone are made anew.
    store.put(&pristine);
    fs::remove_dir_all(data_dir.join("runs")).unwrap();
    let outcome = store.rebuild();
    assert_eq!(outcome.code, 0, "{outcome:?}");
    store.scene.start_server();
    for (name, hash) in &store.hashes {
        assert_eq!(hash_at(&store.scene, name), *hash, "{name}");
    }
    store.scene.stop_server();
}
