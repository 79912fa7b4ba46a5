//! The cache tier: change records, the frames that carry them, and the shared, write-ordered log.
//!
//! Everything here is a format or a state machine `step(now, input) -> outputs`. Nothing waits,
//! nothing knows a socket, a thread or a wall clock. `FORMAT.md` beside this crate describes the
//! bytes.

pub mod bytes;
pub mod error;
pub mod frame;
pub mod key;
mod lanes;
pub mod log;
pub mod record;
pub mod seal;
pub mod segment;
pub mod slot;
#[cfg(test)]
mod testing;

pub use error::{CacheError, Damage};
pub use frame::{DamagedSlot, Frame, FrameBuilder, FrameHeader, FrameIdentity, FrameView};
pub use key::{DiskKey, KeySource, TagKey};
pub use record::{BatchKind, MarkKind, RecordBody, RecordHeader, RecordKind, RecordView};
pub use seal::{Effort, Opener, Sealer, Tagger};
pub use slot::{Codec, ContentTag, SlotContext, SlotHeader, SlotView};
