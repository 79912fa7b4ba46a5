//! Front ends over [`BlockDevice`](afterimage_blockdev::BlockDevice): what the rest of the
//! machine sees of a disk.
//!
//! * [`fuse`]: a tree of files, each of them a device.
//! * [`loop_device`]: `/dev/loopN` over such a file, with direct I/O and nothing less.
//! * [`partition`], [`probe`], [`mount`]: what is on a device, and how to get at it.
//!
//! A daemon that serves its own devices can deadlock with itself. Three rules keep it alive: call
//! [`set_io_flusher`] before any thread starts, attach with [`LoopDevice::attach`] (it opens the
//! backing file on a thread that serves nothing), and never open a file of the tree from within a
//! [`Tree`] call.

pub mod btrfs;
pub mod error;
pub mod fuse;
mod ioctl;
pub mod loop_device;
pub mod mount;
pub mod mount_table;
pub mod partition;
pub mod probe;
pub mod stale;
mod sys;

pub use error::ExportError;
pub use fuse::{
    FuseMount, FuseOptions, IoUring, ListedNode, Node, NodeId, NodeKind, Transport, Tree, TreeError,
};
pub use loop_device::{LoopDevice, LoopOptions};
pub use mount::{MountFlags, MountedAs, is_mount_point, mount_filesystem, unmount};
pub use probe::{Found, FsKind};
pub use stale::{StaleDevice, detach_stale, detach_stale_under, release_stale_under};
pub use sys::{forget_cached, set_io_flusher};
