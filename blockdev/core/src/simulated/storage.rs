//! The simulated [`Storage`]: a queue of operations before a medium.
//!
//! Always true:
//! * Completions are delivered only from `run_one`, without the lock.
//! * The same seed and the same calls give the same completions and the same survivors.
//! * A file id that was given out before a power cut is never given out again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::cut::cut;
use super::every;
use super::fault::{Counters, Fault, FaultEffect, Plan, count};
use super::medium::{Edit, Medium, medium_error};
use crate::buffer::IoBuffer;
use crate::id::Token;
use crate::pages::PAGE_BYTES;
use crate::random::Random;
use crate::size::BLOCK_BYTES;
use crate::storage::{
    Capacity, FileId, FileName, Storage, StorageCompleter, StorageCompletion, StorageError,
    StorageErrorKind, StorageOp, StorageOutcome,
};

/// In which order waiting operations are performed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CompletionOrder {
    /// Any, as the seed decides.
    #[default]
    Random,
    /// As they were submitted.
    Submission,
}

/// How a [`SimulatedStorage`] behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedOptions {
    /// Room on the medium, counted in pages of 4 KiB that were written.
    pub capacity_bytes: u64,
    /// In which order waiting operations are performed.
    pub order: CompletionOrder,
}

impl Default for SimulatedOptions {
    fn default() -> Self {
        Self {
            capacity_bytes: 1 << 40,
            order: CompletionOrder::Random,
        }
    }
}

/// A file that a user has open.
struct OpenFile {
    inode: u64,
    name: FileName,
    is_poisoned: AtomicBool,
}

/// An operation that waits.
struct Pending {
    token: Token,
    op: StorageOp,
    to: Arc<dyn StorageCompleter>,
    file: Option<Arc<OpenFile>>,
    /// Refused at submission.
    refusal: Option<StorageErrorKind>,
    /// The medium's change number at submission: what a sync covers.
    number: u64,
}

struct State {
    options: SimulatedOptions,
    random: Random,
    medium: Medium,
    pending: Vec<Pending>,
    open: BTreeMap<u64, Arc<OpenFile>>,
    opened: u64,
    plan: Plan,
    counters: Counters,
    operations: u64,
    stop_after: Option<u64>,
}

/// A storage whose failures a seed decides.
pub struct SimulatedStorage {
    state: Mutex<State>,
}

impl SimulatedStorage {
    /// Makes an empty storage.
    #[must_use]
    pub fn new(seed: u64, options: SimulatedOptions) -> Arc<Self> {
        Self::with_medium(seed, options, Medium::default(), 0, Counters::new())
    }

    fn with_medium(
        seed: u64,
        options: SimulatedOptions,
        medium: Medium,
        opened: u64,
        counters: Counters,
    ) -> Arc<Self> {
        let state = State {
            options,
            random: Random::new(seed),
            medium,
            pending: Vec::new(),
            open: BTreeMap::new(),
            opened,
            plan: Plan::default(),
            counters,
            operations: 0,
            stop_after: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// Performs one waiting operation and delivers its completion; false when none waits or the
    /// storage has stopped.
    pub fn run_one(&self) -> bool {
        let (to, completion) = {
            let mut state = self.state.lock();
            let Some(pending) = state.choose() else {
                return false;
            };
            state.perform(pending)
        };
        to.complete(completion);
        true
    }

    /// Performs waiting operations, also those that completions submit, until none is left or the
    /// storage stops; returns how many.
    pub fn run_until_idle(&self) -> u64 {
        let mut count = 0;
        while self.run_one() {
            count += 1;
        }
        count
    }

    /// Number of operations that wait.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.state.lock().pending.len()
    }

    /// Number of operations performed since the start or the last power cut.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Stops for good when so many operations were performed, until a power cut; `None` takes
    /// that back.
    pub fn stop_after(&self, operations: Option<u64>) {
        self.state.lock().stop_after = operations;
    }

    /// Says whether the storage has stopped as [`Self::stop_after`] told it to.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.state.lock().is_stopped()
    }

