use afterimage_blockdev::Random;
use proptest::prelude::*;

use super::*;
use crate::testing::frame;

const IDENTITY: SegmentIdentity = SegmentIdentity {
    store: StoreId([0x51; 16]),
    segment: SegmentId(4),
    generation: 2,
};

fn header(sequence: u64, offset: usize) -> CommitHeader {
    CommitHeader {
        identity: IDENTITY,
        sequence,
        offset: offset as u64,
        length: 0,
        durable_through: sequence - 1,
        frame_count: 0,
        first_slot: 0,
        slot_count: 0,
        segment_first: 10,
    }
}

/// A segment of commits with 0 to 2 frames each, and where each commit begins.
fn segment(commits: u64) -> (Vec<u8>, Vec<usize>) {
    let first_sequence = 10;
    let time = Timestamp(1);
    let mut bytes = SegmentHeader {
        identity: IDENTITY,
        first_sequence,
        time,
    }
    .encode()
    .to_vec();
    let mut buffer = IoBuffer::zeroed(SECTOR);
    let mut starts = Vec::new();
    let mut slots = 0;
    for commit in 0..commits {
        let frames: Vec<_> = (0..commit % 3)
            .map(|n| frame(commit * 3 + n, commit * 100 + 1))
            .collect();
        let mut header = header(10 + commit, bytes.len());
        header.first_slot = slots;
        build_commit(&mut header, frames.iter(), &mut buffer);
        slots += header.slot_count;
        starts.push(bytes.len());
        bytes.extend_from_slice(&buffer);
    }
    (bytes, starts)
}

fn scan(bytes: &[u8]) -> (Vec<u64>, Vec<ScanEnd>) {
    let mut scan = SegmentScan::new(bytes, IDENTITY.store, IDENTITY.segment);
    let (mut found, mut ends) = (Vec::new(), Vec::new());
    while let Some(item) = scan.step() {
        match item {
            Ok(commit) => found.push(commit.header.sequence),
            Err(end) => ends.push(end),
        }
    }
    (found, ends)
}

#[test]
fn commits_come_back_in_order() {
    let (mut bytes, _) = segment(7);
    assert_eq!(scan(&bytes), ((10..17).collect(), vec![]));
    bytes.resize(bytes.len() + 3 * SECTOR, 0);
    let (found, ends) = scan(&bytes);
    assert_eq!(found, (10..17).collect::<Vec<_>>());
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].resumed, None);
}

#[test]
fn a_bad_commit_hides_no_other() {
    let (bytes, starts) = segment(9);
    for (bad, start) in starts.iter().enumerate() {
        for place in [0, 30, 50, 100, 120, 140, 200, 290] {
            let mut bytes = bytes.clone();
            bytes[start + place] ^= 4;
            let (found, ends) = scan(&bytes);
            let missing = 10 + bad as u64;
            assert_eq!(
                found,
                (10..19).filter(|s| *s != missing).collect::<Vec<_>>()
            );
            assert_eq!(ends[0].offset, *start as u64);
        }
    }
}

#[test]
fn a_commit_of_another_place_is_refused() {
    let (bytes, starts) = segment(5);
    let commit = &bytes[starts[2]..starts[3]];
    CommitView::accept(commit, starts[2] as u64).unwrap();
    assert!(CommitView::accept(commit, starts[3] as u64).is_err());
    let mut scan = SegmentScan::new(&bytes, IDENTITY.store, SegmentId(5));
    assert!(scan.header.is_err());
    assert!(matches!(scan.step(), Some(Err(_))));
    assert!(scan.step().is_none());
    let scan = SegmentScan::new(&bytes, StoreId([1; 16]), IDENTITY.segment).step();
    assert!(matches!(scan, Some(Err(_))));
}

