//! A whole store on a simulated medium, driven from one thread.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::simulated::{SeededEntropy, SimulatedClock, SimulatedStorage};
use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockOp, BlockOutcome, Clock, FileId,
    IoBuffer, Monotonic, Storage, StorageCompleter, StorageCompletion, StorageOp, StorageOutcome,
    Timestamp, Token,
};
use afterimage_cache::Frame;
use afterimage_seed::engine::{ForkedBranch, StreamNumber, TakenSnapshot};
use afterimage_seed::{
    BranchContents, BranchDevice, Engine, EngineOptions, Event, FrameSink, Input, Output, Request,
    RequestId, Response, SeedError, Usage, ViewDevice,
};
use parking_lot::Mutex;

use crate::report::{count_step, count_turn};

/// Steps of the storage after which a test that still waits has found a stall.
const STEPS_MAX: u64 = 2_000_000;

#[derive(Default)]
struct Inbox(Mutex<Vec<StorageCompletion>>);

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().push(completion);
    }
}

/// Keeps the one completion of a device request.
#[derive(Default)]
pub struct Slot(Mutex<Option<Result<BlockOutcome, BlockError>>>);

impl Slot {
    /// Takes what came of the request, once it is there.
    #[must_use]
    pub fn take(&self) -> Option<Result<BlockOutcome, BlockError>> {
        self.0.lock().take()
    }
}

impl BlockCompleter for Slot {
    fn complete(&self, completion: BlockCompletion) {
        *self.0.lock() = Some(completion.result);
    }
}

/// From a branch to its engine.
enum FromBranch {
    Append(StreamNumber, Frame),
    Refresh(StreamNumber),
}

type Branches = Arc<Mutex<VecDeque<FromBranch>>>;

struct BranchSink {
    queue: Branches,
    stream: StreamNumber,
}

impl FrameSink for BranchSink {
    fn append(&self, frame: Frame) {
        self.queue
            .lock()
            .push_back(FromBranch::Append(self.stream, frame));
    }

    fn refresh(&self) {
        self.queue
            .lock()
            .push_back(FromBranch::Refresh(self.stream));
    }
}

/// An engine, its medium, and what it said that was not yet looked at.
pub struct StoreRig {
    /// The medium.
    pub storage: Arc<SimulatedStorage>,
    /// The clock.
    pub clock: Arc<SimulatedClock>,
    /// The engine.
    pub engine: Engine,
    /// What happened, marks and ends of streams included.
    pub events: VecDeque<Event>,
    /// Answers that were not taken.
    pub replies: HashMap<RequestId, Result<Response, SeedError>>,
    /// Recovery is done.
    pub is_ready: bool,
    /// Why it cannot go on.
    pub failure: Option<SeedError>,
    /// `Stop` is done.
    pub is_stopped: bool,
    /// How long anything may take before it is given up.
    pub patience: Duration,
    inbox: Arc<Inbox>,
    from_branches: Branches,
    branches: HashMap<StreamNumber, Arc<BranchDevice>>,
    refreshing: HashMap<RequestId, StreamNumber>,
    next_request: u64,
    wake_at: Option<Monotonic>,
    entropy: Arc<SeededEntropy>,
    /// Operations of the engine that are under way, by the directory that they concern.
    under_way: HashMap<Token, String>,
    /// Directories of open files.
    opened: HashMap<FileId, String>,
    /// Manifest files begun less those removed: above 1 while one replaces another.
    is_rotating: bool,
}

/// Usual values for a small store.
#[must_use]
pub fn small_store() -> EngineOptions {
    EngineOptions {
        store_key: [9; 32],
        reserve_bytes: 0,
        reserve_file_bytes: 0,
        segment_bytes: 256 << 10,
        bulk_segment_bytes: 128 << 10,
        flush_entries: 64,
        crash_mark_interval: Duration::from_secs(1 << 30),
        retention_interval: Duration::from_secs(1 << 30),
        ..EngineOptions::default()
    }
}

impl StoreRig {
    /// Puts a new engine on a medium and lets it begin.
    #[must_use]
    pub fn new(
        storage: &Arc<SimulatedStorage>,
        clock: &Arc<SimulatedClock>,
        options: EngineOptions,
        seed: u64,
    ) -> Self {
        let entropy = Arc::new(SeededEntropy::new(seed));
        let engine = Engine::new(
            options,
            Arc::clone(storage) as Arc<dyn Storage>,
            Arc::clone(clock) as Arc<dyn Clock>,
            Arc::clone(&entropy) as Arc<dyn afterimage_blockdev::Entropy>,
        );
        let mut rig = Self {
            storage: Arc::clone(storage),
            clock: Arc::clone(clock),
            engine,
            events: VecDeque::new(),
            replies: HashMap::new(),
            is_ready: false,
            failure: None,
            is_stopped: false,
            patience: Duration::MAX,
            inbox: Arc::default(),
            from_branches: Arc::default(),
            branches: HashMap::new(),
            refreshing: HashMap::new(),
            next_request: 1,
            wake_at: None,
            entropy,
            under_way: HashMap::new(),
            opened: HashMap::new(),
            is_rotating: false,
        };
        rig.step(Input::Start);
        rig
    }

