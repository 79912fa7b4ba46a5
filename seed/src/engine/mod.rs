//! The seed engine: `step(now, input) -> outputs`.
//!
//! It owns the shared log and the manifest, applies what is durable to the map, and answers what a
//! snapshot of any disk at any (history, LSN) consists of.
//!
//! Invariants
//! * A stream is told that an LSN is durable only after the log said so for its frame and all
//!   frames of the stream before it.
//! * A bulk frame is acknowledged only after its seed segment is synced and the manifest names it.
//! * A point exists from the durability of its manifest commit, which follows that of its cut.
//! * Within a history received LSNs only increase; a gap is allowed only before an epoch's first
//!   record. A frame of an older epoch than the newest one accepted is refused.
//! * A snapshot never changes: it is made of sealed sections, and what is open is sealed (in
//!   memory) when a snapshot is taken.
//!
//! What may run beside a flush: appends, for the heads were sealed at its begin; bulk, for its
//! parts were taken at its begin; snapshots, which see the sealed parts until the run replaces
//! them; points, which share the one manifest chain. Never a second flush.

mod account;
mod apply;
mod branches;
mod bulk;
mod commits;
mod flush;
mod forecast;
mod ingest;
mod join;
mod listing;
mod live;
mod locks;
mod merge;
mod notes;
mod options;
mod pace;
mod points;
mod pressure;
mod quota;
mod reaches;
mod records;
mod reserve;
mod rest;
mod retention;
mod rewrite;
mod roots;
mod space;
mod start;
mod state;
mod status;
mod sweep;
mod unread;
mod views;
mod window;
mod words;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use afterimage_blockdev::{
    Clock, DiskId, Entropy, FileName, HistoryId, KeyId, Lsn, MachineId, Monotonic, SegmentId,
    Storage, StorageCompletion, StorageOp, StoreId, Timestamp, Token,
};
use afterimage_cache::log::{Log, LogInput, LogOptions, LogOutput};
use afterimage_cache::{Damage, DiskKey, KeySource};
use parking_lot::RwLock;

use crate::error::SeedError;
use crate::manifest::{Edit, Manifest, PointRecord};
use crate::reader::Reader;
use crate::run::RunId;
use crate::section::Snapshot;
use state::{DiskState, HistoryEntry, MachineState};

/// Damage texts that are kept.
const DAMAGE_MAX: usize = 1000;

pub use account::{Account, DiskAccount, PointAccount, Use};
pub use options::EngineOptions;
pub use retention::{ClockInfo, PolicyInfo};
pub use space::{DiskSpace, Files, Forecast, Limit, MachineSpace, PointSpace, SpaceInfo};
pub use status::{DiskInfo, EngineInfo, HistoryInfo, MachineInfo, Reach};
pub use words::{
    Collected, DeclaredDisk, Event, ForkedBranch, Input, OpenedStream, Output, PointState, Request,
    RequestId, Response, StoreFile, StreamEnd, StreamNumber, TakenSnapshot,
};

/// Whom a storage completion is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Log(Token),
    Manifest,
    Bulk(SegmentId),
    Flush,
    Merge(merge::MergeOp),
    Rewrite,
    Notes,
    Reserve,
    Space,
    Start,
    /// Nobody waits for it.
    Nobody,
}

