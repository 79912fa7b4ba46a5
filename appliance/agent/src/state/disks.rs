//! The attached disks and their keys, as files.

use std::collections::BTreeMap;

use afterimage_blockdev::{DiskId, KeyId};
use afterimage_cache::{DiskKey, TagKey};
use serde::{Deserialize, Serialize};

use super::{StateDir, load_json, save_json};
use crate::error::AgentError;
use crate::pipeline::Keys;

/// One attached disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// Identity.
    pub disk: DiskId,
    /// Name.
    pub name: String,
    /// The image file or block device.
    pub source: String,
    /// The size that the appliance knows, or, unprotected, that was last seen.
    pub size_bytes: u64,
    /// Logical block when it was attached.
    pub logical_block_bytes: u32,
    /// It is attached; if not, it is remembered so that it may come back under its name.
    pub is_attached: bool,
    /// Writes are captured.
    pub is_protected: bool,
    /// A whole copy was acknowledged.
    pub is_copied: bool,
    /// The smallest size that the source had since it shrank; what lies behind is compared once
    /// the source has its size again.
    #[serde(default)]
    pub shrunk_bytes: Option<u64>,
}

impl SavedDisk {
    /// Remembers that the source shrank to so many bytes; says whether that is news.
    pub fn note_shrunk(&mut self, found_bytes: u64) -> bool {
        let lowest = self
            .shrunk_bytes
            .map_or(found_bytes, |bytes| bytes.min(found_bytes));
        self.shrunk_bytes.replace(lowest) != Some(lowest)
    }
}

/// All attached disks.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisks {
    /// Version of this file.
    pub version: u16,
    /// The disks, in the order in which they were attached.
    pub disks: Vec<SavedDisk>,
}

impl SavedDisks {
    /// Reads them.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn load(state: &StateDir) -> Result<Self, AgentError> {
        let path = state.path("disks.json");
        let disks: Self = load_json(&path)?.unwrap_or(Self {
            version: 1,
            disks: Vec::new(),
        });
        if disks.version != 1 {
            let what = format!("version {} is not known here", disks.version);
            return Err(AgentError::Damaged { path, what });
        }
        Ok(disks)
    }

    /// Writes them.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save(&self, state: &StateDir) -> Result<(), AgentError> {
        save_json(&state.path("disks.json"), self)
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedKeys {
    version: u16,
    tag: Option<[u8; 32]>,
    disks: BTreeMap<String, SavedKey>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedKey {
    id: u32,
    secret: [u8; 32],
}

/// Reads the keys, so that capture can go on while the appliance is away.
///
/// # Errors
/// When the file cannot be read or is damaged.
pub fn load_keys(state: &StateDir, keys: &Keys) -> Result<(), AgentError> {
    let saved: SavedKeys = load_json(&state.path("keys.json"))?.unwrap_or_default();
    if let Some(tag) = saved.tag {
        keys.set_tag(TagKey(tag));
    }
    for (disk, key) in saved.disks {
        let Ok(disk) = disk.parse() else { continue };
        keys.set_disk(
            disk,
            DiskKey {
                id: KeyId(key.id),
                secret: key.secret,
            },
        );
    }
    Ok(())
}

/// Writes the keys of these disks.
///
/// # Errors
/// When they cannot be written.
pub fn save_keys(
    state: &StateDir,
    keys: &Keys,
    disks: impl IntoIterator<Item = DiskId>,
) -> Result<(), AgentError> {
    let saved = |disk: DiskId| {
        let key = keys.disk(disk)?;
        Some((
            disk.to_string(),
            SavedKey {
                id: key.id.0,
                secret: key.secret,
            },
        ))
    };
    let saved = SavedKeys {
        version: 1,
        tag: keys.tag().map(|key| key.0),
        disks: disks.into_iter().filter_map(saved).collect(),
    };
    save_json(&state.path("keys.json"), &saved)
}
