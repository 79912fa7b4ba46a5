//! Partitions of a loop device, told to the kernel one by one. Not every kernel parses tables,
//! and a table from somebody's disk is better parsed here than there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::ExportError;
use crate::loop_device::{LoopDevice, device_number};
use crate::probe::Partition;
use crate::{ioctl, sys};

impl LoopDevice {
    /// Makes `/dev/loopNpM` of the partitions of a table, and gives their nodes in the same
    /// order. Earlier ones are removed first.
    ///
    /// # Errors
    /// `Busy` when an earlier partition is in use, or what the kernel says; then none of the new
    /// ones stays.
    pub fn add_partitions(&self, partitions: &[Partition]) -> Result<Vec<PathBuf>, ExportError> {
        let path = self.path();
        let failed = |source| explain("add partitions", &path, source);
        remove_all(&path).map_err(failed)?;
        let added = add_all(&path, partitions);
        if added.is_err() {
            remove_all(&path).map_err(failed)?;
        }
        added.map_err(failed)
    }

    /// Removes all `/dev/loopNpM`; the bytes stay.
    ///
    /// # Errors
    /// `Busy` when one is in use; others may be gone then.
    pub fn remove_partitions(&self) -> Result<(), ExportError> {
        let path = self.path();
        remove_all(&path).map_err(|source| explain("remove partitions", &path, source))
    }
}

/// Tells a partition in use from other failures.
pub(crate) fn explain(operation: &'static str, path: &Path, source: io::Error) -> ExportError {
    if source.raw_os_error() == Some(libc::EBUSY) {
        let user = "one of its partitions is mounted or open".to_owned();
        return ExportError::Busy {
            path: path.to_owned(),
            user,
        };
    }
    ExportError::system(operation, path, source)
}

fn add_all(path: &Path, partitions: &[Partition]) -> io::Result<Vec<PathBuf>> {
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let device = File::open(path)?;
    let mut nodes = Vec::with_capacity(partitions.len());
    for partition in partitions {
        let number = i32::try_from(partition.number).map_err(too_large)?;
        let start = i64::try_from(partition.start_bytes).map_err(too_large)?;
        let length = i64::try_from(partition.size_bytes).map_err(too_large)?;
        ioctl::add_partition(&device, number, start, length)?;
        nodes.push(ensure_node(path, partition.number)?);
    }
    Ok(nodes)
}

/// The node of a partition; made here where the kernel does not make it.
fn ensure_node(path: &Path, number: u32) -> io::Result<PathBuf> {
    let mut node = path.as_os_str().to_owned();
    node.push(format!("p{number}"));
    let node = PathBuf::from(node);
    if !node.exists() {
        let directory = list(path)
            .into_iter()
            .find_map(|(found, directory)| (found == number).then_some(directory))
            .ok_or(io::ErrorKind::NotFound)?;
        let (major, minor) = device_number(&directory.join("dev"))?;
        sys::make_block_node(&node, major, minor)?;
    }
    Ok(node)
}

/// The partitions that the kernel knows of a device: number and directory below `/sys`.
pub(crate) fn list(path: &Path) -> Vec<(u32, PathBuf)> {
    let Some(name) = path.file_name() else {
        return Vec::new();
    };
    let directory = Path::new("/sys/block").join(name);
    let Ok(entries) = fs::read_dir(&directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let directory = entry.ok()?.path();
            let number = fs::read_to_string(directory.join("partition")).ok()?;
            Some((number.trim().parse().ok()?, directory))
        })
        .collect()
}

/// Removes all partitions that the kernel knows of a device.
pub(crate) fn remove_all(path: &Path) -> io::Result<()> {
    let partitions = list(path);
    if partitions.is_empty() {
        return Ok(());
    }
    let device = File::open(path)?;
    for (number, _) in partitions {
        let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidData)?;
        match ioctl::remove_partition(&device, number) {
            // Somebody else was quicker.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
            other => other?,
        }
    }
    Ok(())
}
