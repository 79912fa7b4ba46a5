//! A storage that fails as real media do, repeatably.
//!
//! Operations wait until [`SimulatedStorage::run_one`] performs one, in an order that the seed
//! decides, and delivers its completion from that call; so a test needs one thread. What a file
//! holds now and what would survive a power cut are kept apart; see [`SimulatedStorage::power_cut`]
//! for what a cut may do. Data that was synced under a durable name never changes.

mod clock;
mod cut;
mod every;
mod fault;
mod medium;
mod storage;

pub use clock::{SeededEntropy, SimulatedClock};
pub use fault::{Fault, FaultEffect};
pub use storage::{CompletionOrder, SimulatedOptions, SimulatedStorage};

#[cfg(test)]
mod tests;
