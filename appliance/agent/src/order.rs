//! The one order of all writes of the machine: gives out LSNs, and hands the records to the
//! sealers in that order.
//!
//! Invariants
//! * An LSN is given out under the lock, together with the place in the queue; so the queue is in
//!   LSN order without a gap, and times never fall.
//! * No LSN at or above `reserved` is given out: a later run starts above it.
//! * While nothing flows, no LSN is given out at all; whoever wanted one is told under the lock, so
//!   that "before the flow began again" means the same to everybody.
//! * The queue holds at most what admission let through, and marks.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{BatchId, DiskId, IoBuffer, Lsn, Timestamp};
use afterimage_cache::{FrameIdentity, RecordHeader, RecordKind};
use parking_lot::{Condvar, Mutex};

use crate::clock::ApplianceClock;

/// Bytes that a record costs beside its data.
pub const RECORD_OVERHEAD: usize = 256;
/// Records that are appended at once, at most.
const DRAFTS_MAX: u64 = 256;
/// Times that are remembered of records not yet acknowledged.
const TIMES_MAX: usize = 4096;

/// Whole blocks that a record carries.
#[derive(Debug)]
pub enum BlockBytes {
    /// A copy.
    Copied(Vec<u8>),
    /// What was written to the source.
    Written(IoBuffer),
}

impl Deref for BlockBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Written(buffer) => buffer,
        }
    }
}

/// What a record carries.
#[derive(Debug)]
pub enum Payload {
    /// Whole blocks.
    Data(BlockBytes),
    /// The name of a mark, or the disks of a batch.
    Note(Vec<u8>),
}

/// A record with its place in the order.
#[derive(Debug)]
pub struct Captured {
    /// The header, complete.
    pub header: RecordHeader,
    /// What follows.
    pub payload: Payload,
}

/// A record that wants a place.
#[derive(Debug)]
pub struct Draft {
    /// What it does.
    pub kind: RecordKind,
    /// The disk, and its place in [`Order`]; `None` for marks and batches.
    pub disk: Option<(DiskId, DiskPlace)>,
    /// First byte.
    pub offset: u64,
    /// Bytes, or the new size.
    pub length: u64,
    /// The batch.
    pub batch: BatchId,
    /// By kind.
    pub argument: u64,
    /// What follows.
    pub payload: Payload,
}

impl Draft {
    /// A record of no disk.
    #[must_use]
    pub fn note(kind: RecordKind, batch: BatchId, argument: u64, note: Vec<u8>) -> Self {
        let payload = Payload::Note(note);
        Self {
            kind,
            disk: None,
            offset: 0,
            length: 0,
            batch,
            argument,
            payload,
        }
    }

    /// Bytes that the draft must be admitted for. Records of no disk are few and not counted.
    #[must_use]
    pub fn cost(&self) -> usize {
        let payload = match &self.payload {
            Payload::Data(bytes) => bytes.len(),
            Payload::Note(note) => note.len(),
        };
        if self.disk.is_some() {
            payload + RECORD_OVERHEAD
        } else {
            0
        }
    }
}

/// Where the order keeps what it knows of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskPlace(usize);

/// Records that become one frame.
#[derive(Debug)]
pub struct Portion {
    /// Counts portions; frames go on in this order.
    pub ticket: u64,
    /// Whose records.
    pub identity: FrameIdentity,
    /// The records.
    pub records: Vec<Captured>,
    /// Bytes that they cost in the queue.
    pub cost: usize,
    /// Bytes that still wait behind them.
    pub waiting: usize,
}

/// How portions are cut.
#[derive(Clone, Copy, Debug)]
pub struct PortionOptions {
    /// Bytes at which a portion is complete.
    pub bytes: usize,
    /// How long after it was begun a portion is complete.
    pub gather: Duration,
}

struct State {
    identity: FrameIdentity,
    next: Lsn,
    reserved: Lsn,
    wants_reservation: bool,
    last_time: Timestamp,
    previous: Vec<Lsn>,
    queue: VecDeque<(Captured, usize)>,
    queue_bytes: usize,
    is_flowing: bool,
    is_closed: bool,
    next_ticket: u64,
    sealers_idle: usize,
    is_gathering: bool,
    /// LSN and time of some records that may not be acknowledged, in order.
    times: VecDeque<(Lsn, Timestamp)>,
}

/// See the module's text.
pub struct Order {
    state: Mutex<State>,
    filled: Condvar,
    gathered: Condvar,
    clock: Arc<ApplianceClock>,
    options: PortionOptions,
    reserve_half: u64,
    low_on_lsns: Box<dyn Fn() + Send + Sync>,
}

/// Where an order begins.
#[derive(Clone, Copy, Debug)]
pub struct OrderStart {
    /// Whose records.
    pub identity: FrameIdentity,
    /// The first LSN to give out.
    pub next: Lsn,
    /// LSNs below this one are reserved.
    pub reserved: Lsn,
    /// No record gets an earlier time.
    pub time_floor: Timestamp,
}

