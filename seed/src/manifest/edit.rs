//! Edits of the manifest: what the store consists of. Each is a type byte, a length and fixed
//! fields, so that a reader can see where one ends before it looks inside.

use std::time::Duration;

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{
    AgentId, BatchId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, PointId, SegmentId, StoreId,
    Timestamp,
};
use afterimage_cache::Damage;
use afterimage_cache::key::WRAPPED_BYTES;

use super::field::{FieldReader, FieldWriter};
use super::noted::Noted;
use super::space::{QuotaOf, decode_churn, encode_churn};
use crate::retention::{ChurnRecord, ClockRecord, Elapsed, Lock, LockRule, Policy, Tier};
use crate::run::RunId;

/// What kind of state a point names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PointKind {
    /// What a crash would leave.
    Crash,
    /// Applications were quiesced.
    Application,
    /// By a person.
    Bookmark,
    /// Inside an unfinished copy: no state of the source.
    ResyncIncomplete,
}

impl PointKind {
    /// The kind's name, for people and scripts.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Application => "application",
            Self::Bookmark => "bookmark",
            Self::ResyncIncomplete => "resync-incomplete",
        }
    }

    /// The kind that has a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let mut all = (1..=4).filter_map(Self::from_code);
        all.find(|kind| kind.name() == name)
    }

    fn code(self) -> u8 {
        match self {
            Self::Crash => 1,
            Self::Application => 2,
            Self::Bookmark => 3,
            Self::ResyncIncomplete => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Crash,
            2 => Self::Application,
            3 => Self::Bookmark,
            4 => Self::ResyncIncomplete,
            _ => return None,
        })
    }
}

/// A recovery point: a name for one cut of one machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointRecord {
    /// Identity.
    pub id: PointId,
    /// The machine.
    pub machine: MachineId,
    /// The history.
    pub history: HistoryId,
    /// The cut.
    pub lsn: Lsn,
    /// Its time.
    pub time: Timestamp,
    /// Its kind.
    pub kind: PointKind,
    /// Until when it must not be deleted; 0 when not locked.
    pub locked_until: Timestamp,
    /// Its name, unique within the machine.
    pub name: String,
}

/// A batch of a history: a state only when whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatchRecord {
    /// The history.
    pub history: HistoryId,
    /// Its number.
    pub batch: BatchId,
    /// It is the first copy of its disks.
    pub is_initial: bool,
    /// LSN of the begin record.
    pub begin: Lsn,
    /// LSN of the end record; 0 while it is open.
    pub end: Lsn,
    /// The disks covered.
    pub disks: Vec<DiskId>,
}

/// How far a history is covered by run files.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HistoryState {
    /// The history.
    pub history: HistoryId,
    /// Epoch of the newest writer.
    pub epoch: Epoch,
    /// That writer.
    pub origin: AgentId,
    /// Highest LSN.
    pub last: Lsn,
    /// Highest LSN that a bulk record named.
    pub highest_bulk: Lsn,
    /// Time of the highest LSN.
    pub time: Timestamp,
}