#[test]
fn a_slot_that_looks_like_a_commit_is_not_taken_for_one() {
    // A writer may choose what its slots hold: here, a whole commit at a place that is aligned.
    let (forged, starts) = segment(3);
    let commit = &forged[starts[1]..starts[2]];
    let mut noise = vec![0; 64 << 10];
    Random::new(1).fill(&mut noise);
    let mut sealer = crate::Sealer::new(
        None,
        crate::testing::TAG,
        &afterimage_blockdev::simulated::SeededEntropy::new(1),
    );
    sealer.set_effort(crate::Effort::None);
    // The slot's plain bytes are stored raw: header 160 + 80, slot header 72 + 64.
    let inside = COMMIT_HEADER_BYTES + 160 + 80 + 72 + 64;
    let at = 2 * SECTOR - inside;
    let mut forged = commit.to_vec();
    let mut head = header(500, SECTOR + 2 * SECTOR);
    head.segment_first = 10;
    let mut buffer = IoBuffer::zeroed(SECTOR);
    build_commit(&mut head, std::iter::empty(), &mut buffer);
    forged[..SECTOR].copy_from_slice(&buffer);
    noise[at..at + SECTOR].copy_from_slice(&forged[..SECTOR]);
    let mut builder = crate::FrameBuilder::new(crate::testing::identity(1), false);
    let record = crate::testing::write(1, 0, 16384);
    builder.push_data(&record, &noise[..16384], &mut sealer);
    let frame = builder.finish();
    let time = Timestamp(1);
    let first_sequence = 10;
    let mut bytes = SegmentHeader {
        identity: IDENTITY,
        first_sequence,
        time,
    }
    .encode()
    .to_vec();
    for sequence in 10..13 {
        let mut head = header(sequence, bytes.len());
        let frames = [&frame];
        let some = frames.into_iter().filter(|_| sequence == 10);
        build_commit(&mut head, some, &mut buffer);
        bytes.extend_from_slice(&buffer);
    }
    let forged = &bytes[3 * SECTOR..];
    CommitView::accept(forged, 3 * SECTOR as u64).expect("the forgery is well made");
    for place in [0, 45, 60, 100] {
        let mut bytes = bytes.clone();
        bytes[SECTOR + place] ^= 1;
        assert_eq!(scan(&bytes).0, [11, 12], "header byte {place}");
    }
}

#[test]
fn headers_and_footers_come_back_and_notice_every_byte() {
    let header = SegmentHeader {
        identity: IDENTITY,
        first_sequence: 7,
        time: Timestamp(9),
    };
    let bytes = header.encode();
    assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
    let mut directory = Directory::default();
    directory.set(0, 4336);
    directory.set(2, 8192);
    let footer = Footer {
        identity: IDENTITY,
        first_sequence: 7,
        last_sequence: 9,
        directory_offset: 0,
        slot_count: 0,
        root: [3; 32],
        directory_hash: [0; 32],
    };
    let sealed = directory.encode(footer, 12288);
    assert_eq!(sealed.len() as u64, Directory::sealed_bytes(3));
    let at = sealed.len() - FOOTER_BYTES;
    let footer = Footer::decode(&sealed[at..]).unwrap();
    assert_eq!((footer.directory_offset, footer.slot_count), (12288, 3));
    let found = Directory::decode(&sealed, &footer).unwrap();
    assert_eq!(found, directory);
    assert_eq!(
        (found.get(0), found.get(1), found.get(3)),
        (Some(4336), None, None)
    );
    for place in 0..SECTOR {
        let mut changed = bytes.to_vec();
        changed[place] ^= 1;
        assert!(
            SegmentHeader::decode(&changed).is_err(),
            "header byte {place}"
        );
        let mut changed = sealed.to_vec();
        changed[at + place] ^= 1;
        assert!(
            Footer::decode(&changed[at..]).is_err(),
            "footer byte {place}"
        );
    }
    let mut changed = sealed.to_vec();
    changed[1] ^= 1;
    assert!(Directory::decode(&changed, &footer).is_err());
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let header = SegmentHeader {
        identity: IDENTITY,
        first_sequence: 7,
        time: Timestamp(9),
    };
    let mut bytes = header.encode();
    bytes[8] = 2;
    assert!(matches!(
        SegmentHeader::decode(&bytes),
        Err(Damage::Hash { .. })
    ));
    let hash = blake3::hash(&bytes[..HASH_AT]);
    put(&mut bytes, HASH_AT, hash.as_bytes());
    assert!(matches!(
        SegmentHeader::decode(&bytes),
        Err(Damage::Version { found: 2, .. })
    ));
}

