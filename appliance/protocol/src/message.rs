//! Messages of the data port. Origin (who made the records) and carrier (who brings them, known by
//! its certificate) are different things: an appliance may carry what an agent made.

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, Timestamp,
};
use serde::{Deserialize, Serialize};

/// Version of the messages; both sides must say the same.
pub const PROTOCOL_VERSION: u16 = 1;
/// Longest name of a machine, disk or point, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most blocks that one [`FromSender::Compare`] asks about.
pub const COMPARE_BLOCKS_MAX: usize = 4096;

/// Names a stream within a connection; chosen by the sender.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct StreamId(pub u32);

/// A fork point: a history and the last LSN of it that the child sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForkPoint {
    /// The parent history.
    pub history: HistoryId,
    /// The last LSN seen.
    pub lsn: Lsn,
}

/// What a disk is to the sender.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskDescription {
    /// The disk.
    pub disk: DiskId,
    /// Its name, unique within the machine.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Smallest unit of a request, in bytes.
    pub logical_block_bytes: u32,
}

/// From whoever sends records to whoever keeps them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromSender {
    /// First message. The carrier is known by its certificate.
    Hello {
        /// [`PROTOCOL_VERSION`].
        version: u16,
        /// The program and its version, for people.
        program: String,
    },
    /// Opens the stream of one machine's history as its writer. The carrier needs a grant for the
    /// machine. A higher epoch than the one known takes over from the same origin; another
    /// origin's epoch is refused unless an operator moved the machine.
    Open {
        /// The stream's name from now on.
        stream: StreamId,
        /// The machine.
        machine: MachineId,
        /// The machine's name, for people.
        name: String,
        /// The history.
        history: HistoryId,
        /// Where the history forked off, if it did.
        parent: Option<ForkPoint>,
        /// Who makes the records.
        origin: AgentId,
        /// The writer's epoch.
        epoch: Epoch,
    },
    /// Declares a disk of the stream's machine, new or known. Answered by `Disk` or `Refused`.
    Declare {
        /// The stream.
        stream: StreamId,
        /// The disk.
        description: DiskDescription,
    },
    /// Ordered records. `bytes` is a whole frame; the fields repeat its header.
    Frame {
        /// The stream.
        stream: StreamId,
        /// LSN of its first record.
        first: Lsn,
        /// LSN of its last record.
        last: Lsn,
        /// The frame.
        #[serde(with = "crate::wire::blob")]
        bytes: Vec<u8>,
    },
    /// Bulk records of a batch. Acknowledged one by one, in any order, when durable.
    Bulk {
        /// The stream.
        stream: StreamId,
        /// Named in the acknowledgement; rises within the stream.
        number: u64,
        /// The frame.
        #[serde(with = "crate::wire::blob")]
        bytes: Vec<u8>,
    },
    /// Asks which of these blocks differ from the newest state of the replica. Answered by
    /// `Differences` with the same number.
    Compare {
        /// The stream.
        stream: StreamId,
        /// Named in the answer; rises within the stream.
        number: u64,
        /// The disk.
        disk: DiskId,
        /// First block, counted in 4 KiB.
        first_block: u64,
        /// Content tags of the source's blocks.
        tags: Vec<[u8; 16]>,
    },
    /// State of the source, at least once a second. Also the heartbeat.
    Report {
        /// The stream.
        stream: StreamId,
        /// State of capture.
        report: SourceReport,
    },
    /// Ends a stream in order; nothing of it is outstanding.
    Close {
        /// The stream.
        stream: StreamId,
    },
}

/// State of capture at the source.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SourceReport {
    /// Highest LSN given out.
    pub captured: Lsn,
    /// When this report was made, on the appliance's clock as the source knows it.
    pub time: Timestamp,
    /// Completion time of the oldest record that is not acknowledged; `None` when there is none.
    pub oldest_unacknowledged: Option<Timestamp>,
    /// Bytes of records held in memory.
    pub buffered_bytes: u64,
    /// Bytes of records held in the spool.
    pub spooled_bytes: u64,
    /// Each disk.
    pub disks: Vec<DiskReport>,
}

/// State of one disk at the source.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskReport {
    /// The disk.
    pub disk: DiskId,
    /// What is going on.
    pub phase: DiskPhase,
    /// Why, for people; empty when all is well.
    pub reason: String,
    /// Bytes of the present pass that are done.
    pub done_bytes: u64,
    /// Bytes of the present pass.
    pub total_bytes: u64,
}