/// One change of what the store consists of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Edit {
    /// First edit of every manifest file.
    Store {
        /// The store.
        store: StoreId,
        /// When it was made.
        created: Timestamp,
        /// Next number of a segment that the engine gives out.
        next_segment: SegmentId,
        /// Next number of a run.
        next_run: RunId,
        /// Next number of a point.
        next_point: PointId,
    },
    /// A machine, new or renamed.
    Machine {
        /// Identity.
        machine: MachineId,
        /// Keys its content tags.
        tag_key: [u8; 32],
        /// The agent that may write; nil for any with a grant.
        holder: AgentId,
        /// Name.
        name: String,
    },
    /// A disk, new or renamed.
    Disk {
        /// Identity.
        disk: DiskId,
        /// Its machine.
        machine: MachineId,
        /// Size when it was declared.
        size_bytes: u64,
        /// Smallest unit of a request.
        logical_block_bytes: u32,
        /// Generation of its key.
        key: KeyId,
        /// Its key, wrapped by the key of the store.
        wrapped: [u8; WRAPPED_BYTES],
        /// Name.
        name: String,
    },
    /// A history.
    History {
        /// Identity.
        history: HistoryId,
        /// Its machine.
        machine: MachineId,
        /// Its parent; nil for none.
        parent: HistoryId,
        /// The last LSN of the parent that it sees.
        fork: Lsn,
        /// It was forked by this appliance.
        is_branch: bool,
    },
    /// A history was dropped.
    HistoryDropped {
        /// The history.
        history: HistoryId,
    },
    /// A disk has this size from an LSN on.
    Size {
        /// The disk.
        disk: DiskId,
        /// The history.
        history: HistoryId,
        /// The LSN.
        lsn: Lsn,
        /// The size.
        size_bytes: u64,
    },
    /// A seed segment counts from now on.
    Segment {
        /// The segment.
        segment: SegmentId,
        /// How often it was rewritten; the file's name says so.
        generation: u32,
        /// Number of slots that it holds.
        slot_count: u32,
        /// Bytes of its file.
        bytes: u64,
        /// Hash over the hashes of its slots.
        root: [u8; 32],
    },
    /// Commits of the log up to here are needed no longer: what of them still is lies in seed
    /// segments.
    LogReleased {
        /// Sequence of the last of them.
        log_sequence: u64,
    },
    /// A run file counts from now on.
    Run {
        /// The run.
        run: RunId,
        /// Bytes of its file.
        bytes: u64,
    },
    /// A run file does not count any more.
    RunDropped {
        /// The run.
        run: RunId,
    },
    /// Everything of the log up to here is in runs.
    Checkpoint {
        /// Sequence of the log.
        log_sequence: u64,
    },
    /// How far a history is covered.
    HistoryState(HistoryState),
    /// A batch began or ended.
    Batch(BatchRecord),
    /// A recovery point.
    Point(PointRecord),
    /// A point was deleted.
    PointDropped {
        /// The point.
        point: PointId,
    },
    /// Records of a disk were lost.
    Lost {
        /// The disk; nil for all of the history.
        disk: DiskId,
        /// The history.
        history: HistoryId,
        /// First LSN.
        first: Lsn,
        /// Last LSN.
        last: Lsn,
    },
    /// A seed segment does not count any more.
    SegmentDropped {
        /// The segment.
        segment: SegmentId,
    },
    /// Seed segments up to this one are in base parts: their directories need not be read at start.
    BaseThrough {
        /// The segment.
        segment: SegmentId,
    },
    /// How long a machine's points and LSNs are kept.
    Policy {
        /// The machine.
        machine: MachineId,
        /// Rises by one with each change.
        version: u64,
        /// The policy.
        policy: Policy,
    },
    /// A point must not be deleted yet. A later one of the same point only lengthens.
    PointLocked {
        /// The point.
        point: PointId,
        /// Until when.
        lock: Lock,
    },
    /// What the store knows of time.
    Clock(ClockRecord),
    /// Below this LSN of a history only points and forks are addressable. Only rises.
    Floor {
        /// The history.
        history: HistoryId,
        /// First LSN of which all that follow are addressable.
        lsn: Lsn,
    },
    /// What only notes say.
    Noted(Noted),
    /// Most bytes that something may take; 0 for any number.
    Quota {
        /// What.
        of: QuotaOf,
        /// Bytes.
        bytes: u64,
    },
    /// What was measured of a disk's churn.
    Churn {
        /// The disk.
        disk: DiskId,
        /// What.
        churn: ChurnRecord,
    },
}

