//! Changes that do not fill whole blocks: read the blocks, change them, write them back.
//!
//! Invariant: a job passed its file's gate alone, and leaves it before it answers.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_blockdev::{BlockError, BlockErrorKind, BlockOp, BlockOutcome, IoBuffer};

use super::chain::{Job, Outcome};
use super::file::OpenFile;
use super::request::ZeroKind;

type Answer = Box<dyn FnOnce(Result<(), BlockError>) + Send>;

/// Ends a job.
fn finish(file: &OpenFile, answer: &mut Option<Answer>, result: Result<(), BlockError>) {
    file.gate.leave_alone();
    if let Some(answer) = answer.take() {
        answer(result);
    }
}

/// A device that answers a read with something else.
fn not_data(offset: u64, length: u64) -> BlockError {
    let message = "the device answered a read without data".to_owned();
    BlockError {
        operation: "read",
        offset,
        length,
        kind: BlockErrorKind::Io { errno: 0, message },
    }
}

fn read_op(file: &OpenFile, start: u64, end: u64) -> Result<BlockOp, BlockError> {
    let (offset, end) = (file.align_down(start), file.align_up(end));
    let length = end - offset;
    match usize::try_from(length) {
        Ok(bytes) => Ok(BlockOp::Read {
            offset,
            buffer: IoBuffer::zeroed(bytes),
        }),
        Err(_) => Err(BlockError {
            operation: "read",
            offset,
            length,
            kind: BlockErrorKind::Range,
        }),
    }
}

/// Puts `data` (zeroes when it is none) over a part of the blocks just read.
fn overlay(
    blocks: &mut IoBuffer,
    at: u64,
    length: usize,
    data: Option<&[u8]>,
) -> Result<(), BlockError> {
    let range = usize::try_from(at)
        .ok()
        .and_then(|at| blocks.get_mut(at..at.checked_add(length)?));
    let Some(part) = range else {
        return Err(not_data(at, length as u64));
    };
    match data {
        Some(data) => part.copy_from_slice(data),
        None => part.fill(0),
    }
    Ok(())
}

/// Writes bytes that begin or end within a block.
pub(super) struct Patch {
    file: Arc<OpenFile>,
    offset: u64,
    data: IoBuffer,
    fua: bool,
    is_read: bool,
    answer: Option<Answer>,
}

impl Patch {
    /// Of `data` at `offset`, within the device.
    pub(super) fn new(
        file: Arc<OpenFile>,
        offset: u64,
        data: IoBuffer,
        fua: bool,
        answer: impl FnOnce(Result<(), BlockError>) + Send + 'static,
    ) -> Self {
        Self {
            file,
            offset,
            data,
            fua,
            is_read: false,
            answer: Some(Box::new(answer)),
        }
    }

    fn next(&mut self, last: Option<Outcome>) -> Result<Option<BlockOp>, BlockError> {
        let Some(last) = last else {
            let end = self.offset + self.data.len() as u64;
            return read_op(&self.file, self.offset, end).map(Some);
        };
        let outcome = last?;
        if self.is_read {
            return Ok(None);
        }
        self.is_read = true;
        let BlockOutcome::Data(mut buffer) = outcome else {
            return Err(not_data(self.offset, self.data.len() as u64));
        };
        let start = self.file.align_down(self.offset);
        overlay(
            &mut buffer,
            self.offset - start,
            self.data.len(),
            Some(&self.data),
        )?;
        Ok(Some(BlockOp::Write {
            offset: start,
            buffer,
            fua: self.fua,
        }))
    }
}

impl Job for Patch {
    fn step(&mut self, last: Option<Outcome>) -> Option<BlockOp> {
        match self.next(last) {
            Ok(Some(op)) => return Some(op),
            Ok(None) => finish(&self.file, &mut self.answer, Ok(())),
            Err(error) => finish(&self.file, &mut self.answer, Err(error)),
        }
        None
    }
}

enum Step {
    /// Zeroes a part of the blocks that hold it.
    Part { start: u64, end: u64 },
    /// Zeroes whole blocks.
    Whole { start: u64, end: u64 },
}

/// Makes zeroes of a range that begins or ends within a block.
pub(super) struct Zero {
    file: Arc<OpenFile>,
    kind: ZeroKind,
    steps: VecDeque<Step>,
    /// The part whose blocks are being read.
    reading: Option<(u64, u64)>,
    answer: Option<Answer>,
}

impl Zero {
    /// Of `start..end`, within the device and not empty.
    pub(super) fn new(
        file: Arc<OpenFile>,
        kind: ZeroKind,
        start: u64,
        end: u64,
        answer: impl FnOnce(Result<(), BlockError>) + Send + 'static,
    ) -> Self {
        let (inner_start, inner_end) = (file.align_up(start), file.align_down(end));
        let mut steps = VecDeque::with_capacity(3);
        if inner_start > inner_end {
            steps.push_back(Step::Part { start, end });
        } else {
            if start < inner_start {
                steps.push_back(Step::Part {
                    start,
                    end: inner_start,
                });
            }
            if inner_start < inner_end {
                steps.push_back(Step::Whole {
                    start: inner_start,
                    end: inner_end,
                });
            }
            if inner_end < end {
                steps.push_back(Step::Part {
                    start: inner_end,
                    end,
                });
            }
        }
        Self {
            file,
            kind,
            steps,
            reading: None,
            answer: Some(Box::new(answer)),
        }
    }

    fn next(&mut self, last: Option<Outcome>) -> Result<Option<BlockOp>, BlockError> {
        let outcome = last.transpose()?;
        if let Some((start, end)) = self.reading.take() {
            let Some(BlockOutcome::Data(mut buffer)) = outcome else {
                return Err(not_data(start, end - start));
            };
            let offset = self.file.align_down(start);
            let length = usize::try_from(end - start).map_err(|_| not_data(start, end - start))?;
            overlay(&mut buffer, start - offset, length, None)?;
            return Ok(Some(BlockOp::Write {
                offset,
                buffer,
                fua: false,
            }));
        }
        match self.steps.pop_front() {
            Some(Step::Part { start, end }) => {
                self.reading = Some((start, end));
                read_op(&self.file, start, end).map(Some)
            }
            Some(Step::Whole { start, end }) => Ok(Some(self.kind.op(start, end - start))),
            None => Ok(None),
        }
    }
}

impl Job for Zero {
    fn step(&mut self, last: Option<Outcome>) -> Option<BlockOp> {
        match self.next(last) {
            Ok(Some(op)) => return Some(op),
            Ok(None) => finish(&self.file, &mut self.answer, Ok(())),
            Err(error) => finish(&self.file, &mut self.answer, Err(error)),
        }
        None
    }
}
