//! Real file systems over loop over FUSE.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_export::probe;
use afterimage_export::{
    ExportError, FsKind, MountFlags, is_mount_point, mount_filesystem, unmount,
};

use crate::loop_io::attached;
use crate::memory::Memory;
use crate::shelf::{mounted, run};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

/// For a device that cannot be written.
const READ_ONLY: MountFlags = MountFlags {
    is_read_only: true,
    is_device_read_only: true,
    allow_suid: false,
    allow_dev: false,
    allow_exec: false,
};

fn fill(directory: &Path) {
    for index in 0..200_u32 {
        let name = directory.join(format!("file-{index}"));
        fs::write(
            name,
            vec![u8::try_from(index).unwrap(); 1000 * (index as usize % 40)],
        )
        .unwrap();
    }
}

fn check(directory: &Path) {
    for index in 0..200_u32 {
        let bytes = fs::read(directory.join(format!("file-{index}"))).unwrap();
        assert_eq!(bytes.len(), 1000 * (index as usize % 40));
        assert!(bytes.iter().all(|byte| u32::from(*byte) == index));
    }
}

fn mount_directory(name: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::create_dir(&path).unwrap();
    (directory, path)
}

/// Makes, fills, unmounts, checks and mounts again.
fn carries(make: &str, options: &[&str], fsck: &[&str], kind: FsKind, block: u32) {
    let disk = Memory::late(512 * MIB, block);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", block);
    let path = device.path();
    let name = path.to_str().unwrap();
    run(make, &[options, &[name]].concat());
    let found = probe::device(&*disk).unwrap();
    assert_eq!(found.kind, kind);
    assert!(found.uuid.is_some());
    let (_keep, directory) = mount_directory("mnt with blank");
    mount_filesystem(&path, &directory, kind, MountFlags::default()).unwrap();
    assert!(is_mount_point(&directory).unwrap());
    fill(&directory);
    run("fstrim", &[directory.to_str().unwrap()]);

    let other = mount_filesystem(&path, &directory, kind, MountFlags::default()).unwrap_err();
    assert!(
        matches!(other, ExportError::AlreadyMounted { .. }),
        "{other}"
    );
    let user = fs::File::open(directory.join("file-1")).unwrap();
    let busy = unmount(&directory, Duration::from_millis(10)).unwrap_err();
    assert!(matches!(busy, ExportError::Busy { .. }), "{busy}");
    drop(user);
    unmount(&directory, SOON).unwrap();
    let gone = unmount(&directory, SOON).unwrap_err();
    assert!(matches!(gone, ExportError::NotMounted { .. }), "{gone}");

    run(fsck[0], &[&fsck[1..], &[name]].concat());
    mount_filesystem(&path, &directory, kind, READ_ONLY).unwrap();
    check(&directory);
    assert!(fs::write(directory.join("new"), b"x").is_err());
    unmount(&directory, SOON).unwrap();
    device.detach(SOON).unwrap();
}

#[test]
fn ext4_is_clean_after_use() {
    carries(
        "mkfs.ext4",
        &["-q"],
        &["e2fsck", "-f", "-n"],
        FsKind::Ext4,
        512,
    );
}

#[test]
fn ext4_over_4096_byte_blocks() {
    carries(
        "mkfs.ext4",
        &["-q"],
        &["e2fsck", "-f", "-n"],
        FsKind::Ext4,
        4096,
    );
}

#[test]
fn ext2_mounts_by_whichever_driver_there_is() {
    carries(
        "mkfs.ext2",
        &["-q"],
        &["e2fsck", "-f", "-n"],
        FsKind::Ext2,
        512,
    );
}

#[test]
fn xfs_with_512_byte_sectors_is_clean_after_use() {
    let options = ["-q", "-f", "-s", "size=512", "-b", "size=1024"];
    carries(
        "mkfs.xfs",
        &options,
        &["xfs_repair", "-n"],
        FsKind::Xfs,
        512,
    );
}

#[test]
fn btrfs_is_clean_after_use() {
    carries(
        "mkfs.btrfs",
        &["-q"],
        &["btrfs", "check", "--readonly"],
        FsKind::Btrfs,
        512,
    );
}

