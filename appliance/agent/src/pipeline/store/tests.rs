use afterimage_blockdev::{AgentId, BatchId, DiskId, HistoryId, MachineId, SegmentId, Timestamp};
use afterimage_cache::log::FrameLocation;
use afterimage_cache::{FrameBuilder, FrameIdentity, MarkKind, RecordHeader, RecordKind};

use super::*;

/// Keeps frames, and does what it is told when the test says so.
#[derive(Default)]
struct Shelf {
    appended: Mutex<Vec<Arc<Frame>>>,
    loads: Mutex<Vec<(SpoolPlace, Lsn)>>,
    trimmed: Mutex<u64>,
}

impl Spool for Shelf {
    fn append(&self, frame: Arc<Frame>) {
        self.appended.lock().push(frame);
    }

    fn load(&self, place: SpoolPlace, last: Lsn) {
        self.loads.lock().push((place, last));
    }

    fn trim(&self, place: SpoolPlace) {
        let mut trimmed = self.trimmed.lock();
        *trimmed = (*trimmed).max(place.location().sequence);
    }
}

#[derive(Default)]
struct Heard {
    full: Mutex<Vec<String>>,
    lost: Mutex<Vec<bool>>,
}

impl StoreEvents for Heard {
    fn available(&self) {}

    fn full(&self, reason: &str) {
        self.full.lock().push(reason.to_owned());
    }

    fn failed(&self, _reason: &str, is_lost: bool) {
        self.lost.lock().push(is_lost);
    }
}

fn frame(lsn: u64, epoch: u64) -> Frame {
    let identity = FrameIdentity {
        machine: MachineId([1; 16]),
        history: HistoryId([2; 16]),
        origin: AgentId([3; 16]),
        epoch: Epoch(epoch),
    };
    let header = RecordHeader {
        kind: RecordKind::Mark(MarkKind::Crash),
        lsn: Lsn(lsn),
        previous: Lsn::ZERO,
        time: Timestamp(1),
        disk: DiskId::NIL,
        offset: 0,
        length: 0,
        batch: BatchId(0),
        argument: 0,
    };
    let mut builder = FrameBuilder::new(identity, false);
    builder.push_note(&header, &[0; 1000]);
    builder.finish()
}

struct Rig {
    store: Arc<FrameStore>,
    shelf: Arc<Shelf>,
    heard: Arc<Heard>,
    written: usize,
}

impl Rig {
    /// Memory for two frames, two on their way to the spool, two read back, ten in the spool.
    fn new() -> Self {
        let bytes = frame(1, 1).bytes.len();
        let limits = StoreLimits {
            memory_bytes: 2 * bytes,
            writing_bytes: 100 * bytes,
            loaded_bytes: 2 * bytes,
            spooled_bytes: 10 * bytes as u64,
            stall: Duration::from_millis(1),
        };
        let (shelf, heard) = (Arc::<Shelf>::default(), Arc::<Heard>::default());
        let for_store: Arc<Shelf> = Arc::clone(&shelf);
        let events: Arc<Heard> = Arc::clone(&heard);
        let store = FrameStore::new(Epoch(1), limits, for_store, events);
        Self {
            store,
            shelf,
            heard,
            written: 0,
        }
    }

    fn put(&self, lsn: u64) {
        self.store.put(lsn - 1, frame(lsn, 1));
    }

    fn place(number: usize) -> SpoolPlace {
        let location = FrameLocation {
            segment: SegmentId(1),
            offset: 0,
            first_slot: 0,
            sequence: number as u64 + 1,
        };
        SpoolPlace::new(location, 0)
    }

    /// Everything that was appended is written.
    fn write_all(&mut self) {
        let appended = self.shelf.appended.lock().clone();
        for (number, frame) in appended.iter().enumerate().skip(self.written) {
            self.store
                .written(Epoch(1), frame.header.last, Self::place(number));
        }
        self.written = appended.len();
    }

    fn load_all(&self) {
        for (place, last) in core::mem::take(&mut *self.shelf.loads.lock()) {
            let appended = self.shelf.appended.lock().clone();
            let frame = appended
                .iter()
                .find(|frame| frame.header.last == last)
                .unwrap();
            self.store.loaded(place, last, (**frame).clone());
        }
    }

    fn next(&self, after: u64) -> Option<u64> {
        match self.store.next(Lsn(after)) {
            NextFrame::Ready(frame) => Some(frame.header.first.0),
            NextFrame::Loading | NextFrame::None => None,
        }
    }
}

#[test]
fn frames_that_come_early_wait_for_their_turn() {
    let rig = Rig::new();
    rig.put(2);
    assert_eq!(rig.next(0), None);
    rig.put(1);
    assert_eq!(rig.next(0), Some(1));
    assert_eq!(rig.next(1), Some(2));
}

#[test]
fn what_memory_does_not_hold_comes_back_from_the_spool_in_order() {
    let mut rig = Rig::new();
    (1..=8).for_each(|lsn| rig.put(lsn));
    assert_eq!(rig.shelf.appended.lock().len(), 6);
    assert_eq!(
        rig.next(2),
        Some(3),
        "it is still in memory while it is being written"
    );
    rig.write_all();
    let mut sent = Vec::new();
    let mut after = 0;
    while after < 8 {
        match rig.next(after) {
            Some(lsn) => {
                sent.push(lsn);
                after = lsn;
                assert!(
                    rig.store.holding().memory_bytes <= 5 * 1300,
                    "memory is bounded"
                );
                rig.store.acknowledge(Lsn(lsn));
            }
            None => rig.load_all(),
        }
    }
    assert_eq!(sent, (1..=8).collect::<Vec<_>>());
    assert_eq!(*rig.shelf.trimmed.lock(), 6);
    assert_eq!(
        rig.store.holding(),
        Holding {
            acknowledged: Lsn(8),
            ..Holding::default()
        }
    );
    rig.put(9);
    assert_eq!(rig.shelf.appended.lock().len(), 6, "memory is used again");
}

