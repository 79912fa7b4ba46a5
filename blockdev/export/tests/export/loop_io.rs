//! Loop devices over a served file: direct I/O, depth, discard, growth, partitions.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use afterimage_export::probe::{self, FileMedium, FsKind};
use afterimage_export::{
    ExportError, LoopDevice, LoopOptions, MountFlags, NodeId, mount_filesystem, unmount,
};

use crate::memory::Memory;
use crate::shelf::{Mounted, mounted, must_be_root, run};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

pub(crate) fn attached(mounted: &Mounted, name: &str, block: u32) -> LoopDevice {
    let options = LoopOptions {
        logical_block_bytes: block,
        ..LoopOptions::default()
    };
    LoopDevice::attach(&mounted.file(name), options).unwrap()
}

fn attribute(device: &LoopDevice, name: &str) -> String {
    let path = format!("/sys/block/loop{}/{name}", device.number());
    fs::read_to_string(path).unwrap().trim().to_owned()
}

#[test]
fn bytes_go_straight_through() {
    let disk = Memory::late(8 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 512);
    let path = device.path();
    assert_eq!(attribute(&device, "loop/dio"), "1");
    assert_eq!(attribute(&device, "queue/logical_block_size"), "512");
    assert_eq!(attribute(&device, "queue/discard_granularity"), "4096");
    assert_eq!(attribute(&device, "size"), (8 * MIB / 512).to_string());
    let listed = LoopDevice::list().unwrap();
    let entry = listed
        .iter()
        .find(|entry| entry.number == device.number())
        .unwrap();
    assert_eq!(entry.backing, mounted.file("disk.img"));

    let file = File::options().read(true).write(true).open(&path).unwrap();
    let data: Vec<u8> = (0..3 * MIB)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    file.write_all_at(&data, MIB).unwrap();
    let before = disk.disk.flushes.load(Ordering::SeqCst);
    file.sync_all().unwrap();
    assert!(disk.disk.flushes.load(Ordering::SeqCst) > before);
    assert!(disk.bytes(MIB, data.len()) == data);
    disk.disk.flush_errno.store(5, Ordering::SeqCst);
    file.write_all_at(&[9; 4096], 0).unwrap();
    assert!(
        file.sync_all().is_err(),
        "a failed flush must reach the user of the loop device"
    );
    disk.disk.flush_errno.store(0, Ordering::SeqCst);
    drop(file);

    let name = path.to_str().unwrap();
    run(
        "blkdiscard",
        &["--offset", "1048576", "--length", "1048576", name],
    );
    assert!(disk.disk.discards.load(Ordering::SeqCst) > 0);
    run(
        "blkdiscard",
        &[
            "--zeroout",
            "--offset",
            "2097152",
            "--length",
            "65536",
            name,
        ],
    );
    assert!(disk.bytes(MIB, 1 << 20).iter().all(|byte| *byte == 0));
    assert!(disk.bytes(2 * MIB, 65536).iter().all(|byte| *byte == 0));
    assert_eq!(
        disk.bytes(2 * MIB + 65536, 8),
        data[(1 << 20) + 65536..][..8]
    );
    device.detach(SOON).unwrap();
    assert!(!Path::new(&format!("{name}p1")).exists());
}

fn verified_at_every_depth(block: u32, request: &str) {
    let disk = Memory::late(32 * MIB, block);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", block);
    let target = format!("--filename={}", device.path().display());
    for depth in ["1", "4", "16", "64"] {
        run(
            "fio",
            &[
                "--name=v",
                "--rw=randwrite",
                &format!("--bs={request}"),
                "--size=32M",
                "--direct=1",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--ioengine=io_uring",
                &format!("--iodepth={depth}"),
                &target,
            ],
        );
    }
    device.detach(SOON).unwrap();
}

#[test]
fn fio_verifies_4k_writes_at_every_depth() {
    verified_at_every_depth(512, "4k");
}

#[test]
fn fio_verifies_512_byte_writes_at_every_depth() {
    verified_at_every_depth(512, "512");
}

#[test]
fn fio_verifies_writes_of_mixed_sizes_over_4096_byte_blocks() {
    verified_at_every_depth(4096, "64k");
}

#[test]
fn a_device_grows_with_its_file() {
    let disk = Memory::growing(4 * MIB, 8 * MIB);
    let mounted = mounted(&[("disk.img", &disk)]);
    let device = attached(&mounted, "disk.img", 512);
    File::options()
        .write(true)
        .open(mounted.file("disk.img"))
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    mounted.mount.invalidate_node(NodeId(10)).unwrap();
    device.resize().unwrap();
    assert_eq!(attribute(&device, "size"), (8 * MIB / 512).to_string());
    let file = File::options().write(true).open(device.path()).unwrap();
    file.write_all_at(&[5; 4096], 8 * MIB - 4096).unwrap();
    file.sync_all().unwrap();
    assert_eq!(disk.bytes(8 * MIB - 1, 1), [5]);
}

