//! A branch: a writable disk that begins as a view, whose own writes are change records of its own
//! history, journaled like any other.
//!
//! It is a disk with a volatile cache. A completed write is ordered and readable; a completed flush
//! (or a write with FUA) is durable.
//!
//! Invariants
//! * LSNs are given out under one lock, in the order in which writes take effect for readers.
//! * A block stays in memory until a snapshot that contains it is in use; so a read always finds
//!   the newest write, durable or not.
//! * Memory is bounded: above `PENDING_BYTES_MAX` writes wait for the log.
//! * A write that the branch's limit does not allow fails and changes nothing.

mod change;
mod extents;
mod quota;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use afterimage_blockdev::range_lock::{RangeGuard, RangeLock};
use afterimage_blockdev::{
    BLOCK_BYTES, BatchId, BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind,
    BlockIndex, BlockOp, BlockOutcome, Clock, DiskId, Entropy, ExtentKind, Geometry, IoBuffer, Lsn,
    Timestamp, Token,
};
use afterimage_cache::{
    Frame, FrameBuilder, FrameIdentity, RecordHeader, RecordKind, Sealer, TagKey,
};
use parking_lot::Mutex;

use self::change::{Change, write_error};
use self::extents::{LaidOver, Layer};
use self::quota::Account;
pub(crate) use self::quota::OwnBlocks;
pub use self::quota::Usage;
use crate::engine::ForkedBranch;
use crate::error::SeedError;
use crate::reader::{ReadFailure, Reader, Sink};
use crate::section::Snapshot;
use crate::view::{ViewDevice, device_error_kind};

/// Bytes of writes that are kept in memory before further ones wait.
const PENDING_BYTES_MAX: usize = 64 << 20;
/// Bytes of writes in memory at which a newer snapshot is asked for.
const REFRESH_BYTES: usize = 16 << 20;
/// Bytes of writes at which a frame is sealed without being asked.
const FRAME_BYTES: usize = 256 << 10;

/// The branch's way to the engine. Called without a lock held; must not block.
pub trait FrameSink: Send + Sync {
    /// Appends a frame to the branch's stream; frames come in order.
    fn append(&self, frame: Frame);
    /// Asks for a snapshot at the newest durable LSN; the answer goes to
    /// [`BranchDevice::refreshed`].
    fn refresh(&self);
}

struct PendingBlock {
    lsn: Lsn,
    data: Arc<IoBuffer>,
    at: usize,
}

struct PendingRange {
    lsn: Lsn,
    first: u64,
    count: u64,
}

/// A block newer than the snapshot: its LSN, and its data unless it is zero.
type Fresh = (Lsn, Option<(Arc<IoBuffer>, usize)>);

struct Waiter {
    lsn: Lsn,
    token: Token,
    to: Arc<dyn BlockCompleter>,
}

struct State {
    snapshot: Arc<Snapshot>,
    blocks: BTreeMap<u64, PendingBlock>,
    ranges: Vec<PendingRange>,
    pending_bytes: usize,
    queue: Vec<(RecordHeader, Option<Arc<IoBuffer>>)>,
    queue_bytes: usize,
    last: Lsn,
    last_time: Timestamp,
    durable: Lsn,
    waiters: Vec<Waiter>,
    blocked: VecDeque<Box<dyn FnOnce() + Send>>,
    is_refreshing: bool,
    failure: Option<String>,
    account: Account,
}

impl State {
    fn count_pending(&mut self) {
        // A range costs little memory, but every read looks at it.
        self.pending_bytes = (self.blocks.len() + self.ranges.len()) * BLOCK_BYTES;
    }

