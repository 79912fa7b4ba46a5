//! Reading and writing a file of the tree, at any offset and length.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_export::NodeId;

use crate::memory::Memory;
use crate::shelf::{mounted, run};

const MIB: u64 = 1 << 20;

fn writable(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// A small generator of test data; the same seed gives the same numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

#[test]
fn any_offset_and_length_reads_and_writes_what_a_plain_file_would() {
    for (device, seed) in [
        (Memory::new(MIB, 512), 1_u64),
        (Memory::late(MIB, 4096), 2),
        (Memory::late(MIB, 512), 3),
    ] {
        let mounted = mounted(&[("disk.img", &device)]);
        let file = writable(&mounted.file("disk.img"));
        let mut random = Random(seed | 0x9E37_79B9_0000_0000);
        let mut model = vec![0_u8; size(MIB)];
        for turn in 0..600 {
            let longest = if turn % 5 == 0 { 200_000 } else { 3000 };
            let offset = random.below(MIB);
            let length = random.below(longest.min(MIB - offset)) + 1;
            let range = size(offset)..size(offset + length);
            if random.below(2) == 0 {
                let byte = u8::try_from(random.below(255) + 1).unwrap();
                let data: Vec<u8> = range
                    .clone()
                    .map(|at| byte ^ u8::try_from(at % 251).unwrap())
                    .collect();
                file.write_all_at(&data, offset).unwrap();
                model[range].copy_from_slice(&data);
            } else {
                let mut data = vec![0; size(length)];
                file.read_exact_at(&mut data, offset).unwrap();
                assert!(data == model[range], "seed {seed}, turn {turn}");
            }
        }
        assert!(device.bytes(0, size(MIB)) == model, "seed {seed}");
    }
}

#[test]
fn writers_of_parts_of_the_same_block_lose_nothing() {
    let device = Memory::late(MIB, 4096);
    let mounted = mounted(&[("disk.img", &device)]);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let path = mounted.file("disk.img");
            scope.spawn(move || {
                let file = writable(&path);
                let tag = u8::try_from(thread + 1).unwrap();
                for slot in 0..400 {
                    // Whole blocks of their own for one of them, to meet the others at the gate.
                    file.write_all_at(&[tag; 100], slot * 400 + thread * 100)
                        .unwrap();
                    file.write_all_at(&[tag; 4096], MIB / 2 + (slot % 16) * 16384 + thread * 4096)
                        .unwrap();
                }
            });
        }
    });
    let bytes = device.bytes(0, size(MIB));
    for (at, byte) in bytes[..160_000].iter().enumerate() {
        assert_eq!(usize::from(*byte), at / 100 % 4 + 1, "at {at}");
    }
}

#[test]
fn the_end_of_a_file_is_the_end_of_its_device() {
    let device = Memory::new(MIB, 512);
    let mounted = mounted(&[("disk.img", &device)]);
    let mut file = writable(&mounted.file("disk.img"));
    let mut bytes = [0; 1000];
    assert_eq!(file.read_at(&mut bytes, MIB - 300).unwrap(), 300);
    assert_eq!(file.read_at(&mut bytes, MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut bytes, MIB * 5).unwrap(), 0);
    let error = file.write_at(&bytes, MIB - 300).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(27), "EFBIG");
    assert!(file.write_at(&bytes, MIB * 3).is_err());
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    assert_eq!(all.len() as u64, MIB);
    let path = mounted.file("disk.img");
    run(
        "dd",
        &[
            &format!("if={}", path.display()),
            "of=/dev/null",
            "bs=100",
            "count=3000",
        ],
    );
}

#[test]
fn fsync_fails_each_time_the_device_does_and_succeeds_again() {
    let device = Memory::late(MIB, 512);
    let mounted = mounted(&[("disk.img", &device)]);
    let file = writable(&mounted.file("disk.img"));
    file.write_all_at(&[1; 512], 0).unwrap();
    // ENOSYS would make the kernel believe for ever that nothing needs syncing.
    for (errno, expected) in [(5, 5), (28, 28), (38, 5), (38, 5), (-7, 5), (600, 5)] {
        device.disk.flush_errno.store(errno, Ordering::SeqCst);
        assert_eq!(
            file.sync_all().unwrap_err().raw_os_error(),
            Some(expected),
            "for {errno}"
        );
    }
    device.disk.flush_errno.store(0, Ordering::SeqCst);
    let before = device.disk.flushes.load(Ordering::SeqCst);
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    assert_eq!(device.disk.flushes.load(Ordering::SeqCst), before + 2);
}

