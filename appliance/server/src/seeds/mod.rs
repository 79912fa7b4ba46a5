//! Seeds of first copies.
//!
//! Invariants
//! * A seed is never part of the store: nobody sees a block of it before a source was compared.
//! * A block is taken from a seed only when the source says, by its content tag, that it has the
//!   same; it is stored as bulk of the source's own batch, at the LSN of the record that began it,
//!   and the source is told only once it is durable.
//! * The batch that counts is the newest one whose begin was received. Agents ask about seeded
//!   blocks only after that begin was acknowledged; so nothing that the source wrote before it was
//!   asked ranks above what is taken.

mod adopt;
mod registry;

pub(crate) use adopt::Asked;
pub use registry::Seeds;
