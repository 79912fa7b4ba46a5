//! Holds sealed frames until they are acknowledged: in memory while there is room, else in the
//! spool.
//!
//! Invariants
//! * Frames lie in LSN order without a gap, whichever thread sealed them first.
//! * A frame leaves only when it is acknowledged, or with all others when the epoch is given up.
//! * Once one frame lies in the spool, all later ones go there too, until it is empty: so the
//!   spool is read in the order in which it was written.
//! * Memory holds at most `memory_bytes` of frames that never were in the spool, `writing_bytes`
//!   on their way there, and `loaded_bytes` read back, each exceeded by one frame at most.
//! * Nobody waits for the link for longer than [`PATIENCE`], nor at all once it fell behind.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{Epoch, Lsn};
use afterimage_cache::{CacheError, Frame};
use parking_lot::{Condvar, Mutex};

use super::spool::{Spool, SpoolEvents, SpoolPlace};

/// A link that takes so many bytes per second is waited for, rather than that a frame goes through
/// the spool, which costs more than sending it.
const FAST_LINK_BYTES_PER_S: u64 = 150 << 20;
/// How long a frame waits for it at most; then it goes to the spool after all.
const PATIENCE: Duration = Duration::from_millis(20);
/// How often the link is looked at.
const LINK_LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bytes that a store may hold in memory.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// Of frames that are not in the spool.
    pub memory_bytes: usize,
    /// Of frames being written to the spool.
    pub writing_bytes: usize,
    /// Of frames read back from the spool.
    pub loaded_bytes: usize,
    /// In the spool, from which on nothing more should be captured.
    pub spooled_bytes: u64,
    /// A spool that writes nothing for so long counts as failed.
    pub stall: Duration,
}

/// Who is told what a store does. Called without its lock.
pub trait StoreEvents: Send + Sync {
    /// There is something new to send.
    fn available(&self);
    /// No more should be captured: what is held nears the limits.
    fn full(&self, reason: &str);
    /// The spool has failed. When frames are lost, the epoch cannot go on.
    fn failed(&self, reason: &str, is_lost: bool);
}

/// A frame as the connection takes it.
#[derive(Clone, Debug)]
pub struct FrameBytes(pub Arc<Frame>);

impl AsRef<[u8]> for FrameBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

enum Held {
    Memory(Arc<Frame>),
    Writing(Arc<Frame>),
    Spooled(SpoolPlace),
    Loading(SpoolPlace),
    Loaded(Arc<Frame>, SpoolPlace),
}

struct Entry {
    first: Lsn,
    last: Lsn,
    bytes: usize,
    held: Held,
}

#[derive(Default)]
struct State {
    epoch: Epoch,
    next_ticket: u64,
    early: BTreeMap<u64, Frame>,
    entries: VecDeque<Entry>,
    /// Entries that were in memory only, or still are.
    memory_bytes: usize,
    writing_bytes: usize,
    loaded_bytes: usize,
    spooled_bytes: u64,
    /// Entries that are in the spool or on their way there.
    spooled_count: usize,
    acknowledged: Lsn,
    /// Bytes acknowledged since the link was looked at, and when that was.
    drained_bytes: u64,
    looked: Option<Instant>,
    /// It takes frames faster than a spool would be worth while.
    link_is_fast: bool,
    /// Counts frames that the spool has written.
    written: u64,
    /// The spool has no room for now.
    is_paused: bool,
    /// The spool has failed: memory has to do.
    is_dead: bool,
    /// Frames were lost: nothing is taken until the next epoch.
    is_lost: bool,
}

/// See the module's text.
pub struct FrameStore {
    state: Mutex<State>,
    room: Condvar,
    limits: StoreLimits,
    spool: Arc<dyn Spool>,
    events: Arc<dyn StoreEvents>,
}

