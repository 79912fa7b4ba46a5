//! An orderly stop: what was captured is sent, sources are flushed, marks are taken away, so that
//! the next start has nothing to compare.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Machine;
use crate::activity::worker::settle;
use crate::config::ms;

impl Machine {
    /// Takes the devices away and waits, up to the configured time, until the appliance has
    /// everything. The connection must still be served meanwhile; end it afterwards.
    pub fn drain(&self) {
        for disk in self.disks() {
            if let Err(error) = self.hide(&disk) {
                tracing::warn!(%error, disk = disk.name(), "the device stays until it is free");
            }
        }
        let until = Instant::now() + ms(self.config.state.stop_wait_ms);
        loop {
            let changes = self.outbox.changes();
            let (captured, _) = self.order.captured();
            let left = until.saturating_duration_since(Instant::now());
            if self.acknowledged() >= captured || left.is_zero() || !self.is_streaming() {
                break;
            }
            self.outbox.wait(changes, left);
        }
        for disk in self.disks() {
            let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) else {
                continue;
            };
            if let Err(error) = settle(&capture.activity, capture.source.as_ref()) {
                tracing::warn!(%error, disk = disk.name(), "the source cannot be flushed");
            }
        }
    }

    /// Tells threads and connection to end.
    pub fn begin_stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        self.keeper_bell.ring();
        self.watcher_bell.ring();
        self.outbox.nudge();
        self.wake.notify_one();
        self.retry_now.notify_one();
    }

    /// Ends the threads and saves the counters.
    pub fn stop(&self) {
        self.begin_stop();
        if let Err(error) = self.save_counters() {
            tracing::error!(%error, "the counters cannot be saved");
        }
        let threads = [&self.replicator, &self.keeper, &self.watcher];
        for thread in threads.map(|thread| thread.lock().take()) {
            let _panicked = thread.map(std::thread::JoinHandle::join);
        }
        // A device that is still in use goes with its last user.
        for disk in self.disks() {
            drop(disk.state.lock().device.take());
        }
        if let Some(mut mount) = self.mount.lock().take()
            && let Err(error) = mount.unmount()
        {
            tracing::warn!(%error, "the taps stay mounted until they are free");
        }
        self.order.close();
        if let Some(pool) = self.seal_pool.lock().take() {
            pool.join();
        }
    }
}
