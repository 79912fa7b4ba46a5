//! The spool: frames that memory has no room for, in the same log that the appliance keeps.
//!
//! Invariants
//! * The spool holds nothing that outlives the process: what it held is within marked regions, and
//!   the next epoch compares those. So it begins empty.
//! * A frame that is read back is checked in full before it is used.
//! * The thread waits for its inbox only; storage operations complete into the inbox.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_blockdev::{
    Clock, Epoch, FileId, IoBuffer, Lsn, Monotonic, SegmentId, Storage, StorageCompleter,
    StorageCompletion, StorageOp, StorageOutcome, Token,
};
use afterimage_cache::log::{FrameLocation, Log, LogInput, LogOptions, LogOutput};
use afterimage_cache::segment::segment_file;
use afterimage_cache::{CacheError, Damage, Frame};
use parking_lot::{Condvar, Mutex};

/// Where a frame lies in the spool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpoolPlace {
    location: FrameLocation,
    bytes: usize,
}

impl SpoolPlace {
    /// Makes a place; for spools that keep frames elsewhere.
    #[must_use]
    pub fn new(location: FrameLocation, bytes: usize) -> Self {
        Self { location, bytes }
    }

    /// Where.
    #[must_use]
    pub fn location(&self) -> FrameLocation {
        self.location
    }
}

/// Keeps frames on a disk. Nothing here waits.
pub trait Spool: Send + Sync {
    /// Writes a frame; [`SpoolEvents::written`] tells when.
    fn append(&self, frame: Arc<Frame>);
    /// Reads a frame, whose last LSN is `last`; [`SpoolEvents::loaded`] brings it.
    fn load(&self, place: SpoolPlace, last: Lsn);
    /// This frame and all before it are no longer needed.
    fn trim(&self, place: SpoolPlace);
}

/// Who is told. Called without a lock of the spool.
pub trait SpoolEvents: Send + Sync {
    /// A frame of this epoch that ends with `last` is written.
    fn written(&self, epoch: Epoch, last: Lsn, place: SpoolPlace);
    /// A frame was read.
    fn loaded(&self, place: SpoolPlace, last: Lsn, frame: Frame);
    /// There is no room; what was appended waits in memory until there is.
    fn paused(&self, is_paused: bool);
    /// The spool cannot go on, or cannot read a frame that is needed.
    fn failed(&self, error: &CacheError);
}

#[derive(Default)]
struct Inbox {
    appends: VecDeque<Arc<Frame>>,
    loads: VecDeque<(SpoolPlace, Lsn)>,
    trim_through: u64,
    completions: VecDeque<StorageCompletion>,
    is_stopping: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    filled: Condvar,
}

impl Shared {
    fn tell(&self, what: impl FnOnce(&mut Inbox)) {
        what(&mut self.inbox.lock());
        self.filled.notify_one();
    }
}

impl StorageCompleter for Shared {
    fn complete(&self, completion: StorageCompletion) {
        self.tell(|inbox| inbox.completions.push_back(completion));
    }
}

/// The spool over the log of the cache tier.
pub struct LogSpool {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl LogSpool {
    /// Makes a spool that is begun with [`LogSpool::start`]; until then it only takes notes.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::default(),
            thread: Mutex::new(None),
        })
    }

    /// Starts the spool's thread. `options.directory` must be empty.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        &self,
        storage: Arc<dyn Storage>,
        options: LogOptions,
        clock: Arc<dyn Clock>,
        events: Arc<dyn SpoolEvents>,
    ) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let runner = Runner {
            shared,
            storage,
            directory: options.directory.clone(),
            log: Log::new(options),
            clock,
            events,
            is_ready: false,
            wake_at: None,
            next_token: READ_TOKENS,
            reads: HashMap::new(),
            opens: HashMap::new(),
            files: HashMap::new(),
            waiting: HashMap::new(),
            released_through: 0,
        };
        let thread = std::thread::Builder::new().name("spool".to_owned());
        *self.thread.lock() = Some(thread.spawn(move || runner.run())?);
        Ok(())
    }
}

