//! The shared, write-ordered log: one place where the writes of all disks become durable, with
//! group commit. The agent's spool is the same log.
//!
//! Invariants
//! * [`LogOutput::Durable`] is given in append order, and only when the commit that holds the
//!   frame *and all commits before it* are written and synced.
//! * A segment's file is written with zeroes, synced and named durably before the first commit goes
//!   into it; it is never merely allocated.
//! * At most `commits_in_flight_max` commits are being written; a sync covers only writes that
//!   completed before it was submitted.
//! * A commit never follows one of another file that is not durable yet.
//! * A failed sync or write ends the log: nothing is acknowledged afterwards. A write that
//!   fails for want of room is tried again instead.
//! * Segments go from the oldest on, each durably before the next, and the sequence never falls.
//! * An idle commit follows the last data within `idle_commit`, so that damage below it is told
//!   from a torn tail.

mod commit;
mod prepare;
mod recover;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use afterimage_blockdev::{
    Capacity, DiskId, FileId, FileName, HistoryId, Lsn, Monotonic, SegmentId, SlotIndex,
    StorageCompletion, StorageError, StorageErrorKind, StorageOp, StorageOutcome, StoreId,
    Timestamp, Token,
};

use crate::error::{CacheError, Damage};
use crate::frame::{Frame, FrameIdentity};
pub use crate::segment::SalvagedRecord;
use crate::segment::{Directory, SegmentIdentity};

/// How a log behaves.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Directory of the segments, below the storage's root.
    pub directory: String,
    /// The store or spool that owns the segments.
    pub store: StoreId,
    /// Bytes of a segment; room for at least one frame of the largest size that is appended.
    pub segment_bytes: u64,
    /// Bytes of all segments together.
    pub budget_bytes: u64,
    /// Bytes of the medium that are left free.
    pub reserve_bytes: u64,
    /// Bytes of frames that go into one commit.
    pub commit_bytes_max: u64,
    /// Commits being written at once.
    pub commits_in_flight_max: usize,
    /// How long after the last data the idle commit follows.
    pub idle_commit: Duration,
    /// How long after a full medium the next try follows.
    pub retry: Duration,
    /// Writes a directory at the end of each full segment. A spool needs none.
    pub seals: bool,
    /// Uses the files of released segments again.
    pub recycles: bool,
}

impl LogOptions {
    /// Usual values for the store's log.
    #[must_use]
    pub fn new(directory: &str, store: StoreId) -> Self {
        Self {
            directory: directory.to_owned(),
            store,
            segment_bytes: 64 << 20,
            budget_bytes: u64::MAX,
            reserve_bytes: 256 << 20,
            commit_bytes_max: 4 << 20,
            commits_in_flight_max: 2,
            idle_commit: Duration::from_millis(100),
            retry: Duration::from_secs(1),
            seals: true,
            recycles: false,
        }
    }
}

/// Where a frame lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameLocation {
    /// The segment.
    pub segment: SegmentId,
    /// Byte offset of the frame in the segment.
    pub offset: u64,
    /// Index of the frame's first slot in the segment.
    pub first_slot: u32,
    /// Sequence of the commit.
    pub sequence: u64,
}

/// What a log is told.
#[derive(Debug)]
pub enum LogInput {
    /// Begins; commits from this sequence on are given back as `Recovered`. Earlier segments are
    /// only listed.
    Start {
        /// First sequence that is wanted; 0 for all.
        from_sequence: u64,
    },
    /// Appends a frame that was accepted (its hashes verified). Comes back as `Durable`.
    Append {
        /// Comes back.
        token: Token,
        /// The frame.
        frame: Frame,
    },
    /// A storage operation finished.
    Storage(StorageCompletion),
    /// Time has passed.
    Tick,
    /// Segments whose commits all lie at or below this sequence are no longer needed. They go one
    /// by one, from the oldest on; the last of all stays until a later commit is durable.
    Release {
        /// That sequence.
        through_sequence: u64,
    },
    /// Makes everything durable, seals, and ends with `Closed`. No append may follow.
    Close,
}

