//! What a daemon leaves behind when it is killed, and how the next one cleans it up.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use afterimage_blockdev::IoBuffer;
use afterimage_export::{
    FsKind, FuseMount, LoopDevice, LoopOptions, MountFlags, Tree, detach_stale, detach_stale_under,
    is_mount_point, mount_filesystem,
};

use crate::memory::Memory;
use crate::shelf::{must_be_root, options, run, shelf};
use crate::transport::{expected, switch};

const SOON: Duration = Duration::from_secs(10);
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
    let mount = FuseMount::mount(tree, &directory.join("tree"), options()).unwrap();
    assert_eq!(mount.transport(), expected());
    let device =
        LoopDevice::attach(&directory.join("tree/disk.img"), LoopOptions::default()).unwrap();
    run("mkfs.ext4", &["-q", device.path().to_str().unwrap()]);
    mount_filesystem(
        &device.path(),
        &directory.join("files"),
        FsKind::Ext4,
        MountFlags::default(),
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
    let _switch = switch();
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
    let mut mount = FuseMount::mount(shelf, &tree, options()).unwrap();
    mount.unmount().unwrap();
}

/// Reads one block again and again, past the page cache; tells of the first, and ends with the
/// first error.
fn read_until_error(device: &str, told: &Sender<()>) -> Instant {
    const O_DIRECT: i32 = 0o40000;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(O_DIRECT).open(device);
    let file = file.unwrap();
    let mut block = IoBuffer::zeroed(4096);
    while file.read_exact_at(&mut block, 8192).is_ok() {
        let _unheard = told.send(());
    }
    Instant::now()
}

#[test]
fn users_of_a_killed_daemon_get_errors_within_a_second() {
    must_be_root();
    let _switch = switch();
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::create_dir(directory.path().join("files")).unwrap();
    let (mut child, device) = start(directory.path());
    let (tell, told) = channel();
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (device, tell) = (device.clone(), tell.clone());
            std::thread::spawn(move || read_until_error(&device, &tell))
        })
        .collect();
    for _ in 0..100 {
        told.recv_timeout(SOON).unwrap();
    }
    let killed = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    for reader in readers {
        let waited = reader.join().unwrap() - killed;
        assert!(waited < Duration::from_secs(1), "{waited:?}");
    }
    detach_stale_under(&tree).unwrap();
    assert!(detach_stale(&tree).unwrap());
}