    /// A clock at a usual time.
    #[must_use]
    pub fn new_clock() -> Arc<SimulatedClock> {
        Arc::new(SimulatedClock::new(Timestamp(1_800_000_000_000_000_000)))
    }

    /// Gives the engine one input.
    pub fn step(&mut self, input: Input) {
        let mut out = Vec::new();
        count_step();
        self.engine.step(self.clock.monotonic(), input, &mut out);
        for output in out {
            match output {
                Output::Storage(token, op) => {
                    self.note_begun(token, &op);
                    let inbox: Arc<dyn StorageCompleter> = Arc::<Inbox>::clone(&self.inbox);
                    self.storage.submit(token, op, inbox);
                }
                Output::Reply(id, result) => self.reply(id, result),
                Output::Event(event) => self.event(event),
                Output::WakeAt(at) => {
                    self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
                }
                Output::Ready => self.is_ready = true,
                Output::Failed(error) => {
                    for branch in self.branches.values() {
                        branch.failed("the engine failed");
                    }
                    self.failure = Some(error);
                }
                Output::Stopped => self.is_stopped = true,
            }
        }
    }

    fn reply(&mut self, id: RequestId, result: Result<Response, SeedError>) {
        let Some(stream) = self.refreshing.remove(&id) else {
            self.replies.insert(id, result);
            return;
        };
        let Some(branch) = self.branches.get(&stream) else {
            return;
        };
        match result {
            Ok(Response::Snapshot(taken)) => branch.refreshed(taken.snapshot),
            Ok(other) => panic!("{other:?} for a refresh"),
            Err(error) => branch.failed(&error.to_string()),
        }
    }

    fn event(&mut self, event: Event) {
        match &event {
            Event::Durable {
                stream, durable, ..
            } => {
                if let Some(branch) = self.branches.get(stream) {
                    branch.durable(*durable);
                    return;
                }
            }
            Event::Over { stream, .. } => {
                if let Some(branch) = self.branches.remove(stream) {
                    branch.failed("the stream is over");
                }
            }
            _ => {}
        }
        self.events.push_back(event);
    }

    /// Carries what branches and the medium have for the engine to it.
    fn carry(&mut self) -> bool {
        let mut has_carried = false;
        let completions = core::mem::take(&mut *self.inbox.0.lock());
        for completion in completions {
            self.note_ended(&completion);
            has_carried = true;
            self.step(Input::Storage(completion));
        }
        loop {
            let from = self.from_branches.lock().pop_front();
            match from {
                Some(FromBranch::Append(stream, frame)) => self.step(Input::Frame(stream, frame)),
                Some(FromBranch::Refresh(stream)) => {
                    let Some(disk) = self.branches.get(&stream).map(|branch| branch.disk()) else {
                        continue;
                    };
                    let id = self.next_id();
                    self.refreshing.insert(id, stream);
                    self.step(Input::Request(id, Request::NewestState { stream, disk }));
                }
                None => return has_carried,
            }
            has_carried = true;
        }
    }

    fn note_begun(&mut self, token: Token, op: &StorageOp) {
        let directory = match op {
            StorageOp::Create { name } => {
                self.is_rotating |= name.directory() == "manifest" && self.is_ready;
                name.directory().to_owned()
            }
            StorageOp::Open { name } => name.directory().to_owned(),
            StorageOp::Remove { name } => {
                self.is_rotating &= name.directory() != "manifest";
                name.directory().to_owned()
            }
            StorageOp::Rename { to, .. } => to.directory().to_owned(),
            StorageOp::List { directory } | StorageOp::SyncDirectory { directory } => {
                directory.clone()
            }
            StorageOp::Close { file }
            | StorageOp::Read { file, .. }
            | StorageOp::Write { file, .. }
            | StorageOp::Sync { file }
            | StorageOp::SetLength { file, .. } => {
                self.opened.get(file).cloned().unwrap_or_default()
            }
            StorageOp::Capacity { .. } => String::new(),
        };
        self.under_way.insert(token, directory);
    }

    fn note_ended(&mut self, completion: &StorageCompletion) {
        let directory = self.under_way.remove(&completion.token);
        if let (Some(directory), Ok(StorageOutcome::Opened { file, .. })) =
            (directory, &completion.result)
        {
            self.opened.insert(*file, directory);
        }
    }

    /// The directories in which operations are under way; `rotation` while one manifest file
    /// replaces another.
    #[must_use]
    pub fn areas(&self) -> BTreeSet<&str> {
        let mut areas: BTreeSet<&str> = self.under_way.values().map(String::as_str).collect();
        if self.is_rotating {
            areas.insert("rotation");
        }
        areas
    }

    /// Performs one storage operation and brings its completion back; false when none can be.
    pub fn run_one(&mut self) -> bool {
        let has_carried = self.carry();
        let has_run = count_turn(self.storage.run_one());
        self.carry() || has_run || has_carried
    }

