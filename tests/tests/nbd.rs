//! Disks over NBD, from the daemon to clients that nobody here wrote: points, changed blocks
//! between points, branches, TLS, and the daemon's death.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use afterimage_protocol::rest::server::Event;
use afterimage_tests::process::{MIB, Scene, Setup, assert_equal_devices, require, run};
use serde::Deserialize;

const PROGRAMS: [&str; 7] = [
    "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio", "cp", "ss",
];
const BLOCK: usize = 4096;

#[derive(Deserialize)]
struct Listed {
    name: String,
    local: Option<String>,
    remote: Option<String>,
}

fn scene() -> Scene {
    let server = "[nbd]\nlisten = \"127.0.0.1:0\"\n".to_owned();
    Scene::start(&Setup {
        server,
        ..Setup::default()
    })
}

fn listed(scene: &Scene) -> Vec<Listed> {
    scene.aft_json(&["nbd", "list", "web1"])
}

fn local(scene: &Scene, name: &str) -> String {
    let all = listed(scene);
    let found = all.iter().find(|export| export.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not listed"));
    found.local.clone().unwrap()
}

fn attempt(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

fn fails(program: &str, arguments: &[&str], word: &str) {
    let output = attempt(program, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success(),
        "{program} {arguments:?} went through"
    );
    assert!(said.contains(word), "{program} {arguments:?}: {said}");
}

fn noise(device: &Path, at: u64, bytes: usize, seed: u8) {
    let data: Vec<u8> = (0..bytes)
        .map(|place| u8::try_from((place * 7 + place / 251) % 256).unwrap() ^ seed)
        .collect();
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(&data, at).unwrap();
    file.sync_all().unwrap();
}

/// Makes a point, and keeps what the source was there.
fn point(scene: &Scene, source: &Path, name: &str) -> PathBuf {
    scene.caught_up();
    let made = scene.aft(&["point", "create", "web1", "--name", name]);
    assert_eq!(made.code, 0, "{made:?}");
    let kept = scene.root.join(format!("{name}.kept"));
    run("cp", &[source.as_os_str(), kept.as_os_str()]);
    kept
}

/// A disk with two points and a few changes between them.
fn two_points(scene: &Scene) -> (PathBuf, PathBuf) {
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    for at in [0, 5, 11, 40] {
        noise(&device, at * MIB, 2 << 20, 1);
    }
    scene.protect("disk");
    let one = point(scene, &source, "one");
    noise(&device, 5 * MIB + 4096, 8192, 2);
    noise(&device, 30 * MIB, 1 << 20, 3);
    noise(&device, 63 * MIB, 512, 4);
    let place = device.display().to_string();
    run("blkdiscard", &["-o", "41943040", "-l", "1048576", &place]);
    (one, point(scene, &source, "two"))
}

/// Ranges of a map: offset, length, flags.
fn map(uri: &str, context: &str) -> Vec<(usize, usize, u32)> {
    let text = run("nbdinfo", &[&format!("--map={context}"), uri]);
    let number = |word: Option<&str>| word.unwrap().parse::<usize>().unwrap();
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (offset, length) = (number(words.next()), number(words.next()));
        let flags = words.next().unwrap().parse().unwrap();
        (offset, length, flags)
    };
    text.lines().map(line).collect()
}

#[test]
fn points_are_exports_and_tell_what_changed_between_them() {
    require(&PROGRAMS);
    require(&["blkdiscard"]);
    let scene = scene();
    let (one, two) = two_points(&scene);
    for (name, kept) in [("one", &one), ("two", &two)] {
        let uri = local(&scene, &format!("web1/disk@{name}"));
        for connections in ["1", "4", "16"] {
            let copy = scene.root.join(format!("{name}-{connections}.copy"));
            run(
                "nbdcopy",
                &["-C", connections, &uri, &copy.display().to_string()],
            );
            assert_equal_devices(&copy, kept);
        }
        let kept = kept.display().to_string();
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", &uri, &kept],
        );
        fails("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri], "");
    }
    let uri = local(&scene, "web1/disk@two");
    let (before, after) = (std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
    let ranges = map(&uri, "qemu:dirty-bitmap:one");
    let mut dirty = vec![false; after.len() / BLOCK];
    for (offset, length, flags) in &ranges {
        dirty[offset / BLOCK..(offset + length) / BLOCK].fill(flags & 1 != 0);
    }
    let blocks = before.chunks(BLOCK).zip(after.chunks(BLOCK));
    let differs: Vec<bool> = blocks.map(|(old, new)| old != new).collect();
    for (block, differs) in differs.iter().enumerate() {
        assert!(
            !differs || dirty[block],
            "the change of block {block} is not told"
        );
    }
    let count = |of: &[bool]| of.iter().filter(|is| **is).count();
    let (told, real) = (count(&dirty), count(&differs));
    assert!(
        real > 0 && told <= real + 512,
        "{told} blocks told, {real} differ"
    );
    println!("changed blocks: {real}, told {told} of {}", dirty.len());
    // Against itself nothing has changed.
    let same = map(&uri, "qemu:dirty-bitmap:two");
    assert_eq!(same, [(0, after.len(), 0)]);
    for (offset, length, flags) in map(&uri, "base:allocation") {
        let is_zero = after[offset..offset + length].iter().all(|byte| *byte == 0);
        assert!(
            flags & 2 == 0 || is_zero,
            "data at {offset} is called zeroes"
        );
    }
    incremental(&scene, &one, &two, &ranges);
}

/// An incremental backup as QEMU's own tools see it: the same ranges.
fn incremental(scene: &Scene, one: &Path, two: &Path, ranges: &[(usize, usize, u32)]) {
    let socket = scene.data_dir.join("nbd.sock");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=web1/disk@two,\
         x-dirty-bitmap=qemu:dirty-bitmap:one",
        socket.display()
    );
    let text = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    );
    let mapped: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    // With this option a dirty range is one without data.
    let mut image = std::fs::read(one).unwrap();
    let source = std::fs::read(two).unwrap();
    let mut copied = 0;
    for range in &mapped {
        if range["data"].as_bool() == Some(false) {
            let offset = usize::try_from(range["start"].as_u64().unwrap()).unwrap();
            let length = usize::try_from(range["length"].as_u64().unwrap()).unwrap();
            image[offset..offset + length].copy_from_slice(&source[offset..offset + length]);
            copied += length;
        }
    }
    assert!(image == source, "the incremental backup differs");
    let dirty = ranges.iter().filter(|range| range.2 & 1 != 0);
    assert_eq!(copied, dirty.map(|range| range.1).sum::<usize>());
}

