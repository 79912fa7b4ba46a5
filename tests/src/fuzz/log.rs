//! Commits and segments of the log, and the log's recovery over them, with all that it salvages.

use std::sync::Arc;

use afterimage_blockdev::simulated::{SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{
    FileName, IoBuffer, MemoryStorage, Monotonic, Random, SegmentId, Storage, StorageCompleter,
    StorageCompletion, StorageOp, StorageOutcome, Timestamp, wait,
};
use afterimage_cache::bytes::{get_u32, get_u64, put};
use afterimage_cache::log::{Log, LogInput, LogOutput};
use afterimage_cache::segment::{
    COMMIT_HEADER_BYTES, CommitHeader, CommitView, Directory, Footer, SECTOR, SegmentHeader,
    SegmentIdentity, SegmentScan, build_commit, rebuild_directory, segment_file,
};
use afterimage_cache::{Frame, FrameView};
use parking_lot::Mutex;

use super::cache::mend_frame;
use super::{Target, Verdict};
use crate::frames::FrameMaker;
use crate::log_rig::{LogRig, STORE, small_options};

const SEGMENT: SegmentId = SegmentId(3);
/// Where the lone commit of its target says that it lies.
const COMMIT_AT: u64 = 8192;
const HASH_AT: usize = 96;
const SEGMENT_MAGIC: &[u8] = b"AILOGSEG";
const COMMIT_MAGIC: &[u8] = b"AICOMMIT";
const FOOTER_MAGIC: &[u8] = b"AILOGEND";
/// Steps of a recovery after which it is said never to end.
const STEPS_MAX: u32 = 100_000;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(30_000, "commit", make_commit, run_commit).mended_by(|bytes, random| {
            mend_commit(bytes, random);
        }),
        Target::new(20_000, "segment", make_segment, run_segment)
            .mended_by(|bytes, random| mend_segment(bytes, random)),
        Target::new(2000, "log", make_log, run_log)
            .mended_by(|bytes, random| mend_segment(bytes, random))
            .with_memory(8 << 20, 64),
    ]
}

fn frames(random: &mut Random, most: u64) -> Vec<Frame> {
    let mut maker = FrameMaker::new(random.next_u64());
    let count = random.below(most + 1);
    (0..count).map(|_| maker.next_frame(3)).collect()
}

// --- Commits -------------------------------------------------------------------------------

fn new_commit(identity: SegmentIdentity, sequence: u64, offset: u64) -> CommitHeader {
    CommitHeader {
        identity,
        sequence,
        offset,
        length: 0,
        durable_through: sequence - 1,
        frame_count: 0,
        first_slot: 0,
        slot_count: 0,
        segment_first: 1,
    }
}

fn identity() -> SegmentIdentity {
    SegmentIdentity {
        store: STORE,
        segment: SEGMENT,
        generation: 2,
    }
}

fn make_commit(random: &mut Random) -> Vec<u8> {
    let mut header = new_commit(identity(), 1 + random.below(1000), COMMIT_AT);
    let frames = frames(random, 3);
    let mut buffer = IoBuffer::with_capacity(SECTOR);
    build_commit(&mut header, frames.iter(), &mut buffer);
    buffer.to_vec()
}

/// Makes the hashes of a commit and of all that is in it fit; gives back its length.
fn mend_commit(bytes: &mut [u8], random: &mut Random) -> Option<usize> {
    if !bytes.starts_with(COMMIT_MAGIC) || bytes.len() < COMMIT_HEADER_BYTES {
        return None;
    }
    let count = get_u32(bytes, 28)?;
    let mut hashes = Vec::new();
    let (mut at, mut slots) = (COMMIT_HEADER_BYTES, 0u32);
    for _ in 0..count {
        let Some(rest) = bytes.get_mut(at..) else {
            break;
        };
        let Some(len) = mend_frame(rest, random) else {
            break;
        };
        let Ok(view) = FrameView::parse(rest) else {
            break;
        };
        hashes.extend_from_slice(&view.header.hash);
        slots = slots.saturating_add(view.header.slot_count);
        at += len;
    }
    if random.chance(0.5) {
        put(bytes, 76, &slots.to_le_bytes());
        let length = at.next_multiple_of(SECTOR) as u64;
        put(bytes, 56, &length.to_le_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..HASH_AT]);
    hasher.update(&hashes);
    put(bytes, HASH_AT, hasher.finalize().as_bytes());
    usize::try_from(get_u64(bytes, 56)?).ok()
}

