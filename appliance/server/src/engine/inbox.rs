//! What reaches the engine thread from other threads, and how it is woken.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{StorageCompleter, StorageCompletion};
use afterimage_cache::Frame;
use afterimage_protocol::rest::ApiError;
use afterimage_seed::engine::{ForkedBranch, StreamNumber};
use afterimage_seed::{BranchContents, FrameSink, SeedError, Usage};
use parking_lot::{Condvar, Mutex};

use super::command::{BranchOpened, Reply};

/// A branch whose contents were counted.
pub(super) struct Found {
    pub(super) branch: Box<ForkedBranch>,
    pub(super) contents: Result<BranchContents, SeedError>,
    pub(super) usage: Arc<Usage>,
    pub(super) reply: Reply<Result<BranchOpened, ApiError>>,
}

/// From a branch's device, or on its way to one.
pub(super) enum FromBranch {
    /// A frame to append. Bounded by what a branch keeps in memory.
    Append(StreamNumber, Frame),
    /// A newer snapshot is wanted.
    Refresh(StreamNumber),
    /// A device can be made.
    Found(Box<Found>),
}

#[derive(Default)]
struct Contents {
    /// Each with the time at which it arrived.
    completions: Vec<(StorageCompletion, Instant)>,
    branches: VecDeque<FromBranch>,
    is_awake: bool,
}

/// The engine thread's inbox. Commands have a bounded queue of their own.
#[derive(Default)]
pub(super) struct Inbox {
    contents: Mutex<Contents>,
    arrived: Condvar,
}

impl Inbox {
    /// Makes the engine thread look.
    pub(super) fn wake(&self) {
        let mut contents = self.contents.lock();
        if !contents.is_awake {
            contents.is_awake = true;
            self.arrived.notify_one();
        }
    }

    pub(super) fn take(
        &self,
        completions: &mut Vec<(StorageCompletion, Instant)>,
        branches: &mut VecDeque<FromBranch>,
    ) {
        let mut contents = self.contents.lock();
        contents.is_awake = false;
        completions.append(&mut contents.completions);
        branches.append(&mut contents.branches);
    }

    /// Waits until something arrives, at most so long.
    pub(super) fn wait(&self, at_most: Duration) {
        let mut contents = self.contents.lock();
        if !contents.is_awake {
            self.arrived.wait_for(&mut contents, at_most);
        }
    }

    /// Goes on with a branch.
    pub(super) fn found(&self, found: Found) {
        self.put(FromBranch::Found(Box::new(found)));
    }

    fn put(&self, from: FromBranch) {
        self.contents.lock().branches.push_back(from);
        self.wake();
    }
}

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        let arrived = Instant::now();
        let mut contents = self.contents.lock();
        contents.completions.push((completion, arrived));
        if !contents.is_awake {
            contents.is_awake = true;
            self.arrived.notify_one();
        }
    }
}

/// A branch's way to the engine thread.
pub(super) struct BranchSink {
    pub(super) inbox: Arc<Inbox>,
    pub(super) stream: StreamNumber,
}

impl FrameSink for BranchSink {
    fn append(&self, frame: Frame) {
        self.inbox.put(FromBranch::Append(self.stream, frame));
    }

    fn refresh(&self) {
        self.inbox.put(FromBranch::Refresh(self.stream));
    }
}
