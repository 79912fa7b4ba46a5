//! Whole files of a store: manifest, seed segment, run.

use afterimage_blockdev::{
    CellIndex, DiskId, HistoryId, Lsn, MemoryStorage, Random, SegmentId, SlotIndex, Storage,
    StorageError, StorageOp, StorageOutcome, Timestamp, wait,
};
use afterimage_cache::bytes::{array, get_u32, get_u64, index, put};
use afterimage_cache::{SlotContext, SlotView};
use afterimage_seed::engine::StoreFile;
use afterimage_seed::manifest::{Edit, Manifest, ManifestOutput, manifest_file};
use afterimage_seed::run::{
    self, RunFooter, RunId, SectionContent, SectionName, TimeSample, decode_page, encode_run,
    place_of, run_file,
};
use afterimage_seed::segment::{self, SeedFooter, SeedSegmentBuilder, seed_file};
use afterimage_seed::verify::{Verification, verify_file};
use afterimage_seed::{Entry, EntryKind, RangeEntry};

use super::cache::sealed;
use super::log::put_file;
use super::store::stores;
use super::{Target, Verdict};
use crate::log_rig::STORE;

const SECTOR: usize = 4096;
const SEGMENT: SegmentId = SegmentId(1 << 31 | 5);
const RUN: RunId = RunId(5);
const MANIFEST_MAGIC: &[u8] = b"AIMANIFE";
/// Steps of a recovery after which it is said never to end.
const STEPS_MAX: u32 = 10_000;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(
            8000,
            "manifest",
            |random| some_file("manifest", random),
            run_manifest,
        )
        .mended_by(mend_manifest)
        .with_memory(4 << 20, 64),
        Target::new(12_000, "seed-segment", make_segment, run_segment)
            .mended_by(mend_seed_segment)
            .with_memory(4 << 20, 64),
        Target::new(8000, "run", make_run, run_run)
            .mended_by(|bytes, random| mend_run_of(bytes, RUN.0, random))
            .with_memory(4 << 20, 64),
    ]
}

/// A file of a store that the engine wrote.
pub(super) fn some_file(directory: &str, random: &mut Random) -> Vec<u8> {
    stores(|stores| {
        let store = &stores[random.index(stores.len())];
        let files: Vec<_> = store
            .files
            .iter()
            .filter(|(name, _)| name.starts_with(directory))
            .collect();
        files[random.index(files.len())].1.clone()
    })
}

fn put_hash(bytes: &mut [u8], covered: core::ops::Range<usize>, at: usize) {
    if bytes.len() >= at + 32 && covered.end <= bytes.len() {
        let hash = blake3::hash(&bytes[covered]);
        put(bytes, at, hash.as_bytes());
    }
}

/// As [`put_hash`], of `len` bytes at a byte offset, which may not exist.
fn put_hash_of(bytes: &mut [u8], offset: u64, len: usize, at: usize) -> Option<()> {
    let offset = usize::try_from(offset).ok()?;
    let end = offset.checked_add(len).filter(|end| *end <= bytes.len())?;
    put_hash(bytes, offset..end, at);
    Some(())
}

/// The bytes as a medium gives them back: with zeroes up to the next sector.
fn aligned(bytes: &[u8]) -> Vec<u8> {
    let mut aligned = bytes.to_vec();
    aligned.resize(bytes.len().next_multiple_of(SECTOR), 0);
    aligned
}

/// Checks a file as `aft log verify` does.
fn verify(storage: &MemoryStorage, file: StoreFile) -> Verification {
    let mut found = Verification::default();
    verify_file(storage, STORE, file, &mut found).expect("memory can be read");
    found
}

// --- Manifest ------------------------------------------------------------------------------