#[test]
fn a_directory_can_be_found_again() {
    let (bytes, _) = segment(8);
    let directory = rebuild_directory(&bytes, IDENTITY.store, IDENTITY.segment);
    let mut scan = SegmentScan::new(&bytes, IDENTITY.store, IDENTITY.segment);
    let mut slot = 0;
    while let Some(Ok(commit)) = scan.step() {
        for at in commit.frames {
            for offset in scan.frame(at).unwrap().slot_offsets() {
                assert_eq!(directory.get(slot), Some(at + offset as u64));
                slot += 1;
            }
        }
    }
    assert_eq!(directory.offsets.len(), slot as usize);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_segments_never_panic(
        changes in proptest::collection::vec(
            (any::<prop::sample::Index>(), any::<u8>(), 1usize..600), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let (whole, _) = segment(6);
        let mut bytes = whole.clone();
        for (place, change, len) in &changes {
            let at = place.index(bytes.len());
            let end = (at + len).min(bytes.len());
            bytes[at..end].iter_mut().for_each(|byte| *byte ^= change);
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        let (found, _) = scan(&bytes);
        prop_assert!(found.is_sorted());
        let _directory = rebuild_directory(&bytes, IDENTITY.store, IDENTITY.segment);
        let seen = std::collections::HashSet::new();
        let region = Region {
            bytes: &bytes,
            from: SECTOR.min(bytes.len()),
            to: bytes.len(),
            identity: IDENTITY,
            segment_first: 10,
            first_sequence: 10,
            last_sequence: 15,
            first_slot: Some(0),
            next_slot: None,
            identities: &seen,
        };
        for commit in salvage(&region) {
            for piece in commit.pieces {
                if let Piece::Whole { frame, .. } = piece {
                    prop_assert!(frame.view().verify_skeleton().is_ok());
                }
            }
        }
    }

    #[test]
    fn random_sectors_never_panic(seed in any::<u64>()) {
        let mut bytes = vec![0; 4 * SECTOR];
        Random::new(seed).fill(&mut bytes);
        bytes[SECTOR..SECTOR + 8].copy_from_slice(COMMIT_MAGIC);
        prop_assert_eq!(scan(&bytes).0.len(), 0);
        let _header = SegmentHeader::decode(&bytes);
        let _footer = Footer::decode(&bytes);
    }
}

/// Fuzzing made hashes fit around extreme numbers: readers counted slots and sequences past the end
/// of numbers, and the program ended. No reader gets to see them now.
#[test]
fn numbers_with_no_room_to_count_on_are_refused() {
    let frames = [frame(1, 1)];
    let mut buffer = IoBuffer::zeroed(SECTOR);
    let mut accept = |change: fn(&mut CommitHeader)| {
        let mut header = header(12, 0);
        change(&mut header);
        build_commit(&mut header, frames.iter(), &mut buffer);
        CommitView::accept(&buffer, 0).is_ok()
    };
    assert!(accept(|_| {}));
    assert!(!accept(|header| header.first_slot = u32::MAX));
    assert!(!accept(|header| header.first_slot = u32::MAX - 3));
    assert!(!accept(|header| header.segment_first = 0));
    assert!(!accept(|header| header.sequence = u64::MAX));
    let segment = |first_sequence| SegmentHeader {
        identity: IDENTITY,
        first_sequence,
        time: Timestamp(1),
    };
    assert!(SegmentHeader::decode(&segment(1).encode()).is_ok());
    assert!(SegmentHeader::decode(&segment(0).encode()).is_err());
    assert!(SegmentHeader::decode(&segment(u64::MAX).encode()).is_err());
    let footer = |first_sequence, last_sequence| {
        let footer = Footer {
            identity: IDENTITY,
            first_sequence,
            last_sequence,
            directory_offset: 0,
            slot_count: 0,
            root: [0; 32],
            directory_hash: [0; 32],
        };
        let bytes = Directory::default().encode(footer, 8192);
        Footer::decode(&bytes).is_ok()
    };
    assert!(footer(1, 0) && footer(5, 9));
    assert!(!footer(0, 9) && !footer(5, u64::MAX));
}
