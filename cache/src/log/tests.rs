use std::sync::Arc;

use afterimage_blockdev::{ErrorClass, IoBuffer, MemoryStorage, Storage, StorageCompleter, wait};
use std::sync::Mutex;

use super::*;
use crate::bytes::put;
use crate::testing::frame;

const SEGMENT: u64 = 64 << 10;

#[derive(Default)]
struct Inbox(Mutex<Vec<StorageCompletion>>);

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().unwrap().push(completion);
    }
}

/// A log on a storage that completes at once.
struct Rig {
    storage: Arc<MemoryStorage>,
    log: Log,
    inbox: Arc<Inbox>,
    now: Monotonic,
    wake_at: Option<Monotonic>,
    said: Vec<LogOutput>,
    appended: u64,
}

fn spool() -> LogOptions {
    LogOptions {
        segment_bytes: SEGMENT,
        reserve_bytes: 0,
        commit_bytes_max: 1,
        seals: false,
        ..LogOptions::new("spool", StoreId([7; 16]))
    }
}

fn store() -> LogOptions {
    LogOptions {
        seals: true,
        ..spool()
    }
}

impl Rig {
    fn new(storage: &Arc<MemoryStorage>, options: LogOptions) -> Self {
        Self {
            storage: Arc::clone(storage),
            log: Log::new(options),
            inbox: Arc::default(),
            now: Monotonic(1),
            wake_at: None,
            said: Vec::new(),
            appended: 0,
        }
    }

    fn started(storage: &Arc<MemoryStorage>, options: LogOptions) -> Self {
        let mut rig = Self::new(storage, options);
        rig.step(LogInput::Start { from_sequence: 0 });
        rig
    }

    fn step(&mut self, input: LogInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let mut out = Vec::new();
            self.log.step(self.now, input, &mut out);
            for output in out {
                match output {
                    LogOutput::Storage(token, op) => {
                        let inbox: Arc<dyn StorageCompleter> = Arc::<Inbox>::clone(&self.inbox);
                        self.storage.submit(token, op, inbox);
                    }
                    LogOutput::WakeAt(at) => {
                        self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
                    }
                    other => self.said.push(other),
                }
            }
            let completed = core::mem::take(&mut *self.inbox.0.lock().unwrap());
            inputs.extend(completed.into_iter().map(LogInput::Storage));
        }
    }

    fn append(&mut self, count: u64) {
        for _ in 0..count {
            self.appended += 1;
            let frame = frame(self.appended, self.appended * 10);
            self.step(LogInput::Append {
                token: Token(self.appended),
                frame,
            });
        }
    }

    fn wake(&mut self) {
        if let Some(at) = self.wake_at.take() {
            self.now = self.now.max(at);
        }
        self.step(LogInput::Tick);
    }

    fn count(&self, wanted: fn(&LogOutput) -> bool) -> usize {
        self.said.iter().filter(|said| wanted(said)).count()
    }

    fn durable(&self) -> Vec<u64> {
        let token = |said: &LogOutput| match said {
            LogOutput::Durable { token, .. } => Some(token.0),
            _ => None,
        };
        self.said.iter().filter_map(token).collect()
    }

    fn recovered(&self) -> Vec<(FrameLocation, Frame)> {
        let found = |said: &LogOutput| match said {
            LogOutput::Recovered { location, frame } => Some((*location, frame.clone())),
            _ => None,
        };
        self.said.iter().filter_map(found).collect()
    }

    fn ready(&self) -> (u64, Vec<SegmentId>) {
        let ready = |said: &LogOutput| match said {
            LogOutput::Ready {
                last_sequence,
                segments,
            } => Some((*last_sequence, segments.clone())),
            _ => None,
        };
        self.said.iter().find_map(ready).expect("the log is ready")
    }

    fn files(&self) -> Vec<FileName> {
        let directory = "spool".to_owned();
        match wait::storage(&*self.storage, StorageOp::List { directory }).unwrap() {
            StorageOutcome::Listed(names) => names,
            other => panic!("{other:?}"),
        }
    }
}

fn patch(storage: &MemoryStorage, id: u32, change: impl FnOnce(&mut IoBuffer)) {
    let name = crate::segment::segment_file("spool", SegmentId(id));
    let opened = wait::storage(storage, StorageOp::Open { name }).unwrap();
    let (file, _) = super::opened(opened).unwrap();
    let buffer = IoBuffer::zeroed(4096);
    let read = StorageOp::Read {
        file,
        offset: 0,
        buffer,
    };
    let StorageOutcome::Read(mut buffer) = wait::storage(storage, read).unwrap() else {
        panic!("a read gives bytes");
    };
    change(&mut buffer);
    wait::storage(
        storage,
        StorageOp::Write {
            file,
            offset: 0,
            buffer,
        },
    )
    .unwrap();
}