/// Makes the hash of a commit fit, and mostly its number of edits; gives back its length.
pub(super) fn mend_manifest_commit(bytes: &mut [u8], random: &mut Random) -> Option<usize> {
    let end = 128usize.checked_add(index(get_u32(bytes, 12)?))?;
    if !bytes.starts_with(MANIFEST_MAGIC) || end > bytes.len() {
        return None;
    }
    if random.chance(0.8) {
        let (mut at, mut edits) = (128, 0u64);
        while at < end {
            let Some(len) = get_u32(bytes, at + 1) else {
                break;
            };
            at = at.saturating_add(5 + index(len));
            edits += 1;
        }
        put(bytes, 24, &edits.to_le_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..96]);
    hasher.update(&bytes[128..end]);
    put(bytes, 96, hasher.finalize().as_bytes());
    Some(end.next_multiple_of(SECTOR))
}

/// Makes hashes, and in most cases copies and chain, fit.
pub(super) fn mend_manifest(bytes: &mut Vec<u8>, random: &mut Random) {
    let (copies, chains) = (random.chance(0.8), random.chance(0.8));
    let mut last: Option<(u64, [u8; 32])> = None;
    let mut at = 0;
    while at + SECTOR <= bytes.len() {
        if let Some((sequence, hash)) = last.filter(|_| chains && bytes[at] == b'A') {
            put(bytes, at + 16, &sequence.wrapping_add(1).to_le_bytes());
            put(bytes, at + 32, &hash);
        }
        let Some(len) = mend_manifest_commit(&mut bytes[at..], random) else {
            at += SECTOR;
            continue;
        };
        last = get_u64(bytes, at + 16).zip(array(bytes, at + 96));
        if copies && at + 2 * len <= bytes.len() {
            bytes.copy_within(at..at + len, at + len);
            at += len;
        }
        at += len;
    }
}

fn perform(storage: &dyn Storage, op: StorageOp) -> Result<StorageOutcome, StorageError> {
    wait::storage(storage, op)
}

/// The edits of a manifest, when its recovery is done.
fn recover(storage: &MemoryStorage) -> Option<Vec<Edit>> {
    let mut manifest = Manifest::new(64 << 10);
    let mut out = Vec::new();
    manifest.start(&mut out);
    let mut edits = None;
    for _ in 0..STEPS_MAX {
        let mut wanted = None;
        for output in out.drain(..) {
            match output {
                ManifestOutput::Storage(op) => wanted = Some(op),
                ManifestOutput::Recovered(found) => edits = Some(found),
                ManifestOutput::Ready { is_new } => return edits.filter(|_| !is_new),
                ManifestOutput::Failed(_) => return None,
                _ => {}
            }
        }
        let op = wanted.expect("recovery asks for something, or ends");
        manifest.completed(perform(storage, op), &mut out);
    }
    panic!("recovery never ends");
}

fn run_manifest(bytes: &[u8]) -> Verdict {
    let storage = MemoryStorage::new();
    put_file(&*storage, manifest_file(7), bytes);
    let Some(edits) = recover(&storage) else {
        return Verdict::Refused;
    };
    // What was found was written once more: it must be found again.
    assert_eq!(
        recover(&storage),
        Some(edits),
        "a manifest is found as it was left"
    );
    Verdict::Accepted
}

// --- Seed segments -------------------------------------------------------------------------

fn make_segment(random: &mut Random) -> Vec<u8> {
    let mut builder = SeedSegmentBuilder::new(STORE, SEGMENT);
    let disks = [DiskId([1; 16]), DiskId([2; 16])];
    let mut at = 0;
    for cell in 0..random.below(6) {
        let disk = disks[random.index(2)];
        let mask = u8::try_from(1 + random.below(15)).expect("below 16");
        let lsn = Lsn(1 + random.below(1 << 40));
        let (history, cell) = (HistoryId([4; 16]), CellIndex(cell * 7));
        let context = SlotContext::uniform(disk, history, cell, mask, lsn);
        let bytes = sealed(&context, random);
        let slot = SlotView::parse(&bytes).expect("sealed here");
        // Slots between may have been left out.
        at += u32::try_from(random.below(3)).expect("below 3");
        builder.push_at(at, &context, &slot.header.hash, &bytes);
        at += 1;
    }
    let mut bytes = Vec::new();
    while let Some((_, part)) = builder.take_ready() {
        bytes.extend_from_slice(&part);
    }
    bytes.extend_from_slice(&builder.finish().1);
    bytes
}

