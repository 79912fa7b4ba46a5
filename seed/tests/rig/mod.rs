//! A small store in memory whose files can be damaged, and whose sectors can fail, by hand.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::memory::MemoryStorage;
use afterimage_blockdev::simulated::{SeededEntropy, SimulatedClock};
use afterimage_blockdev::{
    AgentId, BLOCK_BYTES, BatchId, BlockDevice, BlockOp, BlockOutcome, Clock, DiskId, Entropy,
    Epoch, FileId, FileName, HistoryId, IoBuffer, Lsn, MachineId, Storage, StorageCompleter,
    StorageCompletion, StorageError, StorageErrorKind, StorageOp, StorageOutcome, Timestamp, Token,
    wait,
};
use afterimage_cache::{
    BatchKind, Frame, FrameBuilder, FrameIdentity, RecordHeader, RecordKind, Sealer, TagKey,
};
use afterimage_seed::engine::{StreamEnd, StreamNumber};
use afterimage_seed::verify::{Verification, verify_file};
use afterimage_seed::{
    Engine, EngineOptions, Event, Input, Output, Request, RequestId, Response, SeedError,
    ViewDevice,
};
use parking_lot::Mutex;

pub(crate) const BLOCK: u64 = BLOCK_BYTES as u64;
pub(crate) const SECTOR: u64 = 4096;
pub(crate) const MACHINE: MachineId = MachineId([1; 16]);
pub(crate) const HISTORY: HistoryId = HistoryId([2; 16]);
pub(crate) const DISK: DiskId = DiskId([3; 16]);
const AGENT: AgentId = AgentId([4; 16]);

/// Files in memory, some sectors of which cannot be read.
pub(crate) struct Medium {
    inner: Arc<MemoryStorage>,
    names: Mutex<HashMap<FileId, String>>,
    bad: Mutex<BTreeSet<(String, u64)>>,
}

impl Medium {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryStorage::new(),
            names: Mutex::default(),
            bad: Mutex::default(),
        })
    }

    fn perform(&self, op: StorageOp) -> Result<StorageOutcome, StorageError> {
        let opened = match &op {
            StorageOp::Open { name } | StorageOp::Create { name } => Some(name.to_string()),
            _ => None,
        };
        if let StorageOp::Read {
            file,
            offset,
            buffer,
        } = &op
        {
            let end = offset + buffer.len() as u64;
            let name = self.names.lock().get(file).cloned().unwrap_or_default();
            let bad = self.bad.lock();
            let is_bad =
                |(of, at): &(String, u64)| *of == name && *at < end && at + SECTOR > *offset;
            if bad.iter().any(is_bad) {
                let error = std::io::Error::from_raw_os_error(5);
                return Err(op.error(&name, StorageErrorKind::Io(error)));
            }
        }
        let result = wait::storage(&*self.inner, op);
        if let (Some(name), Ok(StorageOutcome::Opened { file, .. })) = (opened, &result) {
            self.names.lock().insert(*file, name);
        }
        result
    }

    pub(crate) fn names(&self, directory: &str) -> Vec<FileName> {
        let directory = directory.to_owned();
        let Ok(StorageOutcome::Listed(mut names)) = self.perform(StorageOp::List { directory })
        else {
            panic!("a list");
        };
        names.sort();
        names
    }

    pub(crate) fn only(&self, directory: &str) -> FileName {
        let mut names = self.names(directory);
        names.retain(|name| name.base().contains('.') && !name.base().ends_with(".notes"));
        assert_eq!(names.len(), 1, "{names:?}");
        names[0].clone()
    }

    fn open(&self, name: &FileName) -> (FileId, u64) {
        let op = StorageOp::Open { name: name.clone() };
        match wait::storage(&*self.inner, op) {
            Ok(StorageOutcome::Opened { file, length }) => (file, length),
            other => panic!("{name}: {other:?}"),
        }
    }

    pub(crate) fn content(&self, name: &FileName) -> Vec<u8> {
        let (file, length) = self.open(name);
        let op = StorageOp::Read {
            file,
            offset: 0,
            buffer: IoBuffer::zeroed(usize::try_from(length).unwrap().max(4096)),
        };
        let Ok(StorageOutcome::Read(bytes)) = wait::storage(&*self.inner, op) else {
            panic!("{name} can be read");
        };
        wait::storage(&*self.inner, StorageOp::Close { file }).unwrap();
        bytes.to_vec()
    }

    /// Makes a file anew with other content.
    pub(crate) fn put(&self, name: &FileName, bytes: &[u8]) {
        let _none = wait::storage(&*self.inner, StorageOp::Remove { name: name.clone() });
        let op = StorageOp::Create { name: name.clone() };
        let Ok(StorageOutcome::Opened { file, .. }) = wait::storage(&*self.inner, op) else {
            panic!("{name} can be made");
        };
        let mut buffer = IoBuffer::copy_of(bytes);
        buffer.pad_to(4096);
        let offset = 0;
        let op = StorageOp::Write {
            file,
            offset,
            buffer,
        };
        wait::storage(&*self.inner, op).unwrap();
        wait::storage(&*self.inner, StorageOp::Close { file }).unwrap();
    }

    pub(crate) fn remove(&self, name: &FileName) -> Vec<u8> {
        let bytes = self.content(name);
        wait::storage(&*self.inner, StorageOp::Remove { name: name.clone() }).unwrap();
        bytes
    }

    pub(crate) fn flip(&self, name: &FileName, at: usize) {
        let mut bytes = self.content(name);
        bytes[at] ^= 0x5a;
        self.put(name, &bytes);
    }

    /// From now on a sector cannot be read.
    pub(crate) fn spoil(&self, name: &FileName, offset: u64) {
        self.bad.lock().insert((name.to_string(), offset));
    }

    pub(crate) fn heal(&self) {
        self.bad.lock().clear();
    }
}

