//! Every way of the data through an exported device, above depth 1: the tap of a protected disk,
//! and a branch of it; file systems on both; discards; odd sizes; a view beside its live original.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;

use afterimage_tests::process::{
    FsMount, MIB, Scene, Setup, View, assert_equal_devices,
    guards::{fsck, sparse},
    require, run, run_in,
};

fn fio(scene: &Scene, device: &Path, block: u64, depth: u32, bytes: u64) {
    let name = format!("--name=bs{block}-qd{depth}");
    let filename = format!("--filename={}", device.display());
    let arguments = [
        name,
        filename,
        format!("--bs={block}"),
        format!("--iodepth={depth}"),
        format!("--size={bytes}"),
        format!("--randseed={}", u64::from(depth) * 7919 + block),
    ];
    let fixed = [
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_backlog=1024",
        "--buffer_compress_percentage=50",
        "--refill_buffers",
        "--output-format=terse",
    ];
    let words: Vec<&str> = fixed
        .iter()
        .copied()
        .chain(arguments.iter().map(String::as_str))
        .collect();
    let _figures = run_in(&scene.root, "fio", &words);
}

fn verify_runs(scene: &Scene, device: &Path, name: &str) {
    for depth in [1, 4, 16, 64] {
        fio(scene, device, 4096, depth, 16 * MIB);
        fio(scene, device, 512, depth, 2 * MIB);
        println!("{name}: fio verified depth {depth}, blocks of 4096 and 512");
    }
}

/// 100 MiB and one sector: the last block is a part of one.
const ODD_BYTES: u64 = 100 * MIB + 512;

