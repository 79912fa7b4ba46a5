//! Devices.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::{BACKENDS, Loop, directory, image, on_a_lying_medium};
use crate::buffer::IoBuffer;
use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockErrorKind, BlockOp, BlockOutcome, ExtentKind,
};
use crate::id::Token;
use crate::real::{Backend, DeviceOptions, RealDevice};
use crate::wait;

pub(super) fn device(path: &Path, backend: Backend, is_direct: bool) -> Arc<RealDevice> {
    let options = DeviceOptions {
        backend,
        is_direct,
        ..DeviceOptions::default()
    };
    RealDevice::open(path, options).unwrap()
}

fn read_device(device: &dyn BlockDevice, offset: u64, length: usize) -> Vec<u8> {
    let op = BlockOp::Read {
        offset,
        buffer: IoBuffer::zeroed(length),
    };
    match wait::device(device, op).unwrap() {
        BlockOutcome::Data(buffer) => buffer.to_vec(),
        other => panic!("read gave {other:?}"),
    }
}

fn write_device(device: &dyn BlockDevice, offset: u64, bytes: &[u8], fua: bool) {
    let op = BlockOp::Write {
        offset,
        buffer: IoBuffer::copy_of(bytes),
        fua,
    };
    wait::device(device, op).unwrap();
}

/// What every device of at least 1 MiB must do.
pub(super) fn check_device(device: &dyn BlockDevice) {
    let geometry = device.geometry();
    let unit = geometry.logical_block_bytes as usize;
    write_device(device, 0, &vec![1; 256 * 1024], false);
    write_device(device, unit as u64, &vec![2; unit], true);
    wait::device(device, BlockOp::Flush).unwrap();
    let back = read_device(device, 0, 4 * unit);
    assert_eq!(back[..unit], vec![1; unit]);
    assert_eq!(back[unit..2 * unit], vec![2; unit]);
    let discard = BlockOp::Discard {
        offset: 8192,
        length: 65536,
    };
    wait::device(device, discard).unwrap();
    assert!(
        read_device(device, 8192, 65536)
            .iter()
            .all(|byte| *byte == 0)
    );
    for may_unmap in [false, true] {
        let offset = 131_072;
        write_device(device, offset, &vec![5; 32768], false);
        let length = unit as u64 * 3;
        let op = BlockOp::WriteZeroes {
            offset: offset + unit as u64,
            length,
            may_unmap,
        };
        wait::device(device, op).unwrap();
        let back = read_device(device, offset, 32768);
        assert_eq!(back[..unit], vec![5; unit]);
        assert!(back[unit..4 * unit].iter().all(|byte| *byte == 0));
        assert_eq!(back[4 * unit..], vec![5; 32768 - 4 * unit]);
    }
    let past = BlockOp::Read {
        offset: geometry.size_bytes,
        buffer: IoBuffer::zeroed(4096),
    };
    assert!(matches!(
        wait::device(device, past).unwrap_err().kind,
        BlockErrorKind::Range
    ));
    let op = BlockOp::Extents {
        offset: 0,
        length: geometry.size_bytes,
    };
    let BlockOutcome::Extents(extents) = wait::device(device, op).unwrap() else {
        panic!("extents gave something else")
    };
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.offset, at);
        assert!(extent.length > 0);
        if extent.kind == ExtentKind::Zero {
            let bytes = read_device(device, at, usize::try_from(extent.length).unwrap());
            assert!(
                bytes.iter().all(|byte| *byte == 0),
                "data called a hole at {at}"
            );
        }
        at += extent.length;
    }
    assert_eq!(at, geometry.size_bytes);
}

#[test]
fn an_image_file_is_a_device() {
    for backend in BACKENDS {
        for is_direct in [true, false] {
            let root = directory();
            let path = image(root.path(), (4 << 20) + 300);
            let device = device(&path, backend, is_direct);
            assert_eq!(device.geometry().size_bytes, 4 << 20);
            check_device(&*device);
            let size_bytes = 8 << 20;
            wait::device(&*device, BlockOp::Grow { size_bytes }).unwrap();
            assert_eq!(device.geometry().size_bytes, size_bytes);
            write_device(&*device, size_bytes - 4096, &[4; 4096], true);
            let smaller = BlockOp::Grow { size_bytes: 4096 };
            assert!(wait::device(&*device, smaller).is_err());
            let op = BlockOp::Extents {
                offset: 4 << 20,
                length: 4 << 20,
            };
            let BlockOutcome::Extents(extents) = wait::device(&*device, op).unwrap() else {
                panic!("extents gave something else")
            };
            assert_eq!(extents[0].kind, ExtentKind::Zero);
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            let gone = BlockOp::Read {
                offset: 2 << 20,
                buffer: IoBuffer::zeroed(4096),
            };
            assert!(
                wait::device(&*device, gone).is_err(),
                "a shrunk image is an error"
            );
        }
    }
}

