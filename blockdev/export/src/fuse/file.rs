//! Files that are open, and the device behind each.
//!
//! Invariants:
//! * a handle is one success of `Tree::open`, and ends in one `Tree::close`;
//! * all handles of one node share one gate, so that two writers of a file meet in it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use afterimage_blockdev::BlockDevice;
use fuser::FileHandle;
use parking_lot::{Mutex, RwLock};

use super::backing::Backing;
use super::gate::WriteGate;
use super::tree::NodeId;

/// Handles at the same time, at most; above, opening fails with `ENFILE`.
const HANDLES_MAX: usize = 65_536;

/// One open file.
pub(super) struct OpenFile {
    pub(super) node: NodeId,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) gate: Arc<WriteGate>,
    /// The plain file that the kernel reads and writes itself, until this handle ends.
    _backing: Option<Arc<Backing>>,
    /// Bytes of a logical block; a power of two.
    pub(super) block_bytes: u64,
    pub(super) is_writable: bool,
    /// The size last seen; a device only grows.
    size_bytes: AtomicU64,
}

impl OpenFile {
    /// The size, asked of the device only when `end` lies beyond what was last seen.
    pub(super) fn size_reaching(&self, end: u64) -> u64 {
        let seen = self.size_bytes.load(Ordering::Relaxed);
        if end <= seen { seen } else { self.size_now() }
    }

    /// The size, asked of the device.
    pub(super) fn size_now(&self) -> u64 {
        let size_bytes = self.device.geometry().size_bytes;
        self.size_bytes.fetch_max(size_bytes, Ordering::Relaxed);
        size_bytes
    }

    /// Says whether both are multiples of the logical block.
    pub(super) fn is_aligned(&self, offset: u64, length: u64) -> bool {
        (offset | length) & (self.block_bytes - 1) == 0
    }

    /// The start of the block that holds `offset`.
    pub(super) fn align_down(&self, offset: u64) -> u64 {
        offset & !(self.block_bytes - 1)
    }

    /// The first block boundary at or after `offset`, which lies within the device.
    pub(super) fn align_up(&self, offset: u64) -> u64 {
        offset.next_multiple_of(self.block_bytes)
    }
}

#[derive(Default)]
struct Slots {
    files: Vec<Option<Arc<OpenFile>>>,
    free: Vec<usize>,
}

/// All open files, by handle.
#[derive(Default)]
pub(super) struct OpenFiles {
    slots: RwLock<Slots>,
    gates: Mutex<HashMap<NodeId, Weak<WriteGate>>>,
}

impl OpenFiles {
    /// Keeps a device open, whose logical block is a power of two. Gives it back when there are
    /// too many.
    pub(super) fn insert(
        &self,
        node: NodeId,
        device: Arc<dyn BlockDevice>,
        is_writable: bool,
        backing: Option<Arc<Backing>>,
    ) -> Result<FileHandle, Arc<dyn BlockDevice>> {
        let geometry = device.geometry();
        let block_bytes = u64::from(geometry.logical_block_bytes);
        assert!(
            block_bytes.is_power_of_two(),
            "logical block of {block_bytes} bytes"
        );
        let mut slots = self.slots.write();
        let index = match slots.free.pop() {
            Some(index) => index,
            None if slots.files.len() < HANDLES_MAX => {
                slots.files.push(None);
                slots.files.len() - 1
            }
            None => return Err(device),
        };
        slots.files[index] = Some(Arc::new(OpenFile {
            node,
            device,
            gate: self.gate(node),
            _backing: backing,
            block_bytes,
            is_writable,
            size_bytes: AtomicU64::new(geometry.size_bytes),
        }));
        Ok(FileHandle(index as u64))
    }

    fn gate(&self, node: NodeId) -> Arc<WriteGate> {
        let mut gates = self.gates.lock();
        if let Some(gate) = gates.get(&node).and_then(Weak::upgrade) {
            return gate;
        }
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(WriteGate::default());
        gates.insert(node, Arc::downgrade(&gate));
        gate
    }

    /// Finds a file by its handle.
    pub(super) fn get(&self, handle: FileHandle) -> Option<Arc<OpenFile>> {
        let index = usize::try_from(handle.0).ok()?;
        self.slots.read().files.get(index)?.clone()
    }

    /// Ends a handle.
    pub(super) fn remove(&self, handle: FileHandle) -> Option<Arc<OpenFile>> {
        let index = usize::try_from(handle.0).ok()?;
        let mut slots = self.slots.write();
        let file = slots.files.get_mut(index)?.take()?;
        slots.free.push(index);
        Some(file)
    }

    /// Ends all handles, when the kernel is gone.
    pub(super) fn drain(&self) -> Vec<Arc<OpenFile>> {
        let mut slots = self.slots.write();
        slots.free.clear();
        std::mem::take(&mut slots.files)
            .into_iter()
            .flatten()
            .collect()
    }
}
