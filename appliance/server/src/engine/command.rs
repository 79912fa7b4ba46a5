//! What the rest of the daemon asks of the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{
    AgentId, BlockDevice, DiskId, Epoch, HistoryId, Lsn, MachineId, PointId, Timestamp,
};
use afterimage_cache::Frame;
use afterimage_protocol::message::{DiskDescription, ForkPoint};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::policy::{MachinePolicy, SetPolicy};
use afterimage_protocol::rest::server::{AddressableRange, CollectReport, Point, VerifyReport};
use afterimage_protocol::rest::space::PointSpaces;
use afterimage_protocol::{Refusal, RefusalCode};
use afterimage_seed::{Usage, ViewDevice};
use crossbeam::channel::{Sender, TrySendError};
use tokio::sync::oneshot;

use super::files::FileCommand;
use super::space::SpaceFigures;
use crate::events::EventLog;

/// Names an open stream within the engine. A stream that was taken over or closed is refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct StreamKey(pub u64);

/// Where the engine tells a connection what happened to its stream. Called on the engine thread:
/// implementations only set flags or coalesce, they never block.
pub trait StreamEvents: Send + Sync {
    /// Everything up to `durable` was on disk at `synced` and is visible to views now;
    /// `queued_bytes` of this stream wait in the engine.
    fn durable(&self, durable: Lsn, synced: Instant, queued_bytes: u64);
    /// A bulk frame is durable.
    fn bulk_durable(&self, number: u64);
    /// A mark is wanted.
    fn place_mark(&self, request: u64, is_bookmark: bool, name: &str);
    /// Nothing more is taken for now.
    fn paused(&self, refusal: &Refusal);
    /// The stream is over: fenced, damaged, or the engine goes down.
    fn refused(&self, refusal: &Refusal);
}

/// Opens a stream. That the carrier has a grant for the machine was checked before.
pub struct OpenRequest {
    /// The machine.
    pub machine: MachineId,
    /// Its name.
    pub name: String,
    /// The history.
    pub history: HistoryId,
    /// Where it forked off.
    pub parent: Option<ForkPoint>,
    /// Who makes the records.
    pub origin: AgentId,
    /// The writer's epoch.
    pub epoch: Epoch,
    /// Where to tell what happens.
    pub events: Arc<dyn StreamEvents>,
}

/// An opened stream.
#[derive(Clone, Debug)]
pub struct StreamOpened {
    /// Its name in the engine.
    pub key: StreamKey,
    /// Highest durable LSN.
    pub durable: Lsn,
    /// Highest LSN seen, bulk included.
    pub highest: Lsn,
    /// Keys the content tags.
    pub tag_key: [u8; 32],
}

/// Declares a disk of a stream's machine.
pub struct OpenDisk {
    /// The stream.
    pub stream: StreamKey,
    /// The disk.
    pub description: DiskDescription,
}

/// A declared disk.
#[derive(Clone, Debug)]
pub struct DiskOpened {
    /// Generation of its key.
    pub key: u32,
    /// Its key.
    pub secret: [u8; 32],
    /// A whole copy is here.
    pub has_copy: bool,
    /// A batch of this disk was begun and not ended.
    pub is_in_batch: bool,
    /// Durable bulk of that batch: (first block, blocks).
    pub bulk_done: Vec<(u64, u64)>,
}

/// Asks for a view or a branch.
#[derive(Clone, Debug)]
pub struct ViewRequest {
    /// `<machine>/<disk>@<...>`.
    pub reference: String,
    /// Open a state inside an unfinished copy.
    pub allow_incomplete: bool,
}

/// An open view. It stays readable until the device is dropped.
pub struct ViewOpened {
    /// The read-only disk.
    pub device: Arc<dyn BlockDevice>,
    /// The same, where it can be compared with another state.
    pub view: Option<Arc<ViewDevice>>,
    /// The machine.
    pub machine: MachineId,
    /// The disk.
    pub disk: DiskId,
    /// The history shown.
    pub history: HistoryId,
    /// The LSN shown.
    pub lsn: Lsn,
    /// Time of that LSN.
    pub time: Timestamp,
    /// What was asked for was inside a batch.
    pub resolved_to_batch_begin: bool,
}

/// An open branch. Dropping the device closes it; its history stays until `DropBranch`.
pub struct BranchOpened {
    /// The writable disk.
    pub device: Arc<dyn BlockDevice>,
    /// The branch's own history.
    pub history: HistoryId,
    /// The history forked from.
    pub parent: HistoryId,
    /// The LSN forked from.
    pub lsn: Lsn,
    /// The machine.
    pub machine: MachineId,
    /// The disk.
    pub disk: DiskId,
    /// What it holds of its own, and may hold.
    pub usage: Arc<Usage>,
    /// What was asked for was inside a batch.
    pub resolved_to_batch_begin: bool,
}