fn is_paused(said: &LogOutput) -> bool {
    matches!(said, LogOutput::Paused { .. })
}

fn is_closed(said: &LogOutput) -> bool {
    matches!(said, LogOutput::Closed)
}

#[test]
fn what_is_appended_is_durable_in_order_and_comes_back() {
    for options in [spool(), store()] {
        let storage = MemoryStorage::new();
        let mut rig = Rig::started(&storage, options.clone());
        assert_eq!(rig.ready(), (0, vec![]));
        rig.append(20);
        assert_eq!(rig.durable(), (1..=20).collect::<Vec<_>>());
        assert_eq!(rig.log.queued_bytes(), 0);
        rig.step(LogInput::Close);
        assert_eq!(rig.count(is_closed), 1);
        let again = Rig::started(&storage, options);
        let found = again.recovered();
        assert_eq!(found.len(), 20);
        for (place, (_, found)) in (1..).zip(&found) {
            assert_eq!(found.bytes, frame(place, place * 10).bytes);
        }
        assert!(again.ready().1.len() > 1);
    }
}

#[test]
fn a_start_from_a_sequence_gives_back_what_is_behind_it() {
    let storage = MemoryStorage::new();
    let mut rig = Rig::started(&storage, store());
    rig.append(20);
    let mut again = Rig::new(&storage, store());
    again.step(LogInput::Start { from_sequence: 15 });
    let found = again.recovered();
    assert_eq!(found.first().map(|(at, _)| at.sequence), Some(15));
    assert_eq!(found.len(), 6);
    // Segments that were not wanted, and had no directory, get one that names all slots.
    again.append(1);
    again.step(LogInput::Close);
    let third = Rig::started(&storage, store());
    assert_eq!(third.recovered().len(), 21);
    assert_eq!(
        third.count(|said| matches!(said, LogOutput::Mended { .. })),
        0
    );
}

#[test]
fn a_spent_budget_pauses_and_a_release_resumes() {
    let options = LogOptions {
        budget_bytes: 3 * SEGMENT,
        ..spool()
    };
    let storage = MemoryStorage::new();
    let mut rig = Rig::started(&storage, options);
    rig.append(40);
    assert_eq!(rig.count(is_paused), 1);
    let before = rig.durable().len();
    assert!(before < 40 && rig.log.is_paused() && rig.log.queued_bytes() > 0);
    assert!(rig.log.stored_bytes() <= 3 * SEGMENT && rig.files().len() <= 3);
    let through_sequence = rig.log.durable_through();
    rig.step(LogInput::Release { through_sequence });
    assert!(rig.durable().len() > before, "it goes on at once");
    assert!(rig.count(|said| matches!(said, LogOutput::Resumed)) >= 1);
    while rig.durable().len() < 40 {
        let through_sequence = rig.log.durable_through();
        rig.step(LogInput::Release { through_sequence });
        rig.wake();
    }
    assert!(rig.files().len() <= 3);
}

#[test]
fn a_full_medium_pauses_and_resumes_by_itself() {
    let storage = MemoryStorage::with_capacity(3 * SEGMENT + 4096);
    let mut rig = Rig::started(&storage, spool());
    let ballast = FileName::new("ballast");
    let opened = wait::storage(
        &*storage,
        StorageOp::Create {
            name: ballast.clone(),
        },
    )
    .unwrap();
    let (file, _) = super::opened(opened).unwrap();
    let buffer = IoBuffer::zeroed(usize::try_from(SEGMENT).unwrap());
    wait::storage(
        &*storage,
        StorageOp::Write {
            file,
            offset: 0,
            buffer,
        },
    )
    .unwrap();
    rig.append(8);
    assert_eq!(rig.count(is_paused), 1, "{:?}", rig.durable());
    wait::storage(&*storage, StorageOp::Close { file }).unwrap();
    wait::storage(&*storage, StorageOp::Remove { name: ballast }).unwrap();
    while rig.log.is_paused() && rig.wake_at.is_some() {
        rig.wake();
    }
    assert_eq!(rig.count(|said| matches!(said, LogOutput::Resumed)), 1);
    assert_eq!(rig.durable().len(), 8);
}

