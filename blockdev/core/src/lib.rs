//! The words of a disk, and the two boundaries that everything else is built on.
//!
//! * [`BlockDevice`]: a disk as its user sees it. Requests are submitted and complete in any order.
//! * [`Storage`]: the files that the product keeps its own data in. Same shape, so that a test can
//!   stand in for the medium and lose, tear or reorder what was not yet synced.
//!
//! This crate knows nothing of replication: no history is interpreted here, no record, no network.

pub mod allocation;
pub mod buffer;
mod check;
pub mod clock;
#[cfg(test)]
mod conformance;
mod convert;
pub mod device;
pub mod id;
pub mod memory;
pub mod overlay;
mod pages;
pub mod patience;
pub mod random;
pub mod range_lock;
pub mod real;
pub mod simulated;
pub mod size;
pub mod storage;
pub mod wait;

pub use buffer::IoBuffer;
pub use clock::{Clock, Entropy, Monotonic, SystemClock, SystemEntropy, Timestamp};
pub use device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Extent, ExtentKind, Geometry,
};
pub use id::{
    AgentId, BatchId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, PointId, SegmentId,
    SlotIndex, StoreId, Token,
};
pub use memory::{MemoryDevice, MemoryStorage};
pub use overlay::Overlay;
pub use random::Random;
pub use range_lock::{RangeGuard, RangeLock, RangeWaiter};
pub use real::{Backend, DeviceOptions, DirectoryLock, RealDevice, RealOptions, RealStorage};
pub use simulated::{
    CompletionOrder, Fault, FaultEffect, SeededEntropy, SimulatedClock, SimulatedOptions,
    SimulatedStorage,
};
pub use size::{BLOCK_BYTES, BlockIndex, CELL_BLOCKS, CELL_BYTES, CellIndex};
pub use storage::{
    Capacity, ErrorClass, FileId, FileName, Storage, StorageCompleter, StorageCompletion,
    StorageError, StorageErrorKind, StorageOp, StorageOutcome,
};
