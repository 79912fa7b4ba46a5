use std::collections::HashSet;

use afterimage_blockdev::simulated::SeededEntropy;
use afterimage_blockdev::{CellIndex, DiskId, HistoryId, Lsn};
use proptest::prelude::*;

use super::*;
use crate::slot::SLOT_BYTES_MAX;
use crate::testing::{DISK, TAG, context, key, opener, plain, sealer};

fn seal(effort: Effort, mask: u8, bytes: &[u8]) -> Vec<u8> {
    let mut sealer = sealer(1);
    sealer.set_effort(effort);
    let mut out = Vec::new();
    sealer.seal(&context(mask), bytes, &mut out);
    assert!(out.len() <= SLOT_BYTES_MAX && out.len().is_multiple_of(8));
    out
}

fn open(context: &SlotContext, bytes: &[u8]) -> Result<Vec<u8>, Damage> {
    let slot = SlotView::parse(bytes)?;
    let mut plain = vec![0xee; slot.header.plain_len()];
    opener().open(context, &slot, &mut plain)?;
    Ok(plain)
}

/// A slot with the right hash around bytes of the test's choice, as a hostile writer makes it.
fn forge(codec: Codec, stored: &[u8], key: KeyId) -> Vec<u8> {
    let mut header = SlotHeader {
        codec,
        blocks: 4,
        mask: 15,
        stored_len: narrow(stored.len()),
        key,
        salt: [1; 16],
        counter: 0,
        hash: [0; 32],
        tags: [[0; 16]; 4],
    };
    header.hash = header.compute_hash(&context(15), stored);
    let mut bytes = Vec::new();
    header.encode_into(&mut bytes);
    bytes.extend_from_slice(stored);
    bytes.resize(header.slot_len(), 0);
    bytes
}

#[test]
fn what_is_sealed_opens_again() {
    for mask in 1..16 {
        let len = context(mask).mask.count_ones() as usize * BLOCK_BYTES;
        for bytes in [plain(7, len), vec![0; len], {
            let mut noise = vec![0; len];
            SeededEntropy::new(3).fill(&mut noise);
            noise
        }] {
            for effort in [
                Effort::None,
                Effort::Zstd(-5),
                Effort::Zstd(1),
                Effort::Zstd(3),
            ] {
                let sealed = seal(effort, mask, &bytes);
                assert_eq!(open(&context(mask), &sealed).unwrap(), bytes);
            }
        }
    }
}

#[test]
fn zeroes_take_a_header_only_and_noise_is_stored_raw() {
    let zero = seal(Effort::Zstd(1), 15, &vec![0; 4 * BLOCK_BYTES]);
    assert_eq!(zero.len(), 72 + 4 * 16);
    let mut noise = vec![0; BLOCK_BYTES];
    SeededEntropy::new(4).fill(&mut noise);
    let sealed = seal(Effort::Zstd(1), 1, &noise);
    assert_eq!(SlotView::parse(&sealed).unwrap().header.codec, Codec::Raw);
}

#[test]
fn a_slot_opens_in_its_own_context_only() {
    let bytes = plain(1, 2 * BLOCK_BYTES);
    let sealed = seal(Effort::Zstd(1), 0b0110, &bytes);
    let right = context(0b0110);
    let others = [
        SlotContext {
            disk: DiskId([1; 16]),
            ..right
        },
        SlotContext {
            history: HistoryId([1; 16]),
            ..right
        },
        SlotContext {
            cell: CellIndex(78),
            ..right
        },
        SlotContext {
            mask: 0b0011,
            ..right
        },
        SlotContext::uniform(right.disk, right.history, right.cell, 0b0110, Lsn(1235)),
    ];
    for other in others {
        assert_eq!(
            open(&other, &sealed),
            Err(Damage::Hash { structure: "slot" })
        );
    }
}