/// What waits for a manifest commit.
#[derive(Debug)]
enum AfterCommit {
    Created,
    Point(PointRecord, Option<RequestId>),
    Retention(retention::Applied),
    Bulk(SegmentId),
    Flush,
    Merge,
    Rewrite,
    Reply(RequestId, Box<Response>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    New,
    Manifest,
    Runs,
    Log,
    Running,
    Stopping,
    StoppingLog,
    Ended,
}

/// Keys of all disks, shared with the readers.
#[derive(Default)]
pub struct KeyRing {
    keys: RwLock<HashMap<(DiskId, KeyId), DiskKey>>,
}

impl KeySource for KeyRing {
    fn disk_key(&self, disk: DiskId, key: KeyId) -> Option<DiskKey> {
        self.keys.read().get(&(disk, key)).cloned()
    }
}

/// The engine. See the module's text.
pub struct Engine {
    options: EngineOptions,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    storage: Arc<dyn Storage>,
    keys: Arc<KeyRing>,
    phase: Phase,
    now: Monotonic,
    store: StoreId,
    created: Timestamp,
    next_token: u64,
    owners: HashMap<Token, Owner>,
    log: Log,
    manifest: Manifest,
    next_commit: u64,
    after_commit: HashMap<u64, AfterCommit>,
    reader: Option<Arc<Reader>>,
    machines: BTreeMap<MachineId, MachineState>,
    disks: BTreeMap<DiskId, DiskState>,
    histories: BTreeMap<HistoryId, HistoryEntry>,
    streams: BTreeMap<StreamNumber, state::Stream>,
    next_stream: u64,
    /// The stream and size of each frame in the log's hands, in order.
    appended: HashMap<Token, (StreamNumber, u64)>,
    next_append: u64,
    next_segment: u32,
    next_run: u32,
    next_point: u64,
    next_serial: u64,
    next_mark: u64,
    marks: BTreeMap<u64, points::WantedMark>,
    seed_segments: BTreeMap<SegmentId, state::SeedSegment>,
    base_through: SegmentId,
    runs: BTreeMap<RunId, u64>,
    /// Runs came since a merge was last looked for.
    has_new_runs: bool,
    /// The time samples in each run: history, lowest and highest LSN.
    run_times: BTreeMap<RunId, Vec<(HistoryId, Lsn, Lsn)>>,
    retired: Vec<merge::RetiredRun>,
    /// Files that no manifest names any more.
    removals: Vec<FileName>,
    /// While one of them is alive no file is removed.
    pins: Vec<Weak<()>>,
    /// What the log was told of `log_released`.
    log_told: u64,
    merge: Option<merge::Merge>,
    merge_retry_at: Option<Monotonic>,
    sweep: sweep::Sweep,
    next_sweep: Monotonic,
    sweep_retry_at: Option<Monotonic>,
    /// Collections in a row that gave no room when it was needed.
    vain_sweeps: u32,
    /// Needed collections in a row before which nobody could give way.
    idle_sweeps: u32,
    reserve: reserve::Reserve,
    reserve_retry_at: Option<Monotonic>,
    pace: pace::Pace,
    /// What the store takes besides the log, in bytes.
    kept_bytes: u64,
    shortage: pressure::Shortage,
    /// How often each machine's window was halved for lack of room.
    halvings: BTreeMap<MachineId, u32>,
    rewrite: Option<rewrite::Rewrite>,
    notes: notes::Notes,
    /// Snapshots that somebody may have.
    snapshots: Vec<Weak<Snapshot>>,
    /// Named by the manifest, but unusable.
    dropped_runs: Vec<RunId>,
    checkpoint: u64,
    /// Commits of the log up to here are gone, or may be.
    log_released: u64,
    /// What the last run covered, as edits.
    covered: Vec<Edit>,
    applied_sequence: u64,
    open_entries: usize,
    bulk: bulk::BulkSegments,
    flush: Option<flush::Flush>,
    flush_retry_at: Option<Monotonic>,
    start: start::Start,
    next_crash_mark: Monotonic,
    retention: retention::Retention,
    space: space::Space,
    is_paused: Option<bool>,
    free_bytes: u64,
    manifest_retry_at: Option<Monotonic>,
    manifest_proof_at: Option<Monotonic>,
    unread: unread::Unread,
    damage: Vec<String>,
}

impl core::fmt::Debug for Engine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Engine({}, {:?})", self.store, self.phase)
    }
}

