//! The source loses power under a writer. The machine's whole disk, with the protected image and
//! the agent's state on it, is a file on XFS; a clone of that file is what a power cut leaves,
//! without what was only in the page cache. Meanwhile the appliance has received more than that.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::load::{Load, Model, Random};
use crate::shell::{self, Loop, Mount, clear_below, fill_random, is_mounted, sparse, text};
use crate::site::{Daemon, Plan, Site};

const ROUNDS: u64 = 5;
const HOT_BLOCKS: u64 = 4096;

/// A file system in a file, mounted.
struct Disk {
    mount: Option<Mount>,
    /// Goes after the mount.
    _device: Loop,
}

impl Disk {
    fn mount(file: &Path, directory: &Path) -> Self {
        let device = Loop::attach(file, 512);
        let mount = Mount::new(&device.device, directory);
        Self {
            mount: Some(mount),
            _device: device,
        }
    }

    fn make(file: &Path, mib: u64, kind: &str, directory: &Path) -> Self {
        sparse(file, mib);
        shell::run(&format!("mkfs.{kind}"), &["-q", text(file)]);
        Self::mount(file, directory)
    }

    fn end(self) {
        let directory = self.mount.as_ref().map(|mount| mount.directory.clone());
        drop(self);
        assert!(
            directory.is_some_and(|directory| !is_mounted(&directory)),
            "it is still in use"
        );
    }
}

/// Unmounts it, and before that what a dead agent left on it.
impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take() {
            clear_below(&mount.directory);
            drop(mount);
        }
    }
}

#[test]
#[ignore = "needs root and release binaries: tools/check powercut"]
fn the_replica_becomes_what_the_power_cut_left() {
    let base = tempfile::Builder::new()
        .prefix("afterimage-e2e.")
        .tempdir_in("/var/tmp");
    let base = base.expect("a directory can be made");
    let below = Disk::make(
        &base.path().join("xfs.img"),
        6144,
        "xfs",
        &base.path().join("xfs"),
    );
    let machine_file = base.path().join("xfs/machine.img");
    let place = base.path().join("machine");
    let mut machine = Disk::make(&machine_file, 1024, "ext4", &place);
    let plan = Plan {
        state: Some(place.join("agent")),
        ..Plan::default()
    };
    let mut site = Site::running(plan);
    let source = place.join("source.img");
    sparse(&source, 256);
    fill_random(&source, 128);
    site.protect(&source, "d");
    let mut model = Model::default();
    let mut random = Random::new(11);
    for round in 1..=ROUNDS {
        let before = site.durable();
        let first = random.below(4) * HOT_BLOCKS;
        let load = Load::start(&site.device("d"), &model, first, HOT_BLOCKS, 4);
        std::thread::sleep(Duration::from_millis(200 + random.below(600)));
        let cut = base.path().join("xfs/cut.img");
        let written = load.written();
        shell::run("cp", &["--reflink=always", text(&machine_file), text(&cut)]);
        // The machine is gone; the writers just do not know yet, and the appliance has heard more.
        let after = load.written();
        let (_, errors) = load.end(model.clone());
        assert!(errors.is_empty(), "{errors:?}");
        site.kill(Daemon::Agent);
        machine.end();
        fs::rename(&cut, &machine_file).expect("the clone takes the place of the disk");
        machine = Disk::mount(&machine_file, &place);
        site.start(Daemon::Agent);
        site.wait_connected();
        site.wait_caught_up();
        site.assert_replica_is("d", &source);
        assert!(
            site.durable() >= before,
            "{} after {before}",
            site.durable()
        );
        let disk = site.local_disk("d");
        let read_bytes = disk["recheck_read_bytes"].as_u64().unwrap_or(0);
        assert!(
            read_bytes <= 8 * HOT_BLOCKS * 4096,
            "{read_bytes} bytes were read again"
        );
        println!(
            "round {round}: cut between write {written} and {after}; {read_bytes} bytes read \
             again, {} sent",
            disk["recheck_sent_bytes"]
        );
        model = Model::default();
    }
    drop(site);
    machine.end();
    below.end();
}

/// Files that were synced before the cut are in the source's clone and in the replica.
#[test]
#[ignore = "needs root and release binaries: tools/check powercut"]
fn synced_files_are_there_after_the_power_cut() {
    let base = tempfile::Builder::new()
        .prefix("afterimage-e2e.")
        .tempdir_in("/var/tmp");
    let base = base.expect("a directory can be made");
    let below = Disk::make(
        &base.path().join("xfs.img"),
        4096,
        "xfs",
        &base.path().join("xfs"),
    );
    let machine_file = base.path().join("xfs/machine.img");
    let place = base.path().join("machine");
    let machine = Disk::make(&machine_file, 768, "ext4", &place);
    let mut site = Site::running(Plan {
        state: Some(place.join("agent")),
        ..Plan::default()
    });
    let source = place.join("source.img");
    sparse(&source, 256);
    let device = site.attach(&source, "d");
    shell::run("mkfs.ext4", &["-q", "-F", text(&device)]);
    site.aft(&["disk", "protect", "d"]);
    let directory = site.path("mnt");
    let mount = Mount::new(&device, &directory);
    let (told, heard) = std::sync::mpsc::channel();
    let writer = {
        let directory = directory.clone();
        std::thread::spawn(move || {
            for number in 0u64.. {
                let name = format!("file-{number}");
                let file = directory.join(&name);
                let write = || {
                    fs::write(&file, name.repeat(64))?;
                    fs::File::open(&file)?.sync_all()?;
                    fs::File::open(&directory)?.sync_all()
                };
                if write().is_err() || told.send(name).is_err() {
                    return;
                }
            }
        })
    };
    std::thread::sleep(Duration::from_millis(800));
    let mut synced: Vec<String> = heard.try_iter().collect();
    let cut = base.path().join("xfs/cut.img");
    shell::run("cp", &["--reflink=always", text(&machine_file), text(&cut)]);
    drop(heard);
    writer.join().expect("the writer does not hang");
    site.kill(Daemon::Agent);
    mount.end();
    machine.end();
    fs::rename(&cut, &machine_file).expect("the clone takes the place of the disk");
    let machine = Disk::mount(&machine_file, &place);
    site.start(Daemon::Agent);
    site.wait_connected();
    site.wait_caught_up();
    site.assert_replica_is("d", &source);
    let shown = site.aft(&["mount", "m/d@latest"]);
    let directory = PathBuf::from(shown["directory"].as_str().expect("a directory is text"));
    println!("{} files were synced before the cut", synced.len());
    assert!(!synced.is_empty());
    synced.retain(|name| {
        fs::read(directory.join(name)).map_or(true, |bytes| bytes != name.repeat(64).as_bytes())
    });
    assert!(synced.is_empty(), "missing or wrong: {synced:?}");
    site.umount(&shown);
    drop(site);
    machine.end();
    below.end();
}
