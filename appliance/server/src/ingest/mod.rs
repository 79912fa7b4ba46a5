//! The data service: agents bring change records, and are told what is durable.
//!
//! Invariants
//! * Nobody without a certificate of this appliance gets past the handshake, and no stream is
//!   opened without a grant for its machine.
//! * A frame reaches the engine only after every hash in it was checked, and its identity and LSNs
//!   are those that its stream and its envelope claim.
//! * Messages in memory, over all connections, never exceed `ingest.memory_bytes`, but for what the
//!   engine still holds of connections that broke.
//! * A stream ends as soon as its agent is revoked, or the grant for its machine is another's.
//! * The engine is never held up: what it tells waits, coalesced, in a slot of the stream.

mod accept;
mod connection;
mod delay;
mod grant;
mod listener;
mod live;
mod outgoing;
mod read;
mod report;
mod slot;
#[cfg(test)]
mod tests;

pub use delay::{Delay, StageDelay};
pub(crate) use grant::{held_by_other, revoked};
pub use listener::{Ingest, serve};
pub use live::LiveStreams;
pub use report::{Reported, Reports};
pub(crate) use slot::EventSlot;
