use proptest::prelude::*;

use super::*;
use crate::testing::{DISK, HISTORY, mark, write};

#[test]
fn cells_cover_a_range_once() {
    for offset in 0..9u64 {
        for blocks in 1..14u64 {
            let (from, length) = (offset * 4096, blocks * 4096);
            let cells: Vec<_> = cells(from, length).collect();
            assert_eq!(cells.len() as u64, cell_count(from, length));
            let mut covered = Vec::new();
            for (cell, mask) in cells {
                assert!(mask > 0 && mask < 16);
                covered.extend(
                    (0..4)
                        .filter(|bit| mask >> bit & 1 == 1)
                        .map(|bit| cell.0 * 4 + bit),
                );
            }
            assert_eq!(covered, (offset..offset + blocks).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_note_comes_back_and_is_checked() {
    let note = b"a note of odd length";
    let mut bytes = mark(9).encode(0, narrow_len(note), note).to_vec();
    bytes.extend_from_slice(note);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let (record, len) = RecordView::parse(&bytes).unwrap();
    assert_eq!((record.header, len), (mark(9), bytes.len()));
    assert_eq!(record.note(), note);
    record.verify_header().unwrap();
    record.verify_padding().unwrap();
    for place in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[place] ^= 0x10;
        let Ok((record, _)) = RecordView::parse(&changed) else {
            continue;
        };
        let is_refused = record.verify_header().is_err() || record.verify_padding().is_err();
        assert!(is_refused, "byte {place}");
    }
}

fn narrow_len(note: &[u8]) -> u32 {
    crate::bytes::narrow(note.len())
}

#[test]
fn impossible_fields_are_refused() {
    let legal = write(5, 4096, 8192);
    let refused = [
        RecordHeader {
            offset: 4097,
            ..legal
        },
        RecordHeader { length: 0, ..legal },
        RecordHeader {
            length: 4097,
            ..legal
        },
        RecordHeader {
            length: WRITE_BYTES_MAX + 4096,
            ..legal
        },
        RecordHeader {
            offset: u64::MAX - 4095,
            ..legal
        },
        RecordHeader {
            previous: Lsn(5),
            ..legal
        },
        RecordHeader {
            disk: DiskId::NIL,
            ..legal
        },
    ];
    let slots = |header: &RecordHeader| u16::try_from(cell_count(4096, 8192)).map(|n| (n, *header));
    let parse = |header: &RecordHeader| {
        let (count, header) = slots(header).unwrap();
        let mut bytes = header.encode(count, 8, &[]).to_vec();
        bytes.resize(bytes.len() + 8, 0);
        RecordView::parse(&bytes).map(|_| ())
    };
    parse(&legal).unwrap();
    for header in refused {
        assert!(parse(&header).is_err(), "{header:?}");
    }
    let _same_disk = DISK;
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
        kind in 0u8..40,
    ) {
        if let Some(place) = bytes.get_mut(56) {
            *place = kind;
        }
        if let Ok((record, len)) = RecordView::parse(&bytes) {
            prop_assert!(len <= bytes.len());
            let _bad = record.verify_header();
            prop_assert!(record.slots(HISTORY).count() <= 1 + usize::from(record.slot_count));
        }
    }
}

/// What follows an LSN is counted from it, so the last ones are nobody's.
#[test]
fn an_lsn_with_no_room_to_count_on_is_refused() {
    let decodes = |lsn: Lsn| {
        let header = RecordHeader { lsn, ..mark(1) };
        RecordView::parse(&header.encode(0, 0, &[])).is_ok()
    };
    assert!(decodes(Lsn(LSN_MAX.0 - 1)));
    assert!(!decodes(LSN_MAX) && !decodes(Lsn(u64::MAX)));
}
