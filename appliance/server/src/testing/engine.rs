//! An engine that does what a test says: it keeps what it is told, and makes nothing durable by
//! itself.

use std::collections::HashMap;
use std::sync::Arc;

use afterimage_blockdev::{
    AgentId, BlockDevice, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, MemoryDevice,
    PointId, Timestamp,
};
use afterimage_protocol::Refusal;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::policy::MachinePolicy;
use afterimage_protocol::rest::server::{AddressableRange, CollectReport, Point, VerifyReport};
use afterimage_seed::Usage;
use afterimage_seed::engine::SpaceInfo;
use crossbeam::channel::bounded;
use parking_lot::{Condvar, Mutex};

use crate::engine::{
    BranchOpened, Command, DiskOpened, DiskSummary, EngineHandle, EngineStatus, HistorySummary,
    MachineSummary, PointListing, PointPage, PointsWanted, SpaceFigures, StreamEvents, StreamKey,
    StreamOpened, ViewOpened,
};

pub(crate) const TRUNK: HistoryId = HistoryId([2; 16]);
pub(crate) const BRANCH: HistoryId = HistoryId([9; 16]);

#[derive(Default)]
pub(crate) struct Told {
    pub(crate) frames: Vec<(StreamKey, Lsn, Lsn)>,
    pub(crate) bulk: Vec<(StreamKey, u64)>,
    pub(crate) opened: Vec<StreamKey>,
    pub(crate) closed: Vec<StreamKey>,
    pub(crate) fenced: Vec<(MachineId, AgentId)>,
    pub(crate) dropped: Vec<HistoryId>,
    events: HashMap<StreamKey, Arc<dyn StreamEvents>>,
}

#[derive(Default)]
pub(crate) struct Knows {
    pub(crate) machines: Vec<MachineSummary>,
    pub(crate) points: Vec<Point>,
    /// Size of the disk at all points; without it, that of their views.
    pub(crate) point_bytes: Option<u64>,
    /// Devices of references; all others are refused.
    pub(crate) views: HashMap<String, Arc<dyn BlockDevice>>,
    pub(crate) branches: HashMap<String, Arc<dyn BlockDevice>>,
    pub(crate) paused: Option<Refusal>,
    pub(crate) refuses_open: Option<Refusal>,
    pub(crate) damage: Vec<String>,
    pub(crate) policy: Option<MachinePolicy>,
    pub(crate) clock_ahead: Option<std::time::Duration>,
}

pub(crate) struct FakeEngine {
    told: Mutex<Told>,
    changed: Condvar,
    pub(crate) knows: Mutex<Knows>,
}

impl FakeEngine {
    pub(crate) fn start() -> (Arc<Self>, EngineHandle) {
        let (sender, receiver) = bounded::<Command>(64);
        let engine = Arc::new(Self {
            told: Mutex::default(),
            changed: Condvar::new(),
            knows: Mutex::default(),
        });
        let answering = Arc::clone(&engine);
        std::thread::spawn(move || {
            for command in receiver {
                answering.take(command);
            }
        });
        (engine, EngineHandle::new(sender, Arc::new(|| {})))
    }

    /// Waits until what was told fits.
    pub(crate) fn wait<T>(&self, check: impl Fn(&Told) -> Option<T>) -> T {
        let mut told = self.told.lock();
        loop {
            if let Some(found) = check(&told) {
                return found;
            }
            let waited = self
                .changed
                .wait_for(&mut told, std::time::Duration::from_secs(20));
            assert!(
                !waited.timed_out(),
                "the engine was not told what the test waits for"
            );
        }
    }

    /// Where a stream is told what happened.
    pub(crate) fn events(&self, key: StreamKey) -> Arc<dyn StreamEvents> {
        self.wait(|told| told.events.get(&key).cloned())
    }

    fn take(&self, command: Command) {
        {
            let mut told = self.told.lock();
            self.answer(command, &mut told);
        }
        self.changed.notify_all();
    }