impl Order {
    /// Makes an order in which nothing flows yet. `low_on_lsns` is called, without any lock, when
    /// fewer than `reserve_half` reserved LSNs are left.
    #[must_use]
    pub fn new(
        start: OrderStart,
        clock: Arc<ApplianceClock>,
        options: PortionOptions,
        reserve_half: u64,
        low_on_lsns: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let state = State {
            identity: start.identity,
            next: start.next,
            reserved: start.reserved,
            wants_reservation: false,
            last_time: start.time_floor,
            previous: Vec::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            is_flowing: false,
            is_closed: false,
            next_ticket: 0,
            sealers_idle: 0,
            is_gathering: false,
            times: VecDeque::new(),
        };
        Self {
            state: Mutex::new(state),
            filled: Condvar::new(),
            gathered: Condvar::new(),
            clock,
            options,
            reserve_half,
            low_on_lsns,
        }
    }

    /// Makes room for a disk.
    pub fn add_disk(&self) -> DiskPlace {
        let mut state = self.state.lock();
        state.previous.push(Lsn::ZERO);
        DiskPlace(state.previous.len() - 1)
    }

    /// Gives the drafts consecutive LSNs and queues them. Returns the last LSN, or `None` when
    /// nothing flows; `dropped` was then called under the lock.
    pub fn append(
        &self,
        drafts: impl IntoIterator<Item = Draft>,
        dropped: impl FnOnce(),
    ) -> Option<Lsn> {
        let mut state = self.state.lock();
        if !state.has_lsns() {
            state.is_flowing = false;
        }
        if !state.is_flowing {
            dropped();
            return None;
        }
        let last = self.push_all(&mut state, drafts);
        self.wake_sealers(&state);
        let is_low = state.is_low(self.reserve_half);
        drop(state);
        if is_low {
            (self.low_on_lsns)();
        }
        last
    }

    fn push_all(&self, state: &mut State, drafts: impl IntoIterator<Item = Draft>) -> Option<Lsn> {
        let now = self.clock.now();
        let mut last = None;
        for draft in drafts {
            last = Some(state.push(draft, now));
        }
        last
    }

    fn wake_sealers(&self, state: &State) {
        let is_full = state.queue_bytes >= self.options.bytes;
        if state.is_gathering {
            if is_full {
                self.gathered.notify_one();
            }
            if state.queue_bytes >= 2 * self.options.bytes && state.sealers_idle > 0 {
                self.filled.notify_one();
            }
        } else if state.sealers_idle > 0 {
            self.filled.notify_one();
        }
    }

    /// Lets records flow, beginning with these.
    pub fn begin_flow(&self, drafts: impl IntoIterator<Item = Draft>) -> Option<Lsn> {
        let mut state = self.state.lock();
        state.is_flowing = true;
        let last = self.push_all(&mut state, drafts);
        self.wake_sealers(&state);
        last
    }

    /// Stops the flow: writes get no LSN until it begins again. Says whether it flowed.
    pub fn stop_flow(&self) -> bool {
        core::mem::replace(&mut self.state.lock().is_flowing, false)
    }

    /// Says whether writes are recorded.
    #[must_use]
    pub fn is_flowing(&self) -> bool {
        self.state.lock().is_flowing
    }

    /// Empties the queue for a new epoch that begins at `next` at the earliest. Nothing flows
    /// afterwards. Returns the bytes that the dropped records had been admitted for.
    pub fn restart(&self, identity: FrameIdentity, next: Lsn) -> usize {
        let mut state = self.state.lock();
        state.is_flowing = false;
        state.identity = identity;
        state.next = state.next.max(next);
        state.previous.fill(Lsn::ZERO);
        state.queue.clear();
        state.times.clear();
        core::mem::take(&mut state.queue_bytes)
    }

    /// Whose records are made now.
    #[must_use]
    pub fn identity(&self) -> FrameIdentity {
        self.state.lock().identity
    }

    /// Says whether LSNs are left to give out.
    #[must_use]
    pub fn has_lsns(&self) -> bool {
        self.state.lock().has_lsns()
    }

    /// Takes over a durable reservation.
    pub fn reserve(&self, below: Lsn) {
        let mut state = self.state.lock();
        state.reserved = state.reserved.max(below);
        state.wants_reservation = false;
    }

    /// The next LSN to give out.
    #[must_use]
    pub fn next(&self) -> Lsn {
        self.state.lock().next
    }

    /// Highest LSN given out, and the disk's own last one.
    #[must_use]
    pub fn highest(&self, place: DiskPlace) -> (Lsn, Lsn) {
        let state = self.state.lock();
        (Lsn(state.next.0 - 1), state.previous[place.0])
    }