fn run_commit(bytes: &[u8]) -> Verdict {
    let skeleton = CommitView::accept_skeleton(bytes, COMMIT_AT);
    let whole = CommitView::accept(bytes, COMMIT_AT);
    let Ok(commit) = whole else {
        return Verdict::Refused;
    };
    let skeleton = skeleton.expect("what is whole has a skeleton");
    assert_eq!(skeleton.header, commit.header);
    // Built again of the same frames it is the same commit.
    let mut header = commit.header;
    let frames: Vec<Frame> = commit
        .frames
        .iter()
        .map(|(_, frame)| Frame::accept(frame.bytes.to_vec()).expect("whole"))
        .collect();
    let mut buffer = IoBuffer::with_capacity(bytes.len());
    let offsets = build_commit(&mut header, frames.iter(), &mut buffer);
    assert!(commit.frames.iter().map(|(at, _)| *at).eq(offsets));
    let len = buffer.len().min(SECTOR);
    let is_padded_more = header.length < commit.header.length;
    assert!(
        is_padded_more || buffer[..len] == bytes[..len],
        "the commit comes back"
    );
    Verdict::Accepted
}

// --- Segments ------------------------------------------------------------------------------

fn make_segment(random: &mut Random) -> Vec<u8> {
    let first_sequence = 1 + random.below(100);
    let header = SegmentHeader {
        identity: identity(),
        first_sequence,
        time: Timestamp(random.next_u64()),
    };
    let mut bytes = header.encode().to_vec();
    let mut directory = Directory::default();
    let mut buffer = IoBuffer::with_capacity(SECTOR);
    let count = 1 + random.below(3);
    let mut first_slot = 0;
    for sequence in first_sequence..first_sequence + count {
        let start = bytes.len() as u64;
        let mut commit = new_commit(identity(), sequence, start);
        commit.first_slot = first_slot;
        commit.segment_first = first_sequence;
        let frames = frames(random, 2);
        let offsets = build_commit(&mut commit, frames.iter(), &mut buffer);
        for (frame, at) in frames.iter().zip(offsets) {
            directory.note_frame(first_slot, start + at, &frame.view());
            first_slot += frame.header.slot_count;
        }
        bytes.extend_from_slice(&buffer);
    }
    if random.chance(0.5) {
        let footer = Footer {
            identity: identity(),
            first_sequence,
            last_sequence: first_sequence + count - 1,
            directory_offset: 0,
            slot_count: 0,
            root: [7; 32],
            directory_hash: [0; 32],
        };
        let at = bytes.len() as u64;
        bytes.extend_from_slice(&directory.encode(footer, at));
    }
    bytes
}

/// Makes the hashes of everything in the segments that `bytes` hold fit.
pub(super) fn mend_segment(bytes: &mut [u8], random: &mut Random) {
    let mut at = 0;
    while at + SECTOR <= bytes.len() {
        let mut len = SECTOR;
        let sector = &mut bytes[at..];
        if sector.starts_with(SEGMENT_MAGIC) {
            let hash = blake3::hash(&sector[..HASH_AT]);
            put(sector, HASH_AT, hash.as_bytes());
        } else if sector.starts_with(COMMIT_MAGIC) {
            let said = mend_commit(sector, random).unwrap_or(SECTOR);
            if said.is_multiple_of(SECTOR) && said < sector.len() {
                len = said.max(SECTOR);
            }
        } else if sector.starts_with(FOOTER_MAGIC) {
            mend_footer(bytes, at);
        }
        at += len;
    }
}