impl Engine {
    /// Makes an engine that has not looked at its storage yet. The storage is only handed to the
    /// readers; the engine's own operations come out of `step`.
    #[must_use]
    pub fn new(
        options: EngineOptions,
        storage: Arc<dyn Storage>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Self {
        let now = clock.monotonic();
        // A mark that an earlier engine asked for may still come, and must answer nobody's request.
        let mut first_mark = [0; 8];
        entropy.fill(&mut first_mark);
        let next_mark = u64::from_le_bytes(first_mark) >> 1;
        Self {
            next_crash_mark: now.after(options.crash_mark_interval),
            next_sweep: now.after(options.collect_interval),
            log: Log::new(LogOptions::new("log", StoreId::NIL)),
            manifest: Manifest::new(options.manifest_bytes),
            options,
            clock,
            entropy,
            storage,
            keys: Arc::new(KeyRing::default()),
            phase: Phase::New,
            now,
            store: StoreId::NIL,
            created: Timestamp(0),
            next_token: 1,
            owners: HashMap::new(),
            next_commit: 1,
            after_commit: HashMap::new(),
            reader: None,
            machines: BTreeMap::new(),
            disks: BTreeMap::new(),
            histories: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_stream: 1,
            appended: HashMap::new(),
            next_append: 1,
            next_segment: 1,
            next_run: 1,
            next_point: 1,
            next_serial: 1,
            next_mark,
            marks: BTreeMap::new(),
            seed_segments: BTreeMap::new(),
            base_through: SegmentId(0),
            runs: BTreeMap::new(),
            has_new_runs: true,
            run_times: BTreeMap::new(),
            retired: Vec::new(),
            removals: Vec::new(),
            pins: Vec::new(),
            log_told: 0,
            merge: None,
            merge_retry_at: None,
            sweep: sweep::Sweep::default(),
            sweep_retry_at: None,
            vain_sweeps: 0,
            idle_sweeps: 0,
            reserve: reserve::Reserve::default(),
            reserve_retry_at: None,
            kept_bytes: 0,
            shortage: pressure::Shortage::default(),
            pace: pace::Pace::default(),
            halvings: BTreeMap::new(),
            rewrite: None,
            notes: notes::Notes::default(),
            snapshots: Vec::new(),
            dropped_runs: Vec::new(),
            checkpoint: 0,
            log_released: 0,
            covered: Vec::new(),
            applied_sequence: 0,
            open_entries: 0,
            bulk: bulk::BulkSegments::default(),
            flush: None,
            flush_retry_at: None,
            start: start::Start::default(),
            retention: retention::Retention::default(),
            space: space::Space::default(),
            is_paused: None,
            free_bytes: 0,
            manifest_retry_at: None,
            manifest_proof_at: None,
            unread: unread::Unread::default(),
            damage: Vec::new(),
        }
    }

    /// The reader over this store; there once recovery is done.
    #[must_use]
    pub fn reader(&self) -> Option<Arc<Reader>> {
        self.reader.clone()
    }

    /// The store's identity.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// All points: name, history, LSN.
    #[must_use]
    pub fn cuts(&self) -> Vec<(String, HistoryId, Lsn)> {
        let points = self
            .machines
            .values()
            .flat_map(|machine| machine.points.values());
        points
            .map(|point| (point.name.clone(), point.history, point.lsn))
            .collect()
    }

    /// Takes one input; what it leads to is appended to `out`, in order.
    pub fn step(&mut self, now: Monotonic, input: Input, out: &mut Vec<Output>) {
        self.now = now;
        if self.phase == Phase::Ended {
            return;
        }
        match input {
            Input::Start => self.begin(out),
            Input::Storage(completion) => self.storage_done(completion, out),
            Input::Tick => {
                self.log_step(LogInput::Tick, out);
                self.merge_on(out);
                self.remove_retired(out);
            }
            Input::Request(id, request) => self.request(id, request, out),
            // Once the engine stops, nothing more is taken; the sender keeps what it has.
            Input::Frame(..) | Input::Bulk(..) if self.phase != Phase::Running => {}
            Input::Frame(stream, frame) if self.phase == Phase::Running => {
                self.note_ingest();
                self.take_frame(stream, None, frame, out);
            }
            Input::Bulk(stream, number, frame) if self.phase == Phase::Running => {
                self.note_ingest();
                self.take_frame(stream, Some(number), frame, out);
            }
            // What is not acknowledged is sent again.
            Input::Frame(..) | Input::Bulk(..) => {}
            Input::Stop => {
                if self.phase == Phase::Running {
                    self.phase = Phase::Stopping;
                }
            }
        }
        match self.phase {
            Phase::Running => {
                self.seal_bulk_when_due(false, out);
                self.flush_when_due(false, out);
                self.merge_when_due(out);
                self.commit_merge(out);
                self.sweep_when_due(out);
                self.notes_when_due(out);
                self.make_reserve(out);
                self.place_crash_marks(out);
                self.retain_when_due(out);
                self.retry_manifest(out);
                self.prove_manifest_when_due(out);
            }
            Phase::Stopping => self.stop(out),
            Phase::Manifest => self.retry_manifest(out),
            _ => {}
        }
    }

    fn token(&mut self, owner: Owner) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.owners.insert(token, owner);
        token
    }