/// Asks for a branch that was forked before.
#[derive(Clone, Copy, Debug)]
pub struct ReopenRequest {
    /// The branch.
    pub history: HistoryId,
    /// The disk that it is of.
    pub disk: DiskId,
    /// The most that it may hold of its own.
    pub limit_bytes: Option<u64>,
}

/// Points of a directory of the tree.
#[derive(Clone, Debug, Default)]
pub struct PointListing {
    /// Points at which the disk has a state, each with the epoch of its history's newest writer
    /// and the size of the disk in bytes.
    pub points: Vec<(Point, Epoch, u64)>,
    /// The last point that was looked at; `None` at the end.
    pub last: Option<PointId>,
}

/// Which points a directory of the tree is asked for.
#[derive(Clone, Debug)]
pub enum PointsWanted {
    /// At most so many after one.
    After(PointId, usize),
    /// The one of this name.
    Named(String),
}

/// One page of recovery points, oldest first.
#[derive(Clone, Debug, Default)]
pub struct PointPage {
    /// The points.
    pub points: Vec<Point>,
    /// How many there are in all.
    pub total: u64,
}

/// What the engine knows of one history.
#[derive(Clone, Debug)]
pub struct HistorySummary {
    /// The history.
    pub history: HistoryId,
    /// Its parent.
    pub parent: Option<(HistoryId, Lsn)>,
    /// Epoch of the newest writer.
    pub epoch: Epoch,
    /// That writer.
    pub origin: AgentId,
    /// Highest LSN received.
    pub received: Lsn,
    /// Highest durable LSN.
    pub durable: Lsn,
    /// Time of the highest durable record.
    pub durable_time: Timestamp,
    /// It is a branch of this appliance.
    pub is_branch: bool,
    /// A stream is open.
    pub is_open: bool,
}

/// What the engine knows of one disk.
#[derive(Clone, Debug)]
pub struct DiskSummary {
    /// The disk.
    pub disk: DiskId,
    /// Its name.
    pub name: String,
    /// Size at the newest LSN.
    pub size_bytes: u64,
    /// A whole copy is here.
    pub has_copy: bool,
    /// What can be mounted.
    pub addressable: Vec<AddressableRange>,
    /// Holes and damage, for people.
    pub damage: Vec<String>,
}

/// What the engine knows of one machine.
#[derive(Clone, Debug)]
pub struct MachineSummary {
    /// The machine.
    pub machine: MachineId,
    /// Its name.
    pub name: String,
    /// The history that agents write.
    pub trunk: HistoryId,
    /// All histories.
    pub histories: Vec<HistorySummary>,
    /// The disks.
    pub disks: Vec<DiskSummary>,
    /// Number of points.
    pub point_count: u64,
    /// Its journal window, while a lack of room keeps it shorter than the policy says.
    pub shortened_window: Option<Duration>,
}

/// What the engine knows.
#[derive(Clone, Debug)]
pub struct EngineStatus {
    /// Bytes of the store on disk.
    pub stored_bytes: u64,
    /// Bytes that ingest may still use.
    pub free_bytes: u64,
    /// Why ingest is paused, if it is.
    pub paused: Option<Refusal>,
    /// The machines.
    pub machines: Vec<MachineSummary>,
    /// How far the wall clock is ahead of where it should be, while it is not trusted.
    pub clock_ahead: Option<Duration>,
}

/// A question whose answer goes to `reply`.
pub type Reply<T> = oneshot::Sender<T>;

