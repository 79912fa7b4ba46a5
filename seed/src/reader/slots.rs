//! Reading blocks: plan which slots are needed, read them in as few pieces as possible, verify each
//! and hand out what it holds.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use afterimage_blockdev::{BLOCK_BYTES, BlockIndex, CELL_BYTES, CellIndex, IoBuffer, SegmentId};
use afterimage_cache::{Codec, ContentTag, Damage, SlotContext, SlotView};
use parking_lot::Mutex;

use super::directory::Slots;
use super::files::{FileKey, SegmentFile};
use super::map_page::MapPage;
use super::{REGION_BLOCKS, Reader, Resolved};
use crate::entry::EntryKind;
use crate::error::SeedError;
use crate::section::Snapshot;

/// Slots that lie closer than this are read in one piece.
const GAP_BYTES: u64 = 16 << 10;
/// Longest piece.
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// Alignment of reads.
const SECTOR: u64 = 512;

thread_local! {
    /// Plain bytes of one slot, kept so that they need not be zeroed for each.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Where the blocks of a read go.
#[derive(Debug)]
pub enum Sink {
    /// Their plain bytes, into this buffer.
    Plain(IoBuffer),
    /// Their content tags; `zero` is that of a block of zeroes.
    Tags {
        /// One for each block.
        tags: Vec<ContentTag>,
        /// The tag of zeroes.
        zero: ContentTag,
    },
}

/// Why blocks could not be read: the error and the first block it hurts.
#[derive(Debug)]
pub struct ReadFailure {
    /// The block.
    pub block: BlockIndex,
    /// Why.
    pub error: SeedError,
}

/// Takes the result of a read.
pub type ReadDone = Box<dyn FnOnce(Result<Sink, ReadFailure>) + Send>;

/// A slot that is needed, and where its blocks go.
struct Want {
    file: SegmentFile,
    slot: u32,
    context: SlotContext,
    /// Index of a block within the slot, and of its place in the sink.
    blocks: Vec<(u8, usize)>,
    place: (u64, u64),
}

/// One read of a segment's file.
struct Piece {
    file: SegmentFile,
    offset: u64,
    end: u64,
    wants: Vec<Want>,
}

struct Job {
    reader: Arc<Reader>,
    snapshot: Arc<Snapshot>,
    first: BlockIndex,
    count: usize,
    state: Mutex<State>,
    waiting: AtomicUsize,
    /// Segments moved when the directories were asked for.
    moves: AtomicU64,
}

struct State {
    sink: Option<Sink>,
    done: Option<ReadDone>,
    pages: Vec<Option<Arc<MapPage>>>,
    directories: HashMap<u32, (SegmentFile, Slots)>,
    failure: Option<ReadFailure>,
}

impl Reader {
    /// Reads `count` blocks from `first` of a snapshot.
    pub fn read(
        self: &Arc<Self>,
        snapshot: &Arc<Snapshot>,
        first: BlockIndex,
        count: usize,
        sink: Sink,
        done: ReadDone,
    ) {
        let from = first.0 / REGION_BLOCKS;
        let to = (first.0 + count.max(1) as u64 - 1) / REGION_BLOCKS;
        let regions = usize::try_from(to - from + 1).unwrap_or(1);
        let job = Arc::new(Job {
            reader: Arc::clone(self),
            snapshot: Arc::clone(snapshot),
            first,
            count,
            state: Mutex::new(State {
                sink: Some(sink),
                done: Some(done),
                pages: vec![None; regions],
                directories: HashMap::new(),
                failure: None,
            }),
            waiting: AtomicUsize::new(regions),
            moves: AtomicU64::new(0),
        });
        for place in 0..regions {
            let job = Arc::clone(&job);
            self.map_page(snapshot, from + place as u64, move |page| {
                match page {
                    Ok(page) => job.state.lock().pages[place] = Some(page),
                    Err(error) => job.fail(job.first, error),
                }
                job.step(Job::load_directories);
            });
        }
    }
}

impl Job {
    fn fail(&self, block: BlockIndex, error: SeedError) {
        self.state
            .lock()
            .failure
            .get_or_insert(ReadFailure { block, error });
    }

    /// Counts one part of a stage as finished; the last one goes on with `next`.
    fn step(self: &Arc<Self>, next: fn(&Arc<Self>)) {
        if self.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            if self.state.lock().failure.is_some() {
                self.finish();
            } else {
                next(self);
            }
        }
    }

    /// Says whether to read again: a segment was moved meanwhile, so that the directory of one file
    /// may have been used with another. What was read was not as it should be, so nothing wrong
    /// was handed out.
    fn must_retry(&self) -> bool {
        let moves = self.reader.moves();
        let mut state = self.state.lock();
        let is_moved = self.moves.swap(moves, Ordering::AcqRel) != moves;
        let can_retry =
            is_moved && state.failure.is_some() && state.pages.iter().all(Option::is_some);
        if can_retry {
            state.failure = None;
            state.directories.clear();
        }
        can_retry
    }

    fn finish(self: &Arc<Self>) {
        if self.must_retry() {
            return self.load_directories();
        }
        let (done, result) = {
            let mut state = self.state.lock();
            let sink = state.sink.take();
            let result = match (state.failure.take(), sink) {
                (Some(failure), _) => Err(failure),
                (None, Some(sink)) => Ok(sink),
                (None, None) => return,
            };
            (state.done.take(), result)
        };
        if let Some(done) = done {
            done(result);
        }
    }

    fn resolved(&self, state: &State, place: usize) -> Resolved {
        let block = self.first.0 + place as u64;
        let region = block / REGION_BLOCKS - self.first.0 / REGION_BLOCKS;
        let page = usize::try_from(region)
            .ok()
            .and_then(|region| state.pages[region].as_ref());
        let within = usize::try_from(block % REGION_BLOCKS).unwrap_or(0);
        page.map(|page| page.blocks[within])
            .expect("every page was loaded")
    }

    fn load_directories(self: &Arc<Self>) {
        self.moves.store(self.reader.moves(), Ordering::Release);
        let mut segments: Vec<u32> = Vec::new();
        {
            let state = self.state.lock();
            for place in 0..self.count {
                let resolved = self.resolved(&state, place);
                let is_slot = resolved.layer > 0 && resolved.kind.has_slot();
                if is_slot && !segments.contains(&resolved.segment) {
                    segments.push(resolved.segment);
                }
            }
        }
        // One part is this function itself, so that the stage cannot end before all have begun.
        self.waiting.store(segments.len() + 1, Ordering::Release);
        for segment in segments {
            let job = Arc::clone(self);
            let file = self.reader.file_of(SegmentId(segment));
            self.reader.slots(file, move |slots| {
                match slots {
                    Ok(slots) => {
                        job.state.lock().directories.insert(segment, (file, slots));
                    }
                    Err(error) => job.fail(job.first, error),
                }
                job.step(Job::read_slots);
            });
        }
        self.step(Job::read_slots);
    }

    /// Decides for each block; gives back the slots that are needed, in the order of the blocks.
    fn plan(&self) -> Vec<Want> {
        let mut state = self.state.lock();
        let mut wants: Vec<Want> = Vec::new();
        for place in 0..self.count {
            let resolved = self.resolved(&state, place);
            let block = BlockIndex(self.first.0 + place as u64);
            if let Some(error) = self.doubt(&resolved) {
                state.failure.get_or_insert(ReadFailure { block, error });
                continue;
            }
            if resolved.layer == 0 || !resolved.kind.has_slot() {
                put_zero(state.sink.as_mut(), place);
                continue;
            }
            if let Some(want) = wants.last_mut().filter(|want| {
                want.file.segment.0 == resolved.segment
                    && want.slot == resolved.slot
                    && want.context.cell == block.cell()
            }) {
                want.blocks.push((resolved.block, place));
                continue;
            }
            let found = state.directories.get(&resolved.segment);
            let file = found.map_or_else(
                || self.reader.file_of(SegmentId(resolved.segment)),
                |(file, _)| *file,
            );
            match found.and_then(|(_, slots)| slots.place(resolved.slot)) {
                Some(at) => {
                    let context = self.context(&resolved, block.cell());
                    wants.push(Want {
                        file,
                        slot: resolved.slot,
                        context,
                        blocks: vec![(resolved.block, place)],
                        place: at,
                    });
                }
                None => {
                    let damage = Damage::Short { structure: "slot" };
                    let error = SeedError::Damaged {
                        file: FileKey::Segment(file).name().to_string(),
                        offset: 0,
                        damage,
                    };
                    state.failure.get_or_insert(ReadFailure { block, error });
                }
            }
        }
        wants
    }

    fn context(&self, resolved: &Resolved, cell: CellIndex) -> SlotContext {
        let layer = &self.snapshot.layers[usize::from(resolved.layer) - 1];
        // The mask is taken from the slot when it is read; its hash vouches for it.
        SlotContext::uniform(self.snapshot.disk, layer.history, cell, 15, resolved.lsn)
    }

    /// Says why a block must not be shown, if so.
    fn doubt(&self, resolved: &Resolved) -> Option<SeedError> {
        if resolved.layer > 0 && resolved.kind == EntryKind::Unknown {
            return Some(SeedError::Incomplete {
                message: "the block could not be read at the source when it was captured".into(),
                hint: "resync the disk".into(),
            });
        }
        for (history, first, last) in &self.snapshot.lost {
            let position = self
                .snapshot
                .layers
                .iter()
                .position(|layer| layer.history == *history)?;
            let is_seen = *first <= self.snapshot.layers[position].cap;
            let layer = usize::from(resolved.layer);
            let is_newer = layer > 0
                && (layer - 1 < position || (layer - 1 == position && resolved.lsn > *last));
            if is_seen && !is_newer {
                return Some(SeedError::Incomplete {
                    message: format!("records {first} to {last} of this disk were lost"),
                    hint: "look at an older point, or resync the disk".into(),
                });
            }
        }
        None
    }

    fn read_slots(self: &Arc<Self>) {
        let wants = self.plan();
        if wants.is_empty() || self.state.lock().failure.is_some() {
            self.finish();
            return;
        }
        let pieces = gather(wants);
        self.waiting.store(pieces.len(), Ordering::Release);
        for piece in pieces {
            let job = Arc::clone(self);
            let reader = Arc::clone(&self.reader);
            self.reader
                .file(FileKey::Segment(piece.file), move |file| match file {
                    Ok(file) => {
                        let (offset, len) = (piece.offset, piece.end - piece.offset);
                        let len = usize::try_from(len).unwrap_or(0);
                        // It reaches beyond its slots, so a bad sector may be no part of them.
                        reader.read_patched(file, offset, len, move |bytes| {
                            match bytes {
                                Ok(bytes) => job.deliver(&piece, &bytes),
                                Err(error) => job.fail(job.first, error.into()),
                            }
                            job.step(|job| job.finish());
                        });
                    }
                    Err(error) => {
                        job.fail(job.first, error);
                        job.step(|job| job.finish());
                    }
                });
        }
    }

    fn deliver(&self, piece: &Piece, bytes: &[u8]) {
        let mut opener = self.reader.opener();
        let mut scratch = SCRATCH.take();
        scratch.resize(CELL_BYTES, 0);
        for want in &piece.wants {
            let at = usize::try_from(want.place.0 - piece.offset).unwrap_or(usize::MAX);
            let slot = SlotView::parse(bytes.get(at..).unwrap_or(&[]));
            let result = slot.and_then(|slot| {
                let context = want.context_for(&slot);
                let plain = &mut scratch[..slot.header.plain_len()];
                let is_tags = matches!(self.state.lock().sink, Some(Sink::Tags { .. }));
                if is_tags {
                    slot.verify(&context)?;
                } else {
                    opener.open(&context, &slot, plain)?;
                }
                let mut state = self.state.lock();
                for (block, place) in &want.blocks {
                    put_block(state.sink.as_mut(), &slot, *block, *place, &scratch)?;
                }
                Ok(())
            });
            if let Err(damage) = result {
                let error = SeedError::Damaged {
                    file: FileKey::Segment(want.file).name().to_string(),
                    offset: want.place.0,
                    damage,
                };
                let place = want.blocks.first().map_or(0, |(_, place)| *place);
                self.fail(BlockIndex(self.first.0 + place as u64), error);
            }
        }
        self.reader.give_back(opener);
        SCRATCH.set(scratch);
    }
}