#[test]
fn a_synchronous_file_writes_durably() {
    let device = Memory::new(MIB, 512);
    let mounted = mounted(&[("disk.img", &device)]);
    const O_DSYNC: i32 = 0o10000;
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(O_DSYNC)
        .open(mounted.file("disk.img"))
        .unwrap();
    let durable = |device: &Arc<Memory>| {
        device.disk.fua_writes.load(Ordering::SeqCst) + device.disk.flushes.load(Ordering::SeqCst)
    };
    file.write_all_at(&[1; 512], 0).unwrap();
    assert!(durable(&device) >= 1);
    let before = durable(&device);
    file.write_all_at(&[1; 100], 50).unwrap();
    assert!(durable(&device) > before);
}

#[test]
fn zeroes_holes_and_data() {
    let device = Memory::late(4 * MIB, 512);
    let mounted = mounted(&[("disk.img", &device)]);
    let path = mounted.file("disk.img");
    let name = path.to_str().unwrap();
    let mut file = writable(&path);
    file.write_all_at(&vec![7; size(MIB)], 0).unwrap();
    file.write_all_at(&vec![8; size(MIB)], 3 * MIB).unwrap();
    run(
        "fallocate",
        &[
            "--punch-hole",
            "--offset",
            "65536",
            "--length",
            "131072",
            name,
        ],
    );
    assert_eq!(device.disk.discards.load(Ordering::SeqCst), 1);
    run(
        "fallocate",
        &["--zero-range", "--offset", "1000", "--length", "9000", name],
    );
    assert_eq!(device.disk.zeroes.load(Ordering::SeqCst), 1);
    run(
        "fallocate",
        &["--punch-hole", "--offset", "20100", "--length", "50", name],
    );
    let bytes = device.bytes(0, size(MIB));
    for (at, byte) in bytes.iter().enumerate() {
        let is_zero = (1000..10_000).contains(&at)
            || (20_100..20_150).contains(&at)
            || (65_536..196_608).contains(&at);
        assert_eq!(*byte == 0, is_zero, "at {at}");
    }
    let script = "import os,sys\nf=os.open(sys.argv[1],os.O_RDONLY)\n\
        print(os.lseek(f,0,os.SEEK_HOLE), os.lseek(f,70000,os.SEEK_DATA), \
        os.lseek(f,1048576,os.SEEK_DATA), os.lseek(f,3145728,os.SEEK_HOLE))\n\
        try: os.lseek(f,4194304,os.SEEK_DATA)\nexcept OSError as e: print(e.errno)\n";
    assert_eq!(
        run("python3", &["-c", script, name]),
        "65536 196608 3145728 4194304\n6\n"
    );
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 4 * MIB);
}

#[test]
fn a_file_grows_where_its_device_does_and_never_shrinks() {
    let device = Memory::growing(MIB, 4 * MIB);
    let mounted = mounted(&[("disk.img", &device)]);
    let path = mounted.file("disk.img");
    let file = writable(&path);
    file.set_len(2 * MIB).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2 * MIB);
    file.write_all_at(&[1; 512], 2 * MIB - 512).unwrap();
    assert_eq!(
        file.set_len(MIB).unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );
    assert_eq!(
        file.set_len(8 * MIB).unwrap_err().kind(),
        std::io::ErrorKind::StorageFull
    );
    drop(file);
    run("truncate", &["--size", "3M", path.to_str().unwrap()]);
    mounted.mount.invalidate_node(NodeId(10)).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 * MIB);
    assert!(
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .is_err()
    );
}

#[test]
fn a_reader_through_the_page_cache_sees_every_write() {
    const O_DIRECT: i32 = 0o40000;
    let device = Memory::late(MIB, 512);
    let mounted = mounted(&[("disk.img", &device)]);
    let writer = OpenOptions::new()
        .write(true)
        .custom_flags(O_DIRECT)
        .open(mounted.file("disk.img"))
        .unwrap();
    let reader = File::open(mounted.file("disk.img")).unwrap();
    assert!(reader.as_raw_fd() != writer.as_raw_fd());
    let mut buffer = afterimage_blockdev::IoBuffer::zeroed(8192);
    for turn in 0..200_u8 {
        buffer.fill(turn);
        writer.write_all_at(&buffer, 4096).unwrap();
        let mut seen = [0; 300];
        reader.read_exact_at(&mut seen, 4100).unwrap();
        assert_eq!(seen, [turn; 300]);
    }
}
