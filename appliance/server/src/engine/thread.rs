//! The engine thread: brings inputs to the state machine and carries out what it wants.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use afterimage_blockdev::{
    Clock, Entropy, MachineId, Monotonic, RealStorage, Storage, StorageCompleter, StorageCompletion,
};
use afterimage_protocol::rest::ApiError;
use afterimage_seed::engine::{StoreFile, StreamNumber, TakenSnapshot};
use afterimage_seed::{
    BranchDevice, Engine, EngineOptions, Event, Input, Output, Reader, Request, RequestId,
    Response, SeedError,
};
use crossbeam::channel::Receiver;

use super::answer;
use super::command::{Command, Reply, StreamEvents};
use super::inbox::{BranchSink, FromBranch, Inbox};
use crate::events::EventLog;

/// Longest sleep.
const NAP_MAX: Duration = Duration::from_millis(500);
/// How often branches are sealed and closed ones noticed.
const BRANCH_TICK: Duration = Duration::from_millis(100);
/// Commands taken before completions are looked at again.
const COMMANDS_AT_ONCE: usize = 64;

/// What is to be done with a response.
pub(super) type Then = Box<dyn FnOnce(&mut EngineThread, Result<Response, SeedError>) + Send>;

pub(super) struct EngineThread {
    pub(super) engine: Engine,
    pub(super) storage: Arc<RealStorage>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) entropy: Arc<dyn Entropy>,
    pub(super) inbox: Arc<Inbox>,
    commands: Receiver<Command>,
    next_request: u64,
    waiting: HashMap<RequestId, Then>,
    pub(super) streams: HashMap<StreamNumber, Arc<dyn StreamEvents>>,
    pub(super) branches: HashMap<StreamNumber, Weak<BranchDevice>>,
    pub(super) events: Option<EventLog>,
    stopping: Vec<Reply<()>>,
    wake_at: Monotonic,
    next_branch_tick: Monotonic,
    is_over: bool,
    /// When the medium gave what the engine is told now.
    arrived: Instant,
}

impl EngineThread {
    pub(super) fn new(
        options: EngineOptions,
        storage: Arc<RealStorage>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        inbox: Arc<Inbox>,
        commands: Receiver<Command>,
    ) -> Self {
        let shared: Arc<dyn Storage> = Arc::clone(&storage) as Arc<dyn Storage>;
        let engine = Engine::new(options, shared, Arc::clone(&clock), Arc::clone(&entropy));
        Self {
            engine,
            storage,
            clock,
            entropy,
            inbox,
            commands,
            next_request: 1,
            waiting: HashMap::new(),
            streams: HashMap::new(),
            branches: HashMap::new(),
            events: None,
            stopping: Vec::new(),
            wake_at: Monotonic(0),
            next_branch_tick: Monotonic(0),
            is_over: false,
            arrived: Instant::now(),
        }
    }

    pub(super) fn run(mut self, ready: Sender<Result<(), ApiError>>) {
        let mut ready = Some(ready);
        self.step(Input::Start, &mut ready);
        let mut completions: Vec<(StorageCompletion, Instant)> = Vec::new();
        let mut from_branches = VecDeque::new();
        while !self.is_over {
            self.inbox.take(&mut completions, &mut from_branches);
            let mut is_idle = completions.is_empty() && from_branches.is_empty();
            for (completion, arrived) in completions.drain(..) {
                self.arrived = arrived;
                self.step(Input::Storage(completion), &mut ready);
            }
            self.arrived = Instant::now();
            for from in from_branches.drain(..) {
                self.take_from_branch(from, &mut ready);
            }
            for _ in 0..COMMANDS_AT_ONCE {
                // Commands wait until recovery is done.
                if ready.is_some() {
                    break;
                }
                let Ok(command) = self.commands.try_recv() else {
                    break;
                };
                is_idle = false;
                self.command(command);
            }
            let now = self.clock.monotonic();
            if now >= self.wake_at {
                self.wake_at = now.after(NAP_MAX);
                self.step(Input::Tick, &mut ready);
            }
            if now >= self.next_branch_tick {
                self.next_branch_tick = now.after(BRANCH_TICK);
                self.tend_branches();
            }
            if is_idle && !self.is_over {
                let nap = self
                    .wake_at
                    .min(self.next_branch_tick)
                    .since(now)
                    .min(NAP_MAX);
                self.inbox.wait(nap);
            }
        }
        for (_, events) in self.streams.drain() {
            events.refused(&answer::gone("the appliance is going down"));
        }
        for branch in self.branches.values().filter_map(Weak::upgrade) {
            branch.failed("the appliance is going down");
        }
        for reply in self.stopping.drain(..) {
            let _gone = reply.send(());
        }
    }

