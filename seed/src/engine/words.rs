//! What the engine is asked and told, and what it answers.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, Monotonic, PointId, SegmentId,
    StorageCompletion, StorageOp, Timestamp, Token,
};
use afterimage_cache::{DiskKey, Frame};

use super::EngineInfo;
use super::retention::PolicyInfo;
use super::space::{PointSpace, SpaceInfo};
use crate::error::SeedError;
use crate::manifest::PointRecord;
use crate::notes::NotesFile;
use crate::reference::{At, Reference};
use crate::retention::Policy;
use crate::run::RunId;
use crate::section::Snapshot;

/// Names a request; comes back with its reply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// Names an open stream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StreamNumber(pub u64);

/// What the engine is asked.
#[derive(Debug)]
pub enum Request {
    /// Opens the stream of a history as its writer.
    OpenStream {
        /// The machine.
        machine: MachineId,
        /// Its name.
        name: String,
        /// The history.
        history: HistoryId,
        /// Where it forked off.
        parent: Option<(HistoryId, Lsn)>,
        /// Who makes the records.
        origin: AgentId,
        /// The writer's epoch.
        epoch: Epoch,
    },
    /// Ends a stream.
    CloseStream(StreamNumber),
    /// Declares a disk of a stream's machine.
    DeclareDisk {
        /// The stream.
        stream: StreamNumber,
        /// The disk.
        disk: DiskId,
        /// Its name.
        name: String,
        /// Its size.
        size_bytes: u64,
        /// Smallest unit of a request.
        logical_block_bytes: u32,
    },
    /// Names a cut: the present one (by a mark, when a stream is open), or one that is given.
    CreatePoint {
        /// The machine's name or identity.
        machine: String,
        /// The point's name.
        name: Option<String>,
        /// The cut.
        at: Option<At>,
    },
    /// Deletes points: all of them or none.
    DeletePoints {
        /// The machine's name or identity.
        machine: String,
        /// The points' names.
        names: Vec<String>,
    },
    /// Locks points until a time, or lengthens their locks: all of them or none.
    LockPoints {
        /// The machine's name or identity.
        machine: String,
        /// The points' names.
        names: Vec<String>,
        /// Until when.
        until: Timestamp,
    },
    /// Changes a machine's policy.
    SetPolicy {
        /// The machine's name or identity.
        machine: String,
        /// The policy.
        policy: Policy,
        /// The version that it was made from; refused when there is a newer one.
        expected: Option<u64>,
    },
    /// Shows a machine's policy.
    GetPolicy {
        /// The machine's name or identity.
        machine: String,
    },
    /// Says that the wall clock is right.
    ConfirmClock,
    /// Lists points.
    ListPoints {
        /// The machine's name or identity.
        machine: String,
        /// Those after this one.
        after: PointId,
        /// At most so many.
        limit: usize,
    },
    /// Takes a snapshot.
    Snapshot {
        /// Of what.
        reference: Reference,
        /// Also inside an unfinished copy.
        allow_incomplete: bool,
    },
    /// Takes a snapshot of the newest state of a disk, as it is, for comparing.
    NewestState {
        /// The stream whose machine it is.
        stream: StreamNumber,
        /// The disk.
        disk: DiskId,
    },
    /// Forks a history.
    Fork {
        /// From where.
        reference: Reference,
        /// Also inside an unfinished copy.
        allow_incomplete: bool,
    },
    /// Opens a branch again, as its one writer.
    OpenBranch {
        /// The branch.
        history: HistoryId,
        /// The disk that it is of.
        disk: DiskId,
    },
    /// Drops a branch.
    DropBranch(HistoryId),
    /// Lists the points at which a disk has a state, by number.
    PointStates {
        /// The machine.
        machine: MachineId,
        /// Its disk.
        disk: DiskId,
        /// Those after this one.
        after: PointId,
        /// At most so many.
        limit: usize,
    },
    /// Finds one of them by its name.
    FindPoint {
        /// The machine.
        machine: MachineId,
        /// Its disk.
        disk: DiskId,
        /// The point's name.
        name: String,
    },
    /// Takes a machine away from its writer.
    Fence {
        /// The machine.
        machine: MachineId,
        /// Who may write from now on.
        holder: AgentId,
    },
    /// Collects what nobody needs; answered when that is done.
    Collect,
    /// Describes everything.
    Info,
    /// Lists the files that count, for verification.
    Files,
    /// Says what takes room.
    Space,
    /// Lists points with what they need.
    PointSpace {
        /// The machine's name or identity.
        machine: String,
        /// Those after this one.
        after: PointId,
        /// At most so many.
        limit: usize,
    },
    /// Sets a quota, or takes it away.
    SetQuota {
        /// A machine, or a disk as machine/disk; the store when nothing is named.
        of: Option<String>,
        /// The bytes; none for any number.
        bytes: Option<u64>,
    },
}