/// What a log wants or tells.
#[derive(Debug)]
pub enum LogOutput {
    /// Perform this on the storage and bring the completion back.
    Storage(Token, StorageOp),
    /// A frame found at start, in order.
    Recovered {
        /// Where it lies.
        location: FrameLocation,
        /// The frame.
        frame: Frame,
    },
    /// A slot of the frame just given back is damaged on the medium. The frame's other slots are
    /// good, and its record is known.
    DamagedSlot {
        /// Where the frame lies.
        location: FrameLocation,
        /// Index of the slot in the segment.
        slot: SlotIndex,
        /// The record that it belongs to.
        lsn: Lsn,
        /// The disk that the record is about.
        disk: DiskId,
        /// The history.
        history: HistoryId,
    },
    /// A frame found at start, in order, of which only some records are whole. Other records may
    /// be damaged beyond what [`crate::FrameView::records`] can walk: use the ranges.
    Salvaged {
        /// Where it lies.
        location: FrameLocation,
        /// Whose records.
        identity: FrameIdentity,
        /// The frame's bytes.
        bytes: Vec<u8>,
        /// The records that are whole.
        intact: Vec<SalvagedRecord>,
        /// LSNs of the records that are not.
        lost: Vec<Lsn>,
    },
    /// Bytes of a log file are damaged, but nothing was lost by it: what they said is known from
    /// elsewhere.
    Mended {
        /// Where.
        segment: SegmentId,
        /// Byte offset there.
        offset: u64,
        /// What is wrong with the bytes.
        damage: Damage,
    },
    /// Commits that were durable are damaged, and what is not given back of them is lost. Later
    /// ones are kept.
    Lost {
        /// Where the damage begins.
        segment: SegmentId,
        /// Byte offset there.
        offset: u64,
        /// First sequence lost.
        first_sequence: u64,
        /// Last sequence lost.
        last_sequence: u64,
        /// What is wrong with the bytes.
        damage: Damage,
    },
    /// Recovery is done; appends may follow.
    Ready {
        /// Sequence of the last commit that was kept.
        last_sequence: u64,
        /// The segments that are there, oldest first.
        segments: Vec<SegmentId>,
    },
    /// A frame is durable, and all before it.
    Durable {
        /// The token of its append.
        token: Token,
        /// Where it lies.
        location: FrameLocation,
        /// The frame, back again.
        frame: Frame,
    },
    /// A segment got its directory and will not change any more.
    Sealed {
        /// The segment.
        segment: SegmentId,
        /// Bytes of its file.
        bytes: u64,
    },
    /// There is no room for another segment. Appends wait.
    Paused {
        /// Says whether the budget, not the medium, is used up.
        is_budget: bool,
    },
    /// There is room again.
    Resumed,
    /// A segment's file is gone or used again.
    Released {
        /// The segment.
        segment: SegmentId,
    },
    /// Call `step` with `Tick` at this time at the latest.
    WakeAt(Monotonic),
    /// The log cannot go on; reopen it.
    Failed(CacheError),
    /// `Close` is done.
    Closed,
}

/// A segment that will not change any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedSegment {
    /// The segment.
    pub segment: SegmentId,
    /// Sequence of its last commit.
    pub last_sequence: u64,
    /// Bytes of its file.
    pub bytes: u64,
}

/// A segment that is not being written.
#[derive(Clone, Copy, Debug)]
struct OldSegment {
    id: SegmentId,
    generation: u64,
    /// 0 when it holds no commit.
    last_sequence: u64,
    bytes: u64,
}

#[derive(Debug)]
struct ActiveSegment {
    identity: SegmentIdentity,
    file: FileId,
    first_sequence: u64,
    write_at: u64,
    slots: u32,
    directory: Directory,
    root: blake3::Hasher,
}