pub(super) fn mend_seed_segment(bytes: &mut Vec<u8>, random: &mut Random) {
    put_hash(bytes, 0..64, 64);
    let Some(first) = bytes.len().checked_sub(segment::FOOTERS_BYTES) else {
        return;
    };
    if random.chance(0.5) {
        // Both copies say the same.
        let to = if random.chance(0.5) {
            first
        } else {
            first + SECTOR
        };
        let from = 2 * first + SECTOR - to;
        bytes.copy_within(from..from + SECTOR, to);
    }
    for at in [first, first + SECTOR] {
        let mend = |bytes: &mut [u8]| {
            let slots = index(get_u32(bytes, at + 36)?);
            let contexts = index(get_u32(bytes, at + 40)?);
            let entries = index(get_u32(bytes, at + 44)?);
            let len = slots * 4 + contexts * 32 + entries * 80;
            put_hash_of(bytes, get_u64(bytes, at + 48)?, len, at + 88)
        };
        mend(bytes);
        put_hash(bytes, at..at + 120, at + 120);
    }
}

fn run_segment(bytes: &[u8]) -> Verdict {
    let bytes = &aligned(bytes);
    let is_named = segment::check_header(bytes, STORE, SEGMENT).is_ok();
    let end = bytes.len().saturating_sub(segment::FOOTERS_BYTES);
    let footer = SeedFooter::find(&bytes[end..], STORE, SEGMENT);
    let mut is_good = is_named && footer.is_ok();
    if let Ok(footer) = footer
        && let Ok(at) = usize::try_from(footer.directory_offset)
    {
        let found = footer.find_directory(bytes.get(at..).unwrap_or(&[]));
        is_good &= found.is_ok();
        for entry in found.iter().flat_map(|(_, entries)| entries) {
            let offset = found
                .as_ref()
                .ok()
                .and_then(|(places, _)| places.get(entry.slot));
            let place = usize::try_from(offset.unwrap_or(0)).unwrap_or(usize::MAX);
            let view = SlotView::parse(bytes.get(place..).unwrap_or(&[]));
            is_good &= view.is_ok_and(|slot| slot.verify(&entry.context).is_ok());
        }
    }
    let storage = MemoryStorage::new();
    put_file(&*storage, seed_file(SEGMENT, 0), bytes);
    let found = verify(&storage, StoreFile::Seed(SEGMENT, 0));
    let is_whole = found.damage.is_empty();
    assert!(!is_whole || is_good, "verified what cannot be read");
    Verdict::of(is_good)
}

// --- Runs ----------------------------------------------------------------------------------

fn make_run(random: &mut Random) -> Vec<u8> {
    let sections: Vec<SectionContent> = (0..random.below(4))
        .map(|number| some_section(number, random))
        .collect();
    encode_run(STORE, RUN, &sections).0.to_vec()
}