    /// Cuts the power. Waiting operations are never completed, and may have done their work or a
    /// part. Of what no completed sync covers, each write is kept, lost, torn at 512 or 4096
    /// bytes, or there with the content of a later overwrite; lengths and names likewise. All
    /// open files are gone; the storage can be used again.
    pub fn power_cut(&self) {
        let dropped = {
            let mut state = self.state.lock();
            let mut random = state.random.fork();
            state.medium = state.survivors(&mut random);
            state.open.clear();
            state.operations = 0;
            state.stop_after = None;
            core::mem::take(&mut state.pending)
        };
        // Completers may hold this storage; they go when its lock is free.
        drop(dropped);
    }

    /// Makes the storage that would come up after a power cut at this moment, as `seed` decides,
    /// and leaves this one as it is. It has the same options, no faults, and counts the cut's
    /// events.
    #[must_use]
    pub fn power_cut_image(&self, seed: u64) -> Arc<Self> {
        let mut state = self.state.lock();
        let mut random = Random::new(seed);
        let counters = core::mem::take(&mut state.counters);
        let medium = state.survivors(&mut random);
        let counters = core::mem::replace(&mut state.counters, counters);
        Self::with_medium(
            random.next_u64(),
            state.options,
            medium,
            state.opened,
            counters,
        )
    }

    /// The number of changes that a power cut at this moment may leave or lose: of files and of
    /// names, those of operations that wait included.
    #[must_use]
    pub fn unsynced_changes(&self) -> usize {
        every::changes(&self.state.lock().all_started())
    }

    /// Makes the storage that would come up after a power cut at this moment, if of the
    /// [`unsynced_changes`](Self::unsynced_changes) just those survived, each whole, whose bit is
    /// set in `kept`.
    #[must_use]
    pub fn power_cut_image_with(&self, kept: u64) -> Arc<Self> {
        let state = self.state.lock();
        let medium = every::keep(&state.all_started(), kept);
        let counters = BTreeMap::new();
        Self::with_medium(kept, state.options, medium, state.opened, counters)
    }

    /// Makes an operation fail.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().plan.add(fault);
    }

    /// Takes back all faults that are still to come.
    pub fn clear_faults(&self) {
        self.state.lock().plan.clear();
    }

    /// Changes the room on the medium.
    pub fn set_capacity(&self, capacity_bytes: u64) {
        self.state.lock().options.capacity_bytes = capacity_bytes;
    }

    /// How often each event happened, by name.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().counters.clone()
    }

    /// The names that exist now.
    #[must_use]
    pub fn file_names(&self) -> Vec<FileName> {
        self.state.lock().medium.names.keys().cloned().collect()
    }

    /// What a file holds now.
    #[must_use]
    pub fn read_live(&self, name: &FileName) -> Option<Vec<u8>> {
        let state = self.state.lock();
        let inode = state.medium.names.get(name)?;
        Some(state.medium.inodes.get(inode)?.live.to_bytes())
    }

    /// What is sure to survive of a file whose name is sure to survive.
    #[must_use]
    pub fn read_durable(&self, name: &FileName) -> Option<Vec<u8>> {
        let state = self.state.lock();
        let inode = state.medium.durable_names.get(name)?;
        Some(state.medium.inodes.get(inode)?.durable.to_bytes())
    }

    /// Damages one byte of a file, now and for good; false when there is no such byte. Meant for
    /// files that are synced: an unsynced write that survives a cut covers the damage.
    pub fn flip_byte(&self, name: &FileName, offset: u64) -> bool {
        let mut state = self.state.lock();
        let Some(id) = state.medium.names.get(name).copied() else {
            return false;
        };
        let inode = state.medium.inode(id);
        if offset >= inode.live.length {
            return false;
        }
        for content in [&mut inode.live, &mut inode.durable] {
            if offset < content.length {
                let mut byte = [0];
                content.pages.read(offset, &mut byte);
                content.pages.write(offset, &[byte[0] ^ 0x5a]);
            }
        }
        count(&mut state.counters, "byte-flipped");
        true
    }
}

