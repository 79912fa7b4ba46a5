//! Points leave the appliance as raw images, qcow2 images and archives, equal byte by byte; an
//! archive that came back makes a first copy send no more than what differs.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_protocol::rest::seed::Seed;
use afterimage_protocol::rest::server::{Event, Mount, Point};
use afterimage_tests::process::{
    Chance, MIB, Scene, Setup, assert_equal_devices, programs::own, require, run, until,
};

const SIZE: u64 = 96 * MIB;

fn noise(path: &Path, at: u64, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let mut random = vec![0; usize::try_from(bytes).unwrap()];
    let from = File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut &from, &mut random).unwrap();
    file.write_all_at(&random, at).unwrap();
    file.sync_all().unwrap();
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

struct Rig {
    scene: Scene,
    key: String,
}

impl Rig {
    /// A disk with two points that differ.
    fn new() -> Self {
        let scene = Scene::start(&Setup::default());
        let source = scene.image("disk.img", SIZE);
        noise(&source, 3 * MIB, 20 * MIB);
        let device = scene.attach(&source, "root");
        scene.protect("root");
        noise(&device, 40 * MIB + 4096, 5 * MIB);
        let _one: Point = scene.aft_json(&["point", "create", "web1", "--name", "one"]);
        noise(&device, 41 * MIB, 9 * MIB + 8192);
        noise(&device, 95 * MIB, MIB);
        let _two: Point = scene.aft_json(&["point", "create", "web1", "--name", "two"]);
        noise(&device, 0, MIB);
        scene.caught_up();
        let key = scene.root.join("key");
        fs::write(&key, [7; 32]).unwrap();
        let key = text(&key);
        Self { scene, key }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scene.root.join(name)
    }

    fn export(&self, point: &str, name: &str, more: &[&str]) -> PathBuf {
        let target = self.path(name);
        let (reference, to) = (format!("web1/root@{point}"), text(&target));
        let words = [&["seed", "export", &reference, &to], more].concat();
        println!("{}", self.scene.aft_ok(&words).trim());
        target
    }

    /// A raw image with the content of an archive.
    fn unpacked(&self, archive: &Path, name: &str) -> PathBuf {
        let target = self.path(name);
        let secret = afterimage_bulk::Secret::Key(fs::read(&self.key).unwrap());
        let reader = afterimage_bulk::ArchiveReader::open(archive, Some(&secret)).unwrap();
        let source: std::sync::Arc<dyn afterimage_bulk::BlockSource> = std::sync::Arc::new(reader);
        let raw = afterimage_bulk::RawTarget {
            path: &target,
            identity: "test",
            is_forced: false,
        };
        let progress = afterimage_bulk::Progress::default();
        afterimage_bulk::export_raw(
            &source,
            raw,
            &afterimage_bulk::Options::default(),
            &progress,
        )
        .unwrap();
        target
    }
}

#[test]
fn points_leave_in_every_format() {
    require(&["qemu-img"]);
    let rig = Rig::new();
    let scene = &rig.scene;
    for point in ["one", "two"] {
        let view = scene.view(&format!("web1/root@{point}"));
        for io in ["auto", "threads"] {
            let name = format!("{point}-{io}.img");
            let raw = rig.export(point, &name, &["--io", io]);
            assert_equal_devices(&raw, &view.device);
            let stored = fs::metadata(&raw).unwrap().blocks() * 512;
            assert!(stored < 40 * MIB, "{stored} bytes of {}", raw.display());
        }
        let qcow2 = rig.export(point, &format!("{point}.qcow2"), &["--format", "qcow2"]);
        run("qemu-img", &["check", "-q", &text(&qcow2)]);
        let back = rig.path(&format!("{point}-back.img"));
        let words = ["convert", "-f", "qcow2", "-O", "raw"];
        run(
            "qemu-img",
            &[&words[..], &[&text(&qcow2), &text(&back)]].concat(),
        );
        assert_equal_devices(&back, &view.device);
        let secret = ["--format", "archive", "--key-file", &rig.key];
        let archive = rig.export(point, &format!("{point}.archive"), &secret);
        let unpacked = rig.unpacked(&archive, &format!("{point}-unpacked.img"));
        assert_equal_devices(&unpacked, &view.device);
        let again = rig.export(point, &format!("{point}.archive"), &secret);
        assert_eq!(again, archive);
        let verify = ["seed", "verify", &text(&archive), "--key-file", &rig.key];
        println!("{}", scene.aft_ok(&verify).trim());
    }
    refusals(&rig);
    let mounts: Vec<Mount> = scene.aft_json(&["mounts"]);
    assert_eq!(mounts, [], "every view of an export has ended");
}