    fn answer(&self, command: Command, told: &mut Told) {
        let mut knows = self.knows.lock();
        match command {
            Command::NoteTo(_) => {}
            Command::Space(reply) => {
                let _gone = reply.send(SpaceFigures {
                    info: SpaceInfo::default(),
                    free_bytes: 1 << 30,
                });
            }
            Command::PointSpace { reply, .. } => {
                let _gone = reply.send(Err(missing("account")));
            }
            Command::SetQuota { reply, .. } => {
                let _gone = reply.send(Ok(()));
            }
            Command::Open(request, reply) => {
                let answer = match &knows.refuses_open {
                    Some(refusal) => Err(refusal.clone()),
                    None => {
                        let key = StreamKey(told.events.len() as u64 + 1);
                        told.events.insert(key, request.events);
                        told.opened.push(key);
                        let (durable, highest) = (Lsn(0), Lsn(0));
                        Ok(StreamOpened {
                            key,
                            durable,
                            highest,
                            tag_key: [7; 32],
                        })
                    }
                };
                let _gone = reply.send(answer);
            }
            Command::Declare(_, reply) => {
                let (has_copy, is_in_batch) = (false, false);
                let bulk_done = Vec::new();
                let opened = DiskOpened {
                    key: 1,
                    secret: [3; 32],
                    has_copy,
                    is_in_batch,
                    bulk_done,
                };
                let _gone = reply.send(Ok(opened));
            }
            Command::Append(key, frame) => {
                told.frames
                    .push((key, frame.header.first, frame.header.last));
            }
            Command::Bulk(key, number, _) => told.bulk.push((key, number)),
            Command::Compare { tags, reply, .. } => {
                let _gone = reply.send(Ok(tags.iter().map(|tag| tag[0] != 0).collect()));
            }
            Command::Close(key) => told.closed.push(key),
            Command::CreatePoint { name, reply, .. } => {
                let id = PointId(knows.points.len() as u64 + 1);
                let point = point(id.0, &name.unwrap_or_else(|| format!("auto-{id}")));
                knows.points.push(point.clone());
                let _gone = reply.send(Ok(point));
            }
            Command::DeletePoints { names, reply, .. } => {
                let is_known = |name: &&String| knows.points.iter().any(|p| p.name == **name);
                let unknown = names.iter().find(|name| !is_known(name));
                let answer = unknown.map_or(Ok(()), |name| Err(missing(name)));
                if answer.is_ok() {
                    knows.points.retain(|point| !names.contains(&point.name));
                }
                let _gone = reply.send(answer);
            }
            Command::LockPoints {
                names,
                until,
                reply,
                ..
            } => {
                for point in &mut knows.points {
                    if names.contains(&point.name) {
                        point.locked_until = Some(until);
                    }
                }
                let _gone = reply.send(Ok(()));
            }
            Command::GetPolicy { machine, reply } => {
                let answer = knows.policy.clone().ok_or_else(|| missing(&machine));
                let _gone = reply.send(answer);
            }
            Command::SetPolicy { wanted, reply, .. } => {
                let version = knows.policy.as_ref().map_or(0, |known| known.version) + 1;
                let policy = MachinePolicy {
                    version,
                    policy: wanted.policy,
                };
                knows.policy = Some(policy.clone());
                let _gone = reply.send(Ok(policy));
            }
            Command::ConfirmClock(reply) => {
                knows.clock_ahead = None;
                let _gone = reply.send(Ok(()));
            }
            Command::ListPoints {
                after,
                limit,
                reply,
                ..
            } => {
                let total = knows.points.len() as u64;
                let after = knows.points.iter().filter(|point| point.id > after);
                let points = after.take(limit).cloned().collect();
                let _gone = reply.send(Ok(PointPage { points, total }));
            }
            Command::OpenView(request, reply) => {
                let device = knows.views.get(&request.reference).cloned();
                let answer = device.ok_or_else(|| missing(&request.reference)).map(view);
                let _gone = reply.send(answer);
            }
            Command::Fork(request, reply) => {
                let device = knows.branches.get(&request.reference).cloned();
                let answer = device
                    .ok_or_else(|| missing(&request.reference))
                    .map(branch);
                let _gone = reply.send(answer);
            }
            Command::Reopen(request, reply) => {
                let device = knows.branches.values().next().cloned();
                let device = device.filter(|_| request.history == BRANCH);
                let answer = device.ok_or_else(|| missing("branch")).map(branch);
                let _gone = reply.send(answer);
            }
            Command::PointStates { wanted, reply, .. } => {
                let all = knows.points.iter();
                let found: Vec<&Point> = match &wanted {
                    PointsWanted::After(after, limit) => {
                        let rest = all.filter(|point| point.id > *after);
                        rest.take(*limit).collect()
                    }
                    PointsWanted::Named(name) => {
                        all.filter(|point| point.name == *name).take(1).collect()
                    }
                };
                let last = found.last().map(|point| point.id);
                let size = |point: &Point| {
                    let view = knows.views.get(&format!(
                        "{}/{}@{}:lsn:{}",
                        MachineId([1; 16]),
                        DiskId([5; 16]),
                        point.history,
                        point.lsn
                    ));
                    knows
                        .point_bytes
                        .or(view.map(|view| view.geometry().size_bytes))
                };
                let points = found
                    .into_iter()
                    .filter_map(|point| Some((point.clone(), Epoch(1), size(point)?)));
                let points = points.collect();
                let _gone = reply.send(Ok(PointListing { points, last }));
            }
            Command::DropBranch(history, reply) => {
                told.dropped.push(history);
                let _gone = reply.send(Ok(()));
            }
            Command::Status(reply) => {
                let _gone = reply.send(EngineStatus {
                    stored_bytes: 1 << 20,
                    free_bytes: 1 << 30,
                    paused: knows.paused.clone(),
                    machines: knows.machines.clone(),
                    clock_ahead: knows.clock_ahead,
                });
            }
            Command::Collect(reply) => {
                let _gone = reply.send(Ok(CollectReport {
                    destaged: 0,
                    rewritten: 0,
                    dropped: 0,
                    freed_bytes: 0,
                    written_bytes: 0,
                }));
            }
            Command::Verify(reply) => {
                let damage = knows.damage.clone();
                let _gone = reply.send(Ok(VerifyReport {
                    segments: 1,
                    slots: 2,
                    bytes: 3,
                    damage,
                }));
            }
            // It has no files: whoever asks is told that there is no engine.
            Command::Files(_) => {}
            Command::Fence {
                machine,
                origin,
                reply,
            } => {
                told.fenced.push((machine, origin));
                let _gone = reply.send(Ok(()));
            }
            Command::Stop(reply) => {
                let _gone = reply.send(());
            }
        }
    }
}

