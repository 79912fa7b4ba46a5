//! Plain files behind files of the tree: the kernel reads and writes them itself (passthrough).
//!
//! Invariants:
//! * while a node is open that way, each further open of it gets the same backing file: the
//!   kernel refuses any other;
//! * a backing file is given up when the last handle with it ends.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::tree::NodeId;

/// `FUSE_DEV_IOC_BACKING_OPEN`.
const BACKING_OPEN: u64 = 0x4010_E501;
/// `FUSE_DEV_IOC_BACKING_CLOSE`.
const BACKING_CLOSE: u64 = 0x4004_E502;

/// `fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    descriptor: i32,
    flags: u32,
    padding: u64,
}

const _: () = assert!(size_of::<BackingMap>() == 16);

/// A file that the kernel knows as a backing file.
pub(super) struct Backing {
    fuse: Arc<File>,
    id: i32,
}

impl Backing {
    fn open(fuse: &Arc<File>, file: &File) -> io::Result<Self> {
        let map = BackingMap {
            descriptor: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        };
        // SAFETY: the argument has the kernel's layout and outlives the call.
        #[allow(unsafe_code)]
        let id = unsafe { libc::ioctl(fuse.as_raw_fd(), BACKING_OPEN, &raw const map) };
        if id < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            fuse: Arc::clone(fuse),
            id,
        })
    }

    /// What an answer to `open` calls it.
    pub(super) fn id(&self) -> i32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the argument is a number that outlives the call.
        #[allow(unsafe_code)]
        let result =
            unsafe { libc::ioctl(self.fuse.as_raw_fd(), BACKING_CLOSE, &raw const self.id) };
        if result < 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, id = self.id, "a backing file was gone already");
        }
    }
}

/// The backing files of a mount.
#[derive(Default)]
pub(super) struct Backings {
    /// The connection, when the kernel agreed to passthrough.
    fuse: OnceLock<Arc<File>>,
    open: Mutex<HashMap<NodeId, Weak<Backing>>>,
}

impl Backings {
    /// Allows backing files, on a connection whose kernel agreed to them.
    pub(super) fn allow(&self, fuse: File) {
        // Called once for each connection.
        let _first = self.fuse.set(Arc::new(fuse));
    }

    /// The backing file that a node is to be opened with: the one it has, or `plain` as a new one.
    pub(super) fn get(
        &self,
        node: NodeId,
        plain: impl FnOnce() -> Option<File>,
    ) -> Option<Arc<Backing>> {
        let fuse = self.fuse.get()?;
        let mut open = self.open.lock();
        if let Some(backing) = open.get(&node).and_then(Weak::upgrade) {
            return Some(backing);
        }
        match Backing::open(fuse, &plain()?) {
            Ok(backing) => {
                let backing = Arc::new(backing);
                open.retain(|_, backing| backing.strong_count() > 0);
                open.insert(node, Arc::downgrade(&backing));
                Some(backing)
            }
            Err(error) => {
                // Such as a file system that is stacked on another: the file is served as ever.
                tracing::debug!(%error, "the kernel takes no backing file");
                None
            }
        }
    }
}
