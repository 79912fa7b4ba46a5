//! The same tests as in `tests/export`, over `io_uring`, and those of its own.

// Helpers of tests are tests too: they stop at the first surprise.
#![allow(clippy::unwrap_used)]

#[path = "../export/ends.rs"]
mod ends;
#[path = "../export/file_io.rs"]
mod file_io;
#[path = "../export/filesystems.rs"]
mod filesystems;
#[path = "../export/loop_io.rs"]
mod loop_io;
#[path = "../export/memory.rs"]
mod memory;
#[path = "../export/names.rs"]
mod names;
#[path = "../export/passthrough.rs"]
mod passthrough;
mod queues;
#[path = "../export/shelf.rs"]
mod shelf;
#[path = "../export/stale.rs"]
mod stale;
mod transport;