#[test]
fn names_that_mean_nothing_are_refused() {
    require(&PROGRAMS);
    let scene = scene();
    two_points(&scene);
    let socket = scene.data_dir.join("nbd.sock");
    let socket = socket.display();
    let names = [
        ("", "no default export"),
        ("web1/none@one", "no disk"),
        ("web2/disk@one", "no machine"),
        ("web1/disk@three", "no point"),
        ("../../etc/passwd", ""),
        ("web1/disk@branch:none", "no branch"),
    ];
    for (name, word) in names {
        let uri = format!("nbd+unix:///{name}?socket={socket}");
        fails("qemu-img", &["info", &uri], word);
    }
    let list = run(
        "nbdinfo",
        &["--list", &format!("nbd+unix:///?socket={socket}")],
    );
    assert!(list.contains("description: the newest state"), "{list}");
    for name in ["one", "two"] {
        assert!(
            list.contains(&format!("export=\"web1/disk@{name}\"")),
            "{list}"
        );
    }
    assert!(list.contains("qemu:dirty-bitmap:one"), "{list}");
    // What moves on is another state for each connection, and says so.
    let can = |name: &str| {
        let uri = format!("nbd+unix:///web1/disk@{name}?socket={socket}");
        attempt("nbdinfo", &["--can", "multi-conn", &uri])
            .status
            .success()
    };
    assert!(can("one") && !can("latest"));
}

#[test]
fn a_branch_is_written_by_many_and_kept() {
    require(&PROGRAMS);
    let scene = scene();
    let (one, _) = two_points(&scene);
    let _made = scene.aft_ok(&["branch", "create", "web1/disk@one", "work"]);
    let uri = local(&scene, "web1/disk@branch:work");
    for depth in ["1", "16", "64"] {
        let arguments = [
            "--name=branch",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            &format!("--iodepth={depth}"),
            "--rw=randwrite",
            "--bs=4k",
            "--size=32m",
            "--io_size=8m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ];
        run("fio", &arguments);
    }
    let script = [
        "write -P 9 40M 1M",
        "write -z 41M 64k",
        "discard 42M 64k",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw"];
    for line in &script {
        arguments.extend(["-c", line]);
    }
    arguments.push(&uri);
    run("qemu-io", &arguments);
    let copy = |name: &str, connections: &str| {
        let copy = scene.root.join(name);
        run(
            "nbdcopy",
            &["-C", connections, &uri, &copy.display().to_string()],
        );
        copy
    };
    let (first, second) = (copy("first", "4"), copy("second", "1"));
    assert_equal_devices(&first, &second);
    let bytes = std::fs::read(&first).unwrap();
    assert!(bytes[40 << 20..41 << 20].iter().all(|byte| *byte == 9));
    // All of it through many connections at once, and the point is what it was.
    run(
        "nbdcopy",
        &["--flush", "-C", "8", &one.display().to_string(), &uri],
    );
    assert_equal_devices(&copy("third", "4"), &one);
    let point = local(&scene, "web1/disk@one");
    let kept = one.display().to_string();
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &point, &kept],
    );
}