fn refusals(rig: &Rig) {
    let (scene, path) = (&rig.scene, |name: &str| text(&rig.path(name)));
    let export = |reference: &str, target: &str, more: &[&str]| {
        scene.aft(&[&["seed", "export", reference, target], more].concat())
    };
    let taken = path("one-auto.img");
    export("web1/root@two", &taken, &[]).refuses(3, &["is there already", "--force"]);
    export("web1/root@none", &path("new"), &[]).refuses(3, &["none"]);
    let plain = ["--format", "archive"];
    export("web1/root@one", &path("new"), &plain).refuses(3, &["needs a secret", "--plain"]);
    export("web1/root@one", &text(&rig.scene.root), &[]).refuses(3, &["neither a file"]);
    let full = export("web1/root@one", "/dev/full", &["--force"]);
    full.refuses(3, &["neither a file nor a block device"]);
    let archive = rig.path("two.archive");
    let other = rig.path("other-key");
    fs::write(&other, [8; 32]).unwrap();
    let verify = |key: &str| scene.aft(&["seed", "verify", &text(&archive), "--key-file", key]);
    verify(&text(&other)).refuses(3, &["the key does not open"]);
    let segment = archive.join("00000001.seg");
    let file = OpenOptions::new().read(true).write(true).open(&segment);
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 5000).unwrap();
    verify(&rig.key).refuses(6, &["00000001.seg", "is damaged at byte"]);
    // A small device is refused before anything of it is written.
    let small = rig.scene.image("small.img", MIB);
    let device = afterimage_tests::process::LoopFile::new(&small);
    let onto = export("web1/root@one", &text(&device.device), &["--force"]);
    onto.refuses(3, &["holds 1048576 bytes"]);
    let large = rig.scene.image("large.img", SIZE + MIB);
    noise(&large, 0, SIZE + MIB);
    let device = afterimage_tests::process::LoopFile::new(&large);
    let unforced = export("web1/root@one", &text(&device.device), &[]);
    unforced.refuses(3, &["--force"]);
    rig.export_onto(&device.device);
    let view = scene.view("web1/root@one");
    let (one, other) = (
        fs::read(&view.device).unwrap(),
        fs::read(&device.device).unwrap(),
    );
    assert!(
        one == other[..one.len()],
        "a device is overwritten, holes included"
    );
}

impl Rig {
    fn export_onto(&self, device: &Path) {
        let words = ["seed", "export", "web1/root@one", &text(device), "--force"];
        println!("{}", self.scene.aft_ok(&words).trim());
    }
}

