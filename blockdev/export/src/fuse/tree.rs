//! The names of a FUSE tree, resolved by the product.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, BlockError, Timestamp};

/// Names a file or directory of a tree for as long as the kernel may ask for it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The tree's own directory.
    pub const ROOT: Self = Self(1);
}

/// What a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeKind {
    /// Holds other nodes.
    Directory,
    /// Is a device.
    File {
        /// Size in bytes.
        size_bytes: u64,
        /// Says whether opening it for writing is refused.
        is_read_only: bool,
    },
}

/// A file or directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its identity.
    pub id: NodeId,
    /// What it is.
    pub kind: NodeKind,
    /// The time that is shown for it.
    pub modified: Timestamp,
}

/// A node in its directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedNode {
    /// Its name, without slashes.
    pub name: OsString,
    /// The node itself.
    pub node: Node,
    /// Goes into `after` to list what follows this one. Above 0, below 2^62, and rising; stable
    /// while the directory changes.
    pub cursor: u64,
}

/// Why a tree refused.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// There is no such name or node, or no longer.
    #[error("no such file")]
    NotFound,
    /// A directory was needed.
    #[error("not a directory")]
    NotADirectory,
    /// A file was needed.
    #[error("is a directory")]
    IsADirectory,
    /// The file cannot be written.
    #[error("file is read-only")]
    ReadOnly,
    /// The file is in exclusive use.
    #[error("file is in use")]
    Busy,
    /// The device behind the file failed.
    #[error(transparent)]
    Device(#[from] BlockError),
    /// The product failed to resolve it.
    #[error("{message}")]
    Failed {
        /// The operating system's error number, 0 when there is none.
        errno: i32,
        /// What went wrong.
        message: String,
    },
}

impl TreeError {
    /// The error number that a process is told.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::ReadOnly => libc::EROFS,
            Self::Busy => libc::EBUSY,
            Self::Device(error) => error.errno(),
            Self::Failed { errno, .. } if *errno != 0 => *errno,
            Self::Failed { .. } => libc::EIO,
        }
    }
}

/// The names of a FUSE tree.
///
/// All calls come from a small pool of threads that carries no data, so that they may take some
/// milliseconds. They must end on their own, and must touch no file of the same tree.
pub trait Tree: Send + Sync {
    /// Finds a name in a directory.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`, or what resolving it needs.
    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Node, TreeError>;

    /// Describes a node.
    ///
    /// # Errors
    /// `NotFound` when it has gone.
    fn node(&self, id: NodeId) -> Result<Node, TreeError>;

    /// Lists up to `limit` nodes that follow the cursor `after`; 0 starts. Empty at the end.
    ///
    /// # Errors
    /// `NotADirectory`, or what listing it needs.
    fn list(
        &self,
        directory: NodeId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError>;

    /// Resolves a file to its device, which stays the same until [`Tree::close`] of it.
    ///
    /// # Errors
    /// `ReadOnly`, `Busy`, `IsADirectory`, or what resolving it needs.
    fn open(&self, file: NodeId, want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError>;

    /// The plain file whose bytes are those of the device, at the same places, where there is
    /// one: the kernel then reads and writes it without asking. Asked after each success of
    /// [`Tree::open`]; while the file is open, the first answer counts.
    fn plain_file(&self, _file: NodeId) -> Option<File> {
        None
    }

    /// Gives back a device of [`Tree::open`], once for each success. No request is in flight,
    /// unless somebody aborted the connection.
    fn close(&self, file: NodeId, device: Arc<dyn BlockDevice>);

    /// Extended attributes; each name is shown below `user.afterimage.`.
    fn attributes(&self, id: NodeId) -> Vec<(String, Vec<u8>)>;

    /// The kernel knows the node no longer: it will be looked up again before it is used again.
    /// Lets a tree that makes nodes on lookup bound its memory.
    fn forget(&self, _id: NodeId) {}
}
