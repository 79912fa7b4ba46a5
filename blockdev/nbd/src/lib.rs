//! Disks over the network block device protocol: a server and a client that share one codec.
//!
//! The specification is `doc/proto.md` of the NetworkBlockDevice project; extended headers are on
//! its branch `extension-ext-header`, the contexts `qemu:*` in QEMU's `docs/interop/nbd.rst`.
//!
//! Invariants
//! * The codec ([`option`], [`request`], [`reply`], [`negotiation`]) touches no socket, and keeps
//!   no more of a peer's bytes than [`option::OPTION_BYTES_MAX`].
//! * Nothing that was negotiated before STARTTLS is remembered after it, and no byte that came in
//!   the clear is read as if it had come through TLS.
//! * Whoever asks is judged by [`Exports`] before any device is opened.
//! * Each request gets exactly one final reply, in any order; what a connection has in flight is
//!   bounded, in number and in bytes, until the last byte of the reply has left.
//! * No completer waits for a socket: what cannot be sent at once is sent by the connection's task.

pub mod client;
pub mod export;
pub mod negotiation;
pub mod number;
pub mod option;
pub mod reply;
pub mod request;
pub mod server;
mod wire;

pub use client::{ClientError, ClientOptions, NbdDevice};
pub use export::{
    AllocationMap, Answer, Contexts, Export, Exports, ExtentMap, ListedExport, MapExtent,
    NoContexts, Peer, Refusal,
};
pub use server::{Server, ServerSettings};