#[test]
fn a_recycled_file_never_gives_old_commits_back() {
    let options = LogOptions {
        recycles: true,
        ..spool()
    };
    let storage = MemoryStorage::new();
    let mut rig = Rig::started(&storage, options.clone());
    for _ in 0..40 {
        rig.append(2);
        let through_sequence = rig.log.durable_through() - 1;
        rig.step(LogInput::Release { through_sequence });
        let mut again = Rig::new(&storage, options.clone());
        again.step(LogInput::Start { from_sequence: 0 });
        let found = again.recovered();
        let first = rig.appended + 1 - found.len() as u64;
        for (place, (_, found)) in (first..).zip(&found) {
            assert_eq!(found.bytes, frame(place, place * 10).bytes);
        }
        rig = again;
        rig.appended = first + found.len() as u64 - 1;
    }
    assert_eq!(rig.appended, 80);
    assert!(rig.files().len() <= 4, "{:?}", rig.files());
}

#[test]
fn the_sequence_never_falls_even_when_all_is_released() {
    let storage = MemoryStorage::new();
    let mut last = 0;
    for _ in 0..5 {
        let mut rig = Rig::started(&storage, spool());
        assert!(rig.ready().0 >= last);
        rig.append(3);
        last = rig.log.durable_through();
        rig.step(LogInput::Release {
            through_sequence: last,
        });
        rig.step(LogInput::Close);
        assert_eq!(rig.count(is_closed), 1);
        rig.step(LogInput::Release {
            through_sequence: last,
        });
    }
    let rig = Rig::started(&storage, spool());
    assert!(rig.ready().0 >= last && rig.files().len() <= 2);
}

#[test]
fn an_idle_commit_proves_the_last_data() {
    let storage = MemoryStorage::new();
    let mut rig = Rig::started(&storage, store());
    rig.append(1);
    let last = rig.log.durable_through();
    rig.wake();
    assert_eq!(rig.log.durable_through(), last + 1);
    rig.wake();
    assert_eq!(rig.log.durable_through(), last + 1, "one is enough");
}

#[test]
fn what_a_crash_left_open_is_sealed_and_nothing_piles_up() {
    let storage = MemoryStorage::new();
    for round in 0..8 {
        // The program dies each time, once with data and once without.
        let mut rig = Rig::started(&storage, store());
        rig.append(round % 2);
        rig.wake();
        rig.wake();
    }
    let mut rig = Rig::started(&storage, store());
    rig.append(1);
    rig.step(LogInput::Close);
    assert!(rig.count(|said| matches!(said, LogOutput::Sealed { .. })) >= 1);
    let again = Rig::started(&storage, store());
    assert_eq!(again.recovered().len(), 5);
    assert!(again.files().len() <= 12, "{:?}", again.files());
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    let storage = MemoryStorage::new();
    let mut rig = Rig::started(&storage, store());
    rig.append(1);
    patch(&storage, 1, |header| {
        header[8] = 9;
        let hash = blake3::hash(&header[..96]);
        put(header, 96, hash.as_bytes());
    });
    let rig = Rig::started(&storage, store());
    let Some(LogOutput::Failed(error)) = rig.said.last() else {
        panic!("{:?}", rig.said);
    };
    assert_eq!(error.class(), ErrorClass::Operator);
    assert!(error.to_string().contains("version 9"), "{error}");
}

#[test]
fn a_file_of_another_store_is_left_alone() {
    let storage = MemoryStorage::new();
    let other = LogOptions {
        store: StoreId([8; 16]),
        ..store()
    };
    let mut rig = Rig::started(&storage, other.clone());
    rig.append(2);
    let mut rig = Rig::started(&storage, store());
    assert_eq!(rig.recovered().len(), 0);
    rig.append(1);
    rig.wake();
    rig.step(LogInput::Close);
    assert_eq!(Rig::started(&storage, other).recovered().len(), 2);
}

#[test]
fn a_close_during_recovery_is_kept_in_mind() {
    let storage = MemoryStorage::new();
    Rig::started(&storage, store()).append(3);
    let mut log = Log::new(store());
    let mut out = Vec::new();
    log.step(Monotonic(1), LogInput::Start { from_sequence: 0 }, &mut out);
    log.step(Monotonic(1), LogInput::Close, &mut out);
    let mut rig = Rig {
        log,
        ..Rig::new(&storage, store())
    };
    for output in out {
        if let LogOutput::Storage(token, op) = output {
            let result = wait::storage(&*storage, op);
            rig.step(LogInput::Storage(StorageCompletion { token, result }));
        }
    }
    assert_eq!(rig.recovered().len(), 3);
    assert_eq!(rig.count(is_closed), 1);
}
