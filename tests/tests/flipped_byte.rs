//! A flipped byte in any file of the store: it is found and named, never served as good, and costs
//! nothing else.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use afterimage_protocol::rest::server::{Mount, VerifyReport};
use afterimage_tests::process::compare::{Reading, read_against};
use afterimage_tests::process::{Chance, MIB, Scene, Setup, require, rounds, run};

const DISK_BYTES: u64 = 96 * MIB;

/// A stopped appliance with a disk in it, and what that disk must hold.
struct Store {
    scene: Scene,
    truth: PathBuf,
    pristine: PathBuf,
}

fn noise(device: &Path, from_mib: u64, mib: u64) {
    let of = format!("of={}", device.display());
    let (seek, count) = (format!("seek={from_mib}"), format!("count={mib}"));
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &of,
            "bs=1M",
            &seek,
            &count,
            "oflag=direct",
            "conv=fsync",
            "status=none",
        ],
    );
}

fn flip(path: &Path, offsets: &[u64]) {
    let hurt = File::options().read(true).write(true).open(path).unwrap();
    for offset in offsets {
        let mut byte = [0];
        hurt.read_exact_at(&mut byte, *offset).unwrap();
        hurt.write_all_at(&[byte[0] ^ 0x10], *offset).unwrap();
    }
    hurt.sync_all().unwrap();
}

impl Store {
    fn new() -> Self {
        require(&["dd", "cp", "blockdev"]);
        let setup = Setup {
            server: "segment_bytes = 20971520\nrun_flush_entries = 2000\n".to_owned(),
            ..Setup::default()
        };
        let mut scene = Scene::start(&setup);
        let source = scene.image("disk.img", DISK_BYTES);
        let device = scene.attach(&source, "disk");
        noise(&device, 0, 40);
        scene.protect("disk");
        noise(&device, 20, 60);
        scene.assert_replica_equals("disk");
        scene.stop_agent();
        scene.stop_server();
        let truth = scene.root.join("truth.img");
        run(
            "cp",
            &[
                "--sparse=always".as_ref(),
                source.as_os_str(),
                truth.as_os_str(),
            ],
        );
        let pristine = scene.root.join("pristine");
        run(
            "cp",
            &[
                "-a".as_ref(),
                scene.data_dir.as_os_str(),
                pristine.as_os_str(),
            ],
        );
        Self {
            scene,
            truth,
            pristine,
        }
    }

    /// Files of a kind, oldest first.
    fn files(&self, directory: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.pristine.join(directory)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| Path::new(directory).join(entry.unwrap().file_name()))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no file in {directory}");
        names
    }

    fn length(&self, file: &Path) -> u64 {
        self.pristine.join(file).metadata().unwrap().len()
    }

    /// Starts on a store with flipped bytes; gives what verification and a reader see.
    fn with_flips(&mut self, file: &Path, offsets: &[u64]) -> Option<(VerifyReport, Reading)> {
        fs::remove_dir_all(&self.scene.data_dir).unwrap();
        run(
            "cp",
            &[
                "-a".as_ref(),
                self.pristine.as_os_str(),
                self.scene.data_dir.as_os_str(),
            ],
        );
        let path = self.scene.data_dir.join(file);
        flip(&path, offsets);
        self.scene.start_server();
        let verified = self.scene.aft(&["--json", "log", "verify"]);
        let report: VerifyReport = serde_json::from_str(&verified.stdout).unwrap();
        let wanted = if report.damage.is_empty() { 0 } else { 6 };
        assert_eq!(verified.code, wanted, "{verified:?}");
        let mounted = self
            .scene
            .aft(&["--json", "mount", "web1/disk@latest", "--device"]);
        let result = if mounted.code == 0 {
            let mount: Mount = serde_json::from_str(&mounted.stdout).unwrap();
            let reading = read_against(Path::new(&mount.device), &self.truth);
            let _said = self.scene.aft_ok(&["umount", &mount.id.to_string()]);
            Some((report, reading))
        } else {
            println!("  mount: {}", mounted.stderr.trim());
            assert_eq!(mounted.code, 6, "damage is said to be damage: {mounted:?}");
            None
        };
        self.scene.stop_server();
        result
    }

    /// What the start said that it has worked out anew, of a log segment.
    fn mended(&self, file: &Path) -> Vec<String> {
        let number = file.file_stem().unwrap().to_string_lossy();
        let words = format!("segment {} at", number.trim_start_matches('0'));
        let log = fs::read_to_string(self.scene.root.join("server.log")).unwrap();
        let start = log.rfind("PR_SET_IO_FLUSHER").unwrap_or(0);
        let lines = log[start..].lines();
        lines
            .filter(|line| line.contains(&words))
            .map(str::to_owned)
            .collect()
    }

    /// Flips, and asserts that it is named and not served.
    fn hurt(&mut self, what: &str, file: &Path, offsets: &[u64]) -> Reading {
        let (report, reading) = self.with_flips(file, offsets).expect("a mount");
        println!(
            "{what}, {} at {offsets:?}: {reading:?}; {:?}",
            file.display(),
            report.damage
        );
        let name = file.display().to_string();
        let is_named = report.damage.iter().any(|damage| damage.contains(&name));
        let mended = self.mended(file);
        mended.iter().for_each(|line| println!("  {line}"));
        assert!(
            is_named || !mended.is_empty(),
            "{name} is not named: {:?}",
            report.damage
        );
        assert_eq!(reading.wrong, 0, "bad data was served");
        reading
    }
}