impl Storage for SimulatedStorage {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        let mut state = self.state.lock();
        let mut refusal = op.validate().err();
        let mut file = None;
        if let Some(id) = op.file() {
            let is_close = matches!(op, StorageOp::Close { .. });
            file = if is_close {
                state.open.remove(&id.0)
            } else {
                state.open.get(&id.0).cloned()
            };
            match &file {
                None => refusal = Some(StorageErrorKind::NotOpen),
                Some(file) => {
                    if file.is_poisoned.load(Ordering::Relaxed) && !is_close {
                        refusal = Some(StorageErrorKind::Poisoned);
                    }
                    let inode = file.inode;
                    // A close hands on the use of the open file.
                    state.medium.inode(inode).users += u64::from(!is_close);
                }
            }
        }
        let number = state.medium.next_number;
        state.pending.push(Pending {
            token,
            op,
            to,
            file,
            refusal,
            number,
        });
    }
}

impl State {
    fn is_stopped(&self) -> bool {
        self.stop_after.is_some_and(|last| self.operations >= last)
    }

    fn choose(&mut self) -> Option<Pending> {
        if self.pending.is_empty() || self.is_stopped() {
            return None;
        }
        self.operations += 1;
        Some(match self.options.order {
            CompletionOrder::Submission => self.pending.remove(0),
            CompletionOrder::Random => {
                let index = self.random.index(self.pending.len());
                self.pending.swap_remove(index)
            }
        })
    }

    fn perform(&mut self, pending: Pending) -> (Arc<dyn StorageCompleter>, StorageCompletion) {
        let Pending {
            token,
            op,
            to,
            file,
            refusal,
            number,
        } = pending;
        let file_name = file.as_ref().map_or("", |file| file.name.as_str());
        let blame = op.error(file_name, StorageErrorKind::NotOpen);
        let result = match refusal {
            Some(kind) => Err(kind),
            None => match self.plan.meet(&op) {
                Some(effect) => Err(self.fail(&op, file.as_deref(), number, effect)),
                None => self.serve(op, file.as_deref(), number),
            },
        };
        if let Some(file) = file {
            self.medium.release(file.inode);
        }
        let result = result.map_err(|kind| StorageError { kind, ..blame });
        (to, StorageCompletion { token, result })
    }

    /// Performs an operation that goes well, unless there is no room.
    fn serve(
        &mut self,
        op: StorageOp,
        file: Option<&OpenFile>,
        number: u64,
    ) -> Result<StorageOutcome, StorageErrorKind> {
        let inode = file.map_or(0, |file| file.inode);
        match op {
            StorageOp::Create { name } => {
                let inode = self.medium.create(&name)?;
                Ok(self.open(inode, name))
            }
            StorageOp::Open { name } => {
                let inode = self.medium.find(&name)?;
                Ok(self.open(inode, name))
            }
            StorageOp::Read {
                offset, mut buffer, ..
            } => {
                self.medium.read(inode, offset, &mut buffer);
                Ok(StorageOutcome::Read(buffer))
            }
            StorageOp::Write { offset, buffer, .. } => self.write(inode, offset, buffer),
            StorageOp::Sync { .. } => {
                self.medium.sync(inode, number, &mut self.random);
                Ok(StorageOutcome::Done)
            }
            StorageOp::SetLength { length, .. } => {
                self.medium.edit(inode, Edit::SetLength { length });
                Ok(StorageOutcome::Done)
            }
            StorageOp::Rename { from, to } => self
                .medium
                .rename(&from, &to)
                .map(|()| StorageOutcome::Done),
            StorageOp::Remove { name } => self.medium.remove(&name).map(|()| StorageOutcome::Done),
            StorageOp::List { directory } => {
                let is_inside = |name: &&FileName| name.directory() == directory;
                let names = self
                    .medium
                    .names
                    .keys()
                    .filter(is_inside)
                    .cloned()
                    .collect();
                Ok(StorageOutcome::Listed(names))
            }
            StorageOp::SyncDirectory { directory } => {
                self.medium.sync_directory(&directory, number);
                Ok(StorageOutcome::Done)
            }
            StorageOp::Capacity { .. } => {
                let total_bytes = self.options.capacity_bytes;
                let free_bytes = total_bytes.saturating_sub(self.medium.used_bytes());
                Ok(StorageOutcome::Capacity(Capacity {
                    total_bytes,
                    free_bytes,
                }))
            }
            StorageOp::Close { .. } => Ok(StorageOutcome::Done),
        }
    }

