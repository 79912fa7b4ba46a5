//! Seed disks: the replica of every protected disk with all its history, as a layered map over
//! immutable segments.
//!
//! ```text
//! frames -> log (cache) -> head -> run files -> views at any (history, LSN)
//! bulk   -> seed segments -> base parts ----^
//! manifest log: which files count; points, histories, keys
//! ```
//!
//! [`Engine`] is `step(now, input) -> outputs`: no thread, no runtime, no wall clock of its own.
//! Reading is apart from it: a [`ViewDevice`] works on a [`Snapshot`] of immutable parts, from any
//! thread. `FORMAT.md` beside this crate describes the bytes.

pub mod branch;
pub mod changed;
pub mod engine;
pub mod entry;
pub mod error;
pub mod manifest;
pub mod notes;
mod patchwork;
pub mod reader;
pub mod reference;
pub mod retention;
pub mod run;
pub mod section;
pub mod segment;
pub mod verify;
pub mod view;

pub use branch::{BranchContents, BranchDevice, FrameSink, Usage};
pub use engine::{Engine, EngineOptions, Event, Input, Output, Request, RequestId, Response};
pub use entry::{Entry, EntryKind, RangeEntry};
pub use error::SeedError;
pub use reader::{Reader, ReaderOptions};
pub use reference::{At, Reference};
pub use section::{Layer, Section, Snapshot};
pub use view::ViewDevice;