#[test]
fn flipped_byte() {
    let mut store = Store::new();
    let logs = store.files("log");
    let (first_log, last_log) = (logs[0].clone(), logs[logs.len() - 1].clone());
    assert!(logs.len() >= 3, "several log segments: {logs:?}");
    // The payload of one record, in a sealed segment and with later commits behind it.
    let reading = store.hurt("log payload", &first_log, &[9 * MIB + 1234]);
    assert!(
        (1..=64).contains(&reading.errors),
        "one slot, no other record: {reading:?}"
    );
    let reading = store.hurt("end of the log", &last_log, &[MIB + 777]);
    assert!(reading.errors <= 64, "{reading:?}");
    let log_bytes = store.length(&first_log);
    let reading = store.hurt("log footer", &first_log, &[log_bytes - 4096 + 40]);
    assert_eq!(reading.errors, 0, "the commits say the same: {reading:?}");

    let seed = store.files("segments")[0].clone();
    let reading = store.hurt("seed payload", &seed, &[MIB + 99]);
    assert!((1..=64).contains(&reading.errors), "{reading:?}");

    let run_file = store.files("runs")[0].clone();
    let reading = store.hurt("run entries", &run_file, &[2 * 4096 + 100]);
    assert!(reading.equal > DISK_BYTES / 4096 / 2, "{reading:?}");
    // Nothing at all: the rig itself is sound.
    let (report, reading) = store.with_flips(&seed, &[]).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    assert_eq!((reading.errors, reading.wrong), (0, 0));
}

#[test]
fn a_byte_flips_under_a_running_appliance() {
    let mut store = Store::new();
    let seed = store.files("segments")[0].clone();
    store.scene.start_server();
    flip(&store.scene.data_dir.join(&seed), &[MIB + 99]);
    let verified = store.scene.aft(&["--json", "log", "verify"]);
    assert_eq!(verified.code, 6, "{verified:?}");
    let name = seed.file_name().unwrap().to_string_lossy();
    assert!(verified.stdout.contains(&*name), "{verified:?}");
    let view = store.scene.view("web1/disk@latest");
    let reading = read_against(&view.device, &store.truth);
    println!("under a running appliance: {reading:?}");
    assert_eq!(reading.wrong, 0, "bad data was served");
    assert!((1..=64).contains(&reading.errors), "{reading:?}");
    view.close();
}

#[test]
fn random_flips_are_never_served() {
    let mut store = Store::new();
    let mut chance = Chance::new("random_flips");
    let files: Vec<_> = ["log", "segments", "runs"]
        .iter()
        .flat_map(|kind| store.files(kind))
        .collect();
    for round in 1..=rounds() {
        let pick = usize::try_from(chance.below(files.len() as u64)).unwrap();
        let file = files[pick].clone();
        let offset = chance.below(store.length(&file));
        let Some((report, reading)) = store.with_flips(&file, &[offset]) else {
            continue;
        };
        println!(
            "round {round}: {} at {offset}: {reading:?}; {:?}",
            file.display(),
            report.damage
        );
        assert_eq!(reading.wrong, 0, "bad data was served");
        assert!(
            reading.errors == 0 || !report.damage.is_empty(),
            "an error without a name"
        );
    }
}