fn some_section(number: u64, random: &mut Random) -> SectionContent {
    let most = [3, 180, 400][random.index(3)];
    let mut entries: Vec<Entry> = (0..random.below(most))
        .map(|_| Entry {
            cell: CellIndex(random.below(300)),
            lsn: Lsn(1 + random.below(5000)),
            mask: u8::try_from(1 + random.below(15)).expect("below 16"),
            first: 0,
            kind: [EntryKind::Data, EntryKind::Zero, EntryKind::Discard][random.index(3)],
            segment: SegmentId(1 + u32::try_from(random.below(9)).expect("below 9")),
            slot: SlotIndex(u32::try_from(random.below(99)).expect("below 99")),
        })
        .collect();
    entries.sort_by_key(Entry::key);
    entries.dedup_by_key(|entry| entry.key());
    let ranges = (0..random.below(4)).map(|place| RangeEntry {
        first: CellIndex(random.below(1000)),
        count: 1 + random.below(1 << 30),
        lsn: Lsn(1 + place),
        kind: EntryKind::Zero,
    });
    let ranges = ranges.collect();
    let timeline = (1..=random.below(6)).map(|place| TimeSample {
        time: Timestamp(place * 1_000_000),
        lsn: Lsn(place),
    });
    let id = u8::try_from(number).expect("few sections");
    SectionContent {
        name: SectionName {
            history: HistoryId([4; 16]),
            disk: DiskId([id + 1; 16]),
            is_base_part: random.chance(0.2),
        },
        entries,
        ranges,
        timeline: timeline.collect(),
        low: Lsn(1),
        high: Lsn(5000),
    }
}

pub(super) fn mend_run_of(bytes: &mut [u8], run: u32, random: &mut Random) {
    let Some(first) = bytes.len().checked_sub(run::FOOTERS_BYTES) else {
        return;
    };
    if random.chance(0.5) {
        let to = if random.chance(0.5) {
            first
        } else {
            first + SECTOR
        };
        let from = 2 * first + SECTOR - to;
        bytes.copy_within(from..from + SECTOR, to);
    }
    let mut tail = first;
    for at in [first, first + SECTOR] {
        let mend = |bytes: &mut [u8]| {
            let (offset, len) = (get_u64(bytes, at + 40)?, get_u64(bytes, at + 48)?);
            let len = usize::try_from(len).ok()?;
            put_hash_of(bytes, offset, len, at + 56)?;
            usize::try_from(offset).ok()
        };
        tail = tail.min(mend(bytes).unwrap_or(tail));
        put_hash(bytes, at..at + 96, at + 96);
    }
    for page in bytes[..tail].chunks_exact_mut(SECTOR).skip(1) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&run.to_le_bytes());
        hasher.update(&page[8..]);
        put(page, 0, &hasher.finalize().as_bytes()[..8]);
    }
}

fn run_run(bytes: &[u8]) -> Verdict {
    let bytes = &aligned(bytes);
    let is_named = run::check_header(bytes, STORE, RUN).is_ok();
    let end = bytes.len().saturating_sub(run::FOOTERS_BYTES);
    let footer = RunFooter::find(&bytes[end..], STORE, RUN);
    let mut is_good = is_named && footer.is_ok();
    if let Ok(footer) = footer
        && let Ok(tail) = usize::try_from(footer.tail_offset)
    {
        let sections = footer.find_tail(bytes.get(tail..).unwrap_or(&[]));
        is_good &= sections.is_ok();
        for section in sections.iter().flatten() {
            let pages = section.fences.len() as u64;
            let all = section.reads(CellIndex(0), CellIndex(u64::MAX));
            let count: u64 = all.iter().map(|(_, count)| u64::from(*count)).sum();
            assert!(count <= pages, "more pages than the section has");
            for (first, count) in all {
                for page in first..first.saturating_add(count) {
                    let at = usize::try_from(place_of(page, section.file_pages).offset);
                    let page_bytes = bytes.get(at.unwrap_or(usize::MAX)..).unwrap_or(&[]);
                    is_good &= decode_page(page_bytes, RUN, page).is_ok();
                }
            }
            let _narrow = section.reads(CellIndex(5), CellIndex(6));
        }
    }
    let storage = MemoryStorage::new();
    put_file(&*storage, run_file(RUN), bytes);
    let is_whole = verify(&storage, StoreFile::Run(RUN)).damage.is_empty();
    assert!(!is_whole || is_good, "verified what cannot be read");
    Verdict::of(is_good)
}