/// A frame, or why there is none.
#[derive(Debug)]
pub enum NextFrame {
    /// Here it is.
    Ready(Arc<Frame>),
    /// It is being read from the spool.
    Loading,
    /// There is none yet.
    None,
}

/// What is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Holding {
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// Bytes in the spool.
    pub spooled_bytes: u64,
    /// Highest LSN acknowledged.
    pub acknowledged: Lsn,
}

impl FrameStore {
    /// Makes an empty store for frames of `epoch`.
    #[must_use]
    pub fn new(
        epoch: Epoch,
        limits: StoreLimits,
        spool: Arc<dyn Spool>,
        events: Arc<dyn StoreEvents>,
    ) -> Arc<Self> {
        let state = Mutex::new(State {
            epoch,
            ..State::default()
        });
        Arc::new(Self {
            state,
            room: Condvar::new(),
            limits,
            spool,
            events,
        })
    }

    /// Takes a sealed frame. Waits while the spool is slow, and for moments while the link is fast;
    /// never for a link that is slow or down.
    pub fn put(&self, ticket: u64, frame: Frame) {
        let mut state = self.state.lock();
        while state.writing_bytes > self.limits.writing_bytes && state.can_wait() {
            let before = state.written;
            let is_late = self
                .room
                .wait_for(&mut state, self.limits.stall)
                .timed_out();
            if is_late && state.written == before && state.can_wait() {
                let is_lost = state.bury_spool();
                drop(state);
                self.events.failed("it writes nothing", is_lost);
                state = self.state.lock();
            }
        }
        state.early.insert(ticket, frame);
        let patience = Instant::now() + PATIENCE;
        while let Some(bytes) = state.next_early_bytes() {
            // Others may put and take while this thread waits, so it looks anew afterwards.
            let should_wait = state.link_is_fast && state.overflows(bytes, &self.limits);
            if should_wait && !self.room.wait_until(&mut state, patience).timed_out() {
                continue;
            }
            if let Some(frame) = state.next_early() {
                self.hold(&mut state, frame);
            }
        }
        let full = self.why_full(&state);
        drop(state);
        self.events.available();
        if let Some(reason) = full {
            self.events.full(reason);
        }
    }

