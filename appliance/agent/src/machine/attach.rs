//! Puts taps in front of sources, and takes them away.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, DiskId};
use afterimage_export::{ExportError, LoopDevice, LoopOptions};
use afterimage_protocol::rest::agent::AttachDisk;
use parking_lot::Mutex;

use super::disk::{Disk, DiskState};
use super::{Machine, source};
use crate::config::ms;
use crate::error::AgentError;
use crate::export::TapTree;
use crate::state::disks::{SavedDisk, SavedDisks};
use crate::tap::Tap;

/// Longest name of a disk, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// Accepts a name that can be a file, a link and a part of a reference.
pub(crate) fn check_name(name: &str) -> Result<(), AgentError> {
    let is_legal = (1..=NAME_BYTES_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if is_legal {
        Ok(())
    } else {
        Err(AgentError::Name {
            name: name.to_owned(),
        })
    }
}

impl Machine {
    /// Attaches a disk: a device in front of its source, not yet captured.
    ///
    /// # Errors
    /// When the name is taken, or the source missing, in use or tapped already.
    pub fn attach(&self, request: &AttachDisk) -> Result<Arc<Disk>, AgentError> {
        let _changing = self.changing.lock();
        check_name(&request.name)?;
        if self.disk_named(&request.name).is_some() {
            return Err(AgentError::NameTaken {
                name: request.name.clone(),
            });
        }
        let path = source::find(&request.source)?;
        for disk in self.disks() {
            let saved = disk.saved.lock();
            if source::is_same(saved.source.as_ref(), &path) {
                let what = format!("it is attached as {} already", saved.name);
                let class = afterimage_blockdev::ErrorClass::Refused;
                return Err(AgentError::Source { path, what, class });
            }
        }
        let opened = source::open(&path, &self.config.tap)?;
        let geometry = opened.device.geometry();
        let known = self.known_disk(&request.name)?;
        if let Some(known) = &known
            && known.size_bytes > geometry.size_bytes
        {
            return Err(AgentError::Shrunk {
                name: request.name.clone(),
                known_bytes: known.size_bytes,
                found_bytes: geometry.size_bytes,
            });
        }
        let saved = SavedDisk {
            disk: known
                .as_ref()
                .map_or_else(|| DiskId(self.entropy.identity()), |k| k.disk),
            name: request.name.clone(),
            source: path.display().to_string(),
            size_bytes: geometry.size_bytes,
            logical_block_bytes: geometry.logical_block_bytes,
            is_attached: true,
            is_protected: false,
            is_copied: known.as_ref().is_some_and(|known| known.is_copied),
            shrunk_bytes: known.and_then(|known| known.shrunk_bytes),
        };
        let disk = Arc::new(Disk {
            id: saved.disk,
            saved: Mutex::new(saved),
            state: Mutex::new(DiskState::default()),
            tap: Some(Tap::new(opened.device)),
            file: Some(opened.file),
        });
        self.expose(&disk)?;
        self.disks.lock().push(Arc::clone(&disk));
        if let Err(error) = self.save_disks() {
            self.disks.lock().retain(|other| other.id != disk.id);
            self.hide(&disk)?;
            return Err(error);
        }
        Ok(disk)
    }

    /// A disk of that name that was attached once.
    fn known_disk(&self, name: &str) -> Result<Option<SavedDisk>, AgentError> {
        let saved = SavedDisks::load(&self.state)?;
        Ok(saved.disks.into_iter().find(|disk| disk.name == name))
    }

    /// Gives a disk its file, device and link.
    pub(super) fn expose(&self, disk: &Disk) -> Result<(), AgentError> {
        let Some(tap) = &disk.tap else { return Ok(()) };
        let name = disk.name();
        let device: Arc<dyn BlockDevice> = Arc::<Tap>::clone(tap);
        self.tree.add(&name, device);
        let exposed = self.attach_loop(&name, tap.geometry().logical_block_bytes);
        match exposed {
            Ok(device) => {
                disk.state.lock().device = Some(device);
                Ok(())
            }
            Err(error) => {
                self.tree.remove(&name);
                Err(error)
            }
        }
    }

    fn attach_loop(&self, name: &str, block_bytes: u32) -> Result<LoopDevice, AgentError> {
        let file = self.state.path("fuse").join(TapTree::file_name(name));
        let options = LoopOptions {
            logical_block_bytes: block_bytes,
            ..LoopOptions::default()
        };
        let device = LoopDevice::attach(&file, options)?;
        let link = self.link_path(name);
        let make = || {
            fs::create_dir_all(&self.config.paths.link_dir)?;
            match fs::remove_file(&link) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            symlink(device.path(), &link)
        };
        make().map_err(AgentError::file("make the link", &link))?;
        Ok(device)
    }

    /// Takes file, device and link away.
    ///
    /// # Errors
    /// `InUse`; everything then stays.
    pub(super) fn hide(&self, disk: &Disk) -> Result<(), AgentError> {
        let name = disk.name();
        let device = disk.state.lock().device.take();
        if let Some(mut device) = device {
            let path = device.path().display().to_string();
            if let Err(error) = device.detach(ms(self.config.tap.detach_wait_ms)) {
                disk.state.lock().device = Some(device);
                return Err(match error {
                    ExportError::Busy { user, .. } => AgentError::InUse { device: path, user },
                    error => error.into(),
                });
            }
        }
        self.tree.remove(&name);
        match fs::remove_file(self.link_path(&name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, disk = name, "the link stays");
            }
            _ => {}
        }
        Ok(())
    }

    /// Detaches a disk. Its identity is remembered, so that it may come back under its name.
    ///
    /// # Errors
    /// `NoSuchDisk`, or `InUse` while its device is.
    pub fn detach(&self, name: &str) -> Result<(), AgentError> {
        let _changing = self.changing.lock();
        let missing = || AgentError::NoSuchDisk {
            name: name.to_owned(),
        };
        let disk = self.disk_named(name).ok_or_else(missing)?;
        self.hide(&disk)?;
        if let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) {
            self.activity.remove(&capture.activity);
        }
        disk.saved.lock().is_attached = false;
        self.save_disks()?;
        self.disks.lock().retain(|other| other.id != disk.id);
        Ok(())
    }

    /// Writes the disks down, and those that were attached once.
    pub(super) fn save_disks(&self) -> Result<(), AgentError> {
        let _saving = self.saving_disks.lock();
        let mut saved = SavedDisks::load(&self.state)?;
        for disk in self.disks() {
            let now = disk.saved.lock().clone();
            match saved.disks.iter_mut().find(|known| known.disk == now.disk) {
                Some(known) => *known = now,
                None => saved.disks.push(now),
            }
        }
        saved.save(&self.state)
    }
}
