//! The thread that keeps the counters, and does what no other thread may wait for.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use afterimage_blockdev::Lsn;

use super::Machine;
use crate::config::ms;

impl Machine {
    /// Starts the keeper; it ends when the agent stops.
    pub(super) fn start_keeper(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        let machine = Arc::clone(self);
        std::thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || machine.keep())
    }

    fn keep(&self) {
        let interval = ms(self.config.state.save_interval_ms.max(1));
        let mut next = Instant::now() + interval;
        while !self.is_stopping() {
            self.keeper_bell.wait_until(next);
            if let Some(reason) = self.bridge.take_lost()
                && let Err(error) = self.restart_epoch(&reason, Lsn::ZERO)
            {
                tracing::error!(%error, "no new epoch can begin");
            }
            let is_due = Instant::now() >= next;
            if is_due {
                next = Instant::now() + interval;
            }
            if (is_due || self.is_low_on_lsns())
                && let Err(error) = self.save_counters()
            {
                tracing::error!(%error, "the counters cannot be saved");
                self.link.lock().reason = error.to_string();
            }
            if let Err(error) = self.settle_growth() {
                tracing::error!(%error, "after a restart the growth is recorded again");
            }
            self.show_reasons();
        }
    }

    fn is_low_on_lsns(&self) -> bool {
        let left = self
            .counters
            .lock()
            .1
            .reserved
            .0
            .saturating_sub(self.order.next().0);
        left < self.config.state.reserve_lsns / 2
    }

    /// Saves what changes all the time, and reserves LSNs ahead.
    pub(super) fn save_counters(&self) -> Result<(), crate::AgentError> {
        let reserve = self.config.state.reserve_lsns;
        let next = self.order.next();
        let acknowledged = self.acknowledged();
        let (_, last_time) = self.order.captured();
        let wall_offset_ns = self.clock.wall_offset_ns();
        let reserved = self.change_counters(|counters| {
            if counters.reserved.0.saturating_sub(next.0) < reserve / 2 {
                counters.reserved = Lsn(next.0 + reserve);
            }
            counters.acknowledged = counters.acknowledged.max(acknowledged);
            counters.last_time = counters.last_time.max(last_time);
            counters.wall_offset_ns = wall_offset_ns;
            counters.reserved
        })?;
        self.order.reserve(reserved);
        Ok(())
    }

    fn show_reasons(&self) {
        let is_flowing = self.order.is_flowing();
        for disk in self.disks() {
            let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) else {
                continue;
            };
            let mut reason = self.bridge.reason_of(disk.id, is_flowing);
            if capture.activity.is_broken() {
                reason = "the activity log cannot be written: after a crash the whole disk is \
                          compared"
                    .to_owned();
            }
            disk.state.lock().reason = reason;
        }
    }
}
