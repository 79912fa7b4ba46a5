//! What `aft` shows is so: what can be mounted after an agent's death, and the delay by stage.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use afterimage_protocol::rest::server::DiskStatus;
use afterimage_tests::process::{FsMount, MIB, Scene, Setup, Writers, require, run, until};

fn noise(device: &Path, at_mib: u64) {
    let (of, seek) = (format!("of={}", device.display()), format!("seek={at_mib}"));
    let words = [
        "if=/dev/urandom",
        &of,
        &seek,
        "bs=64k",
        "count=64",
        "oflag=direct",
        "status=none",
    ];
    run("dd", &words);
}

/// The rows of the one disk in `aft disk list`: (from, to, first LSN, last LSN).
fn rows(scene: &Scene) -> Vec<(String, String, u64, u64)> {
    let said = scene.aft_ok(&["disk", "list"]);
    println!("{said}");
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| word.contains("..")).unwrap();
        let (first, last) = words[at].split_once("..").unwrap();
        (
            words[at - 2].to_owned(),
            words[at - 1].to_owned(),
            first.parse().unwrap(),
            last.parse().unwrap(),
        )
    };
    said.lines().skip(1).map(parse).collect()
}

/// After an agent's death there is a gap: what the source was inside of the comparison cannot be
/// mounted. Each row of the list is one range, and both ends of it can be mounted.
#[test]
fn rows_of_the_list_can_be_mounted() {
    require(&["blockdev", "dd"]);
    let mut scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    scene.protect("disk");
    noise(&device, 1);
    scene.caught_up();
    for round in 1..=2 {
        noise(&scene.device("disk"), 2 * round);
        scene.kill_agent();
        scene.start_agent();
        scene.connected();
        scene.protected("disk");
        noise(&scene.device("disk"), 10 * round);
        scene.caught_up();
    }
    let rows = rows(&scene);
    let disks: Vec<DiskStatus> = scene.aft_json(&["disk", "list"]);
    assert!(rows.len() >= 2, "a death leaves a gap: {rows:?}");
    assert_eq!(rows.len(), disks[0].addressable.len());
    for (row, range) in rows.iter().zip(disks[0].addressable.iter().rev()) {
        assert_eq!((row.2, row.3), (range.first.0, range.last.0));
        assert!(row.0 <= row.1, "{row:?}");
        for lsn in [row.2, row.3] {
            let view = scene.view(&format!("web1/disk@lsn:{lsn}"));
            assert_eq!(
                view.mount.lsn.0, lsn,
                "nothing is resolved to another state"
            );
            view.close();
        }
    }
    assert_eq!(
        rows[0].3,
        scene.machine().durable.0,
        "the newest comes first"
    );
}

/// Each stage is measured while there is something, and is zero when there is not.
#[test]
fn the_delay_of_each_stage_is_measured() {
    require(&["blockdev"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 256 * MIB);
    let device = scene.attach(&source, "disk");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("disk");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let writers = Writers::start(&live.path, 0, 2);
    let mut seen = scene.machine().lag;
    until("a measured delay", || {
        let lag = scene.machine().lag;
        seen.cache_ms = seen.cache_ms.max(lag.cache_ms);
        seen.apply_ms = seen.apply_ms.max(lag.apply_ms);
        seen.cache_ms > 0 && seen.apply_ms > 0
    });
    println!("under load: {seen:?}");
    assert!(seen.cache_ms < 10_000 && seen.apply_ms < 10_000, "{seen:?}");
    let (journals, failed) = writers.stop();
    assert_eq!((journals.len(), failed), (2, 0));
    live.umount();
    scene.caught_up();
    until("rest", || {
        let lag = scene.machine().lag;
        (lag.cache_ms, lag.apply_ms, lag.capture_ms) == (0, 0, Some(0))
    });
    let said = scene.aft_ok(&["status"]);
    assert!(said.contains("CACHE") && said.contains("APPLY"), "{said}");
}
