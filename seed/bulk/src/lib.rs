//! Bulk import and export: any point of a disk as a raw image, a qcow2 image or a seed archive, and
//! back again.
//!
//! Invariants
//! * What a resume file or a chain names is durable: data is synced before anything speaks of it.
//! * Every operation that was given to the kernel is waited for before its thread ends, also after
//!   an error or an interruption; its buffer belongs to the kernel until then.
//! * A byte of an archive is served only after its hash was checked.
//! * Memory is bounded by the lanes and by one segment, whatever the size of the disk.
//!
//! This crate knows neither the engine nor FUSE: what it reads is a [`BlockSource`]. `FORMAT.md`
//! beside it describes the archive.

pub mod archive;
mod buffer;
pub mod error;
mod io;
mod lanes;
pub mod progress;
pub mod qcow2;
pub mod raw;
mod resume;
pub mod source;

pub use archive::{ArchiveReader, ArchiveTarget, Secret, export_archive};
pub use error::BulkError;
pub use io::IoChoice;
pub use progress::{Progress, Report};
pub use raw::{RawTarget, export_raw};
pub use resume::{resume_file, resume_identity};
pub use source::{BlockSource, FileSource};

/// How work is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Which way requests reach the kernel.
    pub io: IoChoice,
    /// Chunks under way at once.
    pub lanes: usize,
    /// Bytes of plain data after which progress is made durable.
    pub checkpoint_bytes: u64,
    /// Stored bytes at which a segment of an archive is full.
    pub segment_bytes: usize,
    /// Level of zstd.
    pub level: i32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            io: IoChoice::Auto,
            lanes: 8,
            checkpoint_bytes: 256 << 20,
            segment_bytes: 16 << 20,
            level: 3,
        }
    }
}