#[test]
fn a_read_only_device_refuses_writes() {
    let root = directory();
    let path = image(root.path(), 1 << 20);
    let options = DeviceOptions {
        is_read_only: true,
        ..DeviceOptions::default()
    };
    let device = RealDevice::open(&path, options).unwrap();
    let op = BlockOp::Write {
        offset: 0,
        buffer: IoBuffer::zeroed(4096),
        fua: false,
    };
    assert!(matches!(
        wait::device(&*device, op).unwrap_err().kind,
        BlockErrorKind::ReadOnly
    ));
    assert!(read_device(&*device, 0, 4096).iter().all(|byte| *byte == 0));
    assert!(RealDevice::open(root.path(), DeviceOptions::default()).is_err());
}

#[test]
fn the_logical_block_can_be_chosen_for_an_image() {
    let root = directory();
    let path = image(root.path(), 1 << 20);
    let open = |logical_block_bytes| {
        RealDevice::open(
            &path,
            DeviceOptions {
                logical_block_bytes,
                ..Default::default()
            },
        )
    };
    let device = open(Some(4096)).unwrap();
    assert_eq!(device.geometry().logical_block_bytes, 4096);
    let op = BlockOp::Read {
        offset: 512,
        buffer: IoBuffer::zeroed(512),
    };
    assert!(matches!(
        wait::device(&*device, op).unwrap_err().kind,
        BlockErrorKind::Range
    ));
    assert!(open(Some(1024)).is_err());
}

#[test]
fn a_block_device_is_a_device() {
    for (backend, block_bytes) in [(Backend::IoUring, 512), (Backend::Threads, 4096)] {
        let root = directory();
        let path = image(root.path(), 4 << 20);
        let Some(node) = Loop::attach(&path, block_bytes) else {
            eprintln!("no loop device to be had; not tested");
            return;
        };
        let device = device(Path::new(&node.0), backend, true);
        assert_eq!(device.geometry().logical_block_bytes, block_bytes);
        assert_eq!(device.geometry().size_bytes, 4 << 20);
        check_device(&*device);
        assert!(
            RealDevice::open(Path::new(&node.0), DeviceOptions::default()).is_err(),
            "a writer is alone"
        );
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        let resized = Command::new("losetup")
            .args(["--set-capacity", &node.0])
            .status()
            .unwrap();
        assert!(resized.success());
        wait::device(
            &*device,
            BlockOp::Grow {
                size_bytes: 8 << 20,
            },
        )
        .unwrap();
        assert_eq!(device.geometry().size_bytes, 8 << 20);
        assert!(
            wait::device(
                &*device,
                BlockOp::Grow {
                    size_bytes: 16 << 20
                }
            )
            .is_err()
        );
    }
}

/// Depth 64 of random blocks, each request checked when it completes.
#[test]
fn a_device_keeps_its_bytes_at_depth() {
    struct Collect(Sender<BlockCompletion>);
    impl BlockCompleter for Collect {
        fn complete(&self, completion: BlockCompletion) {
            self.0.send(completion).unwrap();
        }
    }
    for backend in BACKENDS {
        let root = directory();
        let path = image(root.path(), 64 * 4096);
        let device = device(&path, backend, true);
        let (sender, receiver) = channel();
        let to: Arc<dyn BlockCompleter> = Arc::new(Collect(sender));
        for round in 0..20_u8 {
            for block in 0..64_u8 {
                let bytes = [block ^ round; 4096];
                let offset = u64::from(block) * 4096;
                let op = BlockOp::Write {
                    offset,
                    buffer: IoBuffer::copy_of(&bytes),
                    fua: false,
                };
                device.submit(Token(0), op, Arc::clone(&to));
            }
            for _ in 0..64 {
                receiver.recv().unwrap().result.unwrap();
            }
            for block in 0..64_u8 {
                let offset = u64::from(block) * 4096;
                let op = BlockOp::Read {
                    offset,
                    buffer: IoBuffer::zeroed(4096),
                };
                device.submit(Token(u64::from(block ^ round)), op, Arc::clone(&to));
            }
            for _ in 0..64 {
                let BlockCompletion { token, result } = receiver.recv().unwrap();
                let BlockOutcome::Data(buffer) = result.unwrap() else {
                    panic!("not data")
                };
                assert!(buffer.iter().all(|byte| u64::from(*byte) == token.0));
            }
        }
    }
}

#[test]
fn a_failed_flush_poisons_a_device() {
    for backend in BACKENDS {
        on_a_lying_medium("1m", move |node, _| {
            let device = device(node, backend, false);
            write_device(&*device, 0, &vec![1; 4 << 20], false);
            let error = wait::device(&*device, BlockOp::Flush).unwrap_err();
            assert!(!matches!(error.kind, BlockErrorKind::Range), "{error}");
            let read = BlockOp::Read {
                offset: 0,
                buffer: IoBuffer::zeroed(4096),
            };
            let error = wait::device(&*device, read).unwrap_err();
            assert!(error.to_string().contains("reopened"), "{error}");
            drop(device);
            let device = self::device(node, backend, false);
            read_device(&*device, 32 << 20, 4096);
        });
    }
}
