//! Disks as they were, and branches, over the network block device protocol.
//!
//! Invariants
//! * An export is named as everywhere else: `<machine>/<disk>@<when>`, read-only, or
//!   `<machine>/<disk>@branch:<name>`, writable. A name is looked up, never used as a path.
//! * The Unix socket belongs to root. Over TCP nothing is told before TLS, and after it only to
//!   the certificate of an admin that was not revoked.
//! * A name whose state cannot change any more may be opened by several connections at once; one
//!   such as `@latest` means a state of its own for each connection, and says so.
//! * Sessions run on threads of their own: ingest and the control service do not wait for them.

mod changes;
mod exports;
mod refuse;
mod service;

pub use exports::StoreExports;
pub use service::{NbdListeners, listen, serve};
