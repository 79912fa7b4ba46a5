//! The FUSE directory whose files are the taps.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, Clock, Timestamp};
use afterimage_export::fuse::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};
use parking_lot::RwLock;

struct Entry {
    id: NodeId,
    name: OsString,
    device: Arc<dyn BlockDevice>,
}

/// See the module's text.
pub struct TapTree {
    entries: RwLock<(u64, Vec<Entry>)>,
    made: Timestamp,
}

impl TapTree {
    /// An empty directory.
    #[must_use]
    pub fn new(clock: &dyn Clock) -> Arc<Self> {
        let first = NodeId::ROOT.0 + 1;
        Arc::new(Self {
            entries: RwLock::new((first, Vec::new())),
            made: clock.wall(),
        })
    }

    /// Name of a disk's file.
    #[must_use]
    pub fn file_name(disk: &str) -> String {
        format!("{disk}.img")
    }

    /// Adds a disk's file.
    pub fn add(&self, disk: &str, device: Arc<dyn BlockDevice>) {
        let mut entries = self.entries.write();
        let id = NodeId(entries.0);
        entries.0 += 1;
        entries.1.push(Entry {
            id,
            name: Self::file_name(disk).into(),
            device,
        });
    }

    /// Removes a disk's file.
    pub fn remove(&self, disk: &str) {
        let name = OsString::from(Self::file_name(disk));
        self.entries.write().1.retain(|entry| entry.name != name);
    }

    /// The node of a disk's file.
    #[must_use]
    pub fn node_of(&self, disk: &str) -> Option<NodeId> {
        let name = OsString::from(Self::file_name(disk));
        let id = self.find(|entry| entry.name == name, |entry| entry.id);
        id.ok()
    }

    fn root(&self) -> Node {
        Node {
            id: NodeId::ROOT,
            kind: NodeKind::Directory,
            modified: self.made,
        }
    }

    fn describe(&self, entry: &Entry) -> Node {
        let geometry = entry.device.geometry();
        let kind = NodeKind::File {
            size_bytes: geometry.size_bytes,
            is_read_only: geometry.is_read_only,
        };
        Node {
            id: entry.id,
            kind,
            modified: self.made,
        }
    }

    fn find<T>(
        &self,
        is_it: impl Fn(&Entry) -> bool,
        use_it: impl FnOnce(&Entry) -> T,
    ) -> Result<T, TreeError> {
        let entries = self.entries.read();
        entries
            .1
            .iter()
            .find(|entry| is_it(entry))
            .map(use_it)
            .ok_or(TreeError::NotFound)
    }
}

impl Tree for TapTree {
    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        if parent != NodeId::ROOT {
            return Err(TreeError::NotADirectory);
        }
        self.find(|entry| entry.name == name, |entry| self.describe(entry))
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        if id == NodeId::ROOT {
            return Ok(self.root());
        }
        self.find(|entry| entry.id == id, |entry| self.describe(entry))
    }

    fn list(
        &self,
        directory: NodeId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError> {
        if directory != NodeId::ROOT {
            return Err(TreeError::NotADirectory);
        }
        let entries = self.entries.read();
        let listed = |entry: &Entry| ListedNode {
            name: entry.name.clone(),
            node: self.describe(entry),
            cursor: entry.id.0,
        };
        let rest = entries.1.iter().filter(|entry| entry.id.0 > after);
        Ok(rest.take(limit).map(listed).collect())
    }

    fn open(&self, file: NodeId, want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError> {
        if file == NodeId::ROOT {
            return Err(TreeError::IsADirectory);
        }
        let device = self.find(|entry| entry.id == file, |entry| Arc::clone(&entry.device))?;
        if want_write && device.geometry().is_read_only {
            return Err(TreeError::ReadOnly);
        }
        Ok(device)
    }

    fn close(&self, _file: NodeId, _device: Arc<dyn BlockDevice>) {}

    fn attributes(&self, _id: NodeId) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }
}
