//! Watches the sizes of the sources. A disk grows with its source while it is in use; a source
//! that shrank is shown, and nothing that was sent of it is lost.
//!
//! Invariants
//! * The device in front of a source grows only after the record of its growth has an LSN, so that
//!   every write to the new space comes after that record.
//! * Unless the source says that the new space is all zero, the disk grows inside the batch that
//!   compares it: no state is shown that the source never had.
//! * The new size is saved once its record is acknowledged; until then every new epoch, and every
//!   restart, records it again.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_blockdev::{BatchId, BlockDevice, BlockOp, ErrorClass, wait};
use afterimage_cache::RecordKind;

use super::disk::{Disk, Grown};
use super::{Machine, source};
use crate::config::ms;
use crate::error::AgentError;
use crate::export::TapTree;
use crate::order::{Draft, Payload};
use crate::tap::Tap;

/// How long a person waits for a disk that has to grow inside a batch.
const GROW_WAIT: Duration = Duration::from_secs(10);
/// How long the kernel may take to see a file's new size.
const SIZE_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What a look at a source found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Look {
    /// The disk has the size of its source.
    Settled,
    /// It will have it with the next batch.
    Waits,
    /// The source is smaller.
    Shrunk { known_bytes: u64, found_bytes: u64 },
}

impl Machine {
    /// Starts the thread that looks; it ends when the agent stops.
    pub(super) fn start_watcher(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        let machine = Arc::clone(self);
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || machine.watch())
    }

    fn watch(&self) {
        let interval = ms(self.config.tap.size_check_ms);
        let mut next = Instant::now() + interval;
        while !self.is_stopping() {
            self.watcher_bell.wait_until(next);
            next = Instant::now() + interval;
            for disk in self.disks() {
                if self.is_stopping() {
                    return;
                }
                if let Err(error) = self.look(&disk) {
                    tracing::error!(%error, disk = disk.name(), "the disk does not grow");
                }
            }
        }
    }

    /// Looks at the size of a disk's source now, and lets disk and device follow.
    ///
    /// # Errors
    /// `NoSuchDisk`, `Shrunk`, `GrowsLater`, or what source and device say.
    pub fn grow(&self, name: &str) -> Result<Arc<Disk>, AgentError> {
        let missing = || AgentError::NoSuchDisk {
            name: name.to_owned(),
        };
        let disk = self.disk_named(name).ok_or_else(missing)?;
        if disk.tap.is_none() {
            let (path, what) = (
                disk.saved.lock().source.clone(),
                disk.state.lock().trouble.clone(),
            );
            return Err(AgentError::Source {
                path: path.into(),
                what,
                class: ErrorClass::Operator,
            });
        }
        let until = Instant::now() + GROW_WAIT;
        loop {
            let changes = self.outbox.changes();
            let name = || disk.name();
            match self.look(&disk)? {
                Look::Settled => return Ok(disk),
                Look::Shrunk {
                    known_bytes,
                    found_bytes,
                } => {
                    return Err(AgentError::Shrunk {
                        name: name(),
                        known_bytes,
                        found_bytes,
                    });
                }
                Look::Waits => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_stopping() || !self.is_streaming() {
                let reason = if self.is_streaming() {
                    "a copy is under way"
                } else {
                    "the appliance is not connected"
                };
                return Err(AgentError::GrowsLater {
                    name: name(),
                    reason: reason.to_owned(),
                });
            }
            self.outbox.wait(changes, left);
        }
    }

    fn look(&self, disk: &Arc<Disk>) -> Result<Look, AgentError> {
        let _changing = self.changing.lock();
        let name = disk.name();
        if self.disk(disk.id).is_none() {
            return Err(AgentError::NoSuchDisk { name });
        }
        let (Some(tap), Some(file)) = (&disk.tap, &disk.file) else {
            // What keeps it from being opened is shown; only a restart tries again.
            return Ok(Look::Settled);
        };
        let geometry = tap.geometry();
        let shown = geometry.size_bytes;
        let found = match source::size(file, geometry.logical_block_bytes) {
            Ok(found) if found < shown => {
                self.shrank(disk, found, shown)?;
                return Ok(Look::Shrunk {
                    known_bytes: shown,
                    found_bytes: found,
                });
            }
            Ok(found) => found,
            Err(error) => {
                disk.state.lock().trouble = format!("its size cannot be read: {error}");
                let path = disk.saved.lock().source.clone();
                return Err(AgentError::file("read the size of", path)(error));
            }
        };
        self.came_back(disk, tap, shown)?;
        if found > shown && !self.grow_tap(disk, tap, shown, found)? {
            return Ok(Look::Waits);
        }
        disk.state.lock().wants_bytes = None;
        self.record_growth_of(disk);
        self.widen_device(disk)?;
        Ok(Look::Settled)
    }

    fn shrank(&self, disk: &Disk, found_bytes: u64, known_bytes: u64) -> Result<(), AgentError> {
        let error = AgentError::Shrunk {
            name: disk.name(),
            known_bytes,
            found_bytes,
        };
        let is_news = disk.saved.lock().note_shrunk(found_bytes);
        disk.state.lock().trouble = format!("{error}; {}", error.hint());
        if is_news {
            tracing::error!(%error, "the source lost its end");
            self.save_disks()?;
            self.report_now();
        }
        Ok(())
    }

    /// The source has its size. What was cut off meanwhile reads as something else now, so that it
    /// is compared.
    fn came_back(&self, disk: &Disk, tap: &Tap, size_bytes: u64) -> Result<(), AgentError> {
        disk.state.lock().trouble.clear();
        let Some(lowest) = disk.saved.lock().shrunk_bytes else {
            return Ok(());
        };
        if let Some(capture) = tap.captured_by() {
            capture.activity.taint_new(&(lowest..size_bytes));
            capture.activity.commit();
        }
        disk.saved.lock().shrunk_bytes = None;
        self.save_disks()?;
        self.outbox.nudge();
        self.report_now();
        Ok(())
    }

    /// Lets a tap grow now, or asks for a batch to do it in; says whether it has grown.
    fn grow_tap(
        &self,
        disk: &Disk,
        tap: &Arc<Tap>,
        old_bytes: u64,
        new_bytes: u64,
    ) -> Result<bool, AgentError> {
        let is_captured = tap.captured_by().is_some();
        if !is_captured && disk.saved.lock().is_protected {
            // Its first batch is about to begin; the size was declared for that.
            return Ok(false);
        }
        let may_hold_data = |file| source::may_hold_data(file, &(old_bytes..new_bytes));
        if is_captured && disk.file.as_ref().is_none_or(may_hold_data) {
            disk.state.lock().wants_bytes = Some(new_bytes);
            self.outbox.nudge();
            return Ok(false);
        }
        let op = BlockOp::Grow {
            size_bytes: new_bytes,
        };
        wait::device(tap.as_ref(), op)?;
        tracing::info!(disk = disk.name(), old_bytes, new_bytes, "the disk grew");
        if !is_captured {
            disk.saved.lock().size_bytes = new_bytes;
            self.save_disks()?;
        }
        Ok(true)
    }

    /// Disks that grow with the next batch, and their sizes.
    pub(crate) fn take_waiting_growths(&self) -> Vec<(Arc<Disk>, u64)> {
        let grows = |disk: Arc<Disk>| {
            let size_bytes = disk.state.lock().wants_bytes.take()?;
            Some((disk, size_bytes))
        };
        self.disks().into_iter().filter_map(grows).collect()
    }

    /// Lets a disk grow inside the batch that has just begun, which compares the new space.
    pub(crate) fn grow_in_batch(&self, disk: &Disk, new_bytes: u64) {
        let Some(tap) = &disk.tap else { return };
        let Some(capture) = tap.captured_by() else {
            return;
        };
        let old_bytes = tap.geometry().size_bytes;
        if new_bytes <= old_bytes {
            return;
        }
        capture.activity.grow(new_bytes);
        capture.activity.taint_new(&(old_bytes..new_bytes));
        let op = BlockOp::Grow {
            size_bytes: new_bytes,
        };
        match wait::device(tap.as_ref(), op) {
            Ok(_) => tracing::info!(disk = disk.name(), old_bytes, new_bytes, "the disk grew"),
            Err(error) => {
                tracing::error!(disk = disk.name(), %error, "the disk does not grow");
                // There is nothing to compare.
                let new = old_bytes..new_bytes;
                capture
                    .activity
                    .clear(core::slice::from_ref(&new), u64::MAX);
            }
        }
        self.outbox.nudge();
        self.watcher_bell.ring();
    }

    /// Records the size of every disk that the appliance may not know.
    pub(crate) fn record_growth(&self) {
        for disk in self.disks() {
            self.record_growth_of(&disk);
        }
    }

    fn record_growth_of(&self, disk: &Disk) {
        let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) else {
            return;
        };
        let (size_bytes, generation) = (disk.size_bytes(), self.generation());
        let known_bytes = disk.saved.lock().size_bytes;
        let grown = disk.state.lock().grown;
        let is_recorded = grown
            .is_some_and(|grown| grown.size_bytes == size_bytes && grown.generation == generation);
        if size_bytes <= known_bytes || is_recorded {
            return;
        }
        let draft = Draft {
            kind: RecordKind::Grow,
            disk: Some((disk.id, capture.place)),
            offset: 0,
            length: size_bytes,
            batch: BatchId(0),
            argument: 0,
            payload: Payload::Note(Vec::new()),
        };
        let cost = draft.cost();
        // Without a flow it is recorded when the flow begins again.
        let Some(lsn) = self.order.append([draft], || ()) else {
            return;
        };
        self.admission.settle(0, cost);
        disk.state.lock().grown = Some(Grown {
            size_bytes,
            lsn,
            generation,
        });
    }

    /// Saves the sizes that the appliance has acknowledged.
    pub(super) fn settle_growth(&self) -> Result<(), AgentError> {
        let (acknowledged, generation) = (self.acknowledged(), self.generation());
        let mut has_changed = false;
        for disk in self.disks() {
            let mut state = disk.state.lock();
            let is_known =
                |grown: &mut Grown| grown.generation == generation && grown.lsn <= acknowledged;
            if let Some(grown) = state.grown.take_if(is_known) {
                disk.saved.lock().size_bytes = grown.size_bytes;
                has_changed = true;
            }
        }
        if has_changed {
            self.save_disks()
        } else {
            Ok(())
        }
    }

    /// Gives file and device of a disk its present size, while they are in use.
    fn widen_device(&self, disk: &Disk) -> Result<(), AgentError> {
        let size_bytes = disk.size_bytes();
        let state = disk.state.lock();
        let Some(device) = &state.device else {
            return Ok(());
        };
        let name = disk.name();
        let until = Instant::now() + SIZE_WAIT;
        while device.size_bytes()? < size_bytes {
            let mount = self.mount.lock();
            let (Some(mount), Some(node)) = (mount.as_ref(), self.tree.node_of(&name)) else {
                return Ok(());
            };
            mount.invalidate_node(node)?;
            // The kernel asks for the size again, and may drop the answer when a write overtook it.
            let file = self.state.path("fuse").join(TapTree::file_name(&name));
            let seen = file
                .metadata()
                .map_err(AgentError::file("look at", &file))?;
            if seen.len() >= size_bytes {
                device.resize()?;
            }
            if device.size_bytes()? < size_bytes {
                if Instant::now() >= until {
                    let reason = format!("{} keeps its old size", device.path().display());
                    return Err(AgentError::GrowsLater { name, reason });
                }
                std::thread::sleep(LOOK_AGAIN);
            }
        }
        Ok(())
    }
}