impl Edit {
    /// Appends the edit.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let mut w = FieldWriter::default();
        let code = self.encode_fields(&mut w);
        let fields = w.finish();
        out.push(code);
        out.extend_from_slice(&afterimage_cache::bytes::narrow(fields.len()).to_le_bytes());
        out.extend_from_slice(&fields);
    }

    fn encode_fields(&self, w: &mut FieldWriter) -> u8 {
        match self {
            Self::Store {
                store,
                created,
                next_segment,
                next_run,
                next_point,
            } => {
                w.id(store.0)
                    .u64(created.0)
                    .u32(next_segment.0)
                    .u32(next_run.0)
                    .u64(next_point.0);
                1
            }
            Self::Machine {
                machine,
                tag_key,
                holder,
                name,
            } => {
                w.id(machine.0).bytes(tag_key).id(holder.0).text(name);
                2
            }
            Self::Disk {
                disk,
                machine,
                size_bytes,
                logical_block_bytes,
                key,
                wrapped,
                name,
            } => {
                w.id(disk.0)
                    .id(machine.0)
                    .u64(*size_bytes)
                    .u32(*logical_block_bytes);
                w.u32(key.0).bytes(wrapped).text(name);
                3
            }
            Self::History {
                history,
                machine,
                parent,
                fork,
                is_branch,
            } => {
                w.id(history.0)
                    .id(machine.0)
                    .id(parent.0)
                    .u64(fork.0)
                    .flag(*is_branch);
                4
            }
            Self::HistoryDropped { history } => {
                w.id(history.0);
                5
            }
            Self::Size {
                disk,
                history,
                lsn,
                size_bytes,
            } => {
                w.id(disk.0).id(history.0).u64(lsn.0).u64(*size_bytes);
                6
            }
            Self::Segment {
                segment,
                generation,
                slot_count,
                bytes,
                root,
            } => {
                w.u32(segment.0).u32(*generation).u32(*slot_count);
                w.u64(*bytes).bytes(root);
                7
            }
            Self::Run { run, bytes } => {
                w.u32(run.0).u64(*bytes);
                8
            }
            Self::RunDropped { run } => {
                w.u32(run.0);
                9
            }
            Self::Checkpoint { log_sequence } => {
                w.u64(*log_sequence);
                10
            }
            Self::HistoryState(state) => {
                w.id(state.history.0)
                    .u64(state.epoch.0)
                    .id(state.origin.0)
                    .u64(state.last.0);
                w.u64(state.highest_bulk.0).u64(state.time.0);
                11
            }
            Self::Batch(batch) => {
                w.id(batch.history.0)
                    .u32(batch.batch.0)
                    .flag(batch.is_initial);
                w.u64(batch.begin.0).u64(batch.end.0);
                w.u32(afterimage_cache::bytes::narrow(batch.disks.len()));
                for disk in &batch.disks {
                    w.id(disk.0);
                }
                12
            }
            Self::Point(point) => {
                w.u64(point.id.0)
                    .id(point.machine.0)
                    .id(point.history.0)
                    .u64(point.lsn.0);
                w.u64(point.time.0)
                    .u8(point.kind.code())
                    .u64(point.locked_until.0);
                w.text(&point.name);
                13
            }
            Self::PointDropped { point } => {
                w.u64(point.0);
                14
            }
            Self::Lost {
                disk,
                history,
                first,
                last,
            } => {
                w.id(disk.0).id(history.0).u64(first.0).u64(last.0);
                15
            }
            Self::LogReleased { log_sequence } => {
                w.u64(*log_sequence);
                30
            }
            Self::SegmentDropped { segment } => {
                w.u32(segment.0);
                16
            }
            Self::BaseThrough { segment } => {
                w.u32(segment.0);
                17
            }
            Self::Policy {
                machine,
                version,
                policy,
            } => {
                w.id(machine.0).u64(*version);
                encode_policy(policy, w);
                18
            }
            Self::PointLocked { point, lock } => {
                w.u64(point.0).u64(lock.until.0).u64(lock.elapsed_until.0);
                19
            }
            Self::Clock(clock) => {
                w.u64(clock.wall.0)
                    .u64(clock.elapsed.0)
                    .flag(clock.is_frozen);
                20
            }
            Self::Floor { history, lsn } => {
                w.id(history.0).u64(lsn.0);
                21
            }
            Self::Noted(noted) => noted.encode(w),
            Self::Quota { of, bytes } => {
                of.encode(w);
                w.u64(*bytes);
                31
            }
            Self::Churn { disk, churn } => {
                w.id(disk.0);
                encode_churn(churn, w);
                32
            }
        }
    }

    /// Reads the edit that `bytes` begin with; gives back the rest.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Damage> {
        let damage = Damage::Field {
            structure: "manifest edit",
            field: "content",
        };
        let (fields, rest, code) = split(bytes).ok_or_else(|| damage.clone())?;
        let mut r = FieldReader::new(fields);
        let edit = Self::decode_fields(code, &mut r).ok_or_else(|| damage.clone())?;
        if r.is_finished() {
            Ok((edit, rest))
        } else {
            Err(damage)
        }
    }

    fn decode_fields(code: u8, r: &mut FieldReader<'_>) -> Option<Self> {
        Some(match code {
            1 => Self::Store {
                store: StoreId(r.array()?),
                created: Timestamp(r.u64()?),
                next_segment: SegmentId(r.u32()?),
                next_run: RunId(r.u32()?),
                next_point: PointId(r.u64()?),
            },
            2 => Self::Machine {
                machine: MachineId(r.array()?),
                tag_key: r.array()?,
                holder: AgentId(r.array()?),
                name: r.text()?,
            },
            3 => Self::Disk {
                disk: DiskId(r.array()?),
                machine: MachineId(r.array()?),
                size_bytes: r.u64()?,
                logical_block_bytes: r.u32()?,
                key: KeyId(r.u32()?),
                wrapped: r.array()?,
                name: r.text()?,
            },
            4 => Self::History {
                history: HistoryId(r.array()?),
                machine: MachineId(r.array()?),
                parent: HistoryId(r.array()?),
                fork: Lsn(r.u64()?),
                is_branch: r.flag()?,
            },
            5 => Self::HistoryDropped {
                history: HistoryId(r.array()?),
            },
            6 => Self::Size {
                disk: DiskId(r.array()?),
                history: HistoryId(r.array()?),
                lsn: Lsn(r.u64()?),
                size_bytes: r.u64()?,
            },
            7 => Self::Segment {
                segment: SegmentId(r.u32()?),
                generation: r.u32()?,
                slot_count: r.u32()?,
                bytes: r.u64()?,
                root: r.array()?,
            },
            8 => Self::Run {
                run: RunId(r.u32()?),
                bytes: r.u64()?,
            },
            9 => Self::RunDropped {
                run: RunId(r.u32()?),
            },
            10 => Self::Checkpoint {
                log_sequence: r.u64()?,
            },
            11 => Self::HistoryState(HistoryState {
                history: HistoryId(r.array()?),
                epoch: Epoch(r.u64()?),
                origin: AgentId(r.array()?),
                last: Lsn(r.u64()?),
                highest_bulk: Lsn(r.u64()?),
                time: Timestamp(r.u64()?),
            }),
            12 => Self::Batch(decode_batch(r)?),
            13 => Self::Point(PointRecord {
                id: PointId(r.u64()?),
                machine: MachineId(r.array()?),
                history: HistoryId(r.array()?),
                lsn: Lsn(r.u64()?),
                time: Timestamp(r.u64()?),
                kind: PointKind::from_code(r.u8()?)?,
                locked_until: Timestamp(r.u64()?),
                name: r.text()?,
            }),
            14 => Self::PointDropped {
                point: PointId(r.u64()?),
            },
            15 => Self::Lost {
                disk: DiskId(r.array()?),
                history: HistoryId(r.array()?),
                first: Lsn(r.u64()?),
                last: Lsn(r.u64()?),
            },
            30 => Self::LogReleased {
                log_sequence: r.u64()?,
            },
            16 => Self::SegmentDropped {
                segment: SegmentId(r.u32()?),
            },
            17 => Self::BaseThrough {
                segment: SegmentId(r.u32()?),
            },
            18 => Self::Policy {
                machine: MachineId(r.array()?),
                version: r.u64()?,
                policy: decode_policy(r)?,
            },
            19 => Self::PointLocked {
                point: PointId(r.u64()?),
                lock: Lock {
                    until: Timestamp(r.u64()?),
                    elapsed_until: Elapsed(r.u64()?),
                },
            },
            20 => Self::Clock(ClockRecord {
                wall: Timestamp(r.u64()?),
                elapsed: Elapsed(r.u64()?),
                is_frozen: r.flag()?,
            }),
            21 => Self::Floor {
                history: HistoryId(r.array()?),
                lsn: Lsn(r.u64()?),
            },
            22..=24 => Self::Noted(Noted::decode(code, r)?),
            31 => Self::Quota {
                of: QuotaOf::decode(r)?,
                bytes: r.u64()?,
            },
            32 => Self::Churn {
                disk: DiskId(r.array()?),
                churn: decode_churn(r)?,
            },
            _ => return None,
        })
    }
}

