//! The keys that the appliance gave for the machine's disks.

use std::collections::HashMap;

use afterimage_blockdev::DiskId;
use afterimage_cache::{DiskKey, TagKey};
use parking_lot::RwLock;

/// See the module's text.
#[derive(Default)]
pub struct Keys {
    tag: RwLock<Option<TagKey>>,
    disks: RwLock<HashMap<DiskId, DiskKey>>,
}

impl Keys {
    /// Takes the key of the content tags.
    pub fn set_tag(&self, key: TagKey) {
        *self.tag.write() = Some(key);
    }

    /// The key of the content tags.
    #[must_use]
    pub fn tag(&self) -> Option<TagKey> {
        self.tag.read().clone()
    }

    /// Takes a disk's key.
    pub fn set_disk(&self, disk: DiskId, key: DiskKey) {
        self.disks.write().insert(disk, key);
    }

    /// A disk's key.
    #[must_use]
    pub fn disk(&self, disk: DiskId) -> Option<DiskKey> {
        self.disks.read().get(&disk).cloned()
    }
}