#[test]
fn a_wrong_or_missing_key_is_refused() {
    struct Wrong;
    impl KeySource for Wrong {
        fn disk_key(&self, disk: DiskId, id: KeyId) -> Option<DiskKey> {
            let secret = [6; 32];
            (disk == DISK).then_some(DiskKey { id, secret })
        }
    }
    struct Nothing;
    impl KeySource for Nothing {
        fn disk_key(&self, _: DiskId, _: KeyId) -> Option<DiskKey> {
            None
        }
    }
    let sealed = seal(Effort::Zstd(1), 1, &plain(1, BLOCK_BYTES));
    let slot = SlotView::parse(&sealed).unwrap();
    let mut out = vec![0; BLOCK_BYTES];
    let wrong = Opener::new(Arc::new(Wrong)).open(&context(1), &slot, &mut out);
    assert_eq!(wrong, Err(Damage::Cipher));
    let missing = Opener::new(Arc::new(Nothing)).open(&context(1), &slot, &mut out);
    assert_eq!(missing, Err(Damage::KeyMissing { disk: DISK, key: 1 }));
}

#[test]
fn a_nonce_is_never_used_twice() {
    let mut seen = HashSet::new();
    for seed in 0..4 {
        let mut sealer = Sealer::new(Some(&key()), TAG, &SeededEntropy::new(seed));
        for round in 0..500u64 {
            let mut out = Vec::new();
            let zero = round.is_multiple_of(7);
            let bytes = if zero {
                vec![0; BLOCK_BYTES]
            } else {
                plain(round, BLOCK_BYTES)
            };
            sealer.seal(&context(1), &bytes, &mut out);
            let header = SlotView::parse(&out).unwrap().header;
            assert!(seen.insert((header.salt, header.counter)));
        }
    }
}

#[test]
fn a_compressed_frame_cannot_make_the_output_grow() {
    // 64 MiB of zeroes compress to a few kilobytes, which claim their true size.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    assert!(bomb.len() < CELL_BYTES);
    let expected = CELL_BYTES;
    let result = open(&context(15), &forge(Codec::Zstd, &bomb, KeyId(0)));
    assert_eq!(result, Err(Damage::Decompress { expected }));
    let short = zstd::bulk::compress(&[1; 100], 1).unwrap();
    let result = open(&context(15), &forge(Codec::Zstd, &short, KeyId(0)));
    assert_eq!(result, Err(Damage::Decompress { expected }));
    let result = open(&context(15), &forge(Codec::Zstd, &[7; 100], KeyId(0)));
    assert_eq!(result, Err(Damage::Decompress { expected }));
}

#[test]
fn the_openers_memory_of_sessions_is_bounded() {
    let mut opener = opener();
    let mut out = vec![0; BLOCK_BYTES];
    for seed in 0..600 {
        let mut sealed = Vec::new();
        let bytes = plain(seed, BLOCK_BYTES);
        sealer(seed).seal(&context(1), &bytes, &mut sealed);
        let slot = SlotView::parse(&sealed).unwrap();
        opener.open(&context(1), &slot, &mut out).unwrap();
        assert_eq!(out, bytes);
        assert!(opener.sessions.len() <= SESSIONS_MAX);
    }
}

proptest! {
    #[test]
    fn a_changed_byte_is_noticed(place in 0usize..1 << 20, change in 1u8..) {
        let bytes = plain(2, 3 * BLOCK_BYTES);
        let mut sealed = seal(Effort::Zstd(1), 0b1101, &bytes);
        let place = place % sealed.len();
        sealed[place] ^= change;
        let slot = SlotView::parse(&sealed);
        let opened = open(&context(0b1101), &sealed);
        match opened {
            Err(_) => {}
            Ok(opened) => {
                // Padding carries nothing; whoever takes bytes in checks it.
                prop_assert_eq!(opened, bytes);
                prop_assert!(slot.unwrap().verify_padding().is_err());
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _refused = open(&context(15), &bytes);
    }

    #[test]
    fn a_likely_header_never_panics(
        mut bytes in proptest::collection::vec(any::<u8>(), 200..400),
        codec in 0u8..3,
        mask in 1u8..16,
        stored in 0u32..300,
    ) {
        let blocks = mask.count_ones().to_le_bytes()[0];
        bytes[0] = codec;
        bytes[1] = blocks;
        bytes[2] = mask;
        bytes[3] = 0;
        bytes[4..8].copy_from_slice(&stored.to_le_bytes());
        bytes[12..16].copy_from_slice(&(u32::from(blocks) * 4096).to_le_bytes());
        let _refused = open(&context(mask), &bytes);
    }
}
