//! What the installed clients do not ask for yet: extended headers and the filter of contexts; and
//! our own client.

use std::sync::Arc;
use std::sync::mpsc::channel;

use afterimage_blockdev::{
    BlockDevice, BlockErrorKind, BlockOp, BlockOutcome, ExtentKind, IoBuffer, Random, wait,
};
use afterimage_nbd::number::{command_flag, error, flag};
use afterimage_nbd::reply::ReplyStyle;
use afterimage_nbd::request::Command;
use afterimage_nbd::{ClientOptions, NbdDevice};

use crate::raw::{Raw, request, wish};
use crate::rig::Rig;

const MIB: u64 = 1 << 20;
const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:dirty-bitmap:monday"];

#[test]
fn extended_headers_carry_long_ranges() {
    let rig = Rig::new(16 << 30);
    let mut raw = Raw::open(&rig.socket(), &wish("disk", &CONTEXTS, true));
    assert_eq!(raw.agreed.style, ReplyStyle::Extended);
    assert!(raw.agreed.has(flag::BLOCK_STATUS_PAYLOAD));
    let mut write = request(Command::Write, MIB, 4096);
    write.flags = command_flag::PAYLOAD_LEN | command_flag::FUA;
    raw.perform(&write, &[5; 4096]).unwrap();
    let read = request(Command::Read, 0, 2 * MIB);
    let answer = raw.perform(&read, &[]).unwrap();
    assert!(answer.data[1 << 20..][..4096].iter().all(|byte| *byte == 5));
    assert_eq!(answer.holes, 2);
    // One extent of more than 4 GiB.
    let mut status = request(Command::BlockStatus, 2 * MIB, 8 << 30);
    let answer = raw.perform(&status, &[]).unwrap();
    assert_eq!(answer.extents[0], (1, vec![(8 << 30, 3)]));
    assert_eq!(answer.extents[1].0, 2);
    // Only the second context.
    let filter = |length: u64, ids: &[u32]| {
        let mut bytes = Vec::new();
        for shift in (0..64).step_by(8).rev() {
            bytes.push((length >> shift).to_le_bytes()[0]);
        }
        for id in ids {
            bytes.extend([0, 0, 0, id.to_le_bytes()[0]]);
        }
        bytes
    };
    status.flags = command_flag::PAYLOAD_LEN | command_flag::REQ_ONE;
    for (ids, expected) in [
        (&[2][..], Ok(1)),
        (&[2, 2], Err(error::EINVAL)),
        (&[7], Err(22)),
    ] {
        let payload = filter(4 * MIB, ids);
        status.length = payload.len() as u64;
        let answer = raw.perform(&status, &payload);
        assert_eq!(
            answer.map(|answer| answer.extents.len()),
            expected,
            "{ids:?}"
        );
    }
    let zeroes = request(Command::WriteZeroes, 0, 12 << 30);
    raw.perform(&zeroes, &[]).unwrap();
    assert!(rig.device.copy(MIB, 4096).iter().all(|byte| *byte == 0));
    let beyond = request(Command::WriteZeroes, 0, u64::MAX - 511);
    assert_eq!(raw.perform(&beyond, &[]), Err(error::ENOSPC));
    // A payload that belongs to no command is read and refused, and the session goes on.
    let mut flush = request(Command::Flush, 0, 300);
    flush.flags = command_flag::PAYLOAD_LEN;
    assert_eq!(raw.perform(&flush, &[1; 300]), Err(error::EINVAL));
    raw.perform(&request(Command::Flush, 0, 0), &[]).unwrap();
}

#[test]
fn replies_overtake_and_find_their_request() {
    let rig = Rig::new(64 * MIB);
    let mut random = Random::new(5);
    let mut image = vec![0; 64 << 20];
    random.fill(&mut image);
    let op = BlockOp::Write {
        offset: 0,
        buffer: IoBuffer::copy_of(&image),
        fua: false,
    };
    wait::device(&*rig.device, op).unwrap();
    for allow_extended in [false, true] {
        let mut options = ClientOptions::new("disk");
        options.wish.allow_extended = allow_extended;
        let device = NbdDevice::connect_unix(&rig.socket(), &options).unwrap();
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            for seed in 0..8 {
                let (device, sender) = (Arc::clone(&device), sender.clone());
                let image = &image;
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    for _ in 0..200 {
                        let length = 512 * (1 + random.below(400));
                        let offset = 512 * random.below((64 * MIB - length) / 512);
                        let buffer = IoBuffer::zeroed(usize::try_from(length).unwrap());
                        let read = wait::device(&*device, BlockOp::Read { offset, buffer });
                        let Ok(BlockOutcome::Data(data)) = read else {
                            panic!("{read:?}");
                        };
                        let at = usize::try_from(offset).unwrap();
                        sender.send(data[..] == image[at..at + data.len()]).unwrap();
                    }
                });
            }
        });
        drop(sender);
        assert!(receiver.iter().all(|is_same| is_same));
    }
}