impl Drop for LogSpool {
    fn drop(&mut self) {
        self.shared.tell(|inbox| inbox.is_stopping = true);
        if let Some(thread) = self.thread.lock().take() {
            let _panicked = thread.join();
        }
    }
}

impl Spool for LogSpool {
    fn append(&self, frame: Arc<Frame>) {
        self.shared.tell(|inbox| inbox.appends.push_back(frame));
    }

    fn load(&self, place: SpoolPlace, last: Lsn) {
        self.shared
            .tell(|inbox| inbox.loads.push_back((place, last)));
    }

    fn trim(&self, place: SpoolPlace) {
        let through = place.location.sequence;
        self.shared
            .tell(|inbox| inbox.trim_through = inbox.trim_through.max(through));
    }
}

/// Tokens of our own reads; the log counts its own from 1.
const READ_TOKENS: u64 = 1 << 63;
/// Unit of reads.
const SECTOR: u64 = 512;

struct Runner {
    shared: Arc<Shared>,
    storage: Arc<dyn Storage>,
    directory: String,
    log: Log,
    clock: Arc<dyn Clock>,
    events: Arc<dyn SpoolEvents>,
    is_ready: bool,
    wake_at: Option<Monotonic>,
    next_token: u64,
    reads: HashMap<Token, (SpoolPlace, Lsn)>,
    opens: HashMap<Token, SegmentId>,
    files: HashMap<SegmentId, FileId>,
    /// Loads that wait for their segment to be opened.
    waiting: HashMap<SegmentId, Vec<(SpoolPlace, Lsn)>>,
    released_through: u64,
}

impl Runner {
    fn run(mut self) {
        self.step(LogInput::Start { from_sequence: 0 });
        while let Some(work) = self.next() {
            self.work(work);
        }
    }

    fn next(&self) -> Option<Inbox> {
        let mut inbox = self.shared.inbox.lock();
        loop {
            if inbox.is_stopping {
                return None;
            }
            let can_append = self.is_ready && !inbox.appends.is_empty();
            let has_work = can_append
                || !inbox.loads.is_empty()
                || !inbox.completions.is_empty()
                || inbox.trim_through > self.released_through && self.is_ready;
            if has_work {
                break;
            }
            let wait = self.wake_at.map(|at| at.since(self.clock.monotonic()));
            match wait {
                Some(Duration::ZERO) => break,
                Some(wait) => {
                    let _timed_out = self.shared.filled.wait_for(&mut inbox, wait);
                }
                None => self.shared.filled.wait(&mut inbox),
            }
        }
        let mut work = Inbox {
            loads: core::mem::take(&mut inbox.loads),
            completions: core::mem::take(&mut inbox.completions),
            trim_through: inbox.trim_through,
            ..Inbox::default()
        };
        if self.is_ready {
            work.appends = core::mem::take(&mut inbox.appends);
        }
        Some(work)
    }

    fn work(&mut self, work: Inbox) {
        for completion in work.completions {
            if completion.token.0 < READ_TOKENS {
                self.step(LogInput::Storage(completion));
            } else {
                self.read_step(completion);
            }
        }
        for frame in work.appends {
            let frame = Arc::try_unwrap(frame).unwrap_or_else(|shared| (*shared).clone());
            self.step(LogInput::Append {
                token: Token(0),
                frame,
            });
        }
        for (place, last) in work.loads {
            self.load(place, last);
        }
        if self.is_ready && work.trim_through > self.released_through {
            self.released_through = work.trim_through;
            self.step(LogInput::Release {
                through_sequence: work.trim_through,
            });
        }
        if self.wake_at.is_some_and(|at| at <= self.clock.monotonic()) {
            self.wake_at = None;
            self.step(LogInput::Tick);
        }
    }

    fn step(&mut self, input: LogInput) {
        let mut out = Vec::new();
        self.log.step(self.clock.monotonic(), input, &mut out);
        for output in out {
            self.output(output);
        }
    }

