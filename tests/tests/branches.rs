//! Branches: named, limited, promoted and dropped; what was flushed into one is there after the
//! appliance's death; file systems on them; and one never disturbs another or the trunk.

#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use afterimage_protocol::rest::branch::{Branch, Promotion, PromotionState};
use afterimage_protocol::rest::server::Mount;
use afterimage_tests::process::{
    FsMount, MIB, Scene, Setup, View, assert_equal_devices, guards::fsck, require, run, until,
};

const BLOCK: usize = 4096;
const MIB_COUNT: usize = 1 << 20;
const TRY: &str = "web1/disk@branch:try";

/// A protected disk with a file system, and a file in it. Runs are written often, so that what a
/// branch holds is found in files and in memory.
fn scene(bytes: u64) -> Scene {
    let scene = Scene::start(&Setup {
        server: "run_flush_entries = 100\n".to_owned(),
        ..Setup::default()
    });
    let source = scene.image("disk.img", bytes);
    let device = scene.attach(&source, "disk");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("disk");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    std::fs::write(live.path.join("base"), vec![7; 300_000]).unwrap();
    live.umount();
    scene.caught_up();
    scene
}

fn branch(scene: &Scene, name: &str) -> Branch {
    let all: Vec<Branch> = scene.aft_json(&["branch", "list", "web1/disk"]);
    let found = all.iter().find(|branch| branch.name == name);
    found
        .unwrap_or_else(|| panic!("{name} is not in {all:?}"))
        .clone()
}

fn create(scene: &Scene, name: &str, more: &[&str]) -> Branch {
    scene.aft_json(&[&["branch", "create", "web1/disk@latest", name], more].concat())
}

fn device(scene: &Scene, reference: &str) -> (PathBuf, Mount) {
    let mount: Mount = scene.aft_json(&["mount", reference, "--device"]);
    (PathBuf::from(&mount.device), mount)
}

fn umount(scene: &Scene, mount: &Mount) {
    let _said = scene.aft_ok(&["umount", &mount.id.to_string()]);
}

/// For requests that no cache answers.
fn direct(path: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// A buffer where the kernel takes one for direct requests.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Aligned {
    fn new(byte: u8, len: usize) -> Self {
        let bytes = vec![byte; len + BLOCK];
        let at = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, at, len }
    }

    fn slice(&self) -> &[u8] {
        &self.bytes[self.at..self.at + self.len]
    }

    fn slice_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.len]
    }
}

fn tree(scene: &Scene, path: &str) -> PathBuf {
    scene.data_dir.join("mounts/fuse/web1/disk").join(path)
}

#[test]
fn what_was_flushed_is_there_after_a_kill_and_nothing_hangs() {
    require(&["blockdev"]);
    let mut scene = scene(64 * MIB);
    let made = create(&scene, "try", &[]);
    assert_eq!((made.used_bytes, made.quota_bytes), (0, None));
    let (node, _) = device(&scene, TRY);
    let mounted = FsMount::new(&node, &scene.root.join("branch"), "");
    assert_eq!(
        std::fs::read(mounted.path.join("base")).unwrap(),
        vec![7; 300_000]
    );
    let written = mounted.path.join("written");
    std::fs::write(&written, vec![42; 3_000_000]).unwrap();
    File::open(&written).unwrap().sync_all().unwrap();
    // Whoever only looks sees it, and changes nothing.
    let looked = scene.aft_ok(&["files", "get", TRY, "/written", "-"]);
    assert_eq!(looked.len(), 3_000_000);
    let raw = direct(&node);
    scene.kill_server();
    // Errors, not hangs: for a mounted file system and for whoever has the device open.
    let begun = Instant::now();
    let mut buffer = Aligned::new(0, BLOCK);
    let error = raw.read_exact_at(buffer.slice_mut(), 8 * MIB).unwrap_err();
    let waited = begun.elapsed();
    println!("after the kill a read ends after {waited:?}: {error}");
    assert!(waited < Duration::from_secs(1), "{waited:?}");
    drop(raw);
    scene.start_server();
    until("the dead branch's mount is gone", || {
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        !table.contains(&mounted.path.display().to_string())
    });
    drop(mounted);
    let known = branch(&scene, "try");
    assert_eq!((known.history, known.base), (made.history, made.base));
    let (node, mount) = device(&scene, TRY);
    fsck_replayed(&scene, &node);
    let mounted = FsMount::new(&node, &scene.root.join("branch"), "");
    assert_eq!(
        std::fs::read(mounted.path.join("written")).unwrap(),
        vec![42; 3_000_000]
    );
    mounted.umount();
    umount(&scene, &mount);
    assert!(branch(&scene, "try").used_bytes >= 3_000_000);
    // In order: the appliance is stopped while nobody flushed by hand.
    let (node, _) = device(&scene, TRY);
    let file = direct(&node);
    file.write_all_at(Aligned::new(9, BLOCK).slice(), 40 * MIB)
        .unwrap();
    drop(file);
    scene.stop_server();
    scene.start_server();
    let (node, mount) = device(&scene, TRY);
    let mut buffer = Aligned::new(0, BLOCK);
    direct(&node)
        .read_exact_at(buffer.slice_mut(), 40 * MIB)
        .unwrap();
    assert!(buffer.slice().iter().all(|byte| *byte == 9));
    umount(&scene, &mount);
    scene.assert_replica_equals("disk");
    let _said = scene.aft_ok(&["branch", "drop", TRY]);
    scene
        .aft(&["mount", TRY, "--device"])
        .refuses(3, &["no branch \"try\""]);
}