    fn submit(&mut self, owner: Owner, op: StorageOp, out: &mut Vec<Output>) {
        let token = self.token(owner);
        out.push(Output::Storage(token, op));
    }

    fn fail(&mut self, error: SeedError, out: &mut Vec<Output>) {
        self.phase = Phase::Ended;
        out.push(Output::Failed(error));
    }

    fn storage_done(&mut self, completion: StorageCompletion, out: &mut Vec<Output>) {
        let StorageCompletion { token, result } = completion;
        match self.owners.remove(&token) {
            Some(Owner::Log(token)) => {
                self.log_step(LogInput::Storage(StorageCompletion { token, result }), out);
            }
            Some(Owner::Manifest) => {
                let mut wants = Vec::new();
                self.manifest.completed(result, &mut wants);
                self.manifest_outputs(wants, out);
            }
            Some(Owner::Bulk(segment)) => self.bulk_done(segment, result, out),
            Some(Owner::Flush) => self.flush_done(result, out),
            Some(Owner::Merge(op)) => self.merge_done(op, result, out),
            Some(Owner::Rewrite) => self.rewrite_done(result, out),
            Some(Owner::Notes) => self.notes_done(result, out),
            Some(Owner::Reserve) => self.reserve_done(result, out),
            Some(Owner::Space) => self.room_is(result),
            Some(Owner::Start) => self.start_done(result, out),
            Some(Owner::Nobody) | None => {}
        }
    }

    fn log_step(&mut self, input: LogInput, out: &mut Vec<Output>) {
        let mut outputs = Vec::new();
        self.log.set_wall_time(self.clock.wall());
        self.log.step(self.now, input, &mut outputs);
        for output in outputs {
            self.log_output(output, out);
        }
    }

    /// Remembers damage for people.
    fn note_damage(&mut self, text: String) {
        if self.damage.contains(&text) {
            return;
        }
        tracing::error!("{text}");
        if self.damage.len() < DAMAGE_MAX {
            self.damage.push(text);
        }
    }

    fn committed(&mut self, after: AfterCommit, out: &mut Vec<Output>) {
        let moves_files = matches!(
            after,
            AfterCommit::Bulk(_) | AfterCommit::Flush | AfterCommit::Merge | AfterCommit::Rewrite
        );
        self.after_commit(after, out);
        if moves_files {
            self.share_budget();
        }
    }

    fn after_commit(&mut self, after: AfterCommit, out: &mut Vec<Output>) {
        match after {
            AfterCommit::Created => self.read_runs(out),
            AfterCommit::Point(point, request) => {
                self.put_point(point.clone());
                if let Some(request) = request {
                    out.push(Output::Reply(request, Ok(Response::Point(point))));
                }
            }
            AfterCommit::Retention(applied) => self.retention_committed(applied, out),
            AfterCommit::Bulk(segment) => self.bulk_committed(segment, out),
            AfterCommit::Flush => self.flush_committed(out),
            AfterCommit::Merge => self.merge_committed(out),
            AfterCommit::Rewrite => self.rewrite_committed(out),
            AfterCommit::Reply(request, mut response) => {
                if let Response::Stream(opened) = &mut *response {
                    self.renew(opened);
                }
                out.push(Output::Reply(request, Ok(*response)));
            }
        }
    }