fn decode_batch(r: &mut FieldReader<'_>) -> Option<BatchRecord> {
    let history = HistoryId(r.array()?);
    let batch = BatchId(r.u32()?);
    let is_initial = r.flag()?;
    let (begin, end) = (Lsn(r.u64()?), Lsn(r.u64()?));
    let count = r.u32()?;
    let disks = (0..count)
        .map(|_| r.array().map(DiskId))
        .collect::<Option<_>>()?;
    Some(BatchRecord {
        history,
        batch,
        is_initial,
        begin,
        end,
        disks,
    })
}

fn encode_policy(policy: &Policy, w: &mut FieldWriter) {
    w.u64(nanoseconds(policy.journal_window));
    w.u32(afterimage_cache::bytes::narrow(policy.tiers.len()));
    for tier in &policy.tiers {
        w.u64(nanoseconds(tier.interval))
            .u64(nanoseconds(tier.keep_for));
    }
    w.u64(nanoseconds(policy.keep_application));
    w.flag(policy.keep_named.is_some())
        .u64(nanoseconds(policy.keep_named.unwrap_or_default()));
    w.flag(policy.lock.is_some());
    let lock = policy.lock.clone().unwrap_or_default();
    w.u64(nanoseconds(lock.duration));
    w.u32(afterimage_cache::bytes::narrow(lock.kinds.len()));
    for kind in lock.kinds {
        w.u8(kind.code());
    }
}

