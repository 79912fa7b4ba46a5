//! The protected machine loses power: what its disk has is cloned at one instant, and an agent
//! starts from the clone. All that `fsync` promised is there, and the replica is brought to the
//! source's state by reading marked regions only.
//!
//! The machine's own disk (the tapped image and the agent's state) is a file system with a loop
//! device of direct I/O over a file of an XFS with reflinks: a reflink of that file is atomic, and
//! has nothing of the page cache of the file systems above it. The agent is stopped before it:
//! after a power cut nothing more is sent.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use afterimage_tests::process::{
    Chance, FsMount, LoopFile, MIB, Scene, Setup, View, Writers,
    guards::{fsck, sparse, sweep},
    require, run,
};

const OUTER_BYTES: u64 = 4096 * MIB;
const MACHINE_BYTES: u64 = 1536 * MIB;
const DISK_BYTES: u64 = 1024 * MIB;
const RECHECK_BYTES_MAX: u64 = DISK_BYTES / 8;

/// The disk of the protected machine.
struct MachineDisk {
    file: PathBuf,
    place: PathBuf,
    mount: Option<FsMount>,
    device: Option<LoopFile>,
    outer: PathBuf,
    _outer_mount: FsMount,
    _outer_device: LoopFile,
}

impl MachineDisk {
    fn new(root: &Path) -> Self {
        let below = root.join("outer.img");
        sparse(&below, OUTER_BYTES);
        let outer_device = LoopFile::new(&below);
        run(
            "mkfs.xfs",
            &[
                "-q".as_ref(),
                "-m".as_ref(),
                "reflink=1".as_ref(),
                outer_device.device.as_os_str(),
            ],
        );
        let outer = root.join("outer");
        let outer_mount = FsMount::new(&outer_device.device, &outer, "");
        let file = outer.join("machine.img");
        sparse(&file, MACHINE_BYTES);
        let mut disk = Self {
            file: file.clone(),
            place: root.join("machine"),
            mount: None,
            device: None,
            outer,
            _outer_mount: outer_mount,
            _outer_device: outer_device,
        };
        let device = LoopFile::new(&file);
        run("mkfs.ext4", &["-q".as_ref(), device.device.as_os_str()]);
        disk.mount = Some(FsMount::new(&device.device, &disk.place, ""));
        disk.device = Some(device);
        disk
    }

    /// What is on the disk at this instant.
    fn clone_now(&self, number: u64) -> PathBuf {
        let clone = self.outer.join(format!("clone-{number}.img"));
        run(
            "cp",
            &[
                "--reflink=always".as_ref(),
                self.file.as_os_str(),
                clone.as_os_str(),
            ],
        );
        clone
    }

    /// Puts the clone in the place of the disk, as a start after the power cut would find it.
    fn go_on_with(&mut self, clone: &Path) {
        self.mount.take().unwrap().umount();
        self.device = None;
        std::fs::rename(clone, &self.file).unwrap();
        let device = LoopFile::new(&self.file);
        self.mount = Some(FsMount::new(&device.device, &self.place, ""));
        self.device = Some(device);
    }
}

#[test]
fn power_cut_source() {
    require(&["blockdev", "mkfs.xfs", "cp"]);
    let mut chance = Chance::new("power_cut_source");
    let outer = Scene::directory();
    let mut machine_disk = MachineDisk::new(outer.path());
    let setup = Setup {
        state_dir: Some(machine_disk.place.join("agent")),
        // Regions stay marked for long, so that there is something to compare.
        agent: "[activity]\nidle_ms = 3000\nflush_interval_ms = 1000\n".to_owned(),
        ..Setup::default()
    };
    let mut scene = Scene::start(&setup);
    let source = machine_disk.place.join("disk.img");
    sparse(&source, DISK_BYTES);
    let mut device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("root");
    let live_path = scene.root.join("live");
    let mut kept = Vec::new();
    for round in 0..4 {
        let live = FsMount::new(&device, &live_path, "");
        let writers = Writers::start(&live.path, round * 4, 4);
        writers.progress(20 + chance.below(500));
        scene.agent.as_ref().unwrap().signal("STOP");
        let promised = writers.so_far();
        let clone = machine_disk.clone_now(round);
        let durable = scene.machine().durable;
        scene.kill_agent();
        let _later = writers.wait_for_errors();
        live.umount();
        kept.extend(promised);
        // What the dead agent left in the kernel hangs on the disk that goes.
        sweep(&machine_disk.place.join("agent"));
        machine_disk.go_on_with(&clone);
        scene.start_agent();
        scene.connected();
        scene.protected("root");
        let disk = scene.disk("root");
        println!(
            "round {round}: recheck_read_bytes {}, recheck_sent_bytes {} of {DISK_BYTES}",
            disk.recheck_read_bytes, disk.recheck_sent_bytes
        );
        assert!(disk.recheck_read_bytes > 0, "the writers were at work");
        assert!(disk.recheck_read_bytes <= RECHECK_BYTES_MAX, "{disk:?}");
        assert!(scene.machine().durable >= durable, "LSNs only rise");
        scene.assert_replica_equals("root");
        device = scene.device("root");
        let live = FsMount::new(&device, &live_path, "");
        kept.iter().for_each(|journal| journal.check(&live.path));
        live.umount();
        fsck("ext4", &device);
        let view = View::files(&scene, "web1/root@latest");
        kept.iter().for_each(|journal| journal.check(view.path()));
        view.close();
    }
    drop(scene);
    drop(machine_disk);
}
