//! One captured write, discard, write-zeroes or grow on its way.
//!
//! Stages: admission, range lock, activity mark, local operation, reading back what is missing,
//! LSN, completion. Each may finish on another thread; none waits on one.

use std::ops::Range;
use std::sync::{Arc, Weak};

use afterimage_blockdev::{
    BLOCK_BYTES, BatchId, BlockCompleter, BlockCompletion, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, IoBuffer, Token,
};
use afterimage_cache::RecordKind;
use afterimage_cache::record::WRITE_BYTES_MAX;
use parking_lot::Mutex;

use super::capture::Capture;
use super::ranges::Resume;
use crate::order::{BlockBytes, Draft, Payload, RECORD_OVERHEAD};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Longest range that is read back after a failure; beyond, it is marked unknown.
const READ_BACK_BYTES_MAX: u64 = WRITE_BYTES_MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Write,
    Discard,
    WriteZeroes,
    Grow,
}

enum Stage {
    Admission,
    Range,
    Mark,
    Local,
    Head,
    Tail,
    ReadBack(BlockError),
    Over,
}

struct Work {
    stage: Stage,
    op: Option<BlockOp>,
    /// The private copy of what is written; the source's own buffer once it gave it back.
    payload: Option<BlockBytes>,
    /// The block that the request begins within, as it is after the local operation.
    head: Option<IoBuffer>,
    /// The block that it ends within.
    tail: Option<IoBuffer>,
}

/// See the module's text.
pub(super) struct Request {
    this: Weak<Self>,
    capture: Arc<Capture>,
    token: Token,
    to: Arc<dyn BlockCompleter>,
    what: What,
    /// The bytes asked for; for a grow, from the old size to the new one.
    asked: Range<u64>,
    /// The whole blocks around them.
    whole: Range<u64>,
    cost: usize,
    work: Mutex<Work>,
}

fn round_up(offset: u64) -> u64 {
    offset.saturating_add(BLOCK - 1) / BLOCK * BLOCK
}