#[test]
fn fio_verifies_through_tap_and_branch() {
    require(&["fio", "blockdev"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("odd.img", ODD_BYTES);
    let device = scene.attach(&source, "odd");
    let size = run("blockdev", &["--getsize64".as_ref(), device.as_os_str()]);
    assert_eq!(size.trim(), ODD_BYTES.to_string());
    let sector = run("blockdev", &["--getss".as_ref(), device.as_os_str()]);
    assert_eq!(
        sector.trim(),
        "512",
        "the source's logical block size is kept"
    );
    scene.protect("odd");
    verify_runs(&scene, &device, "tap");
    // The odd end itself.
    let end = ODD_BYTES - 512;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .unwrap();
    file.write_all_at(&[0xa5; 512], end).unwrap();
    file.sync_all().unwrap();
    drop(file);
    scene.assert_replica_equals("odd");
    let branch = View::branch(&scene, "web1/odd@latest");
    let size = run(
        "blockdev",
        &["--getsize64".as_ref(), branch.device.as_os_str()],
    );
    assert_eq!(size.trim(), ODD_BYTES.to_string());
    verify_runs(&scene, &branch.device, "branch");
    let mut last = [0; 512];
    std::fs::File::open(&branch.device)
        .unwrap()
        .read_exact_at(&mut last, end)
        .unwrap();
    assert_eq!(last, [0xa5; 512]);
    branch.close();
    // The branch's writes are its own.
    scene.assert_replica_equals("odd");
}

/// A private copy over a view takes writes at every depth, and forgets them.
#[test]
fn fio_verifies_through_private_copies() {
    require(&["fio", "blockdev", "cp"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("odd.img", ODD_BYTES);
    let device = scene.attach(&source, "odd");
    scene.protect("odd");
    fio(&scene, &device, 4096, 16, 16 * MIB);
    scene.caught_up();
    let point = scene.aft(&["point", "create", "web1", "--name", "kept"]);
    assert_eq!(point.code, 0, "{point:?}");
    let kept = scene.root.join("kept.img");
    run("cp", &[source.as_os_str(), kept.as_os_str()]);
    for depth in [1, 4, 16, 64] {
        let private = scene.view("web1/odd@kept");
        fio(&scene, &private.device, 4096, depth, 16 * MIB);
        fio(&scene, &private.device, 512, depth, 2 * MIB);
        private.close();
        let again = scene.view("web1/odd@kept");
        assert_equal_devices(&again.device, &kept);
        again.close();
        println!("private copy: fio verified depth {depth}, and nothing stays");
    }
    scene.assert_replica_equals("odd");
}

/// Makes files, and says what must be found again.
fn fill(directory: &Path) -> String {
    for number in 0..40 {
        let length = 1000 + number * 7777;
        let bytes: Vec<u8> = (0..length)
            .map(|at| u8::try_from((at * (number + 3)) % 251).unwrap())
            .collect();
        std::fs::write(directory.join(format!("file-{number}")), bytes).unwrap();
    }
    for number in (0..40).step_by(3) {
        std::fs::remove_file(directory.join(format!("file-{number}"))).unwrap();
    }
    sums(directory)
}

fn sums(directory: &Path) -> String {
    run_in(directory, "sh", &["-c", "cksum file-*"])
}

fn make(kind: &str, device: &Path) {
    match kind {
        "ext4" => run(
            "mkfs.ext4",
            &["-q".as_ref(), "-F".as_ref(), device.as_os_str()],
        ),
        _ => run(
            "mkfs.xfs",
            &["-q", "-f", "-s", "size=512", &device.display().to_string()],
        ),
    };
}

fn file_system(kind: &str) {
    require(&["mkfs.xfs", "xfs_repair", "fstrim", "blockdev"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 320 * MIB);
    let device = scene.attach(&source, "disk");
    scene.protect("disk");
    // Through the tap, protected from the first write on.
    make(kind, &device);
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let expected = fill(&live.path);
    run("sync", &["-f".as_ref(), live.path.as_os_str()]);
    scene.caught_up();
    // Beside the live original, with the same UUID.
    let beside = View::files(&scene, "web1/disk@latest");
    assert_eq!(sums(beside.path()), expected);
    println!(
        "{kind}: view mounted beside the live original: {:?}",
        beside.mount.notes
    );
    beside.close();
    run("fstrim", &[&live.path]);
    std::fs::write(live.path.join("after-trim"), vec![7; 100_000]).unwrap();
    live.umount();
    fsck(kind, &device);
    scene.assert_replica_equals("disk");
    // Through a branch: what is there, and a file system made anew.
    let branch = View::branch(&scene, "web1/disk@latest");
    fsck(kind, &branch.device);
    let mounted = FsMount::new(&branch.device, &scene.root.join("branch"), "");
    assert_eq!(sums(&mounted.path), expected);
    std::fs::write(mounted.path.join("more"), vec![1; 3_000_000]).unwrap();
    mounted.umount();
    fsck(kind, &branch.device);
    make(kind, &branch.device);
    let mounted = FsMount::new(&branch.device, &scene.root.join("branch"), "");
    let again = fill(&mounted.path);
    assert_eq!(again, expected);
    mounted.umount();
    fsck(kind, &branch.device);
    branch.close();
    scene.assert_replica_equals("disk");
}

#[test]
fn ext4_through_tap_and_branch() {
    file_system("ext4");
}

#[test]
fn xfs_through_tap_and_branch() {
    file_system("xfs");
}

#[test]
fn discards_reach_the_replica() {
    require(&["blkdiscard", "blockdev"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "disk");
    let noise = format!("of={}", device.display());
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &noise,
            "bs=1M",
            "oflag=direct",
            "count=64",
            "status=none",
        ],
    );
    scene.protect("disk");
    let place = device.display().to_string();
    let full = scene.root.join("full.img");
    run("cp", &[source.as_os_str(), full.as_os_str()]);
    scene.caught_up();
    let point = scene.aft(&["point", "create", "web1", "--name", "full"]);
    assert_eq!(point.code, 0, "{point:?}");
    run(
        "blkdiscard",
        &["--offset", "1048576", "--length", "8388608", &place],
    );
    run(
        "blkdiscard",
        &["--offset", "20972032", "--length", "4608", &place],
    );
    run(
        "blkdiscard",
        &[
            "--zeroout",
            "--offset",
            "33554432",
            "--length",
            "1049088",
            &place,
        ],
    );
    scene.assert_replica_equals("disk");
    let zeroed = scene.root.join("zero.img");
    sparse(&zeroed, 64 * MIB);
    run("blkdiscard", &[&place]);
    scene.assert_replica_equals("disk");
    let zeroes = scene.view("web1/disk@latest");
    assert_equal_devices(&zeroed, &zeroes.device);
    zeroes.close();
    let before = scene.view("web1/disk@full");
    assert_equal_devices(&full, &before.device);
    before.close();
}
