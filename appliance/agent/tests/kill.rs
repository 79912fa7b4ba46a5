//! The agent dies at any instant: every write is in the replica in the end, only marked regions
//! are compared, and LSNs only rise. Needs root, FUSE and loop devices.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_agent::config::Config;
use afterimage_blockdev::DiskId;
use afterimage_protocol::message::DiskPhase;
use common::process::Process;
use common::source::{Direct, image, pattern};
use common::{Appliance, enrol, quick_config, until};

const MIB: u64 = 1 << 20;

fn assert_equal(appliance: &Appliance, disk: DiskId, source: &Path) {
    let mut bytes = std::fs::read(source).unwrap();
    let replica = appliance.replica.lock();
    let disk = &replica.disks[&disk];
    bytes.resize(disk.bytes.len(), 0);
    if let Some(at) = (0..bytes.len()).find(|at| bytes[*at] != disk.bytes[*at]) {
        panic!(
            "byte {at} differs: source {}, replica {}",
            bytes[at], disk.bytes[at]
        );
    }
    assert!(disk.has_copy && disk.batch.is_none(), "the copy is whole");
}

struct Scene {
    root: tempfile::TempDir,
    appliance: Appliance,
    state_dir: std::path::PathBuf,
    config: Config,
}

impl Scene {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let appliance = Appliance::start();
        let state_dir = enrol(root.path(), &appliance);
        let config = quick_config(root.path());
        Self {
            root,
            appliance,
            state_dir,
            config,
        }
    }

    fn process(&self) -> Process {
        Process::start(self.root.path(), &self.state_dir, &self.config)
    }
}

/// Writes to a device until told to stop or it fails; returns whether it failed.
fn write_until(device: &Path, seed: u64, is_over: &AtomicBool, count: &AtomicU64) -> bool {
    let mut direct = Direct::open(device);
    let mut number = seed * 1_000_000;
    while !is_over.load(Ordering::SeqCst) {
        // A quarter of the disk, so that most regions are never marked.
        let offset = (number * 7919 % (16 * MIB / 4096)) * 4096;
        let length = 4096 * (1 + usize::try_from(number % 8).unwrap());
        if direct.write(offset, &pattern(number, length)).is_err() {
            return true;
        }
        number += 1;
        count.fetch_add(1, Ordering::SeqCst);
    }
    false
}

#[test]
fn killed_under_load_only_marked_regions_are_compared() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let mut process = scene.process();
    let mut device = process.attach(&source, "data");
    let mut direct = Direct::open(&device);
    for number in 0..64 {
        direct
            .write(number * MIB, &pattern(number, 1 << 19))
            .unwrap();
    }
    drop(direct);
    process.connected();
    process.post("/v1/disks/data/protect", "{}").unwrap();
    process.protected("data");
    let disk = process.disk("data").disk;
    for round in 1..=4 {
        let (is_over, count) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let (device, is_over, count) = (&device, &is_over, &count);
                    scope.spawn(move || write_until(device, round * 10 + writer, is_over, count))
                })
                .collect();
            until("some writes", || count.load(Ordering::SeqCst) > 300 * round);
            process.kill();
            for writer in writers {
                assert!(
                    writer.join().unwrap(),
                    "a writer is told honestly that its disk is gone"
                );
            }
        });
        let highest = scene.appliance.replica.lock().highest;
        process = scene.process();
        process.connected();
        process.protected("data");
        let shown = process.disk("data");
        assert!(shown.recheck_read_bytes > 0, "something was under way");
        assert!(
            shown.recheck_read_bytes <= 17 * MIB,
            "{} bytes",
            shown.recheck_read_bytes
        );
        assert!(process.status().captured > highest, "LSNs only rise");
        process.caught_up();
        assert_equal(&scene.appliance, disk, &source);
        device = Path::new(&shown.device).to_owned();
    }
    process.terminate();
}

#[test]
fn a_first_copy_goes_on_where_it_was() {
    let mut scene = Scene::new();
    scene.config.replicate.rate_bytes_per_s = 16 << 20;
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let mut process = scene.process();
    let device = process.attach(&source, "data");
    let mut direct = Direct::open(&device);
    for number in 0..64 {
        direct
            .write(number * MIB, &pattern(number, 1 << 20))
            .unwrap();
    }
    process.connected();
    process.post("/v1/disks/data/protect", "{}").unwrap();
    until("half of the copy", || {
        process.disk("data").done_bytes > 24 * MIB
    });
    direct.write(60 * MIB, &pattern(1000, 1 << 16)).unwrap();
    drop(direct);
    process.kill();
    scene.config.replicate.rate_bytes_per_s = 0;
    let sent_before = scene.appliance.replica.lock().bulk_bytes;
    process = scene.process();
    process.connected();
    process.protected("data");
    let disk = process.disk("data");
    let sent_after = scene.appliance.replica.lock().bulk_bytes - sent_before;
    assert!(
        sent_after < 50 * MIB,
        "{sent_after} bytes: what was there was not sent again"
    );
    process.caught_up();
    assert_equal(&scene.appliance, disk.disk, &source);
    process.terminate();
}

