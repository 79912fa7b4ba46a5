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

/// A byte budget that a busy disk uses up: the journal window gets shorter before ingest must
/// pause, all is destaged and collected again and again, and what is kept stays right.
#[test]
fn short_budget() {
    require(&["fio", "fsfreeze"]);
    let budget = 384 * MIB;
    let setup = Setup {
        server: format!(
            "budget_bytes = {budget}\nsegment_bytes = {}\nwindow_min_ms = 1000\n",
            17 * MIB
        ),
        ..Setup::default()
    };
    let scene = Scene::start(&setup);
    let source = scene.image("disk.img", 96 * MIB);
    let device = scene.attach(&source, "root");
    scene.protect("root");
    let kept = scene.root.join("then.img");
    let write = |bytes: u64, seed: u64| {
        let written = run(
            "fio",
            &[
                "--name=churn",
                &format!("--filename={}", device.display()),
                "--rw=randwrite",
                "--bs=16k",
                "--iodepth=16",
                "--ioengine=libaio",
                "--direct=1",
                "--norandommap",
                "--refill_buffers",
                "--rate=60m",
                &format!("--randseed={seed}"),
                &format!("--io_size={bytes}"),
                "--end_fsync=1",
            ],
        );
        assert!(written.contains("err= 0"), "{written}");
    };
    write(32 * MIB, 1);
    scene.caught_up();
    std::fs::copy(&source, &kept).unwrap();
    let made = scene.aft(&["point", "create", "web1", "--name", "kept"]);
    assert_eq!(made.code, 0, "{made:?}");
    for round in 0..4 {
        write(budget, 2 + round);
        scene.caught_up();
    }
    let status = scene.status();
    println!("{} MiB stored", status.stored_bytes / MIB);
    assert!(status.stored_bytes <= budget, "{status:?}");
    let events = scene.events();
    let shortened: Vec<_> = events
        .iter()
        .filter(|event| event.kind == "window-shortened")
        .collect();
    assert!(!shortened.is_empty(), "{events:?}");
    println!("{}", shortened[0].text);
    assert!(
        events.iter().all(|event| event.kind != "points-yielded"),
        "a named point is not given away: {events:?}"
    );
    let said = scene.aft(&["status"]).stdout;
    assert!(said.contains("its journal window is"), "{said}");
    scene.assert_replica_equals("root");
    let view = scene.view("web1/root@kept");
    assert_equal_devices(&kept, &view.device);
    view.close();
}

/// The log on a small file system of its own, segments on another: what does not fit into the cache
/// is destaged, and both come back after a kill.
#[test]
fn log_and_segments_on_two_file_systems() {
    require(&["fio", "blockdev"]);
    let outer = Scene::directory();
    let data = outer.path().join("data");
    std::fs::create_dir_all(data.join("log")).unwrap();
    let file = outer.path().join("log.img");
    sparse(&file, 300 * MIB);
    let device = LoopFile::new(&file);
    run(
        "mkfs.ext4",
        &["-q".as_ref(), "-m0".as_ref(), device.device.as_os_str()],
    );
    let _log = FsMount::new(&device.device, &data.join("log"), "");
    let setup = Setup {
        server: format!("segment_bytes = {}\ncache_bytes = {}\n", 17 * MIB, 68 * MIB),
        data_dir: Some(data.clone()),
        ..Setup::default()
    };
    let mut scene = Scene::start(&setup);
    let source = scene.image("disk.img", 64 * MIB);
    let tapped = scene.attach(&source, "root");
    scene.protect("root");
    let then = scene.root.join("then.img");
    for round in 0..3 {
        noise_over(&tapped, 64 * MIB);
        scene.caught_up();
        if round == 0 {
            std::fs::copy(&source, &then).unwrap();
            let made = scene.aft(&["point", "create", "web1", "--name", "then"]);
            assert_eq!(made.code, 0, "{made:?}");
        }
    }
    let of_log = || -> u64 {
        let files = std::fs::read_dir(data.join("log")).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    };
    until("the log to fit into its cache", || of_log() <= 7 * 17 * MIB);
    scene.kill_server();
    scene.start_server();
    scene.connected();
    scene.caught_up();
    scene.assert_replica_equals("root");
    let view = scene.view("web1/root@then");
    assert_equal_devices(&then, &view.device);
    view.close();
}

/// Writes what cannot be compressed over the begin of a device.
fn noise_over(device: &Path, bytes: u64) {
    let mut file = File::options().write(true).open(device).unwrap();
    let mut random = File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut random, &mut file).unwrap();
    file.sync_all().unwrap();
}
