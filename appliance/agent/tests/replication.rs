//! A tapped disk, a real connection, and an appliance in memory: the replica equals the source.
//! Needs root, FUSE and loop devices.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::message::{DiskPhase, RefusalCode};
use common::source::{Direct, image, pattern};
use common::{Agent, Appliance, enrol, quick_config, until};

const MIB: u64 = 1 << 20;

fn assert_equal(appliance: &Appliance, agent: &Agent, name: &str, source: &Path) {
    let id = agent.machine.disk_named(name).unwrap().id;
    let mut bytes = std::fs::read(source).unwrap();
    let replica = appliance.replica.lock();
    let disk = &replica.disks[&id];
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
}

impl Scene {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let appliance = Appliance::start();
        let state_dir = enrol(root.path(), &appliance);
        Self {
            root,
            appliance,
            state_dir,
        }
    }

    fn agent(&self) -> Agent {
        Agent::start(&self.state_dir, quick_config(self.root.path()))
    }
}

#[test]
fn a_disk_is_copied_while_it_is_written() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let agent = scene.agent();
    let device = agent.attach(&source, "data");
    let mut direct = Direct::open(&device);
    for chunk in 0..24 {
        direct
            .write(chunk * 2 * MIB, &pattern(chunk, 1 << 20))
            .unwrap();
    }
    agent.connected();
    agent.machine.protect("data").unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut direct = Direct::open(&device);
            let mut number = 0;
            while !is_over.load(Ordering::SeqCst) {
                let offset = (number * 7919 % (64 * MIB / 4096 - 4)) * 4096;
                direct
                    .write(
                        offset,
                        &pattern(number, 4096 * (1 + usize::try_from(number % 4).unwrap())),
                    )
                    .unwrap();
                number += 1;
            }
        });
        agent.protected("data");
        is_over.store(true, Ordering::SeqCst);
    });
    drop(direct);
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    assert!(scene.appliance.replica.lock().bulk_bytes > 0);
    agent.stop();
}

#[test]
fn a_lost_connection_costs_no_resync() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let agent = scene.agent();
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    let mut direct = Direct::open(&device);
    for round in 0..5 {
        scene.appliance.cut();
        until("the cut", || !agent.machine.is_streaming());
        for number in 0..40 {
            direct
                .write(
                    (number * 13 % 64) * MIB,
                    &pattern(round * 100 + number, 1 << 19),
                )
                .unwrap();
        }
        scene.appliance.heal();
        agent.connected();
    }
    agent.caught_up();
    drop(direct);
    assert_equal(&scene.appliance, &agent, "data", &source);
    assert_eq!(
        scene.appliance.replica.lock().questions,
        0,
        "nothing was compared"
    );
    agent.stop();
}

#[test]
fn memory_then_spool_then_bitmap_and_back() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 256 * MIB);
    let mut config = quick_config(scene.root.path());
    config.pipeline.captured_bytes_max = 8 << 20;
    config.pipeline.sealed_bytes_max = 4 << 20;
    config.spool.bytes_max = 256 << 20;
    config.spool.file_bytes = 32 << 20;
    config.spool.read_ahead_bytes = 4 << 20;
    let agent = Agent::start(&scene.state_dir, config);
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    scene.appliance.cut();
    until("the cut", || !agent.machine.is_streaming());
    let mut direct = Direct::open(&device);
    for number in 0..64 {
        direct
            .write(number * MIB, &pattern(number, 1 << 20))
            .unwrap();
    }
    until("the spool", || {
        agent.machine.status().spooled_bytes > 32 << 20
    });
    scene.appliance.heal();
    agent.connected();
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    assert_eq!(
        scene.appliance.replica.lock().questions,
        0,
        "the spool was enough"
    );

    scene.appliance.cut();
    until("the cut", || !agent.machine.is_streaming());
    let mut number = 0;
    while agent.machine.order().is_flowing() {
        direct
            .write((number % 250) * MIB, &pattern(1000 + number, 1 << 20))
            .unwrap();
        number += 1;
        assert!(number < 600, "the spool is bounded");
    }
    for number in 0..20 {
        direct
            .write(number * 3 * MIB, &pattern(5000 + number, 1 << 16))
            .unwrap();
    }
    until("the reason", || {
        agent.phase("data") == Some(DiskPhase::ResyncNeeded)
    });
    scene.appliance.heal();
    agent.protected("data");
    direct.write(5 * MIB, &pattern(9999, 4096)).unwrap();
    drop(direct);
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    assert!(
        scene.appliance.replica.lock().questions > 0,
        "marked regions were compared"
    );
    agent.stop();
}

