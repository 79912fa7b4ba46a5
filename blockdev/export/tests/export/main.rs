//! Exports as the kernel and its users see them. All of it needs root, `/dev/fuse` and loop
//! devices, and says so when they are missing.

// Helpers of tests are tests too: they stop at the first surprise.
#![allow(clippy::unwrap_used)]

mod ends;
mod file_io;
mod filesystems;
mod loop_io;
mod memory;
mod names;
mod passthrough;
mod shelf;
mod stale;
mod transport;