/// What is going on with a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPhase {
    /// The first copy is being made.
    Initial,
    /// Differences are being found and sent.
    Resync,
    /// Every write is captured and sent.
    Protected,
    /// Capture goes on, and a resync is needed.
    ResyncNeeded,
    /// The source shrank or cannot be used; what was sent stays.
    SourceError,
}

/// From whoever keeps records to whoever sends them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromReceiver {
    /// Answers `Hello`.
    Welcome {
        /// [`PROTOCOL_VERSION`].
        version: u16,
        /// The program and its version, for people.
        program: String,
        /// The appliance's wall clock.
        time: Timestamp,
    },
    /// Answers `Open`: go on after `durable`.
    Opened {
        /// The stream.
        stream: StreamId,
        /// Highest LSN that is durable here; records up to it need not be sent.
        durable: Lsn,
        /// Highest LSN ever seen here, bulk included; a new epoch starts above it.
        highest: Lsn,
        /// Bytes of frames that may be on their way at once.
        credit_bytes: u64,
        /// Keys the content tags of this machine.
        tag_key: [u8; 32],
    },
    /// Answers `Declare`.
    Disk {
        /// The stream.
        stream: StreamId,
        /// The disk.
        disk: DiskId,
        /// Generation of its key.
        key: u32,
        /// Its key.
        secret: [u8; 32],
        /// Says whether a whole copy is here; if not, one must be made.
        has_copy: bool,
        /// Says whether a batch of this disk was begun and not ended.
        is_in_batch: bool,
        /// The bytes of bulk that are durable in that batch, as ranges (first block, blocks).
        /// Outside a batch: what a seed may hold. Nobody compared that yet, so it is asked about
        /// before it is sent, once the record that begins the batch is acknowledged.
        bulk_done: Vec<(u64, u64)>,
    },
    /// Everything up to `durable` is durable; so much more may be on its way.
    Acknowledged {
        /// The stream.
        stream: StreamId,
        /// Highest durable LSN.
        durable: Lsn,
        /// Bytes of frames that may be on their way at once.
        credit_bytes: u64,
    },
    /// These bulk frames are durable.
    BulkAcknowledged {
        /// The stream.
        stream: StreamId,
        /// Their numbers.
        numbers: Vec<u64>,
    },
    /// Answers `Compare`.
    Differences {
        /// The stream.
        stream: StreamId,
        /// The question's number.
        number: u64,
        /// For each block asked about, whether it differs.
        differs: Vec<bool>,
    },
    /// Asks for a mark at the present cut.
    PlaceMark {
        /// The stream.
        stream: StreamId,
        /// Comes back as the mark record's argument.
        request: u64,
        /// Kind, as the mark record's code names it.
        kind: MarkRequestKind,
        /// Name of the point, or empty.
        name: String,
    },
    /// The receiver takes nothing more for now; says why. Ends with the next `Acknowledged`.
    Paused {
        /// Why and what to do.
        refusal: Refusal,
    },
    /// Refuses a stream, or the whole connection when `stream` is `None`.
    Refused {
        /// Which stream.
        stream: Option<StreamId>,
        /// Why and what to do.
        refusal: Refusal,
    },
}

/// Kind of a mark that is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum MarkRequestKind {
    /// By the timer.
    Crash,
    /// By a person.
    Bookmark,
}

/// Why something is not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The other side speaks another version.
    Version,
    /// No grant for the machine.
    NoGrant,
    /// Another writer's epoch is newer.
    StaleEpoch,
    /// Another agent holds the machine.
    HeldByOther,
    /// A frame does not follow what is here.
    Gap,
    /// A frame or message is malformed or does not verify.
    Damaged,
    /// A disk shrank.
    Shrunk,
    /// A name is taken or not acceptable.
    Name,
    /// The appliance's disk is full.
    NoSpace,
    /// The appliance cannot write its log.
    Log,
    /// A limit of the configuration is reached.
    Limit,
    /// The appliance is going down.
    ShuttingDown,
}

/// A refusal: what, why, what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}; {hint}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// How to go on.
    pub class: ErrorClass,
    /// What and why, for people.
    pub message: String,
    /// What to do, for people.
    pub hint: String,
}