    fn why_full(&self, state: &State) -> Option<&'static str> {
        if state.is_dead && state.memory_bytes > self.limits.memory_bytes {
            return Some("memory is full and the spool has failed");
        }
        if state.is_paused {
            return Some("the file system of the spool is full");
        }
        (state.spooled_bytes > self.limits.spooled_bytes).then_some("the spool is full")
    }

    fn hold(&self, state: &mut State, frame: Frame) {
        if frame.header.identity.epoch != state.epoch || state.is_lost {
            return;
        }
        let (first, last) = (frame.header.first, frame.header.last);
        let bytes = frame.bytes.len();
        let frame = Arc::new(frame);
        let fits = state.memory_bytes == 0
            || state.memory_bytes + bytes <= self.limits.memory_bytes
            || state.is_dead;
        let held = if state.spooled_count == 0 && fits {
            state.memory_bytes += bytes;
            Held::Memory(frame)
        } else {
            state.writing_bytes += bytes;
            state.spooled_bytes += bytes as u64;
            state.spooled_count += 1;
            self.spool.append(Arc::clone(&frame));
            Held::Writing(frame)
        };
        state.entries.push_back(Entry {
            first,
            last,
            bytes,
            held,
        });
    }

    /// The first frame with a record above `after`.
    pub fn next(&self, after: Lsn) -> NextFrame {
        let mut state = self.state.lock();
        let place = state.entries.partition_point(|entry| entry.last <= after);
        let Some(entry) = state.entries.get(place) else {
            return NextFrame::None;
        };
        match &entry.held {
            Held::Memory(frame) | Held::Writing(frame) | Held::Loaded(frame, _) => {
                NextFrame::Ready(Arc::clone(frame))
            }
            Held::Spooled(_) | Held::Loading(_) => {
                self.load_from(&mut state, place);
                NextFrame::Loading
            }
        }
    }

    /// Reads ahead from this entry on.
    fn load_from(&self, state: &mut State, place: usize) {
        for at in place..state.entries.len() {
            let is_full = state.loaded_bytes >= self.limits.loaded_bytes;
            if is_full && at > place {
                return;
            }
            let entry = &mut state.entries[at];
            if let Held::Spooled(spooled) = entry.held {
                entry.held = Held::Loading(spooled);
                state.loaded_bytes += entry.bytes;
                self.spool.load(spooled, state.entries[at].last);
            }
        }
    }

    /// Everything up to `durable` is acknowledged.
    pub fn acknowledge(&self, durable: Lsn) {
        let mut state = self.state.lock();
        state.acknowledged = state.acknowledged.max(durable);
        let mut trimmed = None;
        while state
            .entries
            .front()
            .is_some_and(|entry| entry.last <= durable)
        {
            if let Some(entry) = state.entries.pop_front() {
                state.drained_bytes += entry.bytes as u64;
                trimmed = state.forget(&entry).or(trimmed);
            }
        }
        state.look_at_link(Instant::now());
        drop(state);
        self.room.notify_all();
        if let Some(place) = trimmed {
            self.spool.trim(place);
        }
    }

    /// First LSN that can still be sent; `None` when nothing is held.
    #[must_use]
    pub fn first(&self) -> Option<Lsn> {
        self.state.lock().entries.front().map(|entry| entry.first)
    }

    /// Gives everything up: frames of this epoch only are taken from now on.
    pub fn restart(&self, epoch: Epoch, acknowledged: Lsn) {
        let mut state = self.state.lock();
        let tickets = (state.next_ticket, core::mem::take(&mut state.early));
        let last = state
            .entries
            .iter()
            .rev()
            .find_map(|entry| match entry.held {
                Held::Spooled(place) | Held::Loading(place) | Held::Loaded(_, place) => Some(place),
                Held::Memory(_) | Held::Writing(_) => None,
            });
        let (is_paused, is_dead) = (state.is_paused, state.is_dead);
        *state = State {
            epoch,
            acknowledged,
            is_paused,
            is_dead,
            ..State::default()
        };
        (state.next_ticket, state.early) = tickets;
        drop(state);
        self.room.notify_all();
        if let Some(place) = last {
            self.spool.trim(place);
        }
    }

    /// Says whether so little is held that capture may begin again.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        let state = self.state.lock();
        let is_low = state.memory_bytes <= self.limits.memory_bytes / 2;
        state.spooled_count == 0 && is_low && !state.is_paused
    }

    /// What is held.
    #[must_use]
    pub fn holding(&self) -> Holding {
        let state = self.state.lock();
        let memory = state.memory_bytes + state.writing_bytes + state.loaded_bytes;
        Holding {
            memory_bytes: memory as u64,
            spooled_bytes: state.spooled_bytes,
            acknowledged: state.acknowledged,
        }
    }
}

impl State {
    /// The spool will make room by itself.
    fn can_wait(&self) -> bool {
        !self.is_dead && !self.is_paused && !self.is_lost
    }

    /// Bytes of the frame that is held next.
    fn next_early_bytes(&self) -> Option<usize> {
        self.early
            .get(&self.next_ticket)
            .map(|frame| frame.bytes.len())
    }

    /// A frame of so many bytes would be the first in the spool.
    fn overflows(&self, bytes: usize, limits: &StoreLimits) -> bool {
        let is_full = self.memory_bytes > 0 && self.memory_bytes + bytes > limits.memory_bytes;
        is_full && self.spooled_count == 0 && !self.is_dead && !self.is_lost
    }