/// A power cut takes what the source had not flushed, though the appliance has it.
#[test]
fn after_a_power_cut_the_replica_follows_the_source_back() {
    let mut scene = Scene::new();
    scene.config.activity.flush_interval_ms = 1_000_000;
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let process = scene.process();
    let device = process.attach(&source, "data");
    process.connected();
    process.post("/v1/disks/data/protect", "{}").unwrap();
    process.protected("data");
    let mut direct = Direct::open(&device);
    direct.write(8 * MIB, &pattern(1, 1 << 16)).unwrap();
    direct.sync().unwrap();
    process.caught_up();
    let durable = std::fs::read(&source).unwrap();
    direct.write(8 * MIB, &pattern(2, 1 << 16)).unwrap();
    direct.write(40 * MIB, &pattern(3, 1 << 14)).unwrap();
    drop(direct);
    process.caught_up();
    process.kill();
    std::fs::write(&source, &durable).unwrap();
    let process = scene.process();
    process.connected();
    process.protected("data");
    process.caught_up();
    let disk = process.disk("data");
    assert_eq!(disk.recheck_read_bytes, 2 * MIB, "two regions were marked");
    assert_eq!(disk.recheck_sent_bytes, (1 << 16) + (1 << 14));
    assert_equal(&scene.appliance, disk.disk, &source);
    process.terminate();
}

#[test]
fn a_clean_stop_leaves_nothing_to_compare() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 16 * MIB);
    let process = scene.process();
    let device = process.attach(&source, "data");
    process.connected();
    process.post("/v1/disks/data/protect", "{}").unwrap();
    process.protected("data");
    let mut direct = Direct::open(&device);
    direct.write(MIB, &pattern(1, 1 << 16)).unwrap();
    drop(direct);
    process.terminate();
    let process = scene.process();
    process.connected();
    process.protected("data");
    assert_eq!(process.disk("data").recheck_read_bytes, 0);
    assert_eq!(scene.appliance.replica.lock().questions, 0);
    assert_equal(&scene.appliance, process.disk("data").disk, &source);
    process.terminate();
}

#[test]
fn wrong_input_is_refused_and_a_shrunk_disk_stays_out() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 16 * MIB);
    let process = scene.process();
    process.attach(&source, "data");
    let post = |body: &str| process.post("/v1/disks", body).unwrap_err();
    let with = |source: &str, name: &str| format!(r#"{{"source":"{source}","name":"{name}"}}"#);
    let path = source.display().to_string();
    assert!(
        post(&with(&path, "other"))
            .message
            .contains("attached as data")
    );
    assert!(
        post(&with(&path, "data"))
            .message
            .contains("attached already")
    );
    assert!(
        post(&with("/no/such/file", "x"))
            .message
            .contains("No such file")
    );
    assert!(post(&with("relative", "x")).message.contains("absolute"));
    assert!(post(&with(&path, "../x")).message.contains("not a name"));
    assert!(
        post(r#"{"source":"/x","name":"x","more":1}"#)
            .message
            .contains("unknown field")
    );
    assert!(
        process
            .post("/v1/disks/none/detach", "")
            .unwrap_err()
            .message
            .contains("no disk")
    );
    process.connected();
    process.post("/v1/disks/data/protect", "{}").unwrap();
    process.protected("data");
    process.terminate();
    std::fs::File::options()
        .write(true)
        .open(&source)
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    let process = scene.process();
    let disk = process.disk("data");
    assert!(disk.reason.contains("shrank"), "{}", disk.reason);
    assert_eq!(disk.device, "");
    assert_eq!(disk.phase, Some(DiskPhase::SourceError));
    process.terminate();
}

#[test]
fn a_device_in_use_is_not_detached() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let process = scene.process();
    let device = process.attach(&source, "data");
    let run = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    };
    let device = device.display().to_string();
    let directory = scene.root.path().join("mnt");
    std::fs::create_dir(&directory).unwrap();
    let mounted = directory.display().to_string();
    run("mkfs.ext4", &["-q", &device]);
    run("mount", &[&device, &mounted]);
    let refused = process.post("/v1/disks/data/detach", "").unwrap_err();
    assert!(refused.message.contains("in use"), "{}", refused.message);
    std::fs::write(directory.join("file"), b"still writable").unwrap();
    run("umount", &[&mounted]);
    process.post("/v1/disks/data/detach", "").unwrap();
    assert!(process.status().disks.is_empty());
    run("e2fsck", &["-fn", &source.display().to_string()]);
    process.terminate();
}

/// The file system on a dead agent's device says so; the new agent tells what to do, and the old
/// device goes with its last user.
#[test]
fn a_mounted_device_of_a_dead_agent_is_told_and_goes() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let process = scene.process();
    let old = process.attach(&source, "data").display().to_string();
    let run = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    };
    let directory = scene.root.path().join("mnt");
    std::fs::create_dir(&directory).unwrap();
    let mounted = directory.display().to_string();
    run("mkfs.ext4", &["-q", &old]);
    run("mount", &[&old, &mounted]);
    std::fs::write(directory.join("kept"), b"kept").unwrap();
    run("sync", &["-f", &mounted]);
    process.kill();
    std::fs::write(directory.join("lost"), b"lost").ok();
    let synced = std::process::Command::new("sync")
        .args(["-f", &mounted])
        .status()
        .unwrap();
    assert!(!synced.success(), "an error, and no hang");
    let process = scene.process();
    let disk = process.disk("data");
    assert!(disk.reason.contains(&mounted), "{}", disk.reason);
    assert_ne!(disk.device, old);
    run("umount", &[&mounted]);
    let backing = format!("/sys/block/{}/loop/backing_file", &old["/dev/".len()..]);
    until("the end of the old device", || {
        !Path::new(&backing).exists()
    });
    run("mount", &[&disk.link, &mounted]);
    assert_eq!(std::fs::read(directory.join("kept")).unwrap(), b"kept");
    run("umount", &[&mounted]);
    run("e2fsck", &["-fn", &disk.link]);
    process.terminate();
}
