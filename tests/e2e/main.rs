//! The process ring: real daemons, FUSE, loop devices, mounts and faults. It needs root and the
//! release binaries, so its tests are ignored by default; `tools/check NAME` runs them.
//!
//! Invariants
//! * A test ends only processes that it started, and unmounts and detaches only what lies below
//!   its own directory, also when it fails.
//! * What must be in a replica is known from what the writer was told, never from the product.

mod damage;
mod kill;
mod load;
mod network;
mod powercut;
mod proxy;
mod shell;
mod site;
mod tap;
