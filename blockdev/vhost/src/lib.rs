//! A [`BlockDevice`](afterimage_blockdev::BlockDevice) as the disk of a virtual machine: a
//! vhost-user-blk server.
//!
//! The machine's monitor (QEMU, Cloud Hypervisor) connects to a Unix socket and hands over the
//! guest's memory; from then on the guest puts requests into rings of that memory, and this side
//! answers there. The messages on the socket are the work of `vhost-user-backend`; what is in the
//! rings is parsed here.
//!
//! Invariants
//! * Whatever a guest writes into its memory, this side reads once, checks, and then uses what it
//!   has read. A request is answered with a status, or, where there is no place for one, ends the
//!   connection.
//! * A request is answered exactly once. What is in flight is bounded: requests by the size of the
//!   ring, bytes by [`Settings::in_flight_bytes`].
//! * A ring that stops has answered everything that it took before the monitor is told so.
//! * Guest memory stays mapped until the last request that may touch it has been answered.

mod backend;
mod blk;
mod budget;
mod chain;
mod error;
mod harness;
mod pending;
mod request;
mod ring;
mod server;
mod session;
mod settings;
#[cfg(test)]
mod tests;

pub use error::VhostError;
pub use harness::{Outcome, run_ring};
pub use server::{Server, ServerStatus};
pub use settings::Settings;

use vhost_user_backend::VringMutex;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// A guest's memory at one moment.
pub(crate) type Memory = GuestMemoryMmap<()>;
/// A guest's memory, which may be exchanged.
pub(crate) type SharedMemory = GuestMemoryAtomic<Memory>;
/// A ring, as the framework keeps it.
pub(crate) type Vring = VringMutex<SharedMemory>;