    /// What is newer than the snapshot within a range of bytes.
    fn layers(&self, offset: u64, length: u64) -> Vec<Layer> {
        let within = offset..offset + length;
        let bytes = |first: u64, count: u64| {
            let at = BlockIndex(first).offset();
            at..at.saturating_add(count.saturating_mul(BLOCK_BYTES as u64))
        };
        let zeroes = self
            .ranges
            .iter()
            .map(|range| bytes(range.first, range.count));
        let first = BlockIndex::containing(offset).0;
        let end = within.end.div_ceil(BLOCK_BYTES as u64);
        let is_cleared = |block: u64, lsn: Lsn| {
            self.ranges.iter().any(|range| {
                range.lsn > lsn && block >= range.first && block - range.first < range.count
            })
        };
        let data = self.blocks.range(first..end.max(first));
        let data = data
            .filter(|(block, pending)| !is_cleared(**block, pending.lsn))
            .map(|(block, _)| bytes(*block, 1));
        vec![
            Layer::new(ExtentKind::Zero, zeroes, &within),
            Layer::new(ExtentKind::Data, data, &within),
        ]
    }
}

/// A writable disk over a snapshot. See the module's text.
pub struct BranchDevice {
    this: Weak<Self>,
    reader: Arc<Reader>,
    sink: Arc<dyn FrameSink>,
    clock: Arc<dyn Clock>,
    identity: FrameIdentity,
    disk: DiskId,
    geometry: Geometry,
    locks: RangeLock,
    state: Mutex<State>,
    /// Held while a frame is sealed and appended, so that frames leave in order.
    sealing: Mutex<Sealer>,
}

/// What a branch was found to hold when it was opened.
#[derive(Debug)]
pub struct BranchContents(OwnBlocks);

impl BranchContents {
    /// Of a branch that was just forked: nothing.
    #[must_use]
    pub fn none() -> Self {
        Self(OwnBlocks::default())
    }

    /// Finds out what a branch holds, from a snapshot of it.
    pub fn find(
        reader: &Arc<Reader>,
        newest: &Arc<Snapshot>,
        done: impl FnOnce(Result<Self, SeedError>) + Send + 'static,
    ) {
        reader.own_blocks(newest, move |own| done(own.map(Self)));
    }
}