/// What the engine is asked.
pub enum Command {
    /// Opens a stream.
    Open(OpenRequest, Reply<Result<StreamOpened, Refusal>>),
    /// Declares a disk.
    Declare(OpenDisk, Reply<Result<DiskOpened, Refusal>>),
    /// Appends an accepted frame (hashes verified) to a stream.
    Append(StreamKey, Frame),
    /// Stores an accepted bulk frame.
    Bulk(StreamKey, u64, Frame),
    /// Which of these blocks differ from the newest state of the replica.
    Compare {
        /// The stream.
        stream: StreamKey,
        /// The disk.
        disk: DiskId,
        /// First block.
        first_block: u64,
        /// Tags of the source.
        tags: Vec<[u8; 16]>,
        /// The answer, one for each tag.
        reply: Reply<Result<Vec<bool>, Refusal>>,
    },
    /// Ends a stream.
    Close(StreamKey),
    /// Asks the open streams of a machine for a mark, or names a cut that exists.
    CreatePoint {
        /// The machine's name or identity.
        machine: String,
        /// The point's name.
        name: Option<String>,
        /// A cut to name instead of the present one.
        at: Option<String>,
        /// The durable point.
        reply: Reply<Result<Point, ApiError>>,
    },
    /// Deletes points: all of them or none.
    DeletePoints {
        /// The machine's name or identity.
        machine: String,
        /// The points' names.
        names: Vec<String>,
        /// Durable when answered.
        reply: Reply<Result<(), ApiError>>,
    },
    /// Locks points, or lengthens their locks: all of them or none.
    LockPoints {
        /// The machine's name or identity.
        machine: String,
        /// The points' names.
        names: Vec<String>,
        /// Until when.
        until: Timestamp,
        /// Durable when answered.
        reply: Reply<Result<(), ApiError>>,
    },
    /// Shows a machine's policy.
    GetPolicy {
        /// The machine's name or identity.
        machine: String,
        /// The policy.
        reply: Reply<Result<MachinePolicy, ApiError>>,
    },
    /// Changes a machine's policy.
    SetPolicy {
        /// The machine's name or identity.
        machine: String,
        /// What it shall be.
        wanted: SetPolicy,
        /// The policy, durable.
        reply: Reply<Result<MachinePolicy, ApiError>>,
    },
    /// Says that the wall clock is right.
    ConfirmClock(Reply<Result<(), ApiError>>),
    /// Lists points.
    ListPoints {
        /// The machine's name or identity.
        machine: String,
        /// Those after this one.
        after: PointId,
        /// At most so many.
        limit: usize,
        /// The page.
        reply: Reply<Result<PointPage, ApiError>>,
    },
    /// Opens a view.
    OpenView(ViewRequest, Reply<Result<ViewOpened, ApiError>>),
    /// Forks a branch.
    Fork(ViewRequest, Reply<Result<BranchOpened, ApiError>>),
    /// Opens a branch again, at its newest durable state.
    Reopen(ReopenRequest, Reply<Result<BranchOpened, ApiError>>),
    /// Lists or finds points of a disk, as a directory shows them.
    PointStates {
        /// The machine.
        machine: MachineId,
        /// Its disk.
        disk: DiskId,
        /// Which.
        wanted: PointsWanted,
        /// The listing.
        reply: Reply<Result<PointListing, ApiError>>,
    },
    /// Drops a branch's history.
    DropBranch(HistoryId, Reply<Result<(), ApiError>>),
    /// Describes everything.
    Status(Reply<EngineStatus>),
    /// Says what takes room.
    Space(Reply<SpaceFigures>),
    /// Lists points with what they need.
    PointSpace {
        /// The machine's name or identity.
        machine: String,
        /// Those after this one.
        after: PointId,
        /// At most so many.
        limit: usize,
        /// The page.
        reply: Reply<Result<PointSpaces, ApiError>>,
    },
    /// Sets a quota, or takes it away.
    SetQuota {
        /// A machine, or a disk as machine/disk; the store when nothing is named.
        of: Option<String>,
        /// Most bytes; none for any number.
        bytes: Option<u64>,
        /// Durable when answered.
        reply: Reply<Result<(), ApiError>>,
    },
    /// Gives back the space of what nobody needs.
    Collect(Reply<Result<CollectReport, ApiError>>),
    /// Reads and checks every byte of the store.
    Verify(Reply<Result<VerifyReport, ApiError>>),
    /// Asks about the files of the store.
    Files(FileCommand),
    /// Takes the orphaned epoch of a machine away from its present writer.
    Fence {
        /// The machine.
        machine: MachineId,
        /// Who may write from now on.
        origin: AgentId,
        /// Durable when answered.
        reply: Reply<Result<(), ApiError>>,
    },
    /// Makes everything durable, seals the log and ends the thread.
    Stop(Reply<()>),
    /// Where what happens is noted for operators, from now on.
    NoteTo(EventLog),
}

/// The engine thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped")]
pub struct EngineGone;

/// A way to the engine. Clones share one bounded queue.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl EngineHandle {
    /// Makes a handle; `wake` makes the engine thread look at its queue.
    pub fn new(commands: Sender<Command>, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { commands, wake }
    }

    /// Sends a command. The queue is bounded; when it is full this waits for the engine.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn send(&self, command: Command) -> Result<(), EngineGone> {
        let mut command = command;
        loop {
            match self.commands.try_send(command) {
                Ok(()) => {
                    (self.wake)();
                    return Ok(());
                }
                Err(TrySendError::Disconnected(_)) => return Err(EngineGone),
                Err(TrySendError::Full(back)) => {
                    command = back;
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Sends a command that is answered, and waits for the answer.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineGone> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply)).await?;
        answer.await.map_err(|_| EngineGone)
    }

    /// As [`EngineHandle::ask`], for threads without a runtime.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub fn ask_blocking<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineGone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(make(reply)).map_err(|_| EngineGone)?;
        (self.wake)();
        answer.blocking_recv().map_err(|_| EngineGone)
    }
}

/// Refusal of a stream that the engine no longer knows.
#[must_use]
pub fn stream_over() -> Refusal {
    Refusal {
        code: RefusalCode::StaleEpoch,
        class: afterimage_blockdev::ErrorClass::Fenced,
        message: "the stream is no longer open".to_owned(),
        hint: "open it again".to_owned(),
    }
}