#[test]
fn tls_lets_admins_in_and_nobody_else() {
    require(&PROGRAMS);
    let scene = scene();
    let (one, _) = two_points(&scene);
    let (identity, right) = (scene.root.join("admin.pem"), scene.root.join("right"));
    let out = identity.display().to_string();
    let _issued = scene.aft_ok(&["cert", "issue-admin", "ops", "--out", &out]);
    let directory = right.display().to_string();
    let _written = scene.aft_ok(&["nbd", "credentials", &out, &directory]);
    let all = listed(&scene);
    let remote = all.iter().find(|export| export.name == "web1/disk@one");
    let remote = remote.unwrap().remote.clone().unwrap();
    let uri = format!("{remote}?tls-certificates={directory}");
    let copy = scene.root.join("copy");
    run("nbdcopy", &["-C", "4", &uri, &copy.display().to_string()]);
    assert_equal_devices(&copy, &one);
    let plain = remote.replace("nbds://", "nbd://");
    // Without TLS that is all it says.
    fails("nbdinfo", &[&plain], "not supported");
    // A certificate of the agent is a good one, and not enough.
    let agent = scene.root.join("agent-credentials");
    agent_credentials(&scene, &right, &agent);
    let word = "an agent's certificate does not allow this";
    let (stranger, admin, disk) = (object(&agent), object(&right), disk(&remote));
    let arguments = |object| ["info", "--object", object, "--image-opts", &disk];
    fails("qemu-img", &arguments(&stranger), word);
    run("qemu-img", &arguments(&admin));
    let refused = |event: &Event| event.kind == "nbd-refused";
    assert!(scene.events().iter().any(refused), "no event tells of it");
}

/// Credentials for QEMU.
fn object(directory: &Path) -> String {
    let directory = directory.display();
    format!("tls-creds-x509,id=t,endpoint=client,dir={directory}")
}

/// A remote URI in QEMU's own words.
fn disk(uri: &str) -> String {
    let rest = uri.strip_prefix("nbds://localhost:").unwrap();
    let (port, export) = rest.split_once('/').unwrap();
    format!("driver=nbd,host=localhost,port={port},export={export},tls-creds=t")
}

/// Puts the agent's own certificate into a directory as clients want it.
fn agent_credentials(scene: &Scene, admin: &Path, directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    let files = [
        (admin.join("ca-cert.pem"), "ca-cert.pem"),
        (scene.state_dir.join("agent.pem"), "client-cert.pem"),
        (scene.state_dir.join("agent.key"), "client-key.pem"),
    ];
    for (from, to) in files {
        std::fs::copy(from, directory.join(to)).unwrap();
    }
}

#[test]
fn the_death_of_the_daemon_is_an_error_and_no_hang() {
    require(&PROGRAMS);
    let mut scene = scene();
    let (_, two) = two_points(&scene);
    let uri = local(&scene, "web1/disk@two");
    let mut reader = Command::new("fio")
        .args([
            "--name=reads",
            "--ioengine=nbd",
            "--iodepth=16",
            "--rw=randread",
        ])
        .args(["--bs=4k", "--size=64m", "--time_based", "--runtime=600"])
        .arg(format!("--uri={uri}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let socket = scene.data_dir.join("nbd.sock").display().to_string();
    let connected = || {
        run("ss", &["-xH", "state", "established"])
            .matches(&socket)
            .count()
            > 0
    };
    while !connected() {
        assert!(reader.try_wait().unwrap().is_none(), "fio ended early");
        std::thread::yield_now();
    }
    scene.kill_server();
    let status = reader.wait().unwrap();
    assert!(!status.success(), "fio did not notice");
    scene.start_server();
    let copy = scene.root.join("again");
    run("nbdcopy", &["-C", "4", &uri, &copy.display().to_string()]);
    assert_equal_devices(&copy, &two);
}
