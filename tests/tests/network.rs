//! The network between agent and appliance goes away, or the appliance hangs: writes go on, the
//! agent spools what memory does not hold, and catches up without a resync when it can.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::path::Path;

use afterimage_tests::process::{FsMount, MIB, Scene, Setup, Writers, require, run, until};

/// Memory for 8 MiB of sealed frames; the rest goes to files of 32 MiB.
const SMALL_MEMORY: &str = "\
[pipeline]
captured_bytes_max = 8388608
sealed_bytes_max = 8388608
[spool]
bytes_max = 1073741824
file_bytes = 33554432
";

fn noise(path: &Path, bytes: u64) {
    let mut file = File::create(path).unwrap();
    let mut random = File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut random, &mut file).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn network_cut() {
    require(&["blockdev"]);
    let setup = Setup {
        agent: SMALL_MEMORY.to_owned(),
        is_proxied: true,
        ..Setup::default()
    };
    let scene = Scene::start(&setup);
    let source = scene.image("disk.img", 512 * MIB);
    let device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("root");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let writers = Writers::start(&live.path, 0, 2);
    writers.progress(100);
    let proxy = scene.proxy.as_ref().unwrap();
    let epoch = scene.agent_status().epoch;
    // Closed, and half open: nothing arrives, and nothing says so.
    for (how, is_silent) in [("cut", false), ("half open", true)] {
        let before = scene.agent_status();
        if is_silent {
            proxy.silence();
        } else {
            proxy.cut();
        }
        noise(&live.path.join(how), 96 * MIB);
        writers.progress(200);
        until("the agent to see it", || !scene.agent_status().is_connected);
        noise(&live.path.join(format!("{how} 2")), 16 * MIB);
        until("the spool", || scene.agent_status().spooled_bytes > 0);
        let during = scene.agent_status();
        assert!(
            !during.reason.is_empty(),
            "the agent says why it is not connected"
        );
        println!(
            "{how}: {} LSNs behind, {} MiB in memory, {} MiB spooled: {}",
            during.captured.0 - during.acknowledged.0,
            during.buffered_bytes / MIB,
            during.spooled_bytes / MIB,
            during.reason
        );
        assert!(
            during.spooled_bytes > 64 * MIB,
            "memory is bounded: {during:?}"
        );
        until("the appliance to see it", || !scene.machine().is_connected);
        proxy.heal();
        scene.connected();
        scene.caught_up();
        let after = scene.agent_status();
        assert!(after.acknowledged > before.acknowledged);
        until("the spool to empty", || {
            scene.agent_status().spooled_bytes == 0
        });
        assert_eq!(after.epoch, epoch);
        let disk = scene.disk("root");
        assert_eq!(disk.recheck_read_bytes, 0, "no resync: {disk:?}");
    }
    let log = std::fs::read_to_string(scene.root.join("agent.log")).unwrap();
    let copies = log.matches("a copy begins").count();
    assert_eq!(copies, 1, "the first copy is the only batch");
    let (journals, failed) = writers.stop();
    assert_eq!(failed, 0, "writes went on");
    journals
        .iter()
        .for_each(|journal| journal.check(&live.path));
    live.umount();
    scene.assert_replica_equals("root");
}

/// The appliance is there and does nothing, as on a machine that stalls.
#[test]
fn appliance_stopped() {
    require(&["blockdev", "kill"]);
    let setup = Setup {
        agent: SMALL_MEMORY.to_owned(),
        ..Setup::default()
    };
    let scene = Scene::start(&setup);
    let source = scene.image("disk.img", 512 * MIB);
    let device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("root");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let writers = Writers::start(&live.path, 0, 2);
    writers.progress(100);
    let before = scene.agent_status();
    let server = scene.server.as_ref().unwrap();
    server.signal("STOP");
    noise(&live.path.join("stopped"), 96 * MIB);
    writers.progress(200);
    until("the agent to see it", || !scene.agent_status().is_connected);
    let during = scene.agent_status();
    println!(
        "stopped: {} LSNs behind, {} MiB spooled: {}",
        during.captured.0 - during.acknowledged.0,
        during.spooled_bytes / MIB,
        during.reason
    );
    assert!(!during.reason.is_empty(), "the agent says why");
    assert!(during.spooled_bytes > 64 * MIB, "{during:?}");
    server.signal("CONT");
    scene.connected();
    scene.caught_up();
    until("the spool to empty", || {
        scene.agent_status().spooled_bytes == 0
    });
    let after = scene.agent_status();
    assert!(after.acknowledged > before.acknowledged);
    assert_eq!(after.epoch, before.epoch, "the writer is the same");
    assert_eq!(scene.disk("root").recheck_read_bytes, 0, "no resync");
    let (journals, failed) = writers.stop();
    assert_eq!(failed, 0, "writes went on");
    journals
        .iter()
        .for_each(|journal| journal.check(&live.path));
    live.umount();
    scene.assert_replica_equals("root");
}