#[derive(Debug)]
struct InFlight {
    sequence: u64,
    offset: u64,
    first_slot: u32,
    /// The `durable_through` that it carries.
    carries: u64,
    frames: Vec<(Token, FrameLocation, Frame)>,
    is_written: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pending {
    Recover,
    Prepare,
    Header,
    Commit {
        sequence: u64,
    },
    Sync {
        through: u64,
    },
    Seal(SealStep),
    /// Of a segment that was released.
    Remove,
    /// Of the directory it was removed from.
    Removed,
    /// Nothing depends on it.
    Release,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SealStep {
    Open,
    Write,
    Shorten,
    Sync,
    Close,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    New,
    Recovering,
    Running,
    Closing,
    Closed,
    Failed,
}

/// The log. See the module's text.
#[derive(Debug)]
pub struct Log {
    options: LogOptions,
    phase: Phase,
    now: Monotonic,
    next_token: u64,
    pending: HashMap<Token, Pending>,
    recovery: recover::Recovery,
    prepare: prepare::Prepare,
    active: Option<ActiveSegment>,
    /// Being sealed, oldest first.
    sealing: VecDeque<commit::Sealing>,
    /// Found at start without a directory; sealed once a new segment's header is durable.
    unsealed: Vec<commit::Sealing>,
    /// Found at start, all void; removed once a new segment's header is durable.
    leftovers: Vec<SegmentId>,
    old: VecDeque<OldSegment>,
    next_segment: u32,
    next_sequence: u64,
    durable_through: u64,
    /// Highest sequence of which something was found at start.
    found_through: u64,
    /// Highest `durable_through` that a durable commit carries.
    marked_through: u64,
    last_data_sequence: u64,
    last_data_at: Monotonic,
    queue: VecDeque<(Token, Frame)>,
    queue_bytes: u64,
    in_flight: VecDeque<InFlight>,
    is_syncing: bool,
    is_paused: bool,
    /// Writes that the full medium refused: commits, and the header of the active segment.
    retries: BTreeSet<u64>,
    retries_header: bool,
    retry_at: Monotonic,
    released_through: u64,
    removing: Option<OldSegment>,
    closes_when_ready: bool,
    spare_buffers: Vec<afterimage_blockdev::IoBuffer>,
    wall: Timestamp,
}

impl Log {
    /// Makes a log that has not looked at its storage yet.
    #[must_use]
    pub fn new(options: LogOptions) -> Self {
        Self {
            options,
            phase: Phase::New,
            now: Monotonic(0),
            next_token: 1,
            pending: HashMap::new(),
            recovery: recover::Recovery::default(),
            prepare: prepare::Prepare::default(),
            active: None,
            sealing: VecDeque::new(),
            unsealed: Vec::new(),
            leftovers: Vec::new(),
            old: VecDeque::new(),
            next_segment: 1,
            next_sequence: 1,
            found_through: 0,
            durable_through: 0,
            marked_through: 0,
            last_data_sequence: 0,
            last_data_at: Monotonic(0),
            queue: VecDeque::new(),
            queue_bytes: 0,
            in_flight: VecDeque::new(),
            is_syncing: false,
            is_paused: false,
            retries: BTreeSet::new(),
            retries_header: false,
            retry_at: Monotonic(0),
            released_through: 0,
            removing: None,
            closes_when_ready: false,
            spare_buffers: Vec::new(),
            wall: Timestamp(0),
        }
    }

    /// Bytes of frames that wait or are being written.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Bytes of all segment files.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let live = u64::from(self.active.is_some()) + self.prepare.is_begun();
        let sealing: u64 = self
            .sealing
            .iter()
            .map(|_| self.options.segment_bytes)
            .sum();
        self.old.iter().map(|old| old.bytes).sum::<u64>()
            + sealing
            + live * self.options.segment_bytes
    }

    /// The segments that hold commits, oldest first.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentId> {
        let old = self.old.iter().map(|old| old.id);
        let sealing = self.sealing.iter().map(|sealing| sealing.identity.segment);
        let active = self.active.iter().map(|active| active.identity.segment);
        let mut all: Vec<_> = old.chain(sealing).chain(active).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The segments that will not change any more, oldest first.
    #[must_use]
    pub fn sealed_segments(&self) -> Vec<SealedSegment> {
        let is_sealing = |old: &&OldSegment| {
            let mut sealing = self.sealing.iter();
            !sealing.any(|sealing| sealing.identity.segment == old.id)
        };
        let sealed = self.old.iter().take_while(is_sealing);
        sealed
            .map(|old| SealedSegment {
                segment: old.id,
                last_sequence: old.last_sequence,
                bytes: old.bytes,
            })
            .collect()
    }

    /// Highest sequence of which the files said at start that it was there; below what the start
    /// was told to begin with, something is missing.
    #[must_use]
    pub fn found_through(&self) -> u64 {
        self.found_through
    }

    /// Highest sequence that is durable.
    #[must_use]
    pub fn durable_through(&self) -> u64 {
        self.durable_through
    }

    /// Says whether appends wait for room.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Sets the wall time that new segments carry, for people who read them.
    pub fn set_wall_time(&mut self, wall: Timestamp) {
        self.wall = wall;
    }

    /// Sets the bytes that all segment files may take.
    pub fn set_budget(&mut self, bytes: u64) {
        self.options.budget_bytes = bytes;
    }

    /// Takes one input; what it leads to is appended to `out`, in order.
    pub fn step(&mut self, now: Monotonic, input: LogInput, out: &mut Vec<LogOutput>) {
        self.now = now;
        if matches!(self.phase, Phase::Failed | Phase::Closed) {
            return;
        }
        match input {
            LogInput::Start { from_sequence } => self.start(from_sequence, out),
            LogInput::Append { token, frame } => self.append(token, frame),
            LogInput::Storage(completion) => self.storage(completion, out),
            LogInput::Tick => {}
            LogInput::Release { through_sequence } => {
                self.released_through = self.released_through.max(through_sequence);
                self.release(out);
            }
            LogInput::Close if self.phase == Phase::Recovering => self.closes_when_ready = true,
            LogInput::Close => self.phase = Phase::Closing,
        }
        if matches!(self.phase, Phase::Running | Phase::Closing) {
            self.advance(out);
        }
    }

    fn append(&mut self, token: Token, frame: Frame) {
        assert!(self.phase == Phase::Running, "append while the log runs");
        self.queue_bytes += frame.bytes.len() as u64;
        self.queue.push_back((token, frame));
    }

    fn submit(&mut self, pending: Pending, op: StorageOp, out: &mut Vec<LogOutput>) {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.pending.insert(token, pending);
        out.push(LogOutput::Storage(token, op));
    }

    fn fail(&mut self, error: CacheError, out: &mut Vec<LogOutput>) {
        self.phase = Phase::Failed;
        self.pending.clear();
        let active = self.active.take().map(|active| active.file);
        let sealing = self.sealing.drain(..).filter_map(|sealing| sealing.file);
        let files: Vec<_> = active
            .into_iter()
            .chain(sealing)
            .chain(self.prepare.abandon())
            .chain(self.recovery.abandon())
            .collect();
        for file in files {
            self.submit(Pending::Release, StorageOp::Close { file }, out);
        }
        out.push(LogOutput::Failed(error));
    }

    fn storage(&mut self, completion: StorageCompletion, out: &mut Vec<LogOutput>) {
        let Some(pending) = self.pending.remove(&completion.token) else {
            return;
        };
        match pending {
            Pending::Recover => self.recover_step(completion.result, out),
            Pending::Prepare => self.prepare_step(completion.result, out),
            Pending::Remove => self.removed(completion.result, out),
            Pending::Removed => self.removal_synced(completion.result.is_ok(), out),
            Pending::Release => {}
            Pending::Header => match completion.result {
                Ok(_) => self.header_written(),
                Err(error) if error.is_no_space() => {
                    self.retries_header = true;
                    self.retry_later(out);
                }
                Err(error) => self.fail(error.into(), out),
            },
            Pending::Commit { sequence } => self.commit_written(sequence, completion.result, out),
            Pending::Sync { through } => self.synced(through, completion.result, out),
            Pending::Seal(step) => self.seal_step(step, completion.result, out),
        }
    }

    /// Does all that can be done now.
    fn advance(&mut self, out: &mut Vec<LogOutput>) {
        self.prepare_next(out);
        self.activate(out);
        self.write_commits(out);
        self.sync(out);
        self.idle_commit(out);
        self.close_if_done(out);
    }

    /// Gives released segments away, oldest first. Each is durably gone before the next one goes,
    /// so that a crash never leaves a gap that would look like a loss.
    fn release(&mut self, out: &mut Vec<LogOutput>) {
        while let Some(old) = self.old.front().copied() {
            let is_sealing = |sealing: &commit::Sealing| sealing.identity.segment == old.id;
            let is_needed = self.released_through == 0 || old.last_sequence > self.released_through;
            // The last file that knows the sequence stays until a later commit is durable.
            let is_last = self.old.len() == 1 && self.durable_through <= old.last_sequence;
            let must_wait = is_last || self.removing.is_some() || self.prepare.is_recycling();
            if is_needed || must_wait || self.sealing.iter().any(is_sealing) {
                break;
            }
            self.old.pop_front();
            self.unsealed.retain(|unsealed| !is_sealing(unsealed));
            if self.options.recycles && self.prepare.can_recycle() && !self.options.seals {
                self.recycle(old, out);
            } else {
                let name = self.file_name(old.id);
                self.removing = Some(old);
                self.submit(Pending::Remove, StorageOp::Remove { name }, out);
            }
        }
    }

    fn removed(&mut self, result: StorageResult, out: &mut Vec<LogOutput>) {
        let is_gone = match result {
            Ok(_) => true,
            Err(error) => matches!(error.kind, StorageErrorKind::NotFound),
        };
        if is_gone {
            let op = self.directory_op();
            self.submit(Pending::Removed, op, out);
        } else {
            self.removal_synced(false, out);
        }
    }

    /// A removal that failed is tried again with the next release; nothing behind it goes before.
    fn removal_synced(&mut self, is_gone: bool, out: &mut Vec<LogOutput>) {
        let Some(old) = self.removing.take() else {
            return;
        };
        if is_gone {
            out.push(LogOutput::Released { segment: old.id });
            self.prepare.try_again();
            self.release(out);
        } else {
            self.old.push_front(old);
        }
    }

    /// Removes files that hold nothing but what a cut made void.
    fn drop_leftovers(&mut self, out: &mut Vec<LogOutput>) {
        for id in core::mem::take(&mut self.leftovers) {
            let name = self.file_name(id);
            self.submit(Pending::Release, StorageOp::Remove { name }, out);
        }
    }

    fn file_name(&self, id: SegmentId) -> FileName {
        crate::segment::segment_file(&self.options.directory, id)
    }

    fn directory_op(&self) -> StorageOp {
        StorageOp::SyncDirectory {
            directory: self.options.directory.clone(),
        }
    }
}

/// What an `Open` or `Create` gives.
fn opened(outcome: StorageOutcome) -> Option<(FileId, u64)> {
    match outcome {
        StorageOutcome::Opened { file, length } => Some((file, length)),
        _ => None,
    }
}

fn capacity(outcome: StorageOutcome) -> Option<Capacity> {
    match outcome {
        StorageOutcome::Capacity(capacity) => Some(capacity),
        _ => None,
    }
}

/// The highest LSN that a frame ends with; for messages.
#[must_use]
pub fn last_lsn(frame: &Frame) -> Lsn {
    frame.header.last
}

type StorageResult = Result<StorageOutcome, StorageError>;