impl Request {
    /// Begins.
    pub(super) fn start(
        capture: &Arc<Capture>,
        token: Token,
        op: BlockOp,
        to: Arc<dyn BlockCompleter>,
    ) {
        let geometry = capture.source.geometry();
        if let Err(error) = op.validate(&geometry) {
            return to.complete(BlockCompletion {
                token,
                result: Err(error),
            });
        }
        let (_, offset, length) = op.describe();
        if matches!(op, BlockOp::Grow { .. }) {
            // Before any write can touch the new space, and so not on a thread that carries data.
            capture.activity.grow(length);
        }
        let (what, asked) = match &op {
            BlockOp::Write { .. } => (What::Write, offset..offset + length),
            BlockOp::Discard { .. } => (What::Discard, offset..offset + length),
            BlockOp::WriteZeroes { .. } => (What::WriteZeroes, offset..offset + length),
            _ => (What::Grow, geometry.size_bytes..length),
        };
        if asked.is_empty() {
            return capture.source.submit(token, op, to);
        }
        let gives_back = capture.source.gives_buffers_back();
        let (payload, written) = match &op {
            BlockOp::Write { buffer, .. } if gives_back => (None, buffer.len()),
            BlockOp::Write { buffer, .. } => {
                (Some(BlockBytes::Copied(buffer.to_vec())), buffer.len())
            }
            _ => (None, 0),
        };
        let whole = asked.start / BLOCK * BLOCK..round_up(asked.end);
        let cost = match what {
            What::Write => written + 2 * BLOCK_BYTES + RECORD_OVERHEAD,
            _ => 2 * BLOCK_BYTES + 4 * RECORD_OVERHEAD,
        };
        let stage = Stage::Admission;
        let work = Work {
            stage,
            op: Some(op),
            payload,
            head: None,
            tail: None,
        };
        let capture = Arc::clone(capture);
        let request = Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            capture,
            token,
            to,
            what,
            asked,
            whole,
            cost,
            work: Mutex::new(work),
        });
        if request.capture.admission.enter(request.cost, &request) {
            request.admitted();
        }
    }

    fn admitted(self: Arc<Self>) {
        self.work.lock().stage = Stage::Range;
        if self.capture.ranges.lock(self.whole.clone(), &self) {
            self.locked();
        }
    }

    fn locked(self: Arc<Self>) {
        self.work.lock().stage = Stage::Mark;
        if self.capture.activity.begin(self.whole.clone(), &self) {
            self.marked();
        }
    }

    fn marked(self: Arc<Self>) {
        let op = {
            let mut work = self.work.lock();
            work.stage = Stage::Local;
            work.op.take()
        };
        if let Some(op) = op {
            let token = self.token;
            Arc::clone(&self.capture).source.submit(token, op, self);
        }
    }

    fn read(self: Arc<Self>, range: Range<u64>) {
        let size = self.capture.source.geometry().size_bytes;
        let length = range.end.min(size) - range.start;
        let length = usize::try_from(length).expect("reads back 4 MiB at most");
        let op = BlockOp::Read {
            offset: range.start,
            buffer: IoBuffer::zeroed(length),
        };
        let token = self.token;
        Arc::clone(&self.capture).source.submit(token, op, self);
    }

    fn local_done(self: Arc<Self>, result: Result<BlockOutcome, BlockError>) {
        match result {
            Ok(BlockOutcome::Written(buffer)) => {
                self.work.lock().payload = Some(BlockBytes::Written(buffer));
                self.read_head();
            }
            Ok(_) => self.read_head(),
            Err(error) if is_untouched(&error) => self.finish(Vec::new(), Err(error)),
            Err(error) if self.what == What::Grow => self.finish(Vec::new(), Err(error)),
            Err(error) => {
                if self.whole.end - self.whole.start > READ_BACK_BYTES_MAX {
                    return self.unknown(error);
                }
                self.work.lock().stage = Stage::ReadBack(error);
                let whole = self.whole.clone();
                self.read(whole);
            }
        }
    }

    /// Reads the block that the request begins within, if it holds other bytes too.
    fn read_head(self: Arc<Self>) {
        let is_partial = self.what != What::Grow
            && (self.asked.start > self.whole.start || self.is_within_one_block());
        if !is_partial {
            return self.read_tail();
        }
        self.work.lock().stage = Stage::Head;
        let start = self.whole.start;
        self.read(start..start + BLOCK);
    }

    /// Ends within its first block, before the end of the disk.
    fn is_within_one_block(&self) -> bool {
        self.whole.end - self.whole.start == BLOCK && self.has_partial_tail()
    }

    /// Bytes of the disk follow the request within its last block.
    fn has_partial_tail(&self) -> bool {
        self.asked.end < self.whole.end
            && self.asked.end < self.capture.source.geometry().size_bytes
    }

    fn read_tail(self: Arc<Self>) {
        let is_partial = self.what != What::Grow
            && self.whole.end - self.whole.start > BLOCK
            && self.has_partial_tail();
        if !is_partial {
            return self.record();
        }
        self.work.lock().stage = Stage::Tail;
        let end = self.whole.end;
        self.read(end - BLOCK..end);
    }

    fn read_done(self: Arc<Self>, stage: Stage, result: Result<BlockOutcome, BlockError>) {
        match (stage, result) {
            (Stage::Head, Ok(BlockOutcome::Data(block))) => {
                self.work.lock().head = Some(block);
                self.read_tail();
            }
            (Stage::Tail, Ok(BlockOutcome::Data(block))) => {
                self.work.lock().tail = Some(block);
                self.record();
            }
            (Stage::ReadBack(error), Ok(BlockOutcome::Data(buffer))) => {
                let mut bytes = buffer.to_vec();
                bytes.resize(length(&self.whole), 0);
                let drafts = self.writes(self.whole.start, BlockBytes::Copied(bytes));
                self.finish(drafts, Err(error));
            }
            (Stage::ReadBack(error), _) | (_, Err(error)) => self.unknown(error),
            (_, Ok(_)) => {
                let kind = BlockErrorKind::Io {
                    errno: libc::EIO,
                    message: "no data".to_owned(),
                };
                let (offset, length) = (self.whole.start, BLOCK);
                self.unknown(BlockError {
                    operation: "read back",
                    offset,
                    length,
                    kind,
                });
            }
        }
    }

    /// The range cannot be read back: it is unknown until it is compared again.
    fn unknown(self: Arc<Self>, error: BlockError) {
        let draft = self.draft(RecordKind::Unknown, self.whole.clone());
        let reason = format!("a range cannot be read back: {error}");
        self.capture.activity.taint(&self.whole);
        self.capture
            .events
            .resync_needed(self.capture.disk, &reason);
        self.finish(vec![draft], Err(error));
    }

    fn draft(&self, kind: RecordKind, range: Range<u64>) -> Draft {
        Draft {
            kind,
            disk: Some((self.capture.disk, self.capture.place)),
            offset: range.start,
            length: range.end - range.start,
            batch: BatchId(0),
            argument: 0,
            payload: Payload::Note(Vec::new()),
        }
    }

    /// Write records for whole blocks; a record is never too long.
    fn writes(&self, offset: u64, bytes: BlockBytes) -> Vec<Draft> {
        let draft = |offset: u64, bytes: BlockBytes| {
            let end = offset + bytes.len() as u64;
            Draft {
                payload: Payload::Data(bytes),
                ..self.draft(RecordKind::Write, offset..end)
            }
        };
        if bytes.len() as u64 <= WRITE_BYTES_MAX {
            return vec![draft(offset, bytes)];
        }
        let step = usize::try_from(WRITE_BYTES_MAX).expect("4 MiB");
        let pieces = bytes.chunks(step).zip((offset..).step_by(step));
        pieces
            .map(|(piece, at)| draft(at, BlockBytes::Copied(piece.to_vec())))
            .collect()
    }

    /// The local operation succeeded and what is missing was read back.
    fn record(self: Arc<Self>) {
        let (payload, head, tail) = {
            let mut work = self.work.lock();
            (work.payload.take(), work.head.take(), work.tail.take())
        };
        let drafts = match self.what {
            What::Write => {
                let payload = payload.expect("a source gives each buffer back, or none");
                self.writes(self.whole.start, self.widened(payload, head, tail))
            }
            What::Discard => self.zeroed(RecordKind::Discard, head, tail),
            What::WriteZeroes => self.zeroed(RecordKind::WriteZeroes, head, tail),
            What::Grow => {
                let size = self.capture.source.geometry().size_bytes;
                vec![Draft {
                    length: size,
                    ..self.draft(RecordKind::Grow, 0..0)
                }]
            }
        };
        self.finish(drafts, Ok(BlockOutcome::Done));
    }

    /// The whole blocks as they are at the source now. What follows the end of the disk is zero.
    fn widened(
        &self,
        payload: BlockBytes,
        head: Option<IoBuffer>,
        tail: Option<IoBuffer>,
    ) -> BlockBytes {
        if self.asked == self.whole {
            return payload;
        }
        let mut bytes = vec![0; length(&self.whole)];
        if let Some(head) = head {
            bytes[..head.len()].copy_from_slice(&head);
        }
        if let Some(tail) = tail {
            let at = bytes.len() - BLOCK_BYTES;
            bytes[at..at + tail.len()].copy_from_slice(&tail);
        }
        let skip = length(&(self.whole.start..self.asked.start));
        bytes[skip..skip + payload.len()].copy_from_slice(&payload);
        BlockBytes::Copied(bytes)
    }

    /// Whole blocks in the middle as such; blocks at the edges as they are now.
    fn zeroed(
        &self,
        kind: RecordKind,
        head: Option<IoBuffer>,
        tail: Option<IoBuffer>,
    ) -> Vec<Draft> {
        let mut drafts = Vec::new();
        let mut middle = self.whole.clone();
        let block = |buffer: &IoBuffer| {
            let mut bytes = buffer.to_vec();
            bytes.resize(BLOCK_BYTES, 0);
            BlockBytes::Copied(bytes)
        };
        if let Some(head) = &head {
            drafts.extend(self.writes(middle.start, block(head)));
            middle.start += BLOCK;
        }
        if tail.is_some() {
            middle.end -= BLOCK;
        }
        if !middle.is_empty() {
            drafts.push(self.draft(kind, middle.clone()));
        }
        if let Some(tail) = &tail {
            drafts.extend(self.writes(middle.end, block(tail)));
        }
        drafts
    }

    /// Takes the LSNs, gives the range back, completes.
    fn finish(self: Arc<Self>, drafts: Vec<Draft>, result: Result<BlockOutcome, BlockError>) {
        self.work.lock().stage = Stage::Over;
        let capture = &self.capture;
        let has_records = !drafts.is_empty();
        let queued: usize = drafts.iter().map(Draft::cost).sum();
        let mut lsn = None;
        if has_records {
            let taint = || capture.activity.taint(&self.whole);
            lsn = capture.order.append(drafts, taint);
        }
        capture.activity.end(self.whole.clone(), lsn);
        let ready = capture.ranges.unlock(&self.whole);
        if has_records && lsn.is_none() {
            capture
                .events
                .not_recorded(capture.disk, self.whole.end - self.whole.start);
        }
        // Sealers let out what was queued; the rest of what was admitted leaves now.
        let queued = if lsn.is_some() { queued } else { 0 };
        self.to.complete(BlockCompletion {
            token: self.token,
            result,
        });
        for next in ready {
            next.resume();
        }
        capture.admission.settle(self.cost, queued);
    }
}

/// The request was refused before the medium was touched.
fn is_untouched(error: &BlockError) -> bool {
    matches!(
        error.kind,
        BlockErrorKind::Range | BlockErrorKind::ReadOnly | BlockErrorKind::NotSupported
    )
}

fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("a request fits in memory")
}

impl Resume for Request {
    fn resume(self: Arc<Self>) {
        let stage = core::mem::replace(&mut self.work.lock().stage, Stage::Over);
        match stage {
            Stage::Admission => self.admitted(),
            Stage::Range => self.locked(),
            Stage::Mark => self.marked(),
            _ => {}
        }
    }
}

impl BlockCompleter for Request {
    fn complete(&self, completion: BlockCompletion) {
        // Whoever completes holds the request, so it is there.
        let Some(request) = self.this.upgrade() else {
            return;
        };
        let stage = core::mem::replace(&mut self.work.lock().stage, Stage::Over);
        match stage {
            Stage::Local => request.local_done(completion.result),
            stage => request.read_done(stage, completion.result),
        }
    }
}