/// A policy that the engine would not take is no policy.
fn decode_policy(r: &mut FieldReader<'_>) -> Option<Policy> {
    let duration = |r: &mut FieldReader<'_>| r.u64().map(Duration::from_nanos);
    let journal_window = duration(r)?;
    let tiers = (0..r.u32()?)
        .map(|_| {
            Some(Tier {
                interval: duration(r)?,
                keep_for: duration(r)?,
            })
        })
        .collect::<Option<_>>()?;
    let keep_application = duration(r)?;
    let (keeps_named, keep_named) = (r.flag()?, duration(r)?);
    let (is_locking, duration) = (r.flag()?, duration(r)?);
    let kinds: Vec<PointKind> = (0..r.u32()?)
        .map(|_| r.u8().and_then(PointKind::from_code))
        .collect::<Option<_>>()?;
    // What is absent says nothing.
    let is_plain = (keeps_named || keep_named.is_zero())
        && (is_locking || (duration.is_zero() && kinds.is_empty()));
    if !is_plain {
        return None;
    }
    let policy = Policy {
        journal_window,
        tiers,
        keep_application,
        keep_named: keeps_named.then_some(keep_named),
        lock: is_locking.then_some(LockRule { duration, kinds }),
    };
    policy.validate().is_ok().then_some(policy)
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8], u8)> {
    let code = *bytes.first()?;
    let len = afterimage_cache::bytes::index(afterimage_cache::bytes::get_u32(bytes, 1)?);
    let fields = bytes.get(5..5usize.checked_add(len)?)?;
    Some((fields, &bytes[5 + len..], code))
}