    fn open(&mut self, inode: u64, name: FileName) -> StorageOutcome {
        self.opened += 1;
        let entry = self.medium.inode(inode);
        entry.users += 1;
        let length = entry.live.length;
        let file = OpenFile {
            inode,
            name,
            is_poisoned: AtomicBool::new(false),
        };
        self.open.insert(self.opened, Arc::new(file));
        StorageOutcome::Opened {
            file: FileId(self.opened),
            length,
        }
    }

    fn write(
        &mut self,
        inode: u64,
        offset: u64,
        buffer: IoBuffer,
    ) -> Result<StorageOutcome, StorageErrorKind> {
        let missing = self
            .medium
            .inode(inode)
            .live
            .pages
            .missing(offset, buffer.len());
        let capacity_bytes = self.options.capacity_bytes;
        if missing > 0 && !self.medium.has_room(missing * PAGE_BYTES, capacity_bytes) {
            count(&mut self.counters, "no-space");
            return Err(StorageErrorKind::NoSpace);
        }
        self.medium.edit(inode, Edit::write(offset, &buffer));
        Ok(StorageOutcome::Written(buffer))
    }

    /// Performs an operation that fails.
    fn fail(
        &mut self,
        op: &StorageOp,
        file: Option<&OpenFile>,
        number: u64,
        effect: FaultEffect,
    ) -> StorageErrorKind {
        match (op, file) {
            (StorageOp::Sync { .. }, Some(file)) => {
                self.medium.fail_sync(file.inode, number);
                file.is_poisoned.store(true, Ordering::Relaxed);
                count(&mut self.counters, "sync-failed");
            }
            (StorageOp::Write { offset, buffer, .. }, Some(file))
                if effect == FaultEffect::Short =>
            {
                let pages = self.random.index(buffer.len() / BLOCK_BYTES + 1);
                let part = &buffer[..pages * BLOCK_BYTES];
                self.medium.edit(file.inode, Edit::write(*offset, part));
                count(&mut self.counters, "fault-short");
            }
            _ => {}
        }
        if effect == FaultEffect::NoSpace {
            count(&mut self.counters, "fault-no-space");
            return StorageErrorKind::NoSpace;
        }
        count(&mut self.counters, "fault-io");
        medium_error()
    }

    /// Makes the medium that a power cut leaves.
    /// The medium if all that waits had begun.
    fn all_started(&self) -> Medium {
        let mut medium = self.medium.clone();
        let waiting = self.pending.iter().filter(|one| one.refusal.is_none());
        for pending in waiting {
            start(&mut medium, pending);
        }
        medium
    }

    fn survivors(&mut self, random: &mut Random) -> Medium {
        let mut medium = self.medium.clone();
        let mut order: Vec<&Pending> = self.pending.iter().collect();
        random.shuffle(&mut order);
        let counters = &mut self.counters;
        for pending in order {
            let is_refused = pending.refusal.is_some();
            if matches!(pending.op, StorageOp::Sync { .. }) && !is_refused {
                count(counters, "sync-interrupted");
            }
            if !is_refused && random.chance(0.5) && start(&mut medium, pending) {
                count(counters, "pending-started");
            }
        }
        count(counters, "power-cut");
        cut(&medium, random, counters)
    }
}

/// Performs what an operation that waited at a power cut may have done. False when that is nothing
/// that could be seen.
fn start(medium: &mut Medium, pending: &Pending) -> bool {
    match (&pending.op, &pending.file) {
        (StorageOp::Write { offset, buffer, .. }, Some(file)) => {
            medium.edit(file.inode, Edit::write(*offset, buffer));
            true
        }
        (StorageOp::SetLength { length, .. }, Some(file)) => {
            medium.edit(file.inode, Edit::SetLength { length: *length });
            true
        }
        (StorageOp::Create { name }, _) => medium.create(name).is_ok(),
        (StorageOp::Rename { from, to }, _) => medium.rename(from, to).is_ok(),
        (StorageOp::Remove { name }, _) => medium.remove(name).is_ok(),
        _ => false,
    }
}
