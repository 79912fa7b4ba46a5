//! A source whose size changes: the disk grows with it, while it is used or at the agent's next
//! start, and the replica grows at that place of the history. A source that shrank is shown, and
//! nothing that was sent of it is lost.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;

use afterimage_protocol::message::DiskPhase;
use afterimage_tests::process::{
    FsMount, LoopFile, MIB, Scene, Setup, View, assert_equal_devices, guards::fsck, require, run,
    until,
};

/// Only `aft disk grow` looks at sizes.
const NEVER: &str = "[tap]\nsize_check_ms = 3600000\n";
const QUICKLY: &str = "[tap]\nsize_check_ms = 100\n";

fn scene(agent: &str) -> Scene {
    Scene::start(&Setup {
        agent: agent.to_owned(),
        ..Setup::default()
    })
}

fn size(device: &Path) -> u64 {
    let said = run("blockdev", &["--getsize64".as_ref(), device.as_os_str()]);
    said.trim().parse().unwrap()
}

fn resize(file: &Path, bytes: u64) {
    let file = File::options().write(true).open(file).unwrap();
    file.set_len(bytes).unwrap();
}

/// Writes 8 MiB of noise.
fn noise(device: &Path, at_mib: u64) {
    let (of, seek) = (format!("of={}", device.display()), format!("seek={at_mib}"));
    let words = [
        "if=/dev/urandom",
        &of,
        &seek,
        "bs=1M",
        "count=8",
        "oflag=direct",
        "conv=fsync,notrunc",
        "status=none",
    ];
    run("dd", &words);
}

fn point(scene: &Scene, name: &str) {
    let _said = scene.aft_ok(&["point", "create", "web1", "--name", name]);
}

#[test]
fn a_disk_grows_while_the_agent_is_away() {
    require(&["blockdev", "dd"]);
    let mut scene = scene(NEVER);
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    noise(&device, 4);
    scene.protect("disk");
    noise(&device, 40);
    scene.caught_up();
    point(&scene, "small");
    scene.stop_agent();
    let grown = 96 * MIB + 1024;
    resize(&source, grown);
    scene.start_agent();
    scene.connected();
    scene.protected("disk");
    assert_eq!(scene.disk("disk").size_bytes, grown);
    let device = scene.device("disk");
    assert_eq!(size(&device), grown);
    noise(&device, 80);
    scene.assert_replica_equals("disk");
    let small = scene.view("web1/disk@small");
    assert_eq!(size(&small.device), 64 * MIB, "an old point keeps its size");
    small.close();
}

