//! Keys, slots, records and frames.

use std::cell::RefCell;
use std::sync::Arc;

use afterimage_blockdev::simulated::SeededEntropy;
use afterimage_blockdev::{CellIndex, DiskId, HistoryId, KeyId, Lsn, Random};
use afterimage_cache::bytes::{array, get_u32, put};
use afterimage_cache::frame::{FRAME_HEADER_BYTES, FrameHeader};
use afterimage_cache::key::{WRAPPED_BYTES, unwrap, wrap};
use afterimage_cache::record::RECORD_HEADER_BYTES;
use afterimage_cache::seal::Effort;
use afterimage_cache::{
    DiskKey, Frame, FrameView, KeySource, Opener, RecordBody, RecordView, Sealer, SlotContext,
    SlotView, TagKey,
};

use super::{Target, Verdict};
use crate::frames::{FrameMaker, disk_key};

const DISK: DiskId = DiskId([0xd1; 16]);
const HISTORY: HistoryId = HistoryId([0x41; 16]);
const STORE_KEY: [u8; 32] = [9; 32];
/// Where the hash stands in a slot's header.
const SLOT_HASH_AT: usize = 40;
const RECORD_CHECK_AT: usize = 76;
const FRAME_HASH_AT: usize = 128;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(100_000, "key", make_key, run_key).mended_by(mend_key),
        Target::new(60_000, "slot", make_slot, run_slot).mended_by(mend_slot),
        Target::new(100_000, "record", make_record, run_record).mended_by(|bytes, _| {
            let history = array(bytes, 0).map(HistoryId);
            if let (Some(history), Some(record)) = (history, bytes.get_mut(16..)) {
                mend_record(record, history);
            }
        }),
        Target::new(40_000, "frame", make_frame, run_frame).mended_by(|bytes, random| {
            let len = u32::try_from(bytes.len().saturating_sub(FRAME_HEADER_BYTES));
            if let Ok(len) = len
                && bytes.len() >= FRAME_HEADER_BYTES
                && random.chance(0.5)
            {
                put(bytes, 12, &len.to_le_bytes());
            }
            mend_frame(bytes, random);
        }),
    ]
}

struct EveryDisk;

impl KeySource for EveryDisk {
    fn disk_key(&self, _: DiskId, id: KeyId) -> Option<DiskKey> {
        (id == disk_key().id).then(disk_key)
    }
}

thread_local! {
    static OPENER: RefCell<Opener> = RefCell::new(Opener::new(Arc::new(EveryDisk)));
}

/// Opens a slot; the plain bytes do not matter.
fn opens(context: &SlotContext, slot: &SlotView<'_>) -> bool {
    let mut plain = vec![0; slot.header.plain_len()];
    OPENER.with_borrow_mut(|opener| opener.open(context, slot, &mut plain).is_ok())
}

// --- Keys ----------------------------------------------------------------------------------

fn make_key(random: &mut Random) -> Vec<u8> {
    let mut secret = [0; 32];
    random.fill(&mut secret);
    let id = KeyId(1);
    let entropy = SeededEntropy::new(random.next_u64());
    wrap(&STORE_KEY, DISK, &DiskKey { id, secret }, &entropy).to_vec()
}

/// Wraps what stands where the secret does.
fn mend_key(bytes: &mut Vec<u8>, random: &mut Random) {
    let Some(secret) = array(bytes, 12) else {
        return;
    };
    let id = KeyId(1);
    let entropy = SeededEntropy::new(random.next_u64());
    *bytes = wrap(&STORE_KEY, DISK, &DiskKey { id, secret }, &entropy).to_vec();
}

fn run_key(bytes: &[u8]) -> Verdict {
    let Ok(wrapped) = <&[u8; WRAPPED_BYTES]>::try_from(bytes) else {
        return Verdict::Refused;
    };
    let other_disk = unwrap(&STORE_KEY, DiskId([1; 16]), KeyId(1), wrapped);
    let other_key = unwrap(&STORE_KEY, DISK, KeyId(2), wrapped);
    assert!(
        other_disk.is_none() && other_key.is_none(),
        "a key of another disk"
    );
    Verdict::of(unwrap(&STORE_KEY, DISK, KeyId(1), wrapped).is_some())
}