#[test]
fn after_an_orderly_stop_nothing_is_compared() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 64 * MIB);
    let agent = scene.agent();
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    let mut direct = Direct::open(&device);
    for number in 0..50 {
        direct
            .write(number * MIB, &pattern(number, 1 << 16))
            .unwrap();
    }
    drop(direct);
    let before = agent.machine.status().epoch;
    agent.stop();
    let agent = scene.agent();
    agent.connected();
    agent.protected("data");
    assert!(
        agent.machine.status().epoch > before,
        "each run writes an epoch of its own"
    );
    let mut direct = Direct::open(&agent.device("data"));
    direct.write(3 * MIB, &pattern(77, 8192)).unwrap();
    drop(direct);
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    assert_eq!(scene.appliance.replica.lock().questions, 0);
    agent.stop();
}

#[test]
fn marks_are_placed_where_they_are_asked_for() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 16 * MIB);
    let agent = scene.agent();
    agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    scene.appliance.place_mark(42, "before the upgrade");
    until("the mark", || {
        !scene.appliance.replica.lock().marks().is_empty()
    });
    let marks = scene.appliance.replica.lock().marks();
    assert_eq!(
        (marks[0].argument, &marks[0].note[..]),
        (42, &b"before the upgrade"[..])
    );
    until("a report", || {
        let report = scene.appliance.report();
        report.is_some_and(|report| {
            report.captured >= marks[0].lsn && report.oldest_unacknowledged.is_none()
        })
    });
    agent.stop();
}

#[test]
fn a_refusal_is_shown_and_nothing_is_lost() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 16 * MIB);
    let agent = scene.agent();
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    scene
        .appliance
        .refuse(RefusalCode::StaleEpoch, ErrorClass::Fenced);
    scene.appliance.drop_connections();
    until("the reason", || {
        agent.machine.status().reason.contains("it is refused")
    });
    let mut direct = Direct::open(&device);
    direct.write(MIB, &pattern(1, 1 << 16)).unwrap();
    scene.appliance.accept_again();
    agent.connected();
    agent.caught_up();
    drop(direct);
    assert_equal(&scene.appliance, &agent, "data", &source);
    agent.stop();
}

#[test]
fn two_disks_share_one_order_and_one_can_go() {
    let scene = Scene::new();
    let (one, two) = (
        image(scene.root.path(), "one.img", 16 * MIB),
        image(scene.root.path(), "two.img", 16 * MIB + 512),
    );
    let agent = scene.agent();
    let (first, second) = (agent.attach(&one, "one"), agent.attach(&two, "two"));
    agent.connected();
    agent.machine.protect("one").unwrap();
    agent.machine.protect("two").unwrap();
    let (mut a, mut b) = (Direct::open(&first), Direct::open(&second));
    for number in 0..60 {
        a.write(number * 8192, &pattern(number, 8192)).unwrap();
        b.write(number * 4096 + 512, &pattern(number + 500, 1024))
            .unwrap();
    }
    b.write(16 * MIB, &pattern(9, 512)).unwrap();
    agent.protected("one");
    agent.protected("two");
    let busy = agent.machine.detach("two");
    assert!(busy.is_err() || agent.machine.disk_named("two").is_none());
    drop((a, b));
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "one", &one);
    if agent.machine.disk_named("two").is_some() {
        assert_equal(&scene.appliance, &agent, "two", &two);
    }
    agent.stop();
}