/// Replays the journal, then checks.
fn fsck_replayed(scene: &Scene, node: &Path) {
    FsMount::new(node, &scene.root.join("replay"), "").umount();
    fsck("ext4", node);
}

/// Nobody flushed: whoever closes a branch as its last user leaves nothing behind in memory.
#[test]
fn what_was_written_is_there_once_nobody_uses_the_branch() {
    require(&["blockdev"]);
    let mut scene = scene(64 * MIB);
    let _made = create(&scene, "try", &[]);
    let path = tree(&scene, "branches/try.img");
    let data = Aligned::new(0x5A, MIB_COUNT);
    for round in 0..5 {
        let at = (32 + round) * MIB;
        direct(&path).write_all_at(data.slice(), at).unwrap();
        until("the last close", || branch(&scene, "try").users == 0);
        scene.kill_server();
        scene.start_server();
        let mut read = Aligned::new(0, MIB_COUNT);
        direct(&path).read_exact_at(read.slice_mut(), at).unwrap();
        assert!(read.slice() == data.slice(), "round {round}");
    }
    let (_, mount) = device(&scene, TRY);
    let name = mount.device.trim_start_matches("/dev/").to_owned();
    let queue = Path::new("/sys/block").join(name).join("queue");
    let read = |name: &str| std::fs::read_to_string(queue.join(name)).unwrap();
    let (grain, most) = (read("discard_granularity"), read("discard_max_bytes"));
    println!("discards: grain {} at most {}", grain.trim(), most.trim());
    assert!(most.trim().parse::<u64>().unwrap() > 0);
    assert!((512..=4096).contains(&grain.trim().parse::<u64>().unwrap()));
    umount(&scene, &mount);
}

#[test]
fn a_limit_stops_its_own_branch_and_nothing_else() {
    require(&["blkdiscard", "blockdev"]);
    let mut scene = scene(64 * MIB);
    let _made = create(&scene, "try", &["--quota", "4M"]);
    let _other = create(&scene, "other", &[]);
    let ((node, mount), (free, free_mount)) = (
        device(&scene, TRY),
        device(&scene, "web1/disk@branch:other"),
    );
    let file = direct(&node);
    let data = Aligned::new(1, MIB_COUNT);
    for at in 0..4 {
        file.write_all_at(data.slice(), at * MIB).unwrap();
    }
    let full = file.write_all_at(data.slice(), 4 * MIB).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");
    // A rewrite costs nothing, and neither do other branches, views and the trunk.
    file.write_all_at(data.slice(), MIB).unwrap();
    let other = direct(&free);
    for at in 0..8 {
        other.write_all_at(data.slice(), at * MIB).unwrap();
    }
    assert_eq!(branch(&scene, "try").used_bytes, 4 * MIB);
    assert_eq!(branch(&scene, "other").used_bytes, 8 * MIB);
    // Giving back makes room, and so does a larger limit.
    run(
        "blkdiscard",
        &["-o", "1048576", "-l", "1048576", &mount.device],
    );
    assert_eq!(branch(&scene, "try").used_bytes, 3 * MIB);
    file.write_all_at(data.slice(), 4 * MIB).unwrap();
    assert!(file.write_all_at(data.slice(), 5 * MIB).is_err());
    let _said = scene.aft_ok(&["branch", "quota", TRY, "5M"]);
    file.write_all_at(data.slice(), 5 * MIB).unwrap();
    drop((file, other));
    umount(&scene, &mount);
    umount(&scene, &free_mount);
    // What it holds is counted anew after a death, and the limit still holds.
    scene.kill_server();
    scene.start_server();
    let (node, mount) = device(&scene, TRY);
    assert_eq!(branch(&scene, "try").used_bytes, 5 * MIB);
    assert_eq!(branch(&scene, "try").quota_bytes, Some(5 * MIB));
    let error = direct(&node)
        .write_all_at(data.slice(), 9 * MIB)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    umount(&scene, &mount);
    scene.assert_replica_equals("disk");
    scene
        .aft(&["branch", "create", "web1/disk@latest", "try"])
        .refuses(3, &["has a branch \"try\" already", "another name"]);
    scene
        .aft(&["branch", "create", "web1/disk@latest", "a/b"])
        .refuses(3, &["cannot be a branch's name"]);
}