    fn output(&mut self, output: LogOutput) {
        match output {
            LogOutput::Storage(token, op) => {
                let to = Arc::clone(&self.shared);
                self.storage.submit(token, op, to);
            }
            LogOutput::Ready { .. } => self.is_ready = true,
            LogOutput::Durable {
                location, frame, ..
            } => {
                let place = SpoolPlace {
                    location,
                    bytes: frame.bytes.len(),
                };
                let header = &frame.header;
                self.events
                    .written(header.identity.epoch, header.last, place);
            }
            LogOutput::Released { segment } => {
                if let Some(file) = self.files.remove(&segment) {
                    let token = self.token();
                    let to = Arc::clone(&self.shared);
                    self.storage.submit(token, StorageOp::Close { file }, to);
                }
            }
            LogOutput::WakeAt(at) => {
                self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
            }
            LogOutput::Failed(error) => self.events.failed(&error),
            LogOutput::Paused { is_budget } => {
                tracing::warn!(is_budget, "the spool has no room; frames wait in memory");
                self.events.paused(true);
            }
            LogOutput::Resumed => self.events.paused(false),
            // The rest is about logs that were there before, or are sealed; a spool is neither.
            _ => {}
        }
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    fn load(&mut self, place: SpoolPlace, last: Lsn) {
        let segment = place.location.segment;
        let Some(file) = self.files.get(&segment).copied() else {
            let waiting = self.waiting.entry(segment).or_default();
            waiting.push((place, last));
            if waiting.len() == 1 {
                let token = self.token();
                self.opens.insert(token, segment);
                let name = segment_file(&self.directory, segment);
                let to = Arc::clone(&self.shared);
                self.storage.submit(token, StorageOp::Open { name }, to);
            }
            return;
        };
        let token = self.token();
        self.reads.insert(token, (place, last));
        let start = place.location.offset / SECTOR * SECTOR;
        let end = (place.location.offset + place.bytes as u64).next_multiple_of(SECTOR);
        let length = usize::try_from(end - start).expect("a frame has at most 16 MiB");
        let op = StorageOp::Read {
            file,
            offset: start,
            buffer: IoBuffer::zeroed(length),
        };
        let to = Arc::clone(&self.shared);
        self.storage.submit(token, op, to);
    }

    fn read_step(&mut self, completion: StorageCompletion) {
        if let Some(segment) = self.opens.remove(&completion.token) {
            return self.opened(segment, completion);
        }
        let Some((place, last)) = self.reads.remove(&completion.token) else {
            return;
        };
        match completion.result {
            Ok(StorageOutcome::Read(buffer)) => self.read(place, last, &buffer),
            Ok(_) => {}
            Err(error) => self.lost(place, CacheError::Storage(error)),
        }
    }

    fn opened(&mut self, segment: SegmentId, completion: StorageCompletion) {
        let waiting = self.waiting.remove(&segment).unwrap_or_default();
        match completion.result {
            Ok(StorageOutcome::Opened { file, .. }) => {
                self.files.insert(segment, file);
                for (place, last) in waiting {
                    self.load(place, last);
                }
            }
            Ok(_) => {}
            Err(error) => {
                if let Some((place, _)) = waiting.last() {
                    self.lost(*place, CacheError::Storage(error));
                }
            }
        }
    }

    fn read(&mut self, place: SpoolPlace, last: Lsn, buffer: &[u8]) {
        let SpoolPlace { location, bytes } = place;
        let skip = usize::try_from(location.offset % SECTOR).unwrap_or_default();
        let frame = buffer
            .get(skip..skip + bytes)
            .ok_or(Damage::Short { structure: "spool" })
            .and_then(|bytes| Frame::accept(bytes.to_vec()));
        match frame {
            Ok(frame) => self.events.loaded(place, last, frame),
            Err(damage) => {
                let (segment, offset) = (location.segment, location.offset);
                self.lost(
                    place,
                    CacheError::Damaged {
                        segment,
                        offset,
                        damage,
                    },
                );
            }
        }
    }

    /// A frame that is still needed cannot be read.
    fn lost(&self, place: SpoolPlace, error: CacheError) {
        if place.location.sequence > self.released_through {
            self.events.failed(&error);
        }
    }
}