#[test]
fn a_first_copy_with_a_seed_sends_what_differs() {
    require(&["qemu-img"]);
    let rig = Rig::new();
    let scene = &rig.scene;
    let archive = rig.export("two", "a", &["--format", "archive", "--key-file", &rig.key]);
    // A stale copy: the new disk differs from it by 2 MiB and a hole.
    let stale = rig.export("two", "data.img", &[]);
    noise(&stale, 10 * MIB, MIB);
    noise(&stale, 70 * MIB + 4096, MIB);
    let zeroes = vec![0; usize::try_from(MIB).unwrap()];
    let file = OpenOptions::new().write(true).open(&stale).unwrap();
    file.write_all_at(&zeroes, 12 * MIB).unwrap();
    drop(file);
    let import = [
        "seed",
        "import",
        &text(&archive),
        "web1/data",
        "--key-file",
        &rig.key,
    ];
    println!("{}", scene.aft_ok(&import).trim());
    let again = scene.aft_ok(&import);
    assert!(again.contains("is the seed of"), "{again}");
    let seeds: Vec<Seed> = scene.aft_json(&["seed", "list"]);
    assert_eq!(seeds.len(), 1);
    assert!(
        seeds[0].is_ready && seeds[0].size_bytes == SIZE,
        "{seeds:?}"
    );
    // No state of the disk is to be seen yet, whatever the seed holds.
    scene
        .aft(&["mount", "web1/data@latest", "--device"])
        .refuses(3, &["data"]);
    let _answer = scene.attach(&stale, "data");
    scene.protect("data");
    let disk = scene.disk("data");
    println!(
        "read {}, sent {}",
        disk.recheck_read_bytes, disk.recheck_sent_bytes
    );
    assert_eq!(disk.recheck_read_bytes, SIZE);
    assert!(disk.recheck_sent_bytes <= 3 * MIB, "{disk:?}");
    assert!(disk.recheck_sent_bytes >= 2 * MIB, "{disk:?}");
    scene.assert_replica_equals("data");
    afterimage_tests::process::until("the end of the seed", || {
        scene.aft_json::<Vec<Seed>>(&["seed", "list"]).is_empty()
    });
    let events = scene.events();
    let served = events.iter().find(|event| event.kind == "seed-served");
    println!("{}", served.unwrap().text);
    let late = scene.aft(&["seed", "import", &text(&stale), "web1/data"]);
    late.refuses(3, &["a whole copy", "needs no seed"]);
    other_sources(&rig, &stale);
    let _answer = scene.aft_ok(&["log", "verify"]);
}

/// Writes noise and what a seed holds, at random places, until it is told to end.
fn disturb(device: &Path, seed: &Path, is_over: &AtomicBool) -> u64 {
    let device = OpenOptions::new().write(true).open(device).unwrap();
    let seed = File::open(seed).unwrap();
    let mut chance = Chance::new("seed_bulk");
    let mut written = 0;
    while !is_over.load(Ordering::Relaxed) {
        let at = chance.below(SIZE / 4096 - 16) * 4096;
        let mut bytes = vec![0; 4096 * usize::try_from(1 + chance.below(16)).unwrap()];
        if chance.below(2) == 0 {
            bytes.fill_with(|| u8::try_from(chance.below(256)).unwrap());
        } else {
            seed.read_exact_at(&mut bytes, at).unwrap();
        }
        device.write_all_at(&bytes, at).unwrap();
        written += 1;
    }
    device.sync_all().unwrap();
    written
}

#[test]
fn a_seeded_copy_is_right_under_writes() {
    require(&[]);
    let rig = Rig::new();
    let scene = &rig.scene;
    let seed = rig.export("two", "seed.img", &[]);
    let source = rig.export("one", "busy.img", &[]);
    let _answer = scene.aft_ok(&["seed", "import", &text(&seed), "web1/busy"]);
    let device = scene.attach(&source, "busy");
    let is_over = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| disturb(&device, &seed, &is_over));
        let protect = scene.aft(&["disk", "protect", "busy", "--wait"]);
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(protect.code, 0, "{protect:?}");
        writer.join().unwrap()
    });
    assert!(written > 0);
    scene.protected("busy");
    scene.assert_replica_equals("busy");
    let served = |event: &Event| event.kind == "seed-served";
    until("the end of the seed", || scene.events().iter().any(served));
    let event = scene.events().into_iter().find(served).unwrap();
    println!("{written} writes meanwhile; {}", event.text);
    assert!(!event.text.contains(": 0 bytes"), "nothing was taken");
    let _answer = scene.aft_ok(&["log", "verify"]);
}