#[test]
fn a_new_connection_gets_what_was_not_acknowledged_again() {
    let mut rig = Rig::new();
    (1..=6).for_each(|lsn| rig.put(lsn));
    rig.write_all();
    rig.store.acknowledge(Lsn(1));
    assert_eq!(rig.next(2), None);
    rig.load_all();
    assert_eq!(rig.next(2), Some(3));
    assert_eq!(rig.next(1), Some(2), "from the last acknowledged one on");
}

#[test]
fn a_full_spool_is_told_before_it_overflows() {
    let rig = Rig::new();
    (1..=12).for_each(|lsn| rig.put(lsn));
    assert!(rig.heard.full.lock().is_empty());
    rig.put(13);
    assert_eq!(*rig.heard.full.lock(), ["the spool is full"]);
    rig.put(14);
    rig.store.acknowledge(Lsn(14));
    assert!(rig.store.is_drained());
}

#[test]
fn a_failed_spool_loses_only_what_memory_lacks() {
    let rig = Rig::new();
    (1..=4).for_each(|lsn| rig.put(lsn));
    let error = || CacheError::Order {
        expected: Lsn(1),
        found: Lsn(2),
    };
    rig.store.failed(&error());
    assert_eq!(*rig.heard.lost.lock(), [false]);
    assert_eq!((rig.next(2), rig.next(3)), (Some(3), Some(4)));
    rig.put(5);
    assert_eq!(rig.next(4), Some(5), "memory has to do");
    assert_eq!(rig.heard.full.lock().len(), 1);

    let mut rig = Rig::new();
    (1..=4).for_each(|lsn| rig.put(lsn));
    rig.write_all();
    rig.store.failed(&error());
    assert_eq!(*rig.heard.lost.lock(), [true]);
    assert_eq!(rig.next(0), None);
    rig.put(5);
    assert_eq!(rig.next(0), None, "no frame follows a gap");
    rig.store.restart(Epoch(2), Lsn::ZERO);
    rig.store.put(5, frame(6, 1));
    assert_eq!(rig.next(0), None, "a frame of the epoch that was given up");
    rig.store.put(6, frame(100, 2));
    assert_eq!(rig.next(0), Some(100));
}

/// A spool whose disk hangs must not hold writes up for ever.
#[test]
fn a_spool_that_writes_nothing_counts_as_failed() {
    let rig = Rig::new();
    let (shelf, heard) = (Arc::clone(&rig.shelf), Arc::clone(&rig.heard));
    let limits = StoreLimits {
        memory_bytes: 1,
        writing_bytes: 1,
        loaded_bytes: 1,
        spooled_bytes: 1 << 30,
        stall: Duration::from_millis(1),
    };
    let store = FrameStore::new(Epoch(1), limits, shelf, heard);
    for lsn in 1..=5 {
        store.put(lsn - 1, frame(lsn, 1));
    }
    assert_eq!(
        *rig.heard.lost.lock(),
        [false],
        "memory still has all of it"
    );
    let next = |after| match store.next(Lsn(after)) {
        NextFrame::Ready(frame) => frame.header.first.0,
        other => panic!("{other:?}"),
    };
    assert_eq!((0..5).map(next).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
}

/// Fills the memory, puts one frame more and acknowledges the first; gives the frames spooled.
fn spooled_while_the_link_is_fast() -> usize {
    let rig = Rig::new();
    (1..=2).for_each(|lsn| rig.put(lsn));
    rig.store.state.lock().link_is_fast = true;
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| rig.put(3));
        while rig.store.state.lock().early.is_empty() && !waiting.is_finished() {
            std::thread::yield_now();
        }
        rig.store.acknowledge(Lsn(1));
    });
    rig.shelf.appended.lock().len()
}

#[test]
fn a_frame_waits_for_a_fast_link() {
    // On a loaded machine the acknowledgement may come too late, but not always.
    assert!((0..50).any(|_| spooled_while_the_link_is_fast() == 0));
}

#[test]
fn a_link_that_stops_is_waited_for_once() {
    let rig = Rig::new();
    (1..=2).for_each(|lsn| rig.put(lsn));
    rig.store.state.lock().link_is_fast = true;
    let began = Instant::now();
    rig.put(3);
    assert!(began.elapsed() >= PATIENCE);
    let state = rig.store.state.lock();
    assert_eq!(rig.shelf.appended.lock().len(), 1);
    assert!(state.link_is_fast && !state.overflows(1000, &rig.store.limits));
}

#[test]
fn a_link_is_fast_by_what_it_took() {
    let mut state = State::default();
    let start = Instant::now();
    state.look_at_link(start);
    assert!(!state.link_is_fast, "nothing is known");
    let looks = [
        (20 << 20, 100, true),
        (20 << 20, 300, false),
        (0, 300, false),
    ];
    for (bytes, after_ms, is_fast) in looks {
        state.drained_bytes = bytes;
        let looked = state.looked.expect("it was looked at");
        state.look_at_link(looked + Duration::from_millis(after_ms));
        assert_eq!(
            state.link_is_fast, is_fast,
            "{bytes} bytes in {after_ms} ms"
        );
    }
    state.drained_bytes = u64::MAX / 2;
    let looked = state.looked.expect("it was looked at");
    state.look_at_link(looked + Duration::from_millis(99));
    assert!(!state.link_is_fast, "too soon to say");
}
