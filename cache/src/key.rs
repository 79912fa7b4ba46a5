//! Keys of disks and tenants.

use core::fmt;

use afterimage_blockdev::{DiskId, KeyId};

/// Encrypts the slots of one disk. Shown as `***` wherever it is printed.
#[derive(Clone, PartialEq, Eq)]
pub struct DiskKey {
    /// Generation of the key, scoped to the disk; not 0.
    pub id: KeyId,
    /// The secret.
    pub secret: [u8; 32],
}

impl fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskKey({}, ***)", self.id)
    }
}

/// Keys the content tags of one tenant (or of one machine, when its keys are end-to-end).
#[derive(Clone, PartialEq, Eq)]
pub struct TagKey(pub [u8; 32]);

impl fmt::Debug for TagKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TagKey(***)")
    }
}

/// Finds the secret of a disk's key.
pub trait KeySource: Send + Sync {
    /// The key, or `None` when this side does not hold it.
    fn disk_key(&self, disk: DiskId, key: KeyId) -> Option<DiskKey>;
}