impl Want {
    fn context_for(&self, slot: &SlotView<'_>) -> SlotContext {
        let context = &self.context;
        SlotContext::uniform(
            context.disk,
            context.history,
            context.cell,
            slot.header.mask,
            context.lsns[0],
        )
    }
}

fn put_zero(sink: Option<&mut Sink>, place: usize) {
    match sink {
        Some(Sink::Plain(buffer)) => {
            buffer[place * BLOCK_BYTES..(place + 1) * BLOCK_BYTES].fill(0);
        }
        Some(Sink::Tags { tags, zero }) => tags[place] = *zero,
        None => {}
    }
}

fn put_block(
    sink: Option<&mut Sink>,
    slot: &SlotView<'_>,
    block: u8,
    place: usize,
    plain: &[u8],
) -> Result<(), Damage> {
    if block >= slot.header.blocks {
        return Err(Damage::Field {
            structure: "map entry",
            field: "block within the slot",
        });
    }
    let block = usize::from(block);
    match sink {
        Some(Sink::Plain(buffer)) => {
            let to = &mut buffer[place * BLOCK_BYTES..(place + 1) * BLOCK_BYTES];
            if slot.header.codec == Codec::Zero {
                to.fill(0);
            } else {
                to.copy_from_slice(&plain[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES]);
            }
        }
        Some(Sink::Tags { tags, .. }) => tags[place] = slot.header.tags[block],
        None => {}
    }
    Ok(())
}

/// Joins slots that lie near each other into pieces.
fn gather(mut wants: Vec<Want>) -> Vec<Piece> {
    wants.sort_by_key(|want| (want.file.segment, want.place.0));
    let mut pieces: Vec<Piece> = Vec::new();
    for want in wants {
        let (start, end) = want.place;
        let offset = start / SECTOR * SECTOR;
        let end = end.next_multiple_of(SECTOR);
        if let Some(piece) = pieces.last_mut().filter(|piece| {
            piece.file == want.file
                && offset <= piece.end + GAP_BYTES
                && end - piece.offset <= PIECE_BYTES_MAX
        }) {
            piece.end = piece.end.max(end);
            piece.wants.push(want);
        } else {
            pieces.push(Piece {
                file: want.file,
                offset,
                end,
                wants: vec![want],
            });
        }
    }
    pieces
}