// --- Slots ---------------------------------------------------------------------------------

fn context(mask: u8) -> SlotContext {
    SlotContext::uniform(DISK, HISTORY, CellIndex(77), mask, Lsn(1234))
}

/// A slot of random blocks, sealed in its context.
pub(super) fn sealed(context: &SlotContext, random: &mut Random) -> Vec<u8> {
    let entropy = SeededEntropy::new(random.next_u64());
    // Without a key there is no cipher between the fuzzer and the decompressor.
    let key = random.chance(0.5).then(disk_key);
    let mut sealer = Sealer::new(key.as_ref(), TagKey([3; 32]), &entropy);
    if random.chance(0.2) {
        sealer.set_effort(Effort::None);
    }
    let mut plain = vec![0; context.mask.count_ones() as usize * 4096];
    if random.chance(0.9) {
        let stride = 64 + random.index(2000);
        for part in plain.chunks_mut(stride) {
            let len = part.len().min(40);
            random.fill(&mut part[..len]);
        }
    }
    let mut bytes = Vec::new();
    sealer.seal(context, &plain, &mut bytes);
    bytes
}

fn make_slot(random: &mut Random) -> Vec<u8> {
    let mask = u8::try_from(1 + random.below(15)).expect("below 16");
    sealed(&context(mask), random)
}

fn mend_slot(bytes: &mut Vec<u8>, _: &mut Random) {
    let Ok(slot) = SlotView::parse(bytes) else {
        return;
    };
    let hash = slot
        .header
        .compute_hash(&context(slot.header.mask), slot.stored);
    put(bytes, SLOT_HASH_AT, &hash);
}

fn run_slot(bytes: &[u8]) -> Verdict {
    let Ok(slot) = SlotView::parse(bytes) else {
        return Verdict::Refused;
    };
    let mut again = Vec::new();
    slot.header.encode_into(&mut again);
    assert_eq!(
        again,
        bytes[..slot.header.header_len()],
        "the header comes back"
    );
    let context = context(slot.header.mask);
    let is_whole = slot.verify(&context).is_ok() && slot.verify_padding().is_ok();
    let is_open = opens(&context, &slot);
    assert!(
        is_whole || !is_open || slot.verify(&context).is_ok(),
        "opened what does not verify"
    );
    Verdict::of(is_whole && is_open)
}

// --- Records -------------------------------------------------------------------------------

/// The history, and a record of it.
fn make_record(random: &mut Random) -> Vec<u8> {
    let frame = FrameMaker::new(random.next_u64()).next_frame(1);
    let mut bytes = frame.header.identity.history.0.to_vec();
    bytes.extend_from_slice(&frame.bytes[FRAME_HEADER_BYTES..]);
    bytes
}

/// Makes the hashes of a record's slots fit, and its own check. Gives back its length, what a
/// frame's hash covers of it, and the number of its slots.
fn mend_record(bytes: &mut [u8], history: HistoryId) -> Option<(usize, Vec<u8>, u32)> {
    let (record, len) = RecordView::parse(bytes).ok()?;
    let hashes: Vec<(usize, [u8; 32])> = record
        .slots(history)
        .map_while(Result::ok)
        .map(|(at, context, slot)| {
            let hash = slot.header.compute_hash(&context, slot.stored);
            (RECORD_HEADER_BYTES + at + SLOT_HASH_AT, hash)
        })
        .collect();
    let note = record.note().to_vec();
    for (at, hash) in &hashes {
        put(bytes, *at, hash);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..RECORD_CHECK_AT]);
    hasher.update(&note);
    put(bytes, RECORD_CHECK_AT, &hasher.finalize().as_bytes()[..4]);
    let mut covered = bytes[..RECORD_HEADER_BYTES].to_vec();
    covered.extend_from_slice(&note);
    for (_, hash) in &hashes {
        covered.extend_from_slice(hash);
    }
    Some((len, covered, u32::try_from(hashes.len()).ok()?))
}

