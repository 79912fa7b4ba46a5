//! Makes the next segment's file ready ahead of need: zeroes, sync, durable name.

use afterimage_blockdev::{FileId, IoBuffer, Monotonic, SegmentId, StorageErrorKind, StorageOp};

use super::{Log, LogOutput, OldSegment, Pending, Phase, StorageResult, capacity, opened};

/// Bytes of one write of zeroes.
const ZERO_BYTES: u64 = 1 << 20;
/// Writes of zeroes at once: enough to keep the medium busy, few enough to leave room for commits.
const ZEROES_IN_FLIGHT: u32 = 2;

/// Where the preparation stands.
#[derive(Debug, Default)]
pub(super) struct Prepare {
    step: Step,
    file: Option<(SegmentId, FileId)>,
    generation: u64,
    next_zero: u64,
    zeroes_in_flight: u32,
    retry_at: Monotonic,
    /// Why there was no room when it was last tried: the budget, else the medium.
    no_room: Option<bool>,
    is_recycling: bool,
    buffers: Vec<IoBuffer>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    #[default]
    Idle,
    Capacity,
    Create,
    Rename,
    Reopen,
    Zero,
    Sync,
    SyncDirectory,
    Ready,
    Remove,
}

impl Prepare {
    pub(super) fn is_begun(&self) -> u64 {
        u64::from(!matches!(self.step, Step::Idle | Step::Capacity))
    }

    /// Says whether the new name of a used file is not durable yet.
    pub(super) fn is_recycling(&self) -> bool {
        self.is_recycling
    }

    pub(super) fn can_recycle(&self) -> bool {
        self.step == Step::Idle
    }

    /// Gives the ready file away.
    pub(super) fn take(&mut self) -> Option<(SegmentId, FileId, u64)> {
        if self.step != Step::Ready {
            return None;
        }
        self.step = Step::Idle;
        self.file
            .take()
            .map(|(id, file)| (id, file, self.generation))
    }

    /// Forgets the waiting time: room may have come.
    pub(super) fn try_again(&mut self) {
        self.retry_at = Monotonic(0);
    }

    /// Gives up what is being prepared; the file is left for the next start.
    pub(super) fn abandon(&mut self) -> Option<FileId> {
        let is_open = matches!(
            self.step,
            Step::Zero | Step::Sync | Step::SyncDirectory | Step::Ready
        );
        self.step = Step::Idle;
        self.file.take().map(|(_, file)| file).filter(|_| is_open)
    }

    pub(super) fn is_busy(&self) -> bool {
        !matches!(self.step, Step::Idle | Step::Ready)
    }
}

impl Log {
    /// Begins to prepare when there is nothing ready and the active segment is being used.
    pub(super) fn prepare_next(&mut self, out: &mut Vec<LogOutput>) {
        let is_used = |active: &super::ActiveSegment| active.slots > 0 || active.write_at > 8192;
        let is_wanted = match self.phase {
            Phase::Running => self.active.as_ref().is_none_or(is_used),
            Phase::Closing => self.active.is_none() && !self.queue.is_empty(),
            _ => false,
        };
        if !is_wanted || self.prepare.step != Step::Idle {
            return;
        }
        if self.prepare.retry_at > self.now {
            out.push(LogOutput::WakeAt(self.prepare.retry_at));
            self.pause_if_starved(out);
            return;
        }
        let needed = self
            .stored_bytes()
            .saturating_add(self.options.segment_bytes);
        if needed > self.options.budget_bytes {
            self.no_room(true, out);
            return;
        }
        self.prepare.step = Step::Capacity;
        let directory = self.options.directory.clone();
        self.submit(Pending::Prepare, StorageOp::Capacity { directory }, out);
    }

    /// Uses a released file again, under a new name and generation.
    pub(super) fn recycle(&mut self, old: OldSegment, out: &mut Vec<LogOutput>) {
        let id = self.take_segment_id();
        self.prepare.generation = old.generation + 1;
        self.prepare.step = Step::Rename;
        self.prepare.is_recycling = true;
        self.prepare.file = Some((id, FileId(0)));
        out.push(LogOutput::Released { segment: old.id });
        let (from, to) = (self.file_name(old.id), self.file_name(id));
        self.submit(Pending::Prepare, StorageOp::Rename { from, to }, out);
    }

    fn take_segment_id(&mut self) -> SegmentId {
        let id = SegmentId(self.next_segment);
        self.next_segment += 1;
        id
    }

    fn no_room(&mut self, is_budget: bool, out: &mut Vec<LogOutput>) {
        self.prepare.retry_at = self.now.after(self.options.retry);
        self.prepare.no_room = Some(is_budget);
        out.push(LogOutput::WakeAt(self.prepare.retry_at));
        self.drop_leftovers(out);
        self.pause_if_starved(out);
    }

    /// Appends wait only when the active segment is full too.
    fn pause_if_starved(&mut self, out: &mut Vec<LogOutput>) {
        let Some(is_budget) = self.prepare.no_room else {
            return;
        };
        if !self.is_paused && self.active.is_none() {
            self.is_paused = true;
            out.push(LogOutput::Paused { is_budget });
        }
    }