    /// Performs storage operations until none is left.
    pub fn run(&mut self) {
        let mut steps = 0;
        while self.run_one() {
            steps += 1;
            assert!(steps < STEPS_MAX, "the store never comes to rest");
        }
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        self.clock.advance(time);
        self.wake_at = None;
        self.step(Input::Tick);
    }

    /// Lets time pass until the engine wants to be woken; false when that is more than a minute.
    pub fn wake(&mut self) -> bool {
        let Some(at) = self.wake_at.take() else {
            return false;
        };
        let time = at.since(self.clock.monotonic());
        if time > Duration::from_secs(60) {
            return false;
        }
        self.clock.advance(time);
        self.step(Input::Tick);
        true
    }

    /// Runs and lets time pass until `is_done`; false when the medium stops or nothing moves.
    pub fn run_until(&mut self, mut is_done: impl FnMut(&Self) -> bool) -> bool {
        let begun = self.clock.monotonic();
        for _ in 0..STEPS_MAX {
            if is_done(self) {
                return true;
            }
            let waited = self.clock.monotonic().since(begun);
            if self.storage.is_stopped() || self.failure.is_some() || waited > self.patience {
                return false;
            }
            if !self.run_one() && !self.wake() {
                return is_done(self);
            }
        }
        panic!("the store never comes to what is waited for");
    }

    fn next_id(&mut self) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        id
    }

    /// Asks; the answer comes later.
    pub fn request(&mut self, request: Request) -> RequestId {
        let id = self.next_id();
        self.step(Input::Request(id, request));
        id
    }

    /// Asks and waits; `None` when the medium stops or the engine fails before.
    pub fn ask(&mut self, request: Request) -> Option<Result<Response, SeedError>> {
        let id = self.request(request);
        self.run_until(|rig| rig.replies.contains_key(&id));
        self.replies.remove(&id)
    }

    /// Takes a snapshot.
    pub fn snapshot(
        &mut self,
        reference: &str,
        allow_incomplete: bool,
    ) -> Option<Result<TakenSnapshot, SeedError>> {
        let reference = reference.parse().expect("a reference");
        let answer = self.ask(Request::Snapshot {
            reference,
            allow_incomplete,
        })?;
        Some(answer.map(|response| match response {
            Response::Snapshot(taken) => taken,
            other => panic!("{other:?} for a snapshot"),
        }))
    }

    /// Makes the device of a snapshot.
    #[must_use]
    pub fn view(&self, taken: &TakenSnapshot) -> Arc<dyn BlockDevice> {
        let reader = self.engine.reader().expect("the store is open");
        Arc::new(ViewDevice::new(reader, Arc::clone(&taken.snapshot)))
    }

    /// Makes the device of a branch.
    pub fn branch(&mut self, branch: &ForkedBranch) -> Arc<BranchDevice> {
        let stream = branch.stream.stream;
        let queue = Arc::clone(&self.from_branches);
        let device = BranchDevice::new(
            branch,
            BranchContents::none(),
            Arc::new(Usage::new(None)),
            self.engine.reader().expect("the store is open"),
            Arc::new(BranchSink { queue, stream }),
            Arc::clone(&self.clock) as Arc<dyn Clock>,
            &*self.entropy,
        );
        self.branches.insert(stream, Arc::clone(&device));
        device
    }

    /// Submits a request to a device.
    #[must_use]
    pub fn submit(device: &dyn BlockDevice, op: BlockOp) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
        device.submit(Token(0), op, Arc::clone(&slot) as Arc<dyn BlockCompleter>);
        slot
    }

    /// Performs a device request; `None` when the medium stops before it is done.
    pub fn perform(
        &mut self,
        device: &dyn BlockDevice,
        op: BlockOp,
    ) -> Option<Result<BlockOutcome, BlockError>> {
        let slot = Self::submit(device, op);
        self.wait(&slot)
    }

    /// Waits for a device request; `None` when the medium stops before it is done.
    pub fn wait(&mut self, slot: &Slot) -> Option<Result<BlockOutcome, BlockError>> {
        let begun = self.clock.monotonic();
        loop {
            if let Some(result) = slot.take() {
                return Some(result);
            }
            let waited = self.clock.monotonic().since(begun);
            if waited > self.patience || !(self.run_one() || self.wake()) {
                return slot.take();
            }
        }
    }

    /// Reads a range of a device; `None` when the medium stops.
    pub fn read(
        &mut self,
        device: &dyn BlockDevice,
        offset: u64,
        len: usize,
    ) -> Option<Result<IoBuffer, BlockError>> {
        let buffer = IoBuffer::zeroed(len);
        let result = self.perform(device, BlockOp::Read { offset, buffer })?;
        Some(result.map(|outcome| match outcome {
            BlockOutcome::Data(buffer) => buffer,
            other => panic!("{other:?} for a read"),
        }))
    }

    /// Stops the engine in order; false when the medium stops or fails before.
    pub fn stop(&mut self) -> bool {
        self.step(Input::Stop);
        self.run_until(|rig| rig.is_stopped)
    }
}
