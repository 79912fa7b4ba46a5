//! Begins the protection of a disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Disk, Machine};
use crate::activity::Activity;
use crate::error::AgentError;
use crate::tap::Capture;

/// How long the appliance may take to answer for a disk.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

impl Machine {
    /// Begins to protect a disk: the appliance gives it a key, and a copy is made while writes go
    /// on. Returns when that is settled, not when the copy is made.
    ///
    /// # Errors
    /// `NoSuchDisk`, `NotConnected`, or the appliance's refusal.
    pub fn protect(&self, name: &str) -> Result<Arc<Disk>, AgentError> {
        let _changing = self.changing.lock();
        let missing = || AgentError::NoSuchDisk {
            name: name.to_owned(),
        };
        let disk = self.disk_named(name).ok_or_else(missing)?;
        if disk.saved.lock().is_protected || disk.tap.is_none() {
            return Ok(disk);
        }
        disk.state.lock().wants_protection = true;
        let result = self
            .declare(&disk)
            .and_then(|()| self.begin_protection(&disk));
        disk.state.lock().wants_protection = false;
        if result.is_err() {
            // The appliance may have ended the stream because of this disk alone.
            self.retry_now.notify_one();
        }
        result.map(|()| disk)
    }

    fn declare(&self, disk: &Disk) -> Result<(), AgentError> {
        {
            let mut link = self.link.lock();
            if !link.is_streaming {
                return Err(AgentError::NotConnected {
                    reason: link.reason.clone(),
                });
            }
            link.refusal = None;
            link.declares.push(disk.description());
        }
        self.wake.notify_one();
        let until = Instant::now() + ANSWER_WAIT;
        loop {
            let changes = self.outbox.changes();
            if disk.state.lock().answer.is_some() {
                return Ok(());
            }
            let link = self.link.lock();
            if let Some(refusal) = &link.refusal {
                return Err(AgentError::Appliance(afterimage_protocol::rest::ApiError {
                    class: refusal.class,
                    message: refusal.message.clone(),
                    hint: refusal.hint.clone(),
                }));
            }
            let reason = link.reason.clone();
            let is_over = !link.is_streaming || self.is_stopping();
            drop(link);
            let left = until.saturating_duration_since(Instant::now());
            if is_over || left.is_zero() {
                return Err(AgentError::NotConnected { reason });
            }
            self.outbox.wait(changes, left);
        }
    }

    fn begin_protection(&self, disk: &Arc<Disk>) -> Result<(), AgentError> {
        let is_new = !disk.saved.lock().is_copied;
        let capture = self.make_capture(disk, is_new)?;
        if !is_new {
            // It was written to while nobody looked.
            capture.activity.taint_all();
            capture.activity.commit();
        }
        disk.saved.lock().is_protected = true;
        if let Err(error) = self.save_disks() {
            disk.saved.lock().is_protected = false;
            self.activity.remove(&capture.activity);
            return Err(error);
        }
        self.waiting_captures
            .lock()
            .push((Arc::clone(disk), capture));
        self.outbox.nudge();
        Ok(())
    }

    /// Makes what captures a disk; it does not capture yet.
    pub(super) fn make_capture(
        &self,
        disk: &Disk,
        is_new: bool,
    ) -> Result<Arc<Capture>, AgentError> {
        let Some(tap) = &disk.tap else {
            return Err(AgentError::NoSuchDisk { name: disk.name() });
        };
        let source = Arc::clone(tap.source());
        let path = self.state.path("activity").join(disk.id.to_string());
        let (activity, opened) = Activity::open(
            &path,
            disk.id,
            disk.size_bytes(),
            is_new,
            self.activity.bell(),
            Arc::clone(&self.acknowledged),
        )?;
        if opened.marked > 0 {
            let name = disk.name();
            tracing::info!(
                disk = name,
                regions = opened.marked,
                "marked regions are compared"
            );
        }
        if !opened.reason.is_empty() {
            tracing::warn!(
                disk = disk.name(),
                reason = opened.reason,
                "more is compared"
            );
        }
        self.activity
            .add(Arc::clone(&activity), Arc::clone(&source));
        Ok(Arc::new(Capture {
            disk: disk.id,
            place: self.order.add_disk(),
            source,
            order: Arc::clone(&self.order),
            admission: Arc::clone(&self.admission),
            activity,
            ranges: crate::tap::ranges::RangeLock::default(),
            events: Arc::<super::Bridge>::clone(&self.bridge),
        }))
    }
}