#[test]
fn an_export_goes_on_after_a_signal_and_a_full_medium() {
    require(&[]);
    let rig = Rig::new();
    let scene = &rig.scene;
    let view = scene.view("web1/root@two");
    let expected = fs::read(&view.device).unwrap();
    let small = rig.path("small");
    fs::create_dir(&small).unwrap();
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=9m", "none", &text(&small)],
    );
    let (raw, archive) = (text(&small.join("raw")), text(&small.join("archive")));
    let to_raw = ["seed", "export", "web1/root@two", &raw];
    let secret = ["--format", "archive", "--key-file", &rig.key];
    let to_archive = [&["seed", "export", "web1/root@two", &archive], &secret[..]].concat();
    for (words, room) in [(&to_raw[..], 48), (&to_archive[..], 160)] {
        let full = scene.aft(words);
        full.refuses(4, &["No space left", "make room"]);
        let size = format!("remount,size={room}m");
        run("mount", &["-o", &size, &text(&small)]);
        let said = scene.aft_ok(words);
        // The note of a raw image may not fit on a full medium; it is copied again then.
        let has_notes = words == to_archive;
        assert!(!has_notes || said.contains("going on from"), "{said}");
        println!("{}", said.trim());
    }
    assert!(fs::read(&raw).unwrap() == expected);
    let unpacked = rig.unpacked(Path::new(&archive), "unpacked");
    assert!(fs::read(unpacked).unwrap() == expected);
    signalled(&rig, &expected);
    drop(view);
    let mounts: Vec<Mount> = scene.aft_json(&["mounts"]);
    assert_eq!(mounts, [], "every view of an export has ended");
}

fn signalled(rig: &Rig, expected: &[u8]) {
    let scene = &rig.scene;
    let target = rig.path("signalled.img");
    let mut command = std::process::Command::new(own("aft"));
    command.args(["seed", "export", "web1/root@two", &text(&target)]);
    command.env("AFTERIMAGE_SOCKET", scene.data_dir.join("control.sock"));
    let mut child = command.spawn().unwrap();
    let begun = afterimage_bulk::resume_file(&target);
    until("the begin", || begun.exists() || target.exists());
    run("kill", &["-INT", &child.id().to_string()]);
    let code = child.wait().unwrap().code();
    println!("  exit {code:?} after SIGINT");
    // It may have been done by then.
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    if code == Some(1) {
        let _answer = scene.aft_ok(&["seed", "export", "web1/root@two", &text(&target)]);
    }
    assert!(fs::read(&target).unwrap() == expected);
    assert!(!begun.exists());
}

fn other_sources(rig: &Rig, stale: &Path) {
    let scene = &rig.scene;
    let qcow2 = rig.path("stale.qcow2");
    let words = ["convert", "-f", "raw", "-O", "qcow2"];
    run(
        "qemu-img",
        &[&words[..], &[&text(stale), &text(&qcow2)]].concat(),
    );
    let temporary = text(&scene.root);
    let import = |source: &Path, disk: &str| {
        let words = [
            "seed",
            "import",
            &text(source),
            disk,
            "--temporary",
            &temporary,
        ];
        scene.aft(&words)
    };
    // The machine is not known yet; the daemon is not asked for one.
    assert_eq!(import(&qcow2, "new/root").code, 0);
    import(stale, "new/root").refuses(3, &["is there already", "--force"]);
    import(&rig.path("missing"), "new/root").refuses(4, &["missing"]);
    import(stale, "nothing").refuses(3, &["<machine>/<disk>"]);
    let device = afterimage_tests::process::LoopFile::new(stale);
    assert_eq!(import(&device.device, "new/other").code, 0);
    let seeds: Vec<Seed> = scene.aft_json(&["seed", "list"]);
    let names: Vec<_> = seeds
        .iter()
        .map(|seed| (seed.disk.as_str(), seed.is_ready))
        .collect();
    assert_eq!(names, [("other", true), ("root", true)]);
    let _answer = scene.aft_ok(&["seed", "drop", "new/root"]);
    let _answer = scene.aft_ok(&["seed", "drop", "new/other"]);
    scene
        .aft(&["seed", "drop", "new/root"])
        .refuses(3, &["there is no seed"]);
    let left = fs::read_dir(&scene.root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left
        .filter(|name| name.to_string_lossy().starts_with("aft-"))
        .collect();
    assert!(left.is_empty(), "{left:?} was left behind");
}