/// The appliance came back from an older image: what it had acknowledged is not there any more.
#[test]
fn an_appliance_that_was_set_back_is_brought_to_equality() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 32 * MIB);
    let agent = scene.agent();
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    let mut direct = Direct::open(&device);
    direct.write(MIB, &pattern(1, 1 << 16)).unwrap();
    agent.caught_up();
    scene.appliance.drop_connections();
    {
        let mut replica = scene.appliance.replica.lock();
        let disk = replica.disks.values_mut().next().unwrap();
        disk.bytes[1 << 20..2 << 20].fill(0);
        replica.durable = afterimage_blockdev::Lsn(2);
        replica.highest = replica.durable;
    }
    let before = agent.machine.status().epoch;
    until("a new epoch", || agent.machine.status().epoch > before);
    direct.write(9 * MIB, &pattern(2, 1 << 16)).unwrap();
    drop(direct);
    agent.protected("data");
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    agent.stop();
}

/// The agent came back from an older image: its counters and marks are of yesterday.
#[test]
fn an_agent_that_was_set_back_gives_no_lsn_out_twice() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 32 * MIB);
    let agent = scene.agent();
    agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    agent.stop();
    let copy = scene.root.path().join("copy");
    let duplicate = |from: &Path, to: &Path| {
        let status = std::process::Command::new("cp")
            .arg("-a")
            .arg(from)
            .arg(to)
            .status()
            .unwrap();
        assert!(status.success());
    };
    duplicate(&scene.state_dir, &copy);
    let yesterday = std::fs::read(&source).unwrap();
    let agent = scene.agent();
    agent.connected();
    let mut direct = Direct::open(&agent.device("data"));
    direct.write(5 * MIB, &pattern(5, 1 << 16)).unwrap();
    drop(direct);
    agent.caught_up();
    agent.stop();
    std::fs::remove_dir_all(&scene.state_dir).unwrap();
    duplicate(&copy, &scene.state_dir);
    std::fs::write(&source, yesterday).unwrap();
    let highest = scene.appliance.replica.lock().highest;
    let agent = scene.agent();
    agent.connected();
    agent.protected("data");
    agent.caught_up();
    assert!(agent.machine.status().captured > highest);
    assert_equal(&scene.appliance, &agent, "data", &source);
    agent.stop();
}

/// The spool's disk fails under what lies in it: a new epoch compares what was marked.
#[test]
fn a_lost_spool_costs_a_bounded_comparison() {
    let scene = Scene::new();
    let source = image(scene.root.path(), "disk.img", 128 * MIB);
    let mut config = quick_config(scene.root.path());
    config.pipeline.captured_bytes_max = 8 << 20;
    config.pipeline.sealed_bytes_max = 2 << 20;
    config.spool.read_ahead_bytes = 2 << 20;
    let agent = Agent::start(&scene.state_dir, config);
    let device = agent.attach(&source, "data");
    agent.connected();
    agent.machine.protect("data").unwrap();
    agent.protected("data");
    scene.appliance.cut();
    until("the cut", || !agent.machine.is_streaming());
    let mut direct = Direct::open(&device);
    for number in 0..24 {
        direct
            .write(number * MIB, &pattern(number, 1 << 20))
            .unwrap();
    }
    until("the spool", || {
        agent.machine.status().spooled_bytes > 16 << 20
    });
    until("quiet", || agent.machine.status().buffered_bytes < 4 << 20);
    for entry in std::fs::read_dir(scene.state_dir.join("spool/frames")).unwrap() {
        let path = entry.unwrap().path();
        let length = path.metadata().unwrap().len();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for at in (0..length).step_by(1 << 18) {
            std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 8192], at).unwrap();
        }
    }
    let before = agent.machine.status().epoch;
    scene.appliance.heal();
    until("a new epoch", || agent.machine.status().epoch > before);
    direct.write(100 * MIB, &pattern(7, 4096)).unwrap();
    drop(direct);
    agent.protected("data");
    agent.caught_up();
    assert_equal(&scene.appliance, &agent, "data", &source);
    let asked = scene.appliance.replica.lock().blocks_asked * 4096;
    assert!(
        asked > 0 && asked <= 64 * MIB,
        "{asked} bytes were compared"
    );
    agent.stop();
}