    /// Brings what is told of a stream up to date: the commit took a while.
    fn renew(&self, opened: &mut OpenedStream) {
        let stream = self.streams.get(&opened.stream);
        if let Some(entry) = stream.and_then(|open| self.histories.get(&open.history)) {
            opened.durable = entry.durable;
        }
    }

    fn request(&mut self, id: RequestId, request: Request, out: &mut Vec<Output>) {
        if self.phase != Phase::Running {
            let error = SeedError::refused("the store is not open", "wait until it has started");
            out.push(Output::Reply(id, Err(error)));
            return;
        }
        let answer = match request {
            Request::OpenStream {
                machine,
                name,
                history,
                parent,
                origin,
                epoch,
            } => {
                let asked = ingest::Opening {
                    machine,
                    name,
                    history,
                    parent,
                    origin,
                    epoch,
                };
                self.open_stream(id, asked, out)
            }
            Request::CloseStream(stream) => {
                self.close_stream(stream);
                Ok(Some(Response::Done))
            }
            Request::DeclareDisk {
                stream,
                disk,
                name,
                size_bytes,
                logical_block_bytes,
            } => {
                let asked = ingest::Declaring {
                    disk,
                    name,
                    size_bytes,
                    logical_block_bytes,
                };
                self.declare_disk(id, stream, asked, out)
            }
            Request::CreatePoint { machine, name, at } => {
                self.create_point(id, &machine, name, at, out)
            }
            Request::DeletePoints { machine, names } => {
                self.delete_points(id, &machine, &names, out)
            }
            Request::LockPoints {
                machine,
                names,
                until,
            } => self.lock_points(id, &machine, &names, until, out),
            Request::SetPolicy {
                machine,
                policy,
                expected,
            } => self.set_policy(id, &machine, policy, expected, out),
            Request::GetPolicy { machine } => self
                .machine_named(&machine)
                .map(|machine| Some(Response::Policy(self.policy_of(machine)))),
            Request::ConfirmClock => self.confirm_clock(id, out),
            Request::ListPoints {
                machine,
                after,
                limit,
            } => self.list_points(&machine, after, limit).map(Some),
            Request::Snapshot {
                reference,
                allow_incomplete,
            } => self
                .snapshot(&reference, allow_incomplete)
                .map(|taken| Some(Response::Snapshot(taken))),
            Request::NewestState { stream, disk } => self
                .newest_state(stream, disk)
                .map(|taken| Some(Response::Snapshot(taken))),
            Request::Fork {
                reference,
                allow_incomplete,
            } => self.fork(id, &reference, allow_incomplete, out),
            Request::OpenBranch { history, disk } => self.open_branch(id, history, disk, out),
            Request::PointStates {
                machine,
                disk,
                after,
                limit,
            } => self.point_states(machine, disk, after, limit).map(Some),
            Request::FindPoint {
                machine,
                disk,
                name,
            } => self.find_point(machine, disk, &name).map(Some),
            Request::DropBranch(history) => self.drop_branch(id, history, out),
            Request::Fence { machine, holder } => self.fence(id, machine, holder, out),
            Request::Collect => {
                self.collect(id);
                Ok(None)
            }
            Request::Info => Ok(Some(Response::Info(self.info()))),
            Request::Files => Ok(Some(Response::Files(self.files()))),
            Request::Space => Ok(Some(Response::Space(Box::new(self.space_info())))),
            Request::SetQuota { of, bytes } => self.set_quota(id, of.as_deref(), bytes, out),
            Request::PointSpace {
                machine,
                after,
                limit,
            } => self.point_space(&machine, after, limit).map(Some),
        };
        match answer {
            Ok(Some(response)) => out.push(Output::Reply(id, Ok(response))),
            // It is answered when something is durable.
            Ok(None) => {}
            Err(error) => out.push(Output::Reply(id, Err(error))),
        }
    }

