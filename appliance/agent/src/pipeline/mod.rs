//! From captured records to frames that can be sent: sealing, holding in memory, spooling.

pub mod effort;
pub mod keys;
pub mod sealer;
pub mod spool;
pub mod store;

pub use keys::Keys;
pub use sealer::SealPool;
pub use spool::{LogSpool, Spool, SpoolEvents, SpoolPlace};
pub use store::{FrameBytes, FrameStore, StoreEvents, StoreLimits};