fn file_system(kind: &str) {
    require(&["mkfs.xfs", "xfs_repair", "mkfs.btrfs", "btrfs", "fstrim"]);
    let scene = scene(320 * MIB);
    let _made = create(&scene, "try", &[]);
    let (node, mount) = device(&scene, TRY);
    let words: &[&str] = match kind {
        "ext4" => &["-q", "-F"],
        "xfs" => &["-q", "-f", "-s", "size=512"],
        _ => &["-q", "-f"],
    };
    run(&format!("mkfs.{kind}"), &[words, &[&mount.device]].concat());
    let mounted = FsMount::new(&node, &scene.root.join("branch"), "");
    let bytes: Vec<u8> = (0..5_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(mounted.path.join("kept"), &bytes).unwrap();
    std::fs::write(mounted.path.join("gone"), &bytes).unwrap();
    run("sync", &["-f".as_ref(), mounted.path.as_os_str()]);
    let before = branch(&scene, "try").used_bytes;
    std::fs::remove_file(mounted.path.join("gone")).unwrap();
    run("sync", &["-f".as_ref(), mounted.path.as_os_str()]);
    // XFS frees what was removed a little later, by itself.
    let mut after = before;
    until("room from fstrim", || {
        run("fstrim", &[&mounted.path]);
        after = branch(&scene, "try").used_bytes;
        before.saturating_sub(after) > 15_000_000
    });
    println!("{kind}: {before} bytes of its own, {after} after fstrim");
    mounted.umount();
    check(kind, &node);
    umount(&scene, &mount);
    let (node, mount) = device(&scene, TRY);
    let mounted = FsMount::new(&node, &scene.root.join("branch"), "");
    assert!(std::fs::read(mounted.path.join("kept")).unwrap() == bytes);
    mounted.umount();
    umount(&scene, &mount);
    scene.assert_replica_equals("disk");
}

fn check(kind: &str, node: &Path) {
    if kind == "btrfs" {
        run("btrfs", &["check".as_ref(), node.as_os_str()]);
    } else {
        fsck(kind, node);
    }
}

#[test]
fn ext4_on_a_branch() {
    file_system("ext4");
}

#[test]
fn xfs_on_a_branch() {
    file_system("xfs");
}

#[test]
fn btrfs_on_a_branch() {
    file_system("btrfs");
}

/// Waits until a promotion has ended; gives how.
fn ended(scene: &Scene) -> Promotion {
    let mut last = None;
    until("the end of the promotion", || {
        last = branch(scene, "try").promotion;
        last.as_ref().is_some_and(|found| !found.state.is_running())
    });
    last.unwrap()
}

#[test]
fn a_branch_is_promoted_while_it_is_written() {
    require(&["blockdev", "cmp", "qemu-img"]);
    let mut scene = scene(256 * MIB);
    let made = create(&scene, "try", &[]);
    let (node, mount) = device(&scene, TRY);
    let file = direct(&node);
    let data = Aligned::new(3, MIB_COUNT);
    for at in (32..224).step_by(3) {
        file.write_all_at(data.slice(), at * MIB).unwrap();
    }
    file.sync_all().unwrap();
    // Written on and on meanwhile, where the image has something and where it has nothing.
    let is_over = Arc::new(AtomicBool::new(false));
    let writer = {
        let (node, is_over) = (node.clone(), Arc::clone(&is_over));
        std::thread::spawn(move || {
            let (file, data) = (direct(&node), Aligned::new(5, BLOCK));
            let mut writes = 0u64;
            while !is_over.load(Ordering::Relaxed) {
                let at = writes * 7919 * BLOCK as u64 % (200 * MIB) + 32 * MIB;
                file.write_all_at(data.slice(), at).unwrap();
                writes += 1;
            }
            file.sync_all().unwrap();
            writes
        })
    };
    let image = scene.root.join("promoted.img");
    let target = image.display().to_string();
    let begun: Promotion = scene.aft_json(&["branch", "promote", TRY, &target]);
    assert_eq!(begun.total_bytes, 256 * MIB);
    scene.aft(&["branch", "drop", TRY]).refuses(1, &["in use"]);
    // It may have ended before it can be stopped; both are an end.
    let stopped = scene.aft(&["branch", "stop", TRY]);
    let at_stop = ended(&scene);
    println!("stop: {stopped:?}, then {at_stop:?}");
    assert_eq!(image.exists(), at_stop.state == PromotionState::Done);
    // Also the appliance's death is no more than a stop.
    if at_stop.state == PromotionState::Stopped {
        let again: Promotion = scene.aft_json(&["branch", "promote", TRY, &target]);
        assert_eq!(again.lsn, begun.lsn, "it goes on with the same state");
    }
    is_over.store(true, Ordering::Relaxed);
    println!("{} writes meanwhile", writer.join().unwrap());
    drop(file);
    scene.kill_server();
    scene.start_server();
    drop(mount);
    let known = branch(&scene, "try").promotion.unwrap();
    if known.state != PromotionState::Done {
        assert_eq!(known.state, PromotionState::Stopped);
        let done: Promotion = scene.aft_json(&["branch", "promote", TRY, &target, "--wait"]);
        assert_eq!((done.state, done.lsn), (PromotionState::Done, begun.lsn));
    }
    let reference = format!("web1/disk@{}:lsn:{}", made.history, begun.lsn);
    let view = scene.view(&reference);
    assert_equal_devices(&view.device, &image);
    view.close();
    let found = std::fs::metadata(&image).unwrap();
    let (size, held) = (found.len(), found.blocks() * 512);
    println!("the image has {size} bytes and takes {held}");
    assert_eq!(size, 256 * MIB);
    assert!(held < 100 * MIB, "{held}");
    let info = run("qemu-img", &["info", "-f", "raw", &target]);
    assert!(info.contains("256 MiB"), "{info}");
    assert!(!image.with_file_name("promoted.img.unfinished").exists());
    scene
        .aft(&["branch", "promote", TRY, &target])
        .refuses(3, &["is there already", "--force"]);
    // The branch is as usable as before.
    let (node, mount) = device(&scene, TRY);
    direct(&node).write_all_at(data.slice(), 240 * MIB).unwrap();
    umount(&scene, &mount);
    let done: Promotion = scene.aft_json(&["branch", "promote", TRY, &target, "--force", "--wait"]);
    assert!(done.lsn > begun.lsn);
    let reference = format!("web1/disk@{}:lsn:{}", made.history, done.lsn);
    let view = scene.view(&reference);
    assert_equal_devices(&view.device, &image);
    view.close();
    let _said = scene.aft_ok(&["branch", "drop", TRY]);
    assert!(image.exists(), "an image is nobody's branch");
}

#[test]
fn branches_are_files_of_the_tree_and_many_live_at_once() {
    require(&["getfattr", "qemu-img", "blockdev"]);
    let scene = scene(64 * MIB);
    let made: Vec<Branch> = (0..6)
        .map(|number| create(&scene, &format!("b{number}"), &[]))
        .collect();
    let data = Aligned::new(1, BLOCK);
    for (number, branch) in made.iter().enumerate() {
        let file = direct(&tree(&scene, &format!("branches/{}.img", branch.name)));
        let at = (32 + number as u64) * MIB;
        file.write_all_at(data.slice(), at).unwrap();
    }
    let mut names: Vec<_> = std::fs::read_dir(tree(&scene, "branches"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["b0.img", "b1.img", "b2.img", "b3.img", "b4.img", "b5.img"]
    );
    let views: Vec<View> = (0..3).map(|_| scene.view("web1/disk@latest")).collect();
    for (number, branch) in made.iter().enumerate() {
        let path = tree(&scene, &format!("branches/{}.img", branch.name));
        let file = File::open(&path).unwrap();
        for other in 0..made.len() {
            let mut byte = [0];
            file.read_exact_at(&mut byte, (32 + other as u64) * MIB)
                .unwrap();
            assert_eq!(
                byte[0],
                u8::from(other == number),
                "{} at {other}",
                branch.name
            );
        }
        let attribute = |name: &str| {
            let name = format!("user.afterimage.{name}");
            let path = path.display().to_string();
            run("getfattr", &["--only-values", "-n", &name, &path])
        };
        assert_eq!(attribute("history"), branch.history.to_string());
        assert_eq!(attribute("kind"), "branch");
        assert_eq!(attribute("epoch"), "1");
        assert!(attribute("lsn").parse::<u64>().unwrap() > branch.base.0);
        let info = run(
            "qemu-img",
            &[
                "map",
                "--output=json",
                "-f",
                "raw",
                &path.display().to_string(),
            ],
        );
        assert!(info.contains("\"zero\": true"), "{info}");
    }
    for view in views {
        view.close();
    }
    for branch in &made {
        let reference = format!("web1/disk@branch:{}", branch.name);
        let _said = scene.aft_ok(&["branch", "drop", &reference]);
    }
    assert_eq!(
        std::fs::read_dir(tree(&scene, "branches")).unwrap().count(),
        0
    );
    scene.assert_replica_equals("disk");
}
