//! The machine's own files and disks.
//!
//! [`RealStorage`] is a directory, [`RealDevice`] an image file or block device. Both use direct
//! I/O where the file system has it, through one `io_uring` each, or through a few threads where
//! the machine forbids that; the two backends behave alike.

mod device;
mod engine;
mod file;
mod lock;
mod pool;
mod ring;
mod root;
mod storage;
mod work;
mod zeroes;

#[cfg(test)]
mod tests;

pub use device::{DeviceOptions, RealDevice};
pub use engine::Backend;
pub use lock::DirectoryLock;
pub use storage::{RealOptions, RealStorage};
