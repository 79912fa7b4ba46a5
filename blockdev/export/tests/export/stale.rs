//! What a daemon leaves behind when it is killed, and how the next one cleans it up.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use afterimage_export::{
    FsKind, FuseMount, FuseOptions, LoopDevice, LoopOptions, Tree, detach_stale,
    detach_stale_under, is_mount_point, mount_filesystem,
};

use crate::memory::Memory;
use crate::shelf::{must_be_root, run, shelf};

const DIRECTORY: &str = "AFTERIMAGE_TEST_SERVE";

/// The killed daemon itself: serves a disk with an ext4 that is mounted and written, until its
/// end. Other tests start it in a process of its own.
#[test]
#[ignore = "runs in a process of its own, which a test kills"]
fn serves_until_killed() {
    let directory = std::env::var_os(DIRECTORY).expect("started by another test");
    let directory = Path::new(&directory);
    let disk = Memory::late(64 << 20, 512);
    let (tree, _forgotten) = shelf(&[("disk.img", &disk)]);
    let tree: Arc<dyn Tree> = tree;
    let _mount = FuseMount::mount(tree, &directory.join("tree"), FuseOptions::default()).unwrap();
    let device =
        LoopDevice::attach(&directory.join("tree/disk.img"), LoopOptions::default()).unwrap();
    run("mkfs.ext4", &["-q", device.path().to_str().unwrap()]);
    mount_filesystem(
        &device.path(),
        &directory.join("files"),
        FsKind::Ext4,
        false,
    )
    .unwrap();
    println!("\nserving {}", device.path().display());
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

fn start(directory: &Path) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "stale::serves_until_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let device = lines
        .map(|line| line.unwrap())
        .find_map(|line| line.strip_prefix("serving ").map(str::to_owned))
        .expect("the child serves");
    (child, device)
}

#[test]
fn a_killed_daemons_mounts_and_devices_are_detached() {
    must_be_root();
    let directory = tempfile::tempdir().unwrap();
    let (tree, files) = (
        directory.path().join("tree"),
        directory.path().join("files"),
    );
    std::fs::create_dir(&tree).unwrap();
    std::fs::create_dir(&files).unwrap();
    let (mut child, device) = start(directory.path());
    assert!(
        !detach_stale(&tree).unwrap(),
        "a mount that is served is left alone"
    );
    let _open_file = std::fs::write(files.join("a"), b"some bytes");
    child.kill().unwrap();
    child.wait().unwrap();

    let detached = detach_stale_under(&tree).unwrap();
    assert_eq!(detached.directories, [files.canonicalize().unwrap()]);
    assert_eq!(detached.devices, [Path::new(&device)]);
    assert!(is_mount_point(&tree).unwrap());
    assert!(detach_stale(&tree).unwrap());
    assert!(!detach_stale(&tree).unwrap());
    assert!(!is_mount_point(&tree).unwrap());
    assert!(!is_mount_point(&files).unwrap());

    // The next daemon takes the place.
    let disk = Memory::new(1 << 20, 512);
    let (shelf, _forgotten) = shelf(&[("disk.img", &disk)]);
    let shelf: Arc<dyn Tree> = shelf;
    let mut mount = FuseMount::mount(shelf, &tree, FuseOptions::default()).unwrap();
    mount.unmount().unwrap();
}
