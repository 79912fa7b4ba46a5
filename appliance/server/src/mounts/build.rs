//! The steps of one mount, and their way back.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{BlockDevice, ErrorClass};
use afterimage_export::probe::{self, Partition};
use afterimage_export::{
    FsKind, LoopDevice, LoopOptions, MountFlags, MountedAs, mount_filesystem, unmount,
};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::MountOptions;

use super::branches::BranchUse;
use super::choose::{self, Chosen};
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
    /// The node of the partition that was named.
    chosen: Option<PathBuf>,
    /// Of a branch.
    using: Option<BranchUse>,
}

impl Exported {
    /// Makes a block device of `device`, and reads its first bytes.
    pub(super) fn attach(
        id: u64,
        tree: Arc<DiskTree>,
        device: Arc<dyn BlockDevice>,
        using: Option<BranchUse>,
        fuse_root: &Path,
    ) -> Result<Self, ApiError> {
        let geometry = device.geometry();
        let path = fuse_root.join(tree.add_mount(id, Arc::clone(&device)));
        let mut exported = Self {
            id,
            tree,
            device,
            attached: None,
            chosen: None,
            using,
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

    /// The device node that its user wants: that of a partition, when one was named.
    pub(super) fn node(&self) -> PathBuf {
        self.chosen.clone().unwrap_or_else(|| self.path())
    }

    /// Mounts the file system that is on the device, or in one of its partitions.
    pub(super) fn mount(
        &mut self,
        directory: &Path,
        options: &MountOptions,
    ) -> Result<Mounted, ApiError> {
        let Chosen {
            partition,
            kind,
            mut notes,
        } = choose::choose(&*self.device, options.partition)?;
        let node = match &partition {
            Some(partition) => self.add_partition(partition)?,
            None => self.path(),
        };
        let flags = MountFlags {
            is_read_only: options.is_read_only,
            is_device_read_only: self.device.geometry().is_read_only,
            allow_suid: options.allow_suid,
            allow_dev: options.allow_dev,
            allow_exec: options.allow_exec,
        };
        let mounted = mount_filesystem(&node, directory, kind, flags)
            .map_err(|error| export_error(&error))?;
        if mounted == MountedAs::NewIdentity {
            notes.push(
                "this kernel mounts no two file systems with one identity, so that this one was \
                 given another"
                    .to_owned(),
            );
        }
        Ok(Mounted { kind, notes })
    }

    /// Makes device nodes of partitions: of the one that was named, or of all but the members of
    /// LVM and md, which this machine might take up by itself.
    pub(super) fn show_partitions(&mut self, wanted: Option<u32>) -> Result<Vec<String>, ApiError> {
        let found = match probe::device(&*self.device) {
            Ok(found) => found,
            // The device is there all the same.
            Err(error) if wanted.is_none() => return Ok(vec![error.to_string()]),
            Err(error) => return Err(export_error(&error)),
        };
        if !found.kind.is_partition_table() && wanted.is_none() {
            return Ok(Vec::new());
        }
        let all = choose::held(&*self.device, &found);
        let mut notes = choose::describe(&all);
        if let Some(number) = wanted {
            let held = choose::numbered(all, number, found.kind)?;
            self.chosen = Some(self.add_partition(&held.partition)?);
            return Ok(notes);
        }
        notes.extend(
            all.iter()
                .map(choose::Held::advice)
                .filter(|line| !line.is_empty()),
        );
        let shown = all.into_iter().filter(|held| !held.is_member());
        let partitions: Vec<Partition> = shown.map(|held| held.partition).collect();
        match self.add_partitions(&partitions) {
            Ok(_) => {}
            // The whole device is of use without them.
            Err(error) => notes.push(format!("no device nodes of partitions: {error}")),
        }
        Ok(notes)
    }

    fn add_partitions(&self, partitions: &[Partition]) -> Result<Vec<PathBuf>, ApiError> {
        let missing = || api_error(ErrorClass::Operator, "the device is gone", "");
        let attached = self.attached.as_ref().ok_or_else(missing)?;
        attached
            .add_partitions(partitions)
            .map_err(|error| export_error(&error))
    }

    fn add_partition(&self, partition: &Partition) -> Result<PathBuf, ApiError> {
        let nodes = self.add_partitions(std::slice::from_ref(partition))?;
        nodes
            .into_iter()
            .next()
            .ok_or_else(|| api_error(ErrorClass::Operator, "the partition has no device node", ""))
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
        // Last: nothing is written any more, and what was written becomes durable.
        drop(self.using.take());
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
