//! The appliance's own certificate authority.
//!
//! Invariants
//! * The authority's key is made once, at the first start, and never leaves `<data-dir>/ca` (0600).
//! * A certificate says who somebody is, never what they may do: grants are the catalogue's.
//! * An agent's certificate names exactly one agent, an admin's none.

mod authority;
mod identity;
mod server;
#[cfg(test)]
mod tests;

pub use authority::{Authority, CaError, Issued, Lifetime};
pub use identity::{PeerCertificate, PeerIdentity};
pub use server::ServerIdentity;