fn missing(what: &str) -> ApiError {
    ApiError {
        class: ErrorClass::Refused,
        message: format!("there is no {what}"),
        hint: "the nearest is latest".to_owned(),
    }
}

fn view(device: Arc<dyn BlockDevice>) -> ViewOpened {
    ViewOpened {
        device,
        view: None,
        machine: MachineId([1; 16]),
        disk: DiskId([5; 16]),
        history: TRUNK,
        lsn: Lsn(77),
        time: Timestamp(1_000_000_000),
        resolved_to_batch_begin: false,
    }
}

fn branch(device: Arc<dyn BlockDevice>) -> BranchOpened {
    BranchOpened {
        device,
        history: BRANCH,
        parent: TRUNK,
        lsn: Lsn(77),
        machine: MachineId([1; 16]),
        disk: DiskId([5; 16]),
        usage: Arc::new(Usage::new(None)),
        resolved_to_batch_begin: false,
    }
}

pub(crate) fn point(id: u64, name: &str) -> Point {
    Point {
        id: PointId(id),
        name: name.to_owned(),
        kind: "crash".to_owned(),
        history: TRUNK,
        lsn: Lsn(id * 10),
        time: Timestamp(id * 1_000_000_000),
        locked_until: None,
    }
}

/// A machine `web` with a disk `data` that can be mounted.
pub(crate) fn machine(durable: Lsn, durable_time: Timestamp) -> MachineSummary {
    let (first, first_time) = (Lsn(1), Timestamp(0));
    let range = AddressableRange {
        history: TRUNK,
        first,
        last: durable,
        first_time,
        last_time: durable_time,
    };
    MachineSummary {
        machine: MachineId([1; 16]),
        name: "web".to_owned(),
        trunk: TRUNK,
        histories: vec![HistorySummary {
            history: TRUNK,
            parent: None,
            epoch: Epoch(1),
            origin: AgentId([3; 16]),
            received: durable,
            durable,
            durable_time,
            is_branch: false,
            is_open: true,
        }],
        disks: vec![DiskSummary {
            disk: DiskId([5; 16]),
            name: "data".to_owned(),
            size_bytes: 1 << 20,
            has_copy: true,
            addressable: vec![range],
            damage: Vec::new(),
        }],
        point_count: 0,
        shortened_window: None,
    }
}

/// A read-only device with this content.
pub(crate) fn read_only(content: &[u8]) -> Arc<dyn BlockDevice> {
    let device = filled(content);
    device.set_read_only(true);
    device
}

/// A writable device with this content.
pub(crate) fn filled(content: &[u8]) -> Arc<MemoryDevice> {
    let device = MemoryDevice::new(content.len() as u64, 512);
    for (index, chunk) in content.chunks(1 << 20).enumerate() {
        if chunk.iter().all(|byte| *byte == 0) {
            continue;
        }
        let op = afterimage_blockdev::BlockOp::Write {
            offset: (index << 20) as u64,
            buffer: afterimage_blockdev::IoBuffer::copy_of(chunk),
            fua: false,
        };
        afterimage_blockdev::wait::device(&*device, op).unwrap();
    }
    device
}