/// An opened stream.
#[derive(Clone, Debug)]
pub struct OpenedStream {
    /// The stream.
    pub stream: StreamNumber,
    /// Highest durable LSN.
    pub durable: Lsn,
    /// Highest LSN seen, bulk included.
    pub highest: Lsn,
    /// Keys the content tags.
    pub tag_key: [u8; 32],
}

/// A declared disk.
#[derive(Clone, Debug)]
pub struct DeclaredDisk {
    /// Its key.
    pub key: DiskKey,
    /// A whole copy is here.
    pub has_copy: bool,
    /// A batch of it was begun and not ended.
    pub is_in_batch: bool,
    /// Durable bulk of that batch, as ranges of blocks.
    pub bulk_done: Vec<(u64, u64)>,
}

/// A snapshot and how it came about.
#[derive(Clone, Debug)]
pub struct TakenSnapshot {
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
    /// The machine.
    pub machine: MachineId,
    /// Time of its LSN.
    pub time: Timestamp,
    /// What was asked for was inside a batch.
    pub resolved_to_batch_begin: bool,
    /// The machine's tag key.
    pub tag_key: [u8; 32],
}

/// A forked history.
#[derive(Clone, Debug)]
pub struct ForkedBranch {
    /// The stream on which the branch writes.
    pub stream: OpenedStream,
    /// The branch's history.
    pub history: HistoryId,
    /// The state it began with, seen as the branch.
    pub taken: TakenSnapshot,
    /// The history forked from.
    pub parent: HistoryId,
    /// The LSN forked from.
    pub fork: Lsn,
    /// The disk's key.
    pub key: DiskKey,
    /// The writer.
    pub origin: AgentId,
}

/// A point, and what of a disk is there.
#[derive(Clone, Debug)]
pub struct PointState {
    /// The point.
    pub point: PointRecord,
    /// Epoch of the newest writer of its history.
    pub epoch: Epoch,
    /// Size of the disk there, in bytes.
    pub size_bytes: u64,
}

/// A file of the store that counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreFile {
    /// The manifest, by the number of its file.
    Manifest(u32),
    /// A segment of the log.
    Log(SegmentId),
    /// A seed segment, and how often it was rewritten.
    Seed(SegmentId, u32),
    /// A run.
    Run(RunId),
    /// Notes for a rebuild.
    Notes(NotesFile),
}

/// An answer.
#[derive(Debug)]
pub enum Response {
    /// Of `OpenStream`.
    Stream(OpenedStream),
    /// Of `DeclareDisk`.
    Disk(DeclaredDisk),
    /// Of `CreatePoint`.
    Point(PointRecord),
    /// Of `ListPoints`: the page and how many there are.
    Points(Vec<PointRecord>, u64),
    /// Of `Snapshot` and `NewestState`.
    Snapshot(TakenSnapshot),
    /// Of `PointStates` and `FindPoint`: what was found, and the last point that was looked at;
    /// none at the end.
    PointStates(Vec<PointState>, Option<PointId>),
    /// Of `Fork` and `OpenBranch`.
    Branch(Box<ForkedBranch>),
    /// Of `Collect`.
    Collected(Collected),
    /// Of `Info`.
    Info(EngineInfo),
    /// Of `Files`.
    Files(Vec<StoreFile>),
    /// Of `SetPolicy` and `GetPolicy`.
    Policy(PolicyInfo),
    /// Of `Space`.
    Space(Box<SpaceInfo>),
    /// Of `PointSpace`: the page, and when it was worked out.
    PointSpace(Vec<PointSpace>, Option<Timestamp>),
    /// Of all others.
    Done,
}