    fn step(&mut self, input: Input, ready: &mut Option<Sender<Result<(), ApiError>>>) {
        let now = self.clock.monotonic();
        let mut outputs = Vec::new();
        self.engine.step(now, input, &mut outputs);
        for output in outputs {
            self.output(output, ready);
        }
    }

    /// Gives the engine an input once it runs.
    pub(super) fn give(&mut self, input: Input) {
        self.step(input, &mut None);
    }

    /// Asks the engine.
    pub(super) fn ask(&mut self, request: Request, then: Then) {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.waiting.insert(id, then);
        self.step(Input::Request(id, request), &mut None);
    }

    fn output(&mut self, output: Output, ready: &mut Option<Sender<Result<(), ApiError>>>) {
        match output {
            Output::Storage(token, op) => {
                let to = Arc::clone(&self.inbox) as Arc<dyn StorageCompleter>;
                self.storage.submit(token, op, to);
            }
            Output::Reply(id, result) => {
                if let Some(then) = self.waiting.remove(&id) {
                    then(self, result);
                }
            }
            Output::Event(event) => self.event(event),
            Output::WakeAt(at) => self.wake_at = self.wake_at.min(at),
            Output::Ready => {
                if let Some(ready) = ready.take() {
                    let _gone = ready.send(Ok(()));
                }
            }
            Output::Failed(error) => {
                tracing::error!(%error, hint = error.hint(), "the engine cannot go on");
                self.is_over = true;
                if let Some(ready) = ready.take() {
                    let _gone = ready.send(Err(answer::api_error(&error)));
                }
            }
            Output::Stopped => self.is_over = true,
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Durable {
                stream,
                durable,
                queued_bytes,
            } => {
                if let Some(events) = self.streams.get(&stream) {
                    events.durable(durable, self.arrived, queued_bytes);
                } else if let Some(branch) = self.branches.get(&stream).and_then(Weak::upgrade) {
                    branch.durable(durable);
                }
            }
            Event::BulkDurable { stream, number, .. } => {
                if let Some(events) = self.streams.get(&stream) {
                    events.bulk_durable(number);
                }
            }
            Event::PlaceMark {
                stream,
                request,
                is_bookmark,
                name,
            } => {
                if let Some(events) = self.streams.get(&stream) {
                    events.place_mark(request, is_bookmark, &name);
                }
            }
            Event::Over { stream, end } => {
                let refusal = answer::stream_end(end);
                if let Some(events) = self.streams.remove(&stream) {
                    events.refused(&refusal);
                }
                if let Some(branch) = self.branches.remove(&stream).and_then(|b| b.upgrade()) {
                    branch.failed(&refusal.message);
                }
            }
            Event::Paused { is_budget } => {
                let refusal = answer::paused(is_budget);
                self.note("ingest-paused", format!("ingest is paused: {refusal}"));
                for events in self.streams.values() {
                    events.paused(&refusal);
                }
            }
            Event::Resumed => self.note("ingest-resumed", "ingest goes on".to_owned()),
            Event::ClockFrozen { ahead } => {
                let text = format!(
                    "the wall clock jumped by {} s; no lock ends until it is confirmed",
                    ahead.as_secs()
                );
                self.note("clock-frozen", text);
            }
            Event::Thinned { points } => tracing::info!(points, "points were thinned"),
            Event::Merged { runs, left_out } => {
                tracing::info!(runs, left_out, "runs were merged");
            }
            Event::Collected(done) => tracing::info!(?done, "what nobody needs was collected"),
            Event::WindowShortened { machine, window } => {
                let text = format!(
                    "room runs short: the journal window of {} is shortened to {:.1} s",
                    self.name_of(machine),
                    window.as_secs_f64()
                );
                self.note("window-shortened", text);
            }
            Event::PointsYielded { machine, count } => {
                let text = format!(
                    "there is no room: the {count} oldest unlocked points of {} are dropped",
                    self.name_of(machine)
                );
                self.note("points-yielded", text);
            }
            Event::MergeGivenUp { why } => {
                tracing::warn!(%why, "a merge of runs is put off");
            }
            Event::StreamPaused { stream, why } => {
                if let Some(events) = self.streams.get(&stream) {
                    events.paused(&answer::quota_reached(why));
                }
            }
            Event::MachinePaused { machine, why } => {
                let text = format!("ingest of machine {} waits: {why}", self.name_of(machine));
                self.note("machine-paused", text);
            }
            Event::MachineResumed { machine } => {
                let text = format!("ingest of machine {} goes on", self.name_of(machine));
                self.note("machine-resumed", text);
            }
        }
    }

