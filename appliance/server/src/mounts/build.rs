//! The steps of one mount, and their way back.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{BlockDevice, ErrorClass};
use afterimage_export::probe::{self, Partition};
use afterimage_export::{Found, FsKind, LoopDevice, LoopOptions, mount_filesystem, unmount};
use afterimage_protocol::rest::ApiError;

use super::directory::{MountDirectory, export_error};
use super::tree::DiskTree;
use crate::appliance::api_error;

/// Smallest read of a device; enough to know that it answers.
const FIRST_BYTES: usize = 4096;

/// A device in the tree, with a loop device over it. Dropping it takes both away.
pub(super) struct Exported {
    id: u64,
    tree: Arc<DiskTree>,
    device: Arc<dyn BlockDevice>,
    attached: Option<LoopDevice>,
}

impl Exported {
    /// Makes a block device of `device`, and reads its first bytes.
    pub(super) fn attach(
        id: u64,
        tree: Arc<DiskTree>,
        device: Arc<dyn BlockDevice>,
        fuse_root: &Path,
    ) -> Result<Self, ApiError> {
        let geometry = device.geometry();
        let path = fuse_root.join(tree.add_mount(id, Arc::clone(&device)));
        let mut exported = Self {
            id,
            tree,
            device,
            attached: None,
        };
        let options = LoopOptions {
            is_read_only: geometry.is_read_only,
            logical_block_bytes: geometry.logical_block_bytes,
            ..LoopOptions::default()
        };
        let attached = LoopDevice::attach(&path, options).map_err(|error| export_error(&error))?;
        let node = attached.path();
        exported.attached = Some(attached);
        let wanted = FIRST_BYTES.min(usize::try_from(geometry.size_bytes).unwrap_or(FIRST_BYTES));
        let mut first = vec![0; wanted];
        File::open(&node)
            .and_then(|mut file| file.read_exact(&mut first))
            .map_err(|error| {
                api_error(
                    ErrorClass::Corrupt,
                    format!("{} cannot be read: {error}", node.display()),
                    "the log of afterimaged says why; `aft log verify` finds damage",
                )
            })?;
        Ok(exported)
    }

    /// The device node.
    pub(super) fn path(&self) -> PathBuf {
        self.attached
            .as_ref()
            .map(LoopDevice::path)
            .unwrap_or_default()
    }

    /// Mounts the file system that is on the device, or in its only mountable partition.
    pub(super) fn mount(&self, directory: &Path) -> Result<Mounted, ApiError> {
        let found = probe::device(&*self.device).map_err(|error| export_error(&error))?;
        if !found.kind.is_partition_table() {
            let path = self.path();
            mount_filesystem(&path, directory, found.kind, self.is_read_only())
                .map_err(|error| export_error(&error))?;
            return Ok(Mounted {
                kind: found.kind,
                notes: Vec::new(),
            });
        }
        let (partition, kind, notes) = self.only_filesystem(&found)?;
        let nodes = self.add_partition(&partition)?;
        mount_filesystem(&nodes, directory, kind, self.is_read_only())
            .map_err(|error| export_error(&error))?;
        Ok(Mounted { kind, notes })
    }

    fn is_read_only(&self) -> bool {
        self.device.geometry().is_read_only
    }

    fn add_partition(&self, partition: &Partition) -> Result<PathBuf, ApiError> {
        let missing = || api_error(ErrorClass::Operator, "the partition has no device node", "");
        let attached = self.attached.as_ref().ok_or_else(missing)?;
        let nodes = attached
            .add_partitions(std::slice::from_ref(partition))
            .map_err(|error| export_error(&error))?;
        nodes.into_iter().next().ok_or_else(missing)
    }

    /// Finds the one partition with a file system; otherwise says what there is.
    fn only_filesystem(&self, found: &Found) -> Result<(Partition, FsKind, Vec<String>), ApiError> {
        let mut mountable = Vec::new();
        let mut described = Vec::new();
        for partition in &found.partitions {
            let kind = probe::partition(&*self.device, partition)
                .map_or(FsKind::Unknown, |found| found.kind);
            described.push(format!(
                "partition {} holds {kind} ({} MiB)",
                partition.number,
                partition.size_bytes >> 20
            ));
            if kind.is_filesystem() {
                mountable.push((partition.clone(), kind));
            }
        }
        let count = mountable.len();
        match mountable.pop() {
            Some((partition, kind)) if count == 1 => {
                described.push(format!("partition {} is mounted", partition.number));
                Ok((partition, kind, described))
            }
            _ => Err(api_error(
                ErrorClass::Refused,
                format!(
                    "the disk has {}, and {count} of its partitions can be mounted: {}",
                    found.kind,
                    if described.is_empty() {
                        "none".to_owned()
                    } else {
                        described.join(", ")
                    }
                ),
                "take the device with --device, and mount the partition that you want",
            )),
        }
    }

    /// Detaches the loop device. On an error it is there as before.
    pub(super) fn detach(&mut self, busy_wait: Duration) -> Result<(), ApiError> {
        if let Some(attached) = &mut self.attached {
            attached
                .detach(busy_wait)
                .map_err(|error| export_error(&error))?;
        }
        self.attached = None;
        Ok(())
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        // The loop device first: it holds the file open.
        drop(self.attached.take());
        self.tree.remove_mount(self.id);
    }
}

/// What was mounted.
pub(super) struct Mounted {
    pub(super) kind: FsKind,
    pub(super) notes: Vec<String>,
}

/// Unmounts a directory. One that somebody else has unmounted is as good.
pub(super) fn unmount_directory(
    directory: &MountDirectory,
    busy_wait: Duration,
) -> Result<(), ApiError> {
    match unmount(directory.path(), busy_wait) {
        Ok(()) | Err(afterimage_export::ExportError::NotMounted { .. }) => Ok(()),
        Err(error) => Err(export_error(&error)),
    }
}