/// Why a stream ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamEnd {
    /// Another writer has a newer epoch.
    Fenced,
    /// A frame did not follow what is here: expected and found.
    Gap(Lsn, Lsn),
    /// A frame contradicts what is here.
    Damaged,
}

/// What happened to a stream.
#[derive(Debug)]
pub enum Event {
    /// Everything up to here is durable.
    Durable {
        /// The stream.
        stream: StreamNumber,
        /// The LSN.
        durable: Lsn,
        /// Bytes of the stream that still wait.
        queued_bytes: u64,
    },
    /// A bulk frame is durable.
    BulkDurable {
        /// The stream.
        stream: StreamNumber,
        /// Its number.
        number: u64,
        /// Bytes of the stream that still wait.
        queued_bytes: u64,
    },
    /// A mark is wanted.
    PlaceMark {
        /// The stream.
        stream: StreamNumber,
        /// Comes back as the mark's argument.
        request: u64,
        /// By a person.
        is_bookmark: bool,
        /// Name of the point.
        name: String,
    },
    /// The stream is over.
    Over {
        /// The stream.
        stream: StreamNumber,
        /// Why.
        end: StreamEnd,
    },
    /// Ingest waits for room.
    Paused {
        /// The budget, not the medium, is used up.
        is_budget: bool,
    },
    /// Ingest goes on.
    Resumed,
    /// The wall clock is not trusted: no lock ends and nothing is thinned until a person says that
    /// it is right.
    ClockFrozen {
        /// How far it is ahead of where it should be.
        ahead: Duration,
    },
    /// Policies dropped points.
    Thinned {
        /// How many.
        points: usize,
    },
    /// Runs became one.
    Merged {
        /// How many.
        runs: usize,
        /// Entries that nobody needs any more.
        left_out: u64,
    },
    /// What nobody needs was collected.
    Collected(Collected),
    /// There is no room: a machine's journal window gets shorter.
    WindowShortened {
        /// The machine.
        machine: MachineId,
        /// The window that it has from now on.
        window: std::time::Duration,
    },
    /// There is no room: a machine's oldest points go.
    PointsYielded {
        /// The machine.
        machine: MachineId,
        /// How many.
        count: usize,
    },
    /// A machine takes more than its quota, and nothing of it can go: its ingest waits.
    MachinePaused {
        /// The machine.
        machine: MachineId,
        /// Why.
        why: String,
    },
    /// Its ingest goes on.
    MachineResumed {
        /// The machine.
        machine: MachineId,
    },
    /// A stream's frames wait, for its machine does.
    StreamPaused {
        /// The stream.
        stream: StreamNumber,
        /// Why.
        why: String,
    },
    /// Runs were not merged; it is tried again.
    MergeGivenUp {
        /// Why.
        why: String,
    },
}

/// What a collection did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Collected {
    /// Log segments that were destaged.
    pub destaged: u64,
    /// Seed segments that were rewritten without what nobody needs.
    pub rewritten: u64,
    /// Segments of which nothing was needed.
    pub dropped: u64,
    /// Bytes of files that went, less those that came.
    pub freed_bytes: i64,
    /// Bytes that were written for it.
    pub written_bytes: u64,
}

/// What the engine wants or tells.
#[derive(Debug)]
pub enum Output {
    /// Perform this and bring the completion back.
    Storage(Token, StorageOp),
    /// Answers a request.
    Reply(RequestId, Result<Response, SeedError>),
    /// Something happened.
    Event(Event),
    /// Step again at this time at the latest.
    WakeAt(Monotonic),
    /// Recovery is done.
    Ready,
    /// The engine cannot go on.
    Failed(SeedError),
    /// `Stop` is done.
    Stopped,
}

/// What the engine is told.
#[derive(Debug)]
pub enum Input {
    /// Begins recovery.
    Start,
    /// A storage operation finished.
    Storage(StorageCompletion),
    /// Time has passed.
    Tick,
    /// A request.
    Request(RequestId, Request),
    /// An accepted frame of a stream.
    Frame(StreamNumber, Frame),
    /// An accepted bulk frame of a stream.
    Bulk(StreamNumber, u64, Frame),
    /// Makes all durable, writes what is open, seals the log.
    Stop,
}
