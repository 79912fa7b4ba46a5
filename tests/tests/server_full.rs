//! The appliance's disk becomes full: ingest pauses and says why, points stay readable, the agent
//! spools, and all resumes by itself when there is room.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::path::Path;

use afterimage_tests::process::{
    FsMount, LoopFile, MIB, Scene, Setup, View, assert_equal_devices, guards::sparse, require, run,
    until,
};

fn noise(path: &Path, bytes: u64) {
    let mut file = File::create(path).unwrap();
    let mut random = File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut random, &mut file).unwrap();
    file.sync_all().unwrap();
}

/// A file system of its own for the appliance.
struct SmallDisk {
    mount: Option<FsMount>,
    _device: LoopFile,
}

impl SmallDisk {
    fn new(root: &Path, bytes: u64) -> Self {
        let file = root.join("small.img");
        sparse(&file, bytes);
        let device = LoopFile::new(&file);
        run(
            "mkfs.ext4",
            &["-q".as_ref(), "-m0".as_ref(), device.device.as_os_str()],
        );
        let mount = FsMount::new(&device.device, &root.join("small"), "");
        Self {
            mount: Some(mount),
            _device: device,
        }
    }
}

#[test]
fn server_disk_full() {
    require(&["blockdev", "fallocate", "fsfreeze"]);
    let outer = Scene::directory();
    let small = SmallDisk::new(outer.path(), 600 * MIB);
    let small_path = small.mount.as_ref().unwrap().path.clone();
    let setup = Setup {
        server: format!("segment_bytes = {}\n", 32 * MIB),
        data_dir: Some(small_path.join("data")),
        ..Setup::default()
    };
    let scene = Scene::start(&setup);
    let source = scene.image("disk.img", 256 * MIB);
    let device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("root");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    noise(&live.path.join("first"), 32 * MIB);
    run("fsfreeze", &["-f".as_ref(), live.path.as_os_str()]);
    scene.caught_up();
    let point = scene.aft(&["point", "create", "web1", "--name", "before"]);
    run(
        "cp",
        &[
            "--sparse=always".as_ref(),
            source.as_os_str(),
            scene.root.join("then.img").as_os_str(),
        ],
    );
    run("fsfreeze", &["-u".as_ref(), live.path.as_os_str()]);
    assert_eq!(point.code, 0, "{point:?}");

    let free = scene.status().free_bytes;
    let filler = small_path.join("filler");
    let bytes = (free - 100 * MIB).to_string();
    run(
        "fallocate",
        &["-l".as_ref(), bytes.as_ref(), filler.as_os_str()],
    );
    for part in 0..4 {
        noise(&live.path.join(format!("more-{part}")), 40 * MIB);
    }
    until("the pause", || scene.status().is_ingest_paused);
    let said = scene.aft(&["status"]);
    println!("{}", said.stdout.trim());
    let status = scene.status();
    assert_ne!(status.health, "green");
    let is_shown = status
        .causes
        .iter()
        .any(|cause| cause.contains("ingest is paused") || cause.contains("full"));
    assert!(is_shown, "{:?}", status.causes);
    assert!(said.stdout.contains(&status.causes[0]), "{said:?}");
    let agent = scene.agent_status();
    assert!(
        agent.captured > agent.acknowledged,
        "the agent keeps the rest"
    );
    println!(
        "the agent holds {} + {} MiB",
        agent.buffered_bytes / MIB,
        agent.spooled_bytes / MIB
    );

    let view = scene.view("web1/root@before");
    assert_equal_devices(&scene.root.join("then.img"), &view.device);
    view.close();
    let view = View::files(&scene, "web1/root@before");
    assert_eq!(
        view.path().join("first").metadata().unwrap().len(),
        32 * MIB
    );
    view.close();
    // Writing goes on while ingest is paused.
    noise(&live.path.join("during"), 8 * MIB);

    std::fs::remove_file(&filler).unwrap();
    until("ingest to resume", || !scene.status().is_ingest_paused);
    scene.caught_up();
    assert_eq!(scene.disk("root").recheck_read_bytes, 0, "no resync");
    live.umount();
    scene.assert_replica_equals("root");
    let view = scene.view("web1/root@before");
    assert_equal_devices(&scene.root.join("then.img"), &view.device);
    view.close();
    drop(scene);
    small.mount.unwrap().umount();
}