fn run_record(bytes: &[u8]) -> Verdict {
    let (Some(history), Some(bytes)) = (array(bytes, 0).map(HistoryId), bytes.get(16..)) else {
        return Verdict::Refused;
    };
    let Ok((record, len)) = RecordView::parse(bytes) else {
        return Verdict::Refused;
    };
    assert!(len <= bytes.len(), "a record lies within its bytes");
    let is_whole = record.verify_header().is_ok() && record.verify_padding().is_ok();
    let mut is_good = is_whole;
    for slot in record.slots(history) {
        is_good &= slot.is_ok_and(|(_, context, slot)| opens(&context, &slot));
    }
    if is_whole {
        let (body_len, note) = match record.body {
            RecordBody::Slots(body) => (body.len(), &[][..]),
            RecordBody::Note(note) => (note.len(), note),
        };
        let body_len = u32::try_from(body_len).expect("within a frame");
        let again = record.header.encode(record.slot_count, body_len, note);
        assert_eq!(again, bytes[..RECORD_HEADER_BYTES], "the header comes back");
    }
    Verdict::of(is_good)
}

// --- Frames --------------------------------------------------------------------------------

fn make_frame(random: &mut Random) -> Vec<u8> {
    FrameMaker::new(random.next_u64()).next_frame(4).bytes
}

/// Makes all hashes of a frame fit, and in half of the cases its counts and LSNs. Gives back the
/// frame's length.
pub(super) fn mend_frame(bytes: &mut [u8], random: &mut Random) -> Option<usize> {
    let header = FrameHeader::decode(bytes).ok()?;
    let end = header.frame_len().min(bytes.len());
    let mut covered = Vec::new();
    let mut lsns = None;
    let (mut at, mut records, mut slots) = (FRAME_HEADER_BYTES, 0u32, 0u32);
    while at < end {
        let mended = mend_record(&mut bytes[at..end], header.identity.history);
        let Some((len, part, count)) = mended else {
            break;
        };
        let lsn: [u8; 8] = array(&part, 0)?;
        lsns = Some((lsns.map_or(lsn, |(first, _)| first), lsn));
        covered.extend(part);
        records += 1;
        slots += count;
        at += len;
    }
    if let Some((first, last)) = lsns.filter(|_| random.chance(0.5)) {
        put(bytes, 72, &first);
        put(bytes, 80, &last);
        put(bytes, 88, &records.to_le_bytes());
        put(bytes, 92, &slots.to_le_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..FRAME_HASH_AT]);
    hasher.update(&covered);
    put(bytes, FRAME_HASH_AT, hasher.finalize().as_bytes());
    Some(end)
}

fn run_frame(bytes: &[u8]) -> Verdict {
    // What a damaged segment is asked of, whether it verifies or not.
    if let Ok(view) = FrameView::parse(bytes) {
        let places = view.slot_offsets().filter(|at| *at > 0);
        assert!(
            places.max().unwrap_or(0) < view.bytes.len(),
            "a slot beyond its frame"
        );
        let _damaged = view.verify_skeleton();
    }
    let Ok(frame) = Frame::accept(bytes.to_vec()) else {
        return Verdict::Refused;
    };
    let history = frame.header.identity.history;
    let (mut records, mut slots) = (0, 0);
    for record in frame.view().records() {
        let (_, record) = record.expect("an accepted frame is walked to its end");
        records += 1;
        for slot in record.slots(history) {
            let (_, context, slot) = slot.expect("an accepted frame has whole slots");
            let _may_fail = opens(&context, &slot);
            slots += 1;
        }
    }
    assert_eq!(
        (records, slots),
        (frame.header.record_count, frame.header.slot_count)
    );
    assert_eq!(get_u32(bytes, 88), Some(records));
    Verdict::Accepted
}
