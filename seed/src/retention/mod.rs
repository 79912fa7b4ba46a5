//! How long history is kept: policies, what they thin, and the clock that retention locks trust.
//!
//! Nothing in here owns state of a store or reads a clock: times come in, decisions go out. The
//! engine records what is decided.

mod clock;
mod policy;
#[cfg(test)]
mod tests;
mod thin;

pub use clock::{ClockRecord, DOWNTIME_MAX, Elapsed, JUMP_MIN, Lock, LockClock};
pub use policy::{LOCK_MAX, LockRule, Policy, PolicyError, SPAN_MAX, TIERS_MAX, Tier};
pub use thin::{Candidate, thin};