impl Storage for Medium {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        let result = self.perform(op);
        to.complete(StorageCompletion { token, result });
    }
}

#[derive(Default)]
struct Inbox(Mutex<VecDeque<StorageCompletion>>);

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().push_back(completion);
    }
}

pub(crate) struct Rig {
    pub(crate) medium: Arc<Medium>,
    pub(crate) engine: Engine,
    pub(crate) failure: Option<SeedError>,
    pub(crate) is_ready: bool,
    pub(crate) is_stopped: bool,
    pub(crate) events: Vec<Event>,
    pub(crate) stream: Option<StreamNumber>,
    pub(crate) last: Lsn,
    pub(crate) epoch: u64,
    previous: Lsn,
    sealer: Option<Sealer>,
    clock: Arc<SimulatedClock>,
    inbox: Arc<Inbox>,
    replies: HashMap<RequestId, Result<Response, SeedError>>,
    next_request: u64,
}

pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        store_key: [9; 32],
        reserve_bytes: 0,
        segment_bytes: 4 << 20,
        flush_entries: 1 << 20,
        crash_mark_interval: Duration::from_secs(1 << 30),
        ..EngineOptions::default()
    }
}

impl Rig {
    pub(crate) fn start(medium: &Arc<Medium>) -> Self {
        Self::start_with(medium, options())
    }

    pub(crate) fn start_with(medium: &Arc<Medium>, options: EngineOptions) -> Self {
        let clock = Arc::new(SimulatedClock::new(Timestamp(1_800_000_000_000_000_000)));
        let engine = Engine::new(
            options,
            Arc::clone(medium) as Arc<dyn Storage>,
            Arc::clone(&clock) as Arc<dyn Clock>,
            Arc::new(SeededEntropy::new(7)) as Arc<dyn Entropy>,
        );
        let mut rig = Self {
            medium: Arc::clone(medium),
            engine,
            failure: None,
            is_ready: false,
            is_stopped: false,
            events: Vec::new(),
            stream: None,
            last: Lsn::ZERO,
            epoch: 1,
            previous: Lsn::ZERO,
            sealer: None,
            clock,
            inbox: Arc::default(),
            replies: HashMap::new(),
            next_request: 1,
        };
        rig.step(Input::Start);
        rig
    }