    /// Highest LSN given out, and the latest time.
    #[must_use]
    pub fn captured(&self) -> (Lsn, Timestamp) {
        let state = self.state.lock();
        (Lsn(state.next.0 - 1), state.last_time)
    }

    /// Bytes that wait to be sealed.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.state.lock().queue_bytes
    }

    /// Everything up to `durable` is acknowledged. Returns the completion time of the oldest record
    /// that is not, or somewhat earlier.
    pub fn acknowledged(&self, durable: Lsn) -> Option<Timestamp> {
        let mut state = self.state.lock();
        while state
            .times
            .get(1)
            .is_some_and(|(lsn, _)| lsn.0 <= durable.0.saturating_add(1))
        {
            state.times.pop_front();
        }
        let is_all = state.next.0.saturating_sub(1) <= durable.0;
        if is_all {
            state.times.clear();
        }
        state.times.front().map(|(_, time)| *time)
    }

    /// Waits for records and takes a frame's worth; `None` when closed and empty.
    pub fn take(&self) -> Option<Portion> {
        let mut state = self.state.lock();
        loop {
            if state.queue.is_empty() || state.is_gathering {
                if state.queue.is_empty() && state.is_closed {
                    return None;
                }
                if state.queue_bytes < 2 * self.options.bytes || state.queue.is_empty() {
                    state.sealers_idle += 1;
                    self.filled.wait(&mut state);
                    state.sealers_idle -= 1;
                    continue;
                }
            } else if state.queue_bytes < self.options.bytes && !state.is_closed {
                state.is_gathering = true;
                let until = Instant::now() + self.options.gather;
                let _timed_out = self.gathered.wait_until(&mut state, until);
                state.is_gathering = false;
                if state.queue.is_empty() {
                    continue;
                }
            }
            let portion = state.cut(self.options.bytes);
            if state.is_closed {
                self.filled.notify_all();
            } else if !state.queue.is_empty() && state.sealers_idle > 0 {
                self.filled.notify_one();
            }
            return Some(portion);
        }
    }

    /// Lets the sealers end when the queue is empty.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        state.is_flowing = false;
        self.filled.notify_all();
        self.gathered.notify_all();
    }
}

impl State {
    fn push(&mut self, draft: Draft, now: Timestamp) -> Lsn {
        let cost = draft.cost();
        let lsn = self.next;
        self.next = lsn.next();
        self.last_time = self.last_time.max(now);
        let mut previous = Lsn::ZERO;
        if let Some((_, place)) = draft.disk {
            previous = core::mem::replace(&mut self.previous[place.0], lsn);
        }
        let header = RecordHeader {
            kind: draft.kind,
            lsn,
            previous,
            time: self.last_time,
            disk: draft.disk.map_or(DiskId::NIL, |(disk, _)| disk),
            offset: draft.offset,
            length: draft.length,
            batch: draft.batch,
            argument: draft.argument,
        };
        self.note_time(lsn);
        self.queue.push_back((
            Captured {
                header,
                payload: draft.payload,
            },
            cost,
        ));
        self.queue_bytes += cost;
        lsn
    }

    /// Remembers about one record in a hundred milliseconds.
    fn note_time(&mut self, lsn: Lsn) {
        let step = 100_000_000;
        let is_due = self
            .times
            .back()
            .is_none_or(|(_, time)| time.0 + step <= self.last_time.0);
        if is_due && self.times.len() < TIMES_MAX {
            self.times.push_back((lsn, self.last_time));
        }
    }

    /// Without reserved LSNs nothing flows.
    fn has_lsns(&self) -> bool {
        self.next.0.saturating_add(DRAFTS_MAX) <= self.reserved.0
    }

    fn is_low(&mut self, half: u64) -> bool {
        let left = self.reserved.0.saturating_sub(self.next.0);
        if left < half && !self.wants_reservation {
            self.wants_reservation = true;
            return true;
        }
        false
    }

    fn cut(&mut self, bytes_max: usize) -> Portion {
        let mut records = Vec::new();
        let mut cost = 0;
        while let Some((record, bytes)) = self.queue.front() {
            let starts_frame = record.header.kind == RecordKind::EpochStart;
            let is_over = cost >= bytes_max || starts_frame || cost + bytes > FRAME_COST_MAX;
            if !records.is_empty() && is_over {
                break;
            }
            cost += bytes;
            let record = self.queue.pop_front().map(|(record, _)| record);
            records.extend(record);
        }
        self.queue_bytes -= cost;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        Portion {
            ticket,
            identity: self.identity,
            records,
            cost,
            waiting: self.queue_bytes,
        }
    }
}

/// A portion beyond its first record never costs more, so that it fits into a frame.
const FRAME_COST_MAX: usize = 12 << 20;

#[cfg(test)]
mod tests;