    fn stop(&mut self, out: &mut Vec<Output>) {
        self.seal_bulk_when_due(true, out);
        if self.is_paused.is_some() || self.manifest.has_no_space() || self.bulk.waits_for_room() {
            // What waits for room was not acknowledged, and the rest is durable.
            return self.stop_at_once(out);
        }
        self.merge_on(out);
        self.commit_merge(out);
        self.stop_collecting(out);
        let is_quiet = self.appended.is_empty()
            && self.bulk.is_empty()
            && self.merge.is_none()
            && self.rewrite.is_none();
        if is_quiet && self.flush.is_none() && self.open_entries > 0 {
            self.flush_when_due(true, out);
        }
        if is_quiet && self.flush.is_none() {
            self.prove_manifest(out);
        }
        let is_told = is_quiet && self.flush.is_none() && !self.manifest.is_busy();
        if is_told && self.notes_at_stop(out) {
            self.phase = Phase::StoppingLog;
            self.log_step(LogInput::Close, out);
        }
    }

    fn stop_at_once(&mut self, out: &mut Vec<Output>) {
        self.phase = Phase::Ended;
        out.push(Output::Stopped);
    }

    fn log_output(&mut self, output: LogOutput, out: &mut Vec<Output>) {
        match output {
            LogOutput::Storage(token, op) => self.submit(Owner::Log(token), op, out),
            LogOutput::Recovered { location, frame } => self.recovered_frame(&location, &frame),
            LogOutput::Durable {
                token,
                location,
                frame,
            } => {
                self.durable_frame(token, &location, &frame, out);
            }
            LogOutput::DamagedSlot {
                location,
                lsn,
                disk,
                ..
            } => {
                self.slot_damaged(&location, disk, lsn);
            }
            LogOutput::Salvaged {
                location,
                identity,
                bytes,
                intact,
                lost,
            } => {
                self.salvaged_frame(&location, identity, &bytes, &intact, &lost);
            }
            LogOutput::Mended {
                segment,
                offset,
                damage,
            } => {
                let text = format!("log segment {segment} at {offset}: {damage}; mended");
                // A crash while a segment was sealed leaves the same as damage of its end.
                if is_of_segment_end(&damage) {
                    tracing::warn!("{text}");
                } else {
                    self.note_damage(text);
                }
            }
            LogOutput::Lost {
                segment,
                offset,
                first_sequence,
                last_sequence,
                damage,
            } => {
                self.commits_lost();
                self.note_damage(format!(
                    "log segment {segment} at {offset}: of commits {first_sequence} to \
                     {last_sequence} only what is whole was kept: {damage}"
                ));
            }
            LogOutput::Ready { last_sequence, .. } => {
                self.log_ready(last_sequence, out);
            }
            LogOutput::Sealed { segment, .. } => {
                if let Some(reader) = &self.reader {
                    reader.sealed(segment);
                }
            }
            LogOutput::Paused { .. } if self.phase == Phase::StoppingLog => self.stop_at_once(out),
            LogOutput::Paused { is_budget } => {
                self.is_paused = Some(is_budget);
                out.push(Output::Event(Event::Paused { is_budget }));
            }
            LogOutput::Resumed => {
                self.is_paused = None;
                self.vain_sweeps = 0;
                self.idle_sweeps = 0;
                out.push(Output::Event(Event::Resumed));
            }
            LogOutput::Released { segment } => {
                if let Some(reader) = &self.reader {
                    reader.removed(segment);
                }
            }
            LogOutput::WakeAt(at) => out.push(Output::WakeAt(at)),
            LogOutput::Failed(error) => self.fail(error.into(), out),
            LogOutput::Closed => {
                self.phase = Phase::Ended;
                out.push(Output::Stopped);
            }
        }
    }
}

fn is_of_segment_end(damage: &Damage) -> bool {
    match damage {
        Damage::Hash { structure }
        | Damage::Short { structure }
        | Damage::Field { structure, .. } => {
            matches!(*structure, "log segment directory" | "log segment footer")
        }
        _ => false,
    }
}