/// The whole of a device's trade, against any server.
pub(crate) fn exercise(device: &Arc<NbdDevice>) {
    let size = device.geometry().size_bytes;
    let perform = |op| wait::device(&**device, op);
    // Longer than one command takes.
    let mut long = IoBuffer::zeroed(40 << 20);
    Random::new(9).fill(&mut long);
    let expected = long.clone();
    perform(BlockOp::Write {
        offset: MIB,
        buffer: long,
        fua: true,
    })
    .unwrap();
    let buffer = IoBuffer::zeroed(40 << 20);
    let read = perform(BlockOp::Read {
        offset: MIB,
        buffer,
    });
    assert!(matches!(read, Ok(BlockOutcome::Data(data)) if data[..] == expected[..]));
    perform(BlockOp::WriteZeroes {
        offset: 2 * MIB,
        length: MIB,
        may_unmap: true,
    })
    .unwrap();
    perform(BlockOp::Discard {
        offset: 4 * MIB,
        length: MIB,
    })
    .unwrap();
    perform(BlockOp::Flush).unwrap();
    let buffer = IoBuffer::copy_of(&[9; 4096]);
    let read = perform(BlockOp::Read {
        offset: 2 * MIB,
        buffer,
    });
    assert!(matches!(read, Ok(BlockOutcome::Data(data)) if data.iter().all(|byte| *byte == 0)));
    let extents = perform(BlockOp::Extents {
        offset: 0,
        length: size,
    });
    let Ok(BlockOutcome::Extents(extents)) = extents else {
        panic!("{extents:?}");
    };
    assert_eq!(
        extents.iter().map(|extent| extent.length).sum::<u64>(),
        size
    );
    let kind_at = |at: u64| {
        let holds = |extent: &&afterimage_blockdev::Extent| {
            (extent.offset..extent.offset + extent.length).contains(&at)
        };
        extents.iter().find(holds).map(|extent| extent.kind)
    };
    assert_eq!(kind_at(MIB), Some(ExtentKind::Data));
    assert_eq!(kind_at(2 * MIB), Some(ExtentKind::Zero));
    let beyond = perform(BlockOp::Discard {
        offset: size,
        length: 512,
    });
    assert!(matches!(beyond.unwrap_err().kind, BlockErrorKind::Range));
}

#[test]
fn our_client_and_our_server_understand_each_other() {
    for allow_extended in [false, true] {
        let rig = Rig::new(64 * MIB);
        let mut options = ClientOptions::new("disk");
        options.wish.allow_extended = allow_extended;
        options.wish.contexts = vec!["qemu:dirty-bitmap:monday".to_owned()];
        let device = NbdDevice::connect_unix(&rig.socket(), &options).unwrap();
        exercise(&device);
        let (sender, receiver) = channel();
        let done = move |result| sender.send(result).unwrap();
        device.status("qemu:dirty-bitmap:monday", MIB / 2, 3 * MIB, Box::new(done));
        let extents = receiver.recv().unwrap().unwrap();
        assert_eq!(extents, [(MIB / 2, 0), (MIB, 1), (MIB, 0), (MIB / 2, 1)]);
    }
}

#[test]
fn a_lost_server_fails_what_was_asked_and_what_is_asked_later() {
    let rig = Rig::new(64 * MIB);
    let options = ClientOptions::new("disk");
    let device = NbdDevice::connect_unix(&rig.socket(), &options).unwrap();
    drop(rig);
    for _ in 0..3 {
        let buffer = IoBuffer::zeroed(4096);
        let read = wait::device(&*device, BlockOp::Read { offset: 0, buffer });
        assert!(matches!(read.unwrap_err().kind, BlockErrorKind::Io { .. }));
    }
}

#[test]
fn an_export_that_does_not_exist_is_refused_with_its_reason() {
    let rig = Rig::new(MIB);
    let options = ClientOptions::new("other");
    let error = NbdDevice::connect_unix(&rig.socket(), &options)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("there is no \"other\""),
        "{error}"
    );
}