/// The agent notices by itself; the file system on the disk stays mounted throughout. XFS, since
/// growing a mounted ext4 takes a privilege that a container's root may lack.
#[test]
fn a_mounted_file_system_grows() {
    require(&["blockdev", "dd", "mkfs.xfs", "xfs_growfs", "cmp"]);
    let scene = scene(QUICKLY);
    let source = scene.image("disk.img", 320 * MIB);
    let device = scene.attach(&source, "disk");
    run("mkfs.xfs", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("disk");
    let live = FsMount::new(&device, &scene.root.join("live"), "nouuid");
    noise(&live.path.join("first"), 0);
    run("sync", &["-f".as_ref(), live.path.as_os_str()]);
    scene.caught_up();
    point(&scene, "before");
    let epoch = scene.agent_status().epoch;
    resize(&source, 480 * MIB);
    until("the grown device", || size(&device) == 480 * MIB);
    assert_eq!(scene.disk("disk").size_bytes, 480 * MIB);
    run("xfs_growfs", &[&live.path]);
    // More than there was room for.
    for number in 0..40 {
        noise(&live.path.join(format!("more-{number}")), 0);
    }
    run("sync", &["-f".as_ref(), live.path.as_os_str()]);
    scene.caught_up();
    point(&scene, "after");
    assert_eq!(scene.agent_status().epoch, epoch, "the writer is the same");
    let log = std::fs::read_to_string(scene.root.join("agent.log")).unwrap();
    assert_eq!(
        log.matches("a copy begins").count(),
        1,
        "holes need no batch"
    );
    for (name, mib, file) in [("before", 320, "first"), ("after", 480, "more-39")] {
        let shown = View::files(&scene, &format!("web1/disk@{name}"));
        assert_eq!(size(&shown.device), mib * MIB, "{name}");
        run("cmp", &[live.path.join(file), shown.path().join(file)]);
        shown.close();
    }
    live.umount();
    scene.assert_replica_equals("disk");
    let newest = scene.view("web1/disk@latest");
    assert_eq!(size(&newest.device), 480 * MIB);
    fsck("xfs", &newest.device);
    newest.close();
}

/// The new part of a device may hold anything: it is compared before it is shown. A death right
/// after that costs only the marked regions.
#[test]
fn a_device_grows_with_what_it_holds() {
    require(&["blockdev", "dd", "losetup"]);
    let mut scene = scene(NEVER);
    let backing = scene.image("backing.img", 64 * MIB);
    let below = LoopFile::new(&backing);
    let device = scene.attach(&below.device, "disk");
    scene.protect("disk");
    noise(&device, 8);
    scene.caught_up();
    point(&scene, "small");
    resize(&backing, 96 * MIB);
    noise(&backing, 70);
    run("losetup", &["-c".as_ref(), below.device.as_os_str()]);
    assert_eq!(size(&below.device), 96 * MIB);
    let _said = scene.aft_ok(&["disk", "grow", "disk"]);
    assert_eq!(size(&device), 96 * MIB);
    scene.protected("disk");
    let disk = scene.disk("disk");
    assert!(disk.recheck_sent_bytes >= 8 * MIB, "{disk:?}");
    scene.assert_replica_equals("disk");
    noise(&device, 84);
    scene.kill_agent();
    scene.start_agent();
    scene.connected();
    scene.protected("disk");
    let disk = scene.disk("disk");
    assert_eq!(disk.size_bytes, 96 * MIB);
    assert!(disk.recheck_read_bytes >= 8 * MIB, "{disk:?}");
    assert!(disk.recheck_read_bytes < 64 * MIB, "{disk:?}");
    scene.assert_replica_equals("disk");
    let small = scene.view("web1/disk@small");
    assert_eq!(size(&small.device), 64 * MIB);
    small.close();
    // The tap goes before what is below it.
    let _said = scene.aft_ok(&["disk", "detach", "disk"]);
}

#[test]
fn a_source_that_shrinks_is_shown_and_nothing_is_lost() {
    require(&["blockdev", "dd"]);
    let scene = scene(QUICKLY);
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    scene.protect("disk");
    noise(&device, 8);
    noise(&device, 48);
    scene.caught_up();
    point(&scene, "whole");
    let before = scene.root.join("before.img");
    std::fs::copy(&source, &before).unwrap();
    resize(&source, 32 * MIB);
    until("the error", || {
        scene.disk("disk").phase == Some(DiskPhase::SourceError)
    });
    let disk = scene.disk("disk");
    println!("  {}", disk.reason);
    assert!(
        disk.reason.contains("shrank from 67108864 to 33554432"),
        "{disk:?}"
    );
    until("the appliance to know", || {
        scene.machine().disks[0].phase == Some(DiskPhase::SourceError)
    });
    for command in [
        &["disk", "list"][..],
        &["status"],
        &["disk", "show", "web1/disk"],
    ] {
        let said = scene.aft_ok(command);
        assert!(
            said.contains("source error") && said.contains("shrank"),
            "{said}"
        );
    }
    assert_eq!(scene.status().health, "red");
    scene
        .aft(&["disk", "grow", "disk"])
        .refuses(4, &["shrank", "as large as it was"]);
    // What is left is captured as ever, and what was cut off is in the replica.
    noise(&device, 16);
    scene.caught_up();
    for name in ["whole", "latest"] {
        let view = scene.view(&format!("web1/disk@{name}"));
        assert_eq!(size(&view.device), 64 * MIB);
        run(
            "cmp",
            &[
                "-i".as_ref(),
                (48 * MIB).to_string().as_ref(),
                before.as_os_str(),
                view.device.as_os_str(),
            ],
        );
        view.close();
    }
    // It has its size again, and zeroes where the end was.
    resize(&source, 64 * MIB);
    let _said = scene.aft_ok(&["disk", "grow", "disk"]);
    scene.protected("disk");
    assert_eq!(scene.disk("disk").reason, "");
    scene.assert_replica_equals("disk");
    let whole = scene.view("web1/disk@whole");
    assert_equal_devices(&whole.device, &before);
    whole.close();
}

/// A disk comes back under its name at once; the kernel must not remember the one before.
#[test]
fn a_disk_comes_back_under_its_name_at_once() {
    require(&["blockdev"]);
    let scene = scene(NEVER);
    for round in 1..=5 {
        let bytes = round * 8 * MIB;
        let source = scene.image(&format!("source-{round}.img"), bytes);
        let device = scene.attach(&source, "disk");
        assert_eq!(size(&device), bytes, "round {round}");
        let _said = scene.aft_ok(&["disk", "detach", "disk"]);
    }
}