    pub(super) fn prepare_step(&mut self, result: StorageResult, out: &mut Vec<LogOutput>) {
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) if error.is_no_space() => {
                self.give_up(out);
                return;
            }
            // The name may be left over from a recovery that was cut; take the next one.
            Err(error)
                if self.prepare.step == Step::Create
                    && matches!(error.kind, StorageErrorKind::Exists) =>
            {
                self.create(out);
                return;
            }
            // A file that could not be removed is found at the next start.
            Err(_) if self.prepare.step == Step::Remove => {
                self.prepare.zeroes_in_flight = self.prepare.zeroes_in_flight.saturating_sub(1);
                self.finish_removal(out);
                return;
            }
            Err(error) => {
                self.fail(error.into(), out);
                return;
            }
        };
        match self.prepare.step {
            Step::Capacity => {
                let free = capacity(outcome).map_or(0, |capacity| capacity.free_bytes);
                let needed = self.options.segment_bytes + self.options.reserve_bytes;
                if free < needed {
                    self.prepare.step = Step::Idle;
                    self.no_room(false, out);
                } else {
                    self.create(out);
                }
            }
            Step::Create => self.created(opened(outcome), out),
            Step::Rename => {
                let Some((id, _)) = self.prepare.file else {
                    return;
                };
                self.prepare.step = Step::Reopen;
                let name = self.file_name(id);
                self.submit(Pending::Prepare, StorageOp::Open { name }, out);
            }
            Step::Reopen => self.created(opened(outcome), out),
            Step::Zero => {
                if let afterimage_blockdev::StorageOutcome::Written(buffer) = outcome {
                    self.prepare.buffers.push(buffer);
                }
                self.prepare.zeroes_in_flight -= 1;
                self.write_zeroes(out);
            }
            Step::Sync => {
                self.prepare.step = Step::SyncDirectory;
                let op = self.directory_op();
                self.submit(Pending::Prepare, op, out);
            }
            Step::SyncDirectory => {
                self.prepare.step = Step::Ready;
                self.prepare.no_room = None;
                self.prepare.is_recycling = false;
                if self.is_paused && !self.waits_for_room() {
                    self.is_paused = false;
                    out.push(LogOutput::Resumed);
                }
                self.release(out);
            }
            Step::Remove => {
                if self.prepare.zeroes_in_flight > 0 {
                    self.prepare.zeroes_in_flight -= 1;
                }
                self.finish_removal(out);
            }
            Step::Idle | Step::Ready => {}
        }
    }

    fn create(&mut self, out: &mut Vec<LogOutput>) {
        let id = self.take_segment_id();
        self.prepare.step = Step::Create;
        self.prepare.generation = 1;
        self.prepare.file = Some((id, FileId(0)));
        let name = self.file_name(id);
        self.submit(Pending::Prepare, StorageOp::Create { name }, out);
    }

    fn created(&mut self, file: Option<(FileId, u64)>, out: &mut Vec<LogOutput>) {
        let (Some((file, length)), Some((id, _))) = (file, self.prepare.file) else {
            return;
        };
        self.prepare.file = Some((id, file));
        self.prepare.step = Step::Zero;
        // A recycled file is written already; only what is missing gets zeroes. Its old header and
        // commits name another segment, and so do not count under the new name.
        self.prepare.next_zero = if length >= self.options.segment_bytes {
            self.options.segment_bytes
        } else {
            length / ZERO_BYTES * ZERO_BYTES
        };
        self.write_zeroes(out);
    }

    fn write_zeroes(&mut self, out: &mut Vec<LogOutput>) {
        let Some((_, file)) = self.prepare.file else {
            return;
        };
        while self.prepare.next_zero < self.options.segment_bytes
            && self.prepare.zeroes_in_flight < ZEROES_IN_FLIGHT
        {
            let offset = self.prepare.next_zero;
            let length = ZERO_BYTES.min(self.options.segment_bytes - offset);
            self.prepare.next_zero += length;
            self.prepare.zeroes_in_flight += 1;
            let len = usize::try_from(length).unwrap_or(0);
            let spare = self
                .prepare
                .buffers
                .pop()
                .filter(|buffer| buffer.len() == len);
            let buffer = spare.unwrap_or_else(|| IoBuffer::zeroed(len));
            self.submit(
                Pending::Prepare,
                StorageOp::Write {
                    file,
                    offset,
                    buffer,
                },
                out,
            );
        }
        if self.prepare.zeroes_in_flight == 0 {
            self.prepare.buffers.clear();
            self.prepare.step = Step::Sync;
            self.submit(Pending::Prepare, StorageOp::Sync { file }, out);
        }
    }

    /// The medium filled up under the new file: take it away and try again later.
    fn give_up(&mut self, out: &mut Vec<LogOutput>) {
        match self.prepare.step {
            Step::Zero | Step::Remove => {
                self.prepare.zeroes_in_flight = self.prepare.zeroes_in_flight.saturating_sub(1);
            }
            // There is no open file yet. A renamed one keeps its new name and is found at start.
            Step::Create | Step::Rename | Step::Reopen | Step::Capacity => {
                self.prepare.file = None;
            }
            _ => {}
        }
        self.prepare.step = Step::Remove;
        self.prepare.is_recycling = false;
        self.finish_removal(out);
    }

    fn finish_removal(&mut self, out: &mut Vec<LogOutput>) {
        if self.prepare.zeroes_in_flight > 0 {
            return;
        }
        if let Some((id, file)) = self.prepare.file.take() {
            // The number of a file that was given up is not used again.
            let name = self.file_name(id);
            self.submit(Pending::Release, StorageOp::Close { file }, out);
            self.submit(Pending::Prepare, StorageOp::Remove { name }, out);
        } else {
            self.prepare.step = Step::Idle;
            self.no_room(false, out);
        }
    }

    /// Removes a prepared file that is not needed any more.
    pub(super) fn drop_prepared(&mut self, out: &mut Vec<LogOutput>) {
        if let Some((id, file, _)) = self.prepare.take() {
            let name = self.file_name(id);
            self.submit(Pending::Release, StorageOp::Close { file }, out);
            self.submit(Pending::Release, StorageOp::Remove { name }, out);
        }
    }
}
