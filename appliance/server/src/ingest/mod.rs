//! The data service: agents bring change records, and are told what is durable.
//!
//! Invariants
//! * Nobody without a certificate of this appliance gets past the handshake, and no stream is
//!   opened without a grant for its machine.
//! * A frame reaches the engine only after every hash in it was checked, and its identity and LSNs
//!   are those that its stream and its envelope claim.
//! * Messages in memory, over all connections, never exceed `ingest.memory_bytes`, but for what the
//!   engine still holds of connections that broke.
//! * The engine is never held up: what it tells waits, coalesced, in a slot of the stream.

mod accept;
mod connection;
mod grant;
mod listener;
mod outgoing;
mod read;
mod report;
mod slot;
#[cfg(test)]
mod tests;

pub use listener::{Ingest, serve};
pub use report::{Reported, Reports};
