//! A disk that has grown: the agent sees it when it starts, and the replica grows with it.

#![allow(clippy::unwrap_used)]

use afterimage_tests::process::{MIB, Scene, Setup, require, run};

#[test]
fn grow() {
    require(&["blockdev", "dd"]);
    let mut scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    let noise = |device: &std::path::Path, seek: u64| {
        let (of, seek) = (format!("of={}", device.display()), format!("seek={seek}"));
        run(
            "dd",
            &[
                "if=/dev/urandom",
                &of,
                "bs=1M",
                "count=8",
                &seek,
                "oflag=direct",
                "conv=fsync",
                "status=none",
            ],
        );
    };
    noise(&device, 4);
    scene.protect("disk");
    noise(&device, 40);
    scene.caught_up();
    let point = scene.aft(&["point", "create", "web1", "--name", "small"]);
    assert_eq!(point.code, 0, "{point:?}");
    // While the agent runs the disk keeps its size: nothing is half grown.
    let grown = 96 * MIB + 1024;
    let file = std::fs::File::options().write(true).open(&source).unwrap();
    file.set_len(grown).unwrap();
    drop(file);
    noise(&device, 20);
    scene.assert_replica_equals("disk");
    scene.stop_agent();
    scene.start_agent();
    scene.connected();
    scene.protected("disk");
    assert_eq!(scene.disk("disk").size_bytes, grown);
    let device = scene.device("disk");
    let size = run("blockdev", &["--getsize64".as_ref(), device.as_os_str()]);
    assert_eq!(size.trim(), grown.to_string());
    noise(&device, 80);
    scene.assert_replica_equals("disk");
    let small = scene.view("web1/disk@small");
    let size = run(
        "blockdev",
        &["--getsize64".as_ref(), small.device.as_os_str()],
    );
    assert_eq!(
        size.trim(),
        (64 * MIB).to_string(),
        "an old point keeps its size"
    );
    small.close();
}