    pub(crate) fn step(&mut self, input: Input) {
        self.step_once(input);
        loop {
            let completion = self.inbox.0.lock().pop_front();
            let Some(completion) = completion else { break };
            self.step_once(Input::Storage(completion));
        }
    }

    fn step_once(&mut self, input: Input) {
        let mut out = Vec::new();
        self.engine.step(self.clock.monotonic(), input, &mut out);
        for output in out {
            match output {
                Output::Storage(token, op) => {
                    let inbox: Arc<dyn StorageCompleter> = Arc::<Inbox>::clone(&self.inbox);
                    self.medium.submit(token, op, inbox);
                }
                Output::Reply(id, result) => {
                    self.replies.insert(id, result);
                }
                Output::Event(event) => self.events.push(event),
                Output::WakeAt(_) => {}
                Output::Ready => self.is_ready = true,
                Output::Failed(error) => self.failure = Some(error),
                Output::Stopped => self.is_stopped = true,
            }
        }
    }

    /// Lets time pass, in small steps.
    pub(crate) fn pass(&mut self, time: Duration) {
        for _ in 0..20 {
            self.clock.advance(time / 20);
            self.step(Input::Tick);
        }
    }

    pub(crate) fn ask(&mut self, request: Request) -> Result<Response, SeedError> {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.step(Input::Request(id, request));
        if !self.replies.contains_key(&id) {
            self.pass(Duration::from_secs(2));
        }
        self.replies.remove(&id).expect("an answer")
    }

    pub(crate) fn stop(&mut self) {
        self.step(Input::Stop);
        for _ in 0..50 {
            self.pass(Duration::from_secs(1));
            if self.is_stopped {
                return;
            }
        }
        panic!("the store does not stop: {:?}", self.failure);
    }

    /// Opens the stream of the machine and declares its disk.
    pub(crate) fn open(&mut self) {
        let opened = self.ask(Request::OpenStream {
            machine: MACHINE,
            name: "machine".to_owned(),
            history: HISTORY,
            parent: None,
            origin: AGENT,
            epoch: Epoch(self.epoch),
        });
        let Ok(Response::Stream(opened)) = opened else {
            panic!("{opened:?}");
        };
        self.stream = Some(opened.stream);
        self.last = opened.highest;
        let declared = self.ask(Request::DeclareDisk {
            stream: opened.stream,
            disk: DISK,
            name: "disk".to_owned(),
            size_bytes: 1 << 20,
            logical_block_bytes: 4096,
        });
        let Ok(Response::Disk(declared)) = declared else {
            panic!("{declared:?}");
        };
        let entropy = SeededEntropy::new(11);
        let tag_key = TagKey(opened.tag_key);
        self.sealer = Some(Sealer::new(Some(&declared.key), tag_key, &entropy));
    }

    pub(crate) fn identity(&self) -> FrameIdentity {
        FrameIdentity {
            machine: MACHINE,
            history: HISTORY,
            origin: AGENT,
            epoch: Epoch(self.epoch),
        }
    }

    pub(crate) fn header(&mut self, kind: RecordKind) -> RecordHeader {
        self.last = self.last.next();
        RecordHeader {
            kind,
            lsn: self.last,
            previous: Lsn::ZERO,
            time: Timestamp(1_800_000_000_000_000_000 + self.last.0),
            disk: DiskId::NIL,
            offset: 0,
            length: 0,
            batch: BatchId(0),
            argument: 0,
        }
    }

    pub(crate) fn note(&mut self, header: &RecordHeader, note: &[u8]) {
        let mut builder = FrameBuilder::new(self.identity(), false);
        builder.push_note(header, note);
        self.send(builder.finish());
    }

    pub(crate) fn send(&mut self, frame: Frame) {
        let stream = self.stream.expect("an open stream");
        self.step(Input::Frame(stream, frame));
    }