    fn note(&self, kind: &'static str, text: String) {
        match &self.events {
            Some(events) => events.note(kind, text),
            None => tracing::info!(kind, "{text}"),
        }
    }

    fn name_of(&self, machine: MachineId) -> String {
        let name = self.engine.name_of(machine);
        name.map_or_else(|| machine.to_string(), str::to_owned)
    }

    fn take_from_branch(
        &mut self,
        from: FromBranch,
        ready: &mut Option<Sender<Result<(), ApiError>>>,
    ) {
        match from {
            FromBranch::Append(stream, frame) => self.step(Input::Frame(stream, frame), ready),
            FromBranch::Refresh(stream) => self.refresh(stream),
            FromBranch::Found(found) => self.found(*found),
        }
    }

    fn refresh(&mut self, stream: StreamNumber) {
        let Some(branch) = self.branches.get(&stream).and_then(Weak::upgrade) else {
            return;
        };
        let disk = branch.disk();
        self.ask(
            Request::NewestState { stream, disk },
            Box::new(move |_, result| match result {
                Ok(Response::Snapshot(taken)) => branch.refreshed(taken.snapshot),
                Ok(_) => {}
                Err(error) => branch.failed(&error.to_string()),
            }),
        );
    }

    /// Seals what idle branches hold, and closes the streams of those that are gone.
    fn tend_branches(&mut self) {
        let mut gone = Vec::new();
        for (stream, branch) in &self.branches {
            match branch.upgrade() {
                Some(branch) => branch.seal(),
                None => gone.push(*stream),
            }
        }
        for stream in gone {
            self.branches.remove(&stream);
            self.ask(Request::CloseStream(stream), Box::new(|_, _| {}));
        }
    }

    pub(super) fn stop(&mut self, reply: Reply<()>) {
        for branch in self.branches.values().filter_map(Weak::upgrade) {
            branch.seal();
        }
        self.stopping.push(reply);
        let (mut none, mut from) = (Vec::new(), VecDeque::new());
        self.inbox.take(&mut none, &mut from);
        for (completion, _) in none {
            self.give(Input::Storage(completion));
        }
        for from in from {
            self.take_from_branch(from, &mut None);
        }
        self.give(Input::Stop);
    }

    pub(super) fn reader(&self) -> Result<Arc<Reader>, SeedError> {
        self.engine.reader().ok_or_else(|| SeedError::Refused {
            message: "the store is not open".to_owned(),
            hint: "wait until it has started".to_owned(),
        })
    }

    pub(super) fn sink(&self, stream: StreamNumber) -> Arc<BranchSink> {
        Arc::new(BranchSink {
            inbox: Arc::clone(&self.inbox),
            stream,
        })
    }
}

/// The files of a response, for verification.
pub(super) fn files_of(response: Response) -> Vec<StoreFile> {
    if let Response::Files(files) = response {
        files
    } else {
        Vec::new()
    }
}

/// The snapshot of a response.
pub(super) fn snapshot_of(response: Response) -> Option<TakenSnapshot> {
    if let Response::Snapshot(taken) = response {
        Some(taken)
    } else {
        None
    }
}