impl BranchDevice {
    /// Makes the device of a forked history, or of one that is opened again. `usage` is set to what
    /// it holds.
    #[must_use]
    pub fn new(
        branch: &ForkedBranch,
        contents: BranchContents,
        usage: Arc<Usage>,
        reader: Arc<Reader>,
        sink: Arc<dyn FrameSink>,
        clock: Arc<dyn Clock>,
        entropy: &dyn Entropy,
    ) -> Arc<Self> {
        let snapshot = Arc::clone(&branch.taken.snapshot);
        let tag_key = TagKey(branch.stream.tag_key);
        let geometry = Geometry {
            size_bytes: snapshot.size_bytes,
            logical_block_bytes: snapshot.logical_block_bytes,
            is_read_only: false,
        };
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            reader,
            sink,
            clock,
            identity: FrameIdentity {
                machine: branch.taken.machine,
                history: branch.history,
                origin: branch.origin,
                epoch: afterimage_blockdev::Epoch(1),
            },
            disk: snapshot.disk,
            geometry,
            locks: RangeLock::new(),
            state: Mutex::new(State {
                snapshot,
                blocks: BTreeMap::new(),
                ranges: Vec::new(),
                pending_bytes: 0,
                queue: Vec::new(),
                queue_bytes: 0,
                last: branch.stream.durable,
                last_time: branch.taken.time,
                durable: branch.stream.durable,
                waiters: Vec::new(),
                blocked: VecDeque::new(),
                is_refreshing: false,
                failure: None,
                account: Account::new(usage, contents.0),
            }),
            sealing: Mutex::new(Sealer::new(Some(&branch.key), tag_key, entropy)),
        })
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// Everything up to here is durable.
    pub fn durable(&self, durable: Lsn) {
        let (done, wants_refresh) = {
            let mut state = self.state.lock();
            state.durable = state.durable.max(durable);
            let (done, wait): (Vec<_>, Vec<_>) = state
                .waiters
                .drain(..)
                .partition(|waiter| waiter.lsn <= durable);
            state.waiters = wait;
            let wants = !state.is_refreshing
                && (state.pending_bytes >= REFRESH_BYTES || !state.blocked.is_empty())
                && state.durable > state.snapshot.lsn;
            state.is_refreshing |= wants;
            (done, wants)
        };
        for waiter in done {
            let result = Ok(BlockOutcome::Done);
            waiter.to.complete(BlockCompletion {
                token: waiter.token,
                result,
            });
        }
        if wants_refresh {
            self.sink.refresh();
        }
    }

    /// A newer snapshot: what it contains need not be kept any longer.
    pub fn refreshed(&self, snapshot: Arc<Snapshot>) {
        let blocked = {
            let mut state = self.state.lock();
            state.is_refreshing = false;
            let through = snapshot.lsn;
            state.snapshot = snapshot;
            state.blocks.retain(|_, block| block.lsn > through);
            state.ranges.retain(|range| range.lsn > through);
            state.count_pending();
            core::mem::take(&mut state.blocked)
        };
        for write in blocked {
            write();
        }
    }

    /// The branch cannot be written any more; what waits fails, and so does every later write.
    pub fn failed(&self, why: &str) {
        let (waiters, blocked) = {
            let mut state = self.state.lock();
            state.failure.get_or_insert_with(|| why.to_owned());
            (
                core::mem::take(&mut state.waiters),
                core::mem::take(&mut state.blocked),
            )
        };
        for waiter in waiters {
            let kind = BlockErrorKind::Io {
                errno: 0,
                message: why.to_owned(),
            };
            let error = BlockError {
                operation: "flush",
                offset: 0,
                length: 0,
                kind,
            };
            waiter.to.complete(BlockCompletion {
                token: waiter.token,
                result: Err(error),
            });
        }
        for write in blocked {
            write();
        }
    }

    /// Seals and appends what waits. To be called from time to time, so that an idle branch is
    /// journaled too.
    pub fn seal(&self) {
        let mut sealer = self.sealing.lock();
        let queue = {
            let mut state = self.state.lock();
            state.queue_bytes = 0;
            core::mem::take(&mut state.queue)
        };
        if queue.is_empty() {
            return;
        }
        let mut builder = FrameBuilder::new(self.identity, false);
        for (record, data) in &queue {
            let plain_len = data.as_ref().map_or(0, |data| data.len());
            if !builder.is_empty() && !builder.fits(plain_len) {
                let full =
                    core::mem::replace(&mut builder, FrameBuilder::new(self.identity, false));
                self.sink.append(full.finish());
            }
            match data {
                Some(data) => builder.push_data(record, data, &mut sealer),
                None => builder.push_note(record, &[]),
            }
        }
        self.sink.append(builder.finish());
    }

    fn record(
        &self,
        state: &mut State,
        kind: RecordKind,
        offset: u64,
        length: u64,
    ) -> RecordHeader {
        let previous = state.last;
        let lsn = previous.next();
        state.last = lsn;
        state.last_time = state.last_time.max(self.clock.wall());
        RecordHeader {
            kind,
            lsn,
            // The branch has one disk, so the previous record is the disk's previous one.
            previous,
            time: state.last_time,
            disk: self.disk,
            offset,
            length,
            batch: BatchId(0),
            argument: 0,
        }
    }

    /// Writes whole blocks: they take effect here, unless the limit forbids it.
    fn put(&self, offset: u64, data: IoBuffer) -> Result<Lsn, BlockErrorKind> {
        let (lsn, is_frame) = {
            let mut state = self.state.lock();
            let first = BlockIndex::containing(offset).0;
            if !state.account.take(first, (data.len() / BLOCK_BYTES) as u64) {
                return Err(BlockErrorKind::NoSpace);
            }
            let record = self.record(&mut state, RecordKind::Write, offset, data.len() as u64);
            let data = Arc::new(data);
            for place in 0..data.len() / BLOCK_BYTES {
                let block = PendingBlock {
                    lsn: record.lsn,
                    data: Arc::clone(&data),
                    at: place * BLOCK_BYTES,
                };
                state.blocks.insert(first + place as u64, block);
            }
            state.count_pending();
            state.queue_bytes += data.len();
            state.queue.push((record, Some(data)));
            (record.lsn, state.queue_bytes >= FRAME_BYTES)
        };
        if is_frame {
            self.seal();
        }
        Ok(lsn)
    }

    /// Makes whole blocks zero.
    fn clear(&self, kind: RecordKind, offset: u64, length: u64) -> Lsn {
        let mut state = self.state.lock();
        let record = self.record(&mut state, kind, offset, length);
        let first = BlockIndex::containing(offset).0;
        let count = length / BLOCK_BYTES as u64;
        state.account.give(first, count);
        state.ranges.push(PendingRange {
            lsn: record.lsn,
            first,
            count,
        });
        state.count_pending();
        state.queue.push((record, None));
        record.lsn
    }

    fn complete_at(&self, lsn: Lsn, token: Token, to: Arc<dyn BlockCompleter>) {
        self.seal();
        let failure = {
            let mut state = self.state.lock();
            if state.durable < lsn && state.failure.is_none() {
                state.waiters.push(Waiter { lsn, token, to });
                return;
            }
            state.failure.clone().filter(|_| state.durable < lsn)
        };
        let result = match failure {
            None => Ok(BlockOutcome::Done),
            Some(message) => Err(BlockError {
                operation: "flush",
                offset: 0,
                length: 0,
                kind: BlockErrorKind::Io { errno: 0, message },
            }),
        };
        to.complete(BlockCompletion { token, result });
    }

    /// Reads whole blocks: from memory what is newer than the snapshot, the rest from the store.
    fn read_blocks(
        &self,
        first: BlockIndex,
        buffer: IoBuffer,
        done: impl FnOnce(Result<IoBuffer, ReadFailure>) + Send + 'static,
    ) {
        let count = buffer.len() / BLOCK_BYTES;
        let end = first.0 + count as u64;
        let (snapshot, fresh) = {
            let state = self.state.lock();
            let mut fresh: BTreeMap<u64, Fresh> = BTreeMap::new();
            for (block, pending) in state.blocks.range(first.0..end) {
                fresh.insert(
                    *block,
                    (pending.lsn, Some((Arc::clone(&pending.data), pending.at))),
                );
            }
            for range in &state.ranges {
                for block in first.0.max(range.first)..end.min(range.first + range.count) {
                    let known = fresh.entry(block).or_insert((range.lsn, None));
                    if known.0 < range.lsn {
                        *known = (range.lsn, None);
                    }
                }
            }
            (Arc::clone(&state.snapshot), fresh)
        };
        let lay_over = move |buffer: &mut IoBuffer| {
            for (block, (_, data)) in &fresh {
                let at = usize::try_from(block - first.0).unwrap_or(0) * BLOCK_BYTES;
                let to = &mut buffer[at..at + BLOCK_BYTES];
                match data {
                    Some((data, from)) => to.copy_from_slice(&data[*from..from + BLOCK_BYTES]),
                    None => to.fill(0),
                }
            }
            fresh.len()
        };
        let sink = Sink::Plain(buffer);
        let finish = move |result: Result<Sink, ReadFailure>| match result {
            Ok(Sink::Plain(mut buffer)) => {
                lay_over(&mut buffer);
                done(Ok(buffer));
            }
            Ok(Sink::Tags { .. }) => {}
            Err(failure) => done(Err(failure)),
        };
        self.reader
            .read(&snapshot, first, count, sink, Box::new(finish));
    }

    fn read(&self, token: Token, offset: u64, mut outer: IoBuffer, to: Arc<dyn BlockCompleter>) {
        let length = outer.len();
        let first = BlockIndex::containing(offset);
        let end = (offset + length as u64).next_multiple_of(BLOCK_BYTES as u64);
        let bytes = usize::try_from(end - first.offset()).unwrap_or(0);
        self.read_blocks(first, IoBuffer::zeroed(bytes), move |result| {
            let result = match result {
                Ok(inner) => {
                    let at = usize::try_from(offset - first.offset()).unwrap_or(0);
                    outer.copy_from_slice(&inner[at..at + length]);
                    Ok(BlockOutcome::Data(outer))
                }
                Err(failure) => {
                    let kind = device_error_kind(&failure.error);
                    let length = length as u64;
                    Err(BlockError {
                        operation: "read",
                        offset,
                        length,
                        kind,
                    })
                }
            };
            to.complete(BlockCompletion { token, result });
        });
    }

    /// Orders a change after those that overlap it, then does it.
    fn change(&self, token: Token, change: Change, to: Arc<dyn BlockCompleter>) {
        let (offset, length) = change.range();
        let block = BLOCK_BYTES as u64;
        let range = offset / block * block..(offset + length).next_multiple_of(block);
        let Some(this) = self.this.upgrade() else {
            return;
        };
        self.locks.lock(
            range.clone(),
            Box::new(move |guard| this.changing(token, change, range, guard, to)),
        );
    }

    fn changing(
        self: Arc<Self>,
        token: Token,
        change: Change,
        range: core::ops::Range<u64>,
        guard: RangeGuard,
        to: Arc<dyn BlockCompleter>,
    ) {
        {
            let mut state = self.state.lock();
            if let Some(message) = state.failure.clone() {
                drop(state);
                let error = change.error(BlockErrorKind::Io { errno: 0, message });
                return to.complete(BlockCompletion {
                    token,
                    result: Err(error),
                });
            }
            if state.pending_bytes >= PENDING_BYTES_MAX {
                let this = Arc::clone(&self);
                state.blocked.push_back(Box::new(move || {
                    this.changing(token, change, range, guard, to);
                }));
                // Before anything newer is durable, a newer snapshot would free nothing.
                let wants = !state.is_refreshing && state.durable > state.snapshot.lsn;
                state.is_refreshing |= wants;
                drop(state);
                self.seal();
                if wants {
                    self.sink.refresh();
                }
                return;
            }
        }
        let (offset, length) = change.range();
        let is_whole = range.start == offset && range.end == offset + length;
        match change {
            Change::Write { data, fua, .. } if is_whole => {
                let put = self.put(offset, data);
                drop(guard);
                let put = put.map_err(|kind| write_error(offset, length, kind));
                self.finish(put, fua, token, to);
            }
            Change::Clear { kind, .. } if is_whole => {
                let lsn = self.clear(kind, offset, length);
                drop(guard);
                self.finish(Ok(lsn), false, token, to);
            }
            other => self.merge(token, other, &range, guard, to),
        }
    }

    fn finish(
        &self,
        put: Result<Lsn, BlockError>,
        fua: bool,
        token: Token,
        to: Arc<dyn BlockCompleter>,
    ) {
        let result = match put {
            Ok(lsn) if fua => return self.complete_at(lsn, token, to),
            Ok(_) => Ok(BlockOutcome::Done),
            Err(error) => Err(error),
        };
        to.complete(BlockCompletion { token, result });
    }

    /// Changes parts of blocks: reads them whole, under the lock, and writes them whole.
    fn merge(
        self: Arc<Self>,
        token: Token,
        change: Change,
        range: &core::ops::Range<u64>,
        guard: RangeGuard,
        to: Arc<dyn BlockCompleter>,
    ) {
        let (start, end) = (range.start, range.end);
        let (offset, length) = change.range();
        if let Change::Clear { kind, .. } = change {
            let block = BLOCK_BYTES as u64;
            let (inner, inner_end) = (
                offset.next_multiple_of(block),
                (offset + length) / block * block,
            );
            if inner_end.saturating_sub(inner) > (1 << 20) {
                // Only the edges are parts of blocks; they are less than a block each.
                self.clear(kind, inner, inner_end - inner);
                let this = Arc::clone(&self);
                let edges = [
                    (offset, inner - offset),
                    (inner_end, offset + length - inner_end),
                ];
                return this.clear_edges(token, edges, guard, to);
            }
        }
        let bytes = usize::try_from(end - start).unwrap_or(0);
        let this = Arc::clone(&self);
        self.read_blocks(
            BlockIndex::containing(start),
            IoBuffer::zeroed(bytes),
            move |result| match result {
                Ok(mut whole) => {
                    let at = usize::try_from(offset - start).unwrap_or(0);
                    let len = usize::try_from(length).unwrap_or(0);
                    let fua = change.apply(&mut whole[at..at + len]);
                    let put = this.put(start, whole);
                    drop(guard);
                    let put = put.map_err(|kind| change.error(kind));
                    this.finish(put, fua, token, to);
                }
                Err(failure) => {
                    let error = change.error(device_error_kind(&failure.error));
                    drop(guard);
                    to.complete(BlockCompletion {
                        token,
                        result: Err(error),
                    });
                }
            },
        );
    }

    /// Zeroes the two ends of a range, one after the other, under the lock of the whole.
    fn clear_edges(
        self: Arc<Self>,
        token: Token,
        edges: [(u64, u64); 2],
        guard: RangeGuard,
        to: Arc<dyn BlockCompleter>,
    ) {
        let Some(place) = edges.iter().position(|(_, length)| *length > 0) else {
            drop(guard);
            return to.complete(BlockCompletion {
                token,
                result: Ok(BlockOutcome::Done),
            });
        };
        let (offset, length) = edges[place];
        let mut rest = edges;
        rest[place].1 = 0;
        let first = BlockIndex::containing(offset);
        let this = Arc::clone(&self);
        self.read_blocks(first, IoBuffer::zeroed(BLOCK_BYTES), move |result| {
            let put = match result {
                Ok(mut whole) => {
                    let at = usize::try_from(offset - first.offset()).unwrap_or(0);
                    let len = usize::try_from(length).unwrap_or(0);
                    whole[at..at + len].fill(0);
                    this.put(first.offset(), whole)
                }
                Err(failure) => Err(device_error_kind(&failure.error)),
            };
            match put {
                Ok(_) => this.clear_edges(token, rest, guard, to),
                Err(kind) => {
                    let error = BlockError {
                        operation: "write-zeroes",
                        offset,
                        length,
                        kind,
                    };
                    drop(guard);
                    to.complete(BlockCompletion {
                        token,
                        result: Err(error),
                    });
                }
            }
        });
    }
}

