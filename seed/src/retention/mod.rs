//! How long history is kept: policies, what they thin, and the clock that retention locks trust.
//!
//! Nothing in here owns state of a store or reads a clock: times come in, decisions go out. The
//! engine records what is decided.

mod churn;
mod clock;
mod forecast;
mod policy;
#[cfg(test)]
mod tests;
mod thin;

pub use churn::{Churn, ChurnRecord, HORIZON, SPANS, Stored, scaled};
pub use clock::{ClockRecord, DOWNTIME_MAX, Elapsed, JUMP_MIN, Lock, LockClock};
pub use forecast::{Keeping, lasts, locked_bytes, reach};
pub use policy::{LOCK_MAX, LockRule, Policy, PolicyError, SPAN_MAX, TIERS_MAX, Tier};
pub use thin::{Candidate, thin};