#[test]
fn a_read_only_file_gives_a_read_only_device() {
    let disk = Memory::read_only(MIB);
    let mounted = mounted(&[("disk.img", &disk)]);
    let options = LoopOptions {
        is_read_only: true,
        ..LoopOptions::default()
    };
    let mut device = LoopDevice::attach(&mounted.file("disk.img"), options).unwrap();
    assert_eq!(attribute(&device, "ro"), "1");
    assert!(LoopDevice::attach(&mounted.file("disk.img"), LoopOptions::default()).is_err());
    device.detach(SOON).unwrap();
}

#[test]
fn a_device_in_use_is_busy_and_goes_with_its_user() {
    let disk = Memory::new(4 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 512);
    let number = device.number();
    let is_bound = || {
        LoopDevice::list()
            .unwrap()
            .iter()
            .any(|entry| entry.number == number && entry.backing.starts_with(mounted.path()))
    };
    let file = File::open(device.path()).unwrap();
    let error = device.detach(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, ExportError::Busy { .. }), "{error}");
    assert!(is_bound());
    drop(device);
    assert!(is_bound());
    drop(file);
    assert!(!is_bound());
}

#[test]
fn a_dropped_device_is_detached() {
    let disk = Memory::new(4 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    drop(attached(&mounted, "disk.img", 512));
    let left = LoopDevice::list().unwrap();
    assert!(
        !left
            .iter()
            .any(|entry| entry.backing.starts_with(mounted.path())),
        "{left:?}"
    );
}

#[test]
fn direct_io_that_the_kernel_drops_is_refused() {
    // A file system on 4096-byte blocks cannot do direct I/O in units of 512 bytes.
    let disk = Memory::new(64 * MIB, 4096);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 4096);
    run("mkfs.ext4", &["-q", device.path().to_str().unwrap()]);
    let directory = tempfile::tempdir().unwrap();
    mount_filesystem(
        &device.path(),
        directory.path(),
        FsKind::Ext4,
        MountFlags::default(),
    )
    .unwrap();
    let path = directory.path().join("inner.img");
    File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    let error = LoopDevice::attach(&path, LoopOptions::default()).unwrap_err();
    assert!(
        matches!(error, ExportError::DirectIoRefused { .. }),
        "{error}"
    );
    let left = LoopDevice::list().unwrap();
    assert!(!left.iter().any(|entry| entry.backing == path), "{left:?}");
    let options = LoopOptions {
        logical_block_bytes: 4096,
        ..LoopOptions::default()
    };
    LoopDevice::attach(&path, options)
        .unwrap()
        .detach(SOON)
        .unwrap();
    unmount(directory.path(), SOON).unwrap();
    device.detach(SOON).unwrap();
}

#[test]
fn a_missing_file_is_named() {
    must_be_root();
    let error = LoopDevice::attach(Path::new("/no/such.img"), LoopOptions::default()).unwrap_err();
    assert!(error.to_string().contains("/no/such.img"), "{error}");
}

fn partitioned(label: &str, script: &str, kind: FsKind) {
    let disk = Memory::late(64 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 512);
    let path = device.path();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("script");
    fs::write(&file, format!("label: {label}\n{script}")).unwrap();
    run(
        "sh",
        &[
            "-c",
            &format!(
                "sfdisk --no-reread --no-tell-kernel --quiet {} < {}",
                path.display(),
                file.display()
            ),
        ],
    );
    let found = probe::device(&*disk).unwrap();
    assert_eq!(found.kind, kind);
    let sectors: Vec<_> = found
        .partitions
        .iter()
        .map(|part| (part.number, part.start_bytes / 512, part.size_bytes / 512))
        .collect();
    let second = if label == "gpt" { 2 } else { 5 };
    assert_eq!(sectors, [(1, 2048, 20480), (second, 40960, 20480)]);

    let nodes = device.add_partitions(&found.partitions).unwrap();
    run("mkfs.ext4", &["-q", nodes[1].to_str().unwrap()]);
    assert_eq!(
        probe::partition(&*disk, &found.partitions[1]).unwrap().kind,
        FsKind::Ext4
    );
    let mut medium = FileMedium::open(&nodes[1], 512).unwrap();
    assert_eq!(probe::identify(&mut medium).unwrap().kind, FsKind::Ext4);
    drop(medium);
    let mountpoint = directory.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    mount_filesystem(&nodes[1], &mountpoint, FsKind::Ext4, MountFlags::default()).unwrap();
    let error = device.remove_partitions().unwrap_err();
    assert!(error.to_string().contains("busy"), "{error}");
    let error = device.detach(SOON).unwrap_err();
    assert!(error.to_string().contains("mounted at"), "{error}");
    unmount(&mountpoint, SOON).unwrap();
    device.detach(SOON).unwrap();
    assert!(
        !nodes[0].exists(),
        "a detached device takes its partitions along"
    );
}

#[test]
fn gpt_partitions_become_devices() {
    partitioned(
        "gpt",
        "1: start=2048,size=20480\n2: start=40960,size=20480\n",
        FsKind::Gpt,
    );
}

#[test]
fn mbr_partitions_become_devices() {
    partitioned(
        "dos",
        "1: start=2048,size=20480,type=83\n2: start=38912,size=40000,type=5\n\
         5: start=40960,size=20480,type=83\n",
        FsKind::Mbr,
    );
}
