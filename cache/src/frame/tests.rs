use afterimage_blockdev::{BatchId, DiskId};
use proptest::prelude::*;

use super::*;
use crate::record::{RecordBody, RecordHeader, RecordKind};
use crate::testing::{DISK, frame, identity, mark, opener, plain, sealer, write};

#[test]
fn a_frame_comes_back_as_it_was_built() {
    let built = frame(1, 10);
    let accepted = Frame::accept(built.bytes.clone()).unwrap();
    assert_eq!(accepted.header, built.header);
    assert_eq!(
        (accepted.header.first, accepted.header.last),
        (Lsn(10), Lsn(12))
    );
    let view = accepted.view();
    let records: Vec<_> = view.records().map(Result::unwrap).collect();
    assert_eq!(records.len(), 3);
    assert_eq!(records[0].1.header, write(10, 4096, 8192));
    assert_eq!(records[1].1.header, mark(11));
    let RecordBody::Note(note) = records[1].1.body else {
        panic!("a mark has a note");
    };
    assert_eq!(note, b"before the upgrade");
    let expected = plain(2, 5 * 4096);
    let mut found = Vec::new();
    for slot in records[2].1.slots(accepted.header.identity.history) {
        let (_, context, slot) = slot.unwrap();
        let mut part = vec![0; slot.header.plain_len()];
        opener().open(&context, &slot, &mut part).unwrap();
        found.extend(part);
    }
    assert_eq!(found, expected);
    assert_eq!(
        view.slot_offsets().count(),
        built.header.slot_count as usize
    );
}

#[test]
fn every_flipped_byte_is_refused() {
    let built = frame(3, 1);
    for place in 0..built.bytes.len() {
        let mut bytes = built.bytes.clone();
        bytes[place] ^= 1 << (place % 8);
        assert!(Frame::accept(bytes).is_err(), "byte {place}");
    }
    for len in 0..built.bytes.len() {
        assert!(
            Frame::accept(built.bytes[..len].to_vec()).is_err(),
            "cut to {len}"
        );
    }
    let mut longer = built.bytes.clone();
    longer.extend_from_slice(&[0; 8]);
    assert!(Frame::accept(longer).is_err());
}

#[test]
fn a_bad_slot_is_named_and_the_rest_keeps_its_numbers() {
    let built = frame(5, 1);
    let offsets: Vec<_> = built.view().slot_offsets().collect();
    for (slot, at) in offsets.iter().enumerate() {
        let mut bytes = built.bytes.clone();
        bytes[at + 200] ^= 1;
        let view = FrameView::parse(&bytes).unwrap();
        assert!(view.verify().is_err());
        let bad = view.verify_skeleton().unwrap();
        assert_eq!(bad.len(), 1);
        assert_eq!((bad[0].slot as usize, bad[0].disk), (slot, DISK));
        assert_eq!(view.slot_offsets().collect::<Vec<_>>(), offsets);
    }
    // A slot whose header is bad hides the rest of its record, but no other number.
    let mut bytes = built.bytes.clone();
    bytes[offsets[0]] = 77;
    let view = FrameView::parse(&bytes).unwrap();
    let found: Vec<_> = view.slot_offsets().collect();
    assert_eq!(found.len(), offsets.len());
    let first = built.view().records().next().unwrap().unwrap().1.slot_count;
    assert_eq!(found[usize::from(first)..], offsets[usize::from(first)..]);
}

fn build(records: &[RecordHeader], is_bulk: bool) -> Frame {
    let mut sealer = sealer(1);
    let mut builder = FrameBuilder::new(identity(1), is_bulk);
    for record in records {
        if record.kind.has_slots() {
            let bytes = plain(1, usize::try_from(record.length).unwrap());
            builder.push_data(record, &bytes, &mut sealer);
        } else {
            builder.push_note(record, &[]);
        }
    }
    builder.finish()
}

#[test]
fn records_must_be_in_order() {
    let ordered = |lsns: &[u64]| {
        let records: Vec<_> = lsns.iter().map(|lsn| write(*lsn, 0, 4096)).collect();
        Frame::accept(build(&records, false).bytes)
    };
    ordered(&[4, 5, 6]).unwrap();
    for wrong in [[4, 4], [4, 6], [5, 4]] {
        assert!(ordered(&wrong).is_err(), "{wrong:?}");
    }
    let bulk = |lsn| RecordHeader {
        kind: RecordKind::Bulk,
        batch: BatchId(1),
        ..write(lsn, 0, 4096)
    };
    Frame::accept(build(&[bulk(4), bulk(4), bulk(9)], true).bytes).unwrap();
    assert!(Frame::accept(build(&[bulk(4), bulk(3)], true).bytes).is_err());
    assert!(Frame::accept(build(&[bulk(4)], false).bytes).is_err());
    assert!(Frame::accept(build(&[write(4, 0, 4096)], true).bytes).is_err());
    let epoch = RecordHeader {
        kind: RecordKind::EpochStart,
        disk: DiskId::NIL,
        argument: 3,
        ..write(9, 0, 0)
    };
    Frame::accept(build(&[epoch, write(10, 0, 4096)], false).bytes).unwrap();
    assert!(Frame::accept(build(&[write(8, 0, 4096), epoch], false).bytes).is_err());
}

#[test]
fn a_full_frame_stays_below_its_bound() {
    let mut sealer = sealer(1);
    sealer.set_effort(crate::Effort::None);
    let mut builder = FrameBuilder::new(identity(1), false);
    let mut noise = vec![0; 1 << 20];
    afterimage_blockdev::Random::new(1).fill(&mut noise);
    let mut lsn = 1;
    while builder.fits(noise.len()) {
        builder.push_data(&write(lsn, 4096, noise.len()), &noise, &mut sealer);
        lsn += 1;
    }
    let frame = builder.finish();
    assert!(frame.bytes.len() <= FRAME_BYTES_MAX && lsn > 14);
    Frame::accept(frame.bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_bytes_are_refused_and_never_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6),
    ) {
        let built = frame(7, 100);
        let mut bytes = built.bytes.clone();
        for (place, change) in &changes {
            bytes[place.index(built.bytes.len())] ^= change;
        }
        prop_assume!(bytes != built.bytes);
        if let Ok(view) = FrameView::parse(&bytes) {
            let _skeleton = view.verify_skeleton();
            prop_assert!(view.slot_offsets().count() <= bytes.len() * 4);
        }
        prop_assert!(Frame::accept(bytes).is_err());
    }

    #[test]
    fn random_bytes_behind_a_good_header_never_panic(
        body in proptest::collection::vec(any::<u8>(), 0..2000),
        counts in any::<(u32, u32)>(),
    ) {
        let mut header = frame(7, 100).header;
        let len = body.len() / 8 * 8;
        header.body_len = crate::bytes::narrow(len);
        header.record_count = counts.0.max(1);
        header.slot_count = counts.1;
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(&body[..len]);
        prop_assert!(Frame::accept(bytes).is_err());
    }
}