    pub(crate) fn data_frame(&mut self, disk: DiskId, offset: u64, fill: u8) -> Frame {
        let mut header = self.header(RecordKind::Write);
        header.disk = disk;
        header.previous = self.previous;
        header.offset = offset;
        header.length = BLOCK;
        self.previous = header.lsn;
        let mut builder = FrameBuilder::new(self.identity(), false);
        let sealer = self.sealer.as_mut().expect("an open stream");
        builder.push_data(&header, &[fill; BLOCK_BYTES], sealer);
        builder.finish()
    }

    pub(crate) fn write(&mut self, block: u64, fill: u8) {
        let frame = self.data_frame(DISK, block * BLOCK, fill);
        self.send(frame);
    }

    pub(crate) fn bulk_frame(&mut self, disk: DiskId, block: u64, fill: u8) -> Frame {
        let header = RecordHeader {
            kind: RecordKind::Bulk,
            lsn: self.last,
            previous: Lsn::ZERO,
            time: Timestamp(1_800_000_000_000_000_000),
            disk,
            offset: block * BLOCK,
            length: BLOCK,
            batch: BatchId(1),
            argument: 0,
        };
        let mut builder = FrameBuilder::new(self.identity(), true);
        let sealer = self.sealer.as_mut().expect("an open stream");
        builder.push_data(&header, &[fill; BLOCK_BYTES], sealer);
        builder.finish()
    }

    pub(crate) fn bulk(&mut self, block: u64, fill: u8) {
        let frame = self.bulk_frame(DISK, block, fill);
        let stream = self.stream.expect("an open stream");
        self.step(Input::Bulk(stream, 1, frame));
        self.pass(Duration::from_secs(1));
    }

    /// A first copy of the disk: one block of bulk.
    pub(crate) fn copy(&mut self, block: u64, fill: u8) {
        let mut header = self.header(RecordKind::BatchBegin(BatchKind::Initial));
        header.batch = BatchId(1);
        self.note(&header, &DISK.0);
        self.bulk(block, fill);
        let mut header = self.header(RecordKind::BatchEnd);
        header.batch = BatchId(1);
        self.note(&header, &[]);
    }

    /// A block of the newest state.
    pub(crate) fn read(&mut self, block: u64) -> Result<u8, String> {
        let reference = "machine/disk@latest".parse().unwrap();
        let taken = self.ask(Request::Snapshot {
            reference,
            allow_incomplete: true,
        });
        let Ok(Response::Snapshot(taken)) = taken else {
            panic!("{taken:?}");
        };
        let view = ViewDevice::new(self.engine.reader().unwrap(), taken.snapshot);
        let op = BlockOp::Read {
            offset: block * BLOCK,
            buffer: IoBuffer::zeroed(BLOCK_BYTES),
        };
        match wait::device(&view as &dyn BlockDevice, op) {
            Ok(BlockOutcome::Data(bytes)) => {
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                Ok(bytes[0])
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(crate) fn damage(&mut self) -> Vec<String> {
        match self.ask(Request::Info) {
            Ok(Response::Info(info)) => info.damage,
            other => panic!("{other:?}"),
        }
    }

    /// How the stream ended, if it has.
    pub(crate) fn end(&self) -> Option<StreamEnd> {
        self.events.iter().find_map(|event| match event {
            Event::Over { end, .. } => Some(*end),
            _ => None,
        })
    }

    pub(crate) fn durable(&self) -> Lsn {
        let durable = self.events.iter().filter_map(|event| match event {
            Event::Durable { durable, .. } => Some(*durable),
            _ => None,
        });
        durable.max().unwrap_or_default()
    }

    pub(crate) fn verify(&mut self) -> Verification {
        let Ok(Response::Files(files)) = self.ask(Request::Files) else {
            panic!("files");
        };
        let mut found = Verification::default();
        for file in files {
            let store = self.engine.store();
            verify_file(&*self.medium, store, file, &mut found).unwrap();
        }
        found
    }
}

/// A store with a first copy (block 0: 7, of bulk) and a write (block 1: 8), closed in order.
pub(crate) fn closed_store() -> Arc<Medium> {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    rig.copy(0, 7);
    rig.write(1, 8);
    rig.stop();
    medium
}