    fn look_at_link(&mut self, now: Instant) {
        let passed = self.looked.map(|at| now.duration_since(at));
        if passed.is_some_and(|passed| passed < LINK_LOOK_EVERY) {
            return;
        }
        let passed_ms = passed.map_or(u128::MAX, |passed| passed.as_millis());
        let floor = u128::from(FAST_LINK_BYTES_PER_S) * passed_ms.min(60_000) / 1000;
        self.link_is_fast = u128::from(self.drained_bytes) >= floor;
        (self.looked, self.drained_bytes) = (Some(now), 0);
    }

    fn next_early(&mut self) -> Option<Frame> {
        let frame = self.early.remove(&self.next_ticket)?;
        self.next_ticket += 1;
        Some(frame)
    }

    /// Takes an entry off the books; returns its place in the spool.
    fn forget(&mut self, entry: &Entry) -> Option<SpoolPlace> {
        if let Held::Memory(_) = entry.held {
            self.memory_bytes -= entry.bytes;
            return None;
        }
        self.spooled_count -= 1;
        self.spooled_bytes -= entry.bytes as u64;
        match entry.held {
            Held::Memory(_) => None,
            Held::Writing(_) => {
                self.writing_bytes -= entry.bytes;
                None
            }
            Held::Spooled(place) => Some(place),
            Held::Loading(place) | Held::Loaded(_, place) => {
                self.loaded_bytes -= entry.bytes;
                Some(place)
            }
        }
    }

    fn entry_of(&mut self, last: Lsn) -> Option<&mut Entry> {
        let place = self.entries.partition_point(|entry| entry.last < last);
        self.entries
            .get_mut(place)
            .filter(|entry| entry.last == last)
    }
}

impl SpoolEvents for FrameStore {
    fn written(&self, epoch: Epoch, last: Lsn, place: SpoolPlace) {
        let mut state = self.state.lock();
        state.written += 1;
        if epoch != state.epoch {
            drop(state);
            return self.spool.trim(place);
        }
        let mut freed = 0;
        match state.entry_of(last) {
            Some(entry) => {
                if let Held::Writing(_) = entry.held {
                    entry.held = Held::Spooled(place);
                    freed = entry.bytes;
                }
                state.writing_bytes -= freed;
                drop(state);
            }
            None => {
                // It was acknowledged while it was being written.
                drop(state);
                self.spool.trim(place);
            }
        }
        self.room.notify_all();
        self.events.available();
    }

    fn loaded(&self, place: SpoolPlace, last: Lsn, frame: Frame) {
        let mut state = self.state.lock();
        if let Some(entry) = state.entry_of(last)
            && matches!(entry.held, Held::Loading(loading) if loading == place)
        {
            entry.held = Held::Loaded(Arc::new(frame), place);
        }
        drop(state);
        self.events.available();
    }

    fn paused(&self, is_paused: bool) {
        self.state.lock().is_paused = is_paused;
        self.room.notify_all();
        if is_paused {
            self.events.full("the file system of the spool is full");
        }
    }

    fn failed(&self, error: &CacheError) {
        let is_lost = self.state.lock().bury_spool();
        self.room.notify_all();
        self.events.failed(&error.to_string(), is_lost);
    }
}

impl State {
    /// Keeps what memory still has; says whether more than that is lost.
    fn bury_spool(&mut self) -> bool {
        self.is_dead = true;
        for entry in &mut self.entries {
            match &entry.held {
                Held::Memory(_) => {}
                Held::Writing(frame) | Held::Loaded(frame, _) => {
                    entry.held = Held::Memory(Arc::clone(frame));
                }
                Held::Spooled(_) | Held::Loading(_) => self.is_lost = true,
            }
        }
        if self.is_lost {
            self.entries.clear();
        }
        self.memory_bytes = self.entries.iter().map(|entry| entry.bytes).sum();
        (self.writing_bytes, self.loaded_bytes) = (0, 0);
        (self.spooled_bytes, self.spooled_count) = (0, 0);
        self.is_lost
    }
}

#[cfg(test)]
mod tests;