impl BlockDevice for BranchDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        if let Err(error) = op.validate(&self.geometry) {
            return to.complete(BlockCompletion {
                token,
                result: Err(error),
            });
        }
        match op {
            BlockOp::Read { offset, buffer } => self.read(token, offset, buffer, to),
            BlockOp::Write {
                offset,
                buffer,
                fua,
            } => {
                self.change(
                    token,
                    Change::Write {
                        offset,
                        data: buffer,
                        fua,
                    },
                    to,
                );
            }
            BlockOp::Discard { offset, length } => {
                self.change(
                    token,
                    Change::Clear {
                        kind: RecordKind::Discard,
                        offset,
                        length,
                    },
                    to,
                );
            }
            BlockOp::WriteZeroes { offset, length, .. } => {
                let kind = RecordKind::WriteZeroes;
                self.change(
                    token,
                    Change::Clear {
                        kind,
                        offset,
                        length,
                    },
                    to,
                );
            }
            BlockOp::Flush => {
                let last = self.state.lock().last;
                self.complete_at(last, token, to);
            }
            BlockOp::Extents { offset, length } => {
                let (snapshot, layers) = {
                    let state = self.state.lock();
                    (Arc::clone(&state.snapshot), state.layers(offset, length))
                };
                let view = ViewDevice::new(Arc::clone(&self.reader), snapshot);
                let over = Arc::new(LaidOver { layers, to });
                view.submit(token, BlockOp::Extents { offset, length }, over);
            }
            other @ BlockOp::Grow { .. } => {
                let error = other.error(BlockErrorKind::NotSupported);
                to.complete(BlockCompletion {
                    token,
                    result: Err(error),
                });
            }
        }
    }
}