/// Two devices with the same bytes.
fn twins(make: &str, kind: FsKind) -> Result<(), ExportError> {
    let (one, two) = (Memory::new(512 * MIB, 512), Memory::new(512 * MIB, 512));
    let mounted = mounted(&[("one.img", &one), ("two.img", &two)]);
    let mut first = attached(&mounted, "one.img", 512);
    let mut second = attached(&mounted, "two.img", 512);
    run(make, &["-q", first.path().to_str().unwrap()]);
    let (from, to) = (first.path(), second.path());
    let (from, to) = (
        format!("if={}", from.display()),
        format!("of={}", to.display()),
    );
    run("dd", &[&from, &to, "bs=1M", "conv=fsync", "status=none"]);
    let (_keep, original) = mount_directory("original");
    let (_keep_too, copy) = mount_directory("copy");
    mount_filesystem(&first.path(), &original, kind, MountFlags::default())?;
    fs::write(original.join("only-here"), b"x").unwrap();
    let result = mount_filesystem(&second.path(), &copy, kind, MountFlags::default());
    if result.is_ok() {
        // The copy itself must have been mounted, not the original once more.
        let is_own = !copy.join("only-here").exists();
        unmount(&copy, SOON)?;
        assert!(is_own, "the original was mounted in place of its copy");
    }
    unmount(&original, SOON)?;
    second.detach(SOON)?;
    first.detach(SOON)?;
    result.map(drop)
}

#[test]
fn an_xfs_copy_mounts_beside_its_original() {
    twins("mkfs.xfs", FsKind::Xfs).unwrap();
}

#[test]
fn an_ext4_copy_mounts_beside_its_original() {
    twins("mkfs.ext4", FsKind::Ext4).unwrap();
}

#[test]
fn a_btrfs_copy_mounts_beside_its_original() {
    twins("mkfs.btrfs", FsKind::Btrfs).unwrap();
}

fn btrfs_identity(device: &Path) -> String {
    let mut found = probe_file(device);
    found.uuid.take().map_or(String::new(), |uuid| {
        uuid.iter().map(|byte| format!("{byte:02x}")).collect()
    })
}

fn probe_file(device: &Path) -> afterimage_export::Found {
    let mut medium = afterimage_export::probe::FileMedium::open(device, 512).unwrap();
    afterimage_export::probe::identify(&mut medium).unwrap()
}

/// What a kernel without temporary identities needs.
#[test]
fn a_btrfs_with_a_new_identity_is_whole_and_keeps_its_files() {
    let disk = Memory::new(512 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 512);
    let (path, flags) = (device.path(), MountFlags::default());
    run("mkfs.btrfs", &["-q", path.to_str().unwrap()]);
    let (_keep, directory) = mount_directory("files");
    mount_filesystem(&path, &directory, FsKind::Btrfs, flags).unwrap();
    fs::write(directory.join("kept"), vec![7; 1_000_000]).unwrap();
    unmount(&directory, SOON).unwrap();
    let before = btrfs_identity(&path);
    for _ in 0..2 {
        afterimage_export::btrfs::renew_identity(&path).unwrap();
    }
    let after = btrfs_identity(&path);
    assert!(
        !before.is_empty() && before != after,
        "{before} and {after}"
    );
    run("btrfs", &["check", "--readonly", path.to_str().unwrap()]);
    mount_filesystem(&path, &directory, FsKind::Btrfs, flags).unwrap();
    let named = after.replace('-', "");
    let known: Vec<_> = fs::read_dir("/sys/fs/btrfs")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let is_known = known.iter().any(|uuid| uuid.replace('-', "") == named);
    assert!(is_known, "{named} is not in {known:?}");
    assert_eq!(
        fs::read(directory.join("kept")).unwrap(),
        vec![7; 1_000_000]
    );
    fs::write(directory.join("more"), b"x").unwrap();
    unmount(&directory, SOON).unwrap();
    run("btrfs", &["check", "--readonly", path.to_str().unwrap()]);
    device.detach(SOON).unwrap();
}

#[test]
fn what_is_no_file_system_is_refused_with_advice() {
    let disk = Memory::new(16 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let device = attached(&mounted, "disk.img", 512);
    run("mkswap", &["-q", device.path().to_str().unwrap()]);
    let found = probe::device(&*disk).unwrap();
    assert_eq!(found.kind, FsKind::Swap);
    let (_keep, directory) = mount_directory("mnt");
    let error = mount_filesystem(&device.path(), &directory, found.kind, READ_ONLY).unwrap_err();
    assert!(!error.hint().is_empty());
    // An empty device that is said to be ext4.
    let blank = mount_filesystem(&device.path(), &directory, FsKind::Ext4, READ_ONLY).unwrap_err();
    assert!(matches!(blank, ExportError::MountRefused { .. }), "{blank}");
}