fn mend_footer(bytes: &mut [u8], at: usize) -> Option<()> {
    let offset = usize::try_from(get_u64(bytes, at + 160)?).ok()?;
    let count = usize::try_from(get_u32(bytes, at + 12)?).ok()?;
    if let Some(directory) = bytes.get(offset..offset.checked_add(count * 4)?) {
        let hash = blake3::hash(directory);
        put(bytes, at + 96, hash.as_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[at..at + 128]);
    hasher.update(&bytes[at + 160..at + 168]);
    put(bytes, at + 128, hasher.finalize().as_bytes());
    Some(())
}

fn run_segment(bytes: &[u8]) -> Verdict {
    let mut scan = SegmentScan::new(bytes, STORE, SEGMENT);
    let mut is_good = scan.header.is_ok();
    let mut commits = 0;
    let mut end = 0;
    while let Some(item) = scan.step() {
        let Ok(commit) = item else { continue };
        commits += 1;
        is_good &= commit.damaged.is_empty();
        end = commit.header.offset.saturating_add(commit.header.length);
        for at in &commit.frames {
            assert!(
                scan.frame(*at).is_some(),
                "a frame of a commit that was found"
            );
        }
    }
    let directory = rebuild_directory(bytes, STORE, SEGMENT);
    let most = bytes.len() / 80 + 1;
    assert!(
        directory.offsets.len() <= most,
        "more slots than bytes for them"
    );
    // What begins behind the commits of a sealed segment is its directory.
    let footer = bytes.get(bytes.len().saturating_sub(SECTOR)..);
    if let Some(footer) = footer.and_then(|bytes| Footer::decode(bytes).ok()) {
        let at = usize::try_from(footer.directory_offset).unwrap_or(usize::MAX);
        let found = Directory::decode(bytes.get(at..).unwrap_or(&[]), &footer);
        if let Ok(directory) = &found {
            for slot in 0..=footer.slot_count.min(1000) {
                let _may_be_lost = directory.get(slot);
            }
            let again = directory.encode(footer, footer.directory_offset);
            let last = &again[again.len() - SECTOR..];
            assert_eq!(Footer::decode(last), Ok(footer), "the footer comes back");
        }
        is_good &= found.is_ok();
    } else if end < bytes.len() as u64 {
        is_good = false;
    }
    Verdict::of(is_good && commits > 0)
}

// --- Recovery ------------------------------------------------------------------------------

/// The files of a log, one behind the other: each begins with a segment's header.
fn make_log(random: &mut Random) -> Vec<u8> {
    let medium = SimulatedStorage::new(random.next_u64(), SimulatedOptions::default());
    let mut options = small_options(64 << 10, random.chance(0.8));
    options.commit_bytes_max = 12 << 10;
    let mut rig = LogRig::new(Arc::clone(&medium), options);
    rig.step(LogInput::Start { from_sequence: 0 });
    rig.run();
    let mut maker = FrameMaker::new(random.next_u64());
    for token in 0..3 + random.below(6) {
        rig.append(token, maker.next_frame(3));
        if random.chance(0.6) {
            rig.run();
        }
    }
    rig.run();
    rig.wake();
    rig.run();
    let mut bytes = Vec::new();
    for name in medium.file_names() {
        bytes.extend(medium.read_live(&name).unwrap_or_default());
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    }
    bytes
}

/// Puts a file into a storage, with zeroes up to the next sector.
pub(super) fn put_file(storage: &dyn Storage, name: FileName, bytes: &[u8]) {
    let created = wait::storage(storage, StorageOp::Create { name });
    let Ok(StorageOutcome::Opened { file, .. }) = created else {
        panic!("{created:?} for a new file");
    };
    let (offset, mut buffer) = (0, IoBuffer::copy_of(bytes));
    buffer.pad_to(SECTOR);
    let write = StorageOp::Write {
        file,
        offset,
        buffer,
    };
    wait::storage(storage, write).expect("the medium takes it");
    wait::storage(storage, StorageOp::Sync { file }).expect("the medium takes it");
    wait::storage(storage, StorageOp::Close { file }).expect("the medium takes it");
}

#[derive(Default)]
struct Inbox(Mutex<Vec<StorageCompletion>>);

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().push(completion);
    }
}

fn run_log(bytes: &[u8]) -> Verdict {
    let storage = MemoryStorage::new();
    let starts: Vec<usize> = (0..bytes.len())
        .step_by(SECTOR)
        .filter(|at| *at == 0 || bytes[*at..].starts_with(SEGMENT_MAGIC))
        .collect();
    for (number, start) in (1u32..).zip(&starts) {
        let end = starts.get(usize::try_from(number).unwrap_or(0));
        let name = segment_file("log", SegmentId(number));
        put_file(
            &*storage,
            name,
            &bytes[*start..end.copied().unwrap_or(bytes.len())],
        );
    }
    let mut log = Log::new(small_options(64 << 10, true));
    let inbox = Arc::new(Inbox::default());
    let mut inputs = vec![LogInput::Start { from_sequence: 0 }];
    let mut is_good = true;
    let mut frames = 0;
    for _ in 0..STEPS_MAX {
        for input in core::mem::take(&mut inputs) {
            let mut out = Vec::new();
            log.step(Monotonic(1), input, &mut out);
            for output in out {
                match output {
                    LogOutput::Storage(token, op) => {
                        storage.submit(token, op, Arc::<Inbox>::clone(&inbox) as _);
                    }
                    LogOutput::Recovered { frame, .. } => {
                        frames += 1;
                        let whole = frame.view().verify_skeleton();
                        assert!(whole.is_ok(), "recovered a frame that does not verify");
                    }
                    LogOutput::Ready { .. } => return Verdict::of(is_good && frames > 0),
                    LogOutput::Failed(_) => return Verdict::Refused,
                    LogOutput::Salvaged { intact, bytes, .. } => {
                        is_good = false;
                        let is_within = intact.iter().all(|r| r.range.end <= bytes.len());
                        assert!(is_within, "a salvaged record beyond its bytes");
                    }
                    LogOutput::Lost { .. }
                    | LogOutput::Mended { .. }
                    | LogOutput::DamagedSlot { .. } => is_good = false,
                    _ => {}
                }
            }
        }
        inputs.extend(inbox.0.lock().drain(..).map(LogInput::Storage));
        assert!(!inputs.is_empty(), "recovery stalls");
    }
    panic!("recovery never ends");
}
