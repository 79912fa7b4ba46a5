//! What the captured writes of one disk share.

use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, DiskId};

use super::admission::Admission;
use super::ranges::RangeLock;
use crate::activity::Activity;
use crate::order::{DiskPlace, Order};

/// Is told what a person or a resync must know.
pub trait CaptureEvents: Send + Sync {
    /// The content of a range at the source is not known; it must be compared again.
    fn resync_needed(&self, disk: DiskId, reason: &str);
    /// A write found that records do not flow.
    fn not_recorded(&self, disk: DiskId, bytes: u64);
}

/// See the module's text.
pub struct Capture {
    /// The disk.
    pub disk: DiskId,
    /// Its place in the order.
    pub place: DiskPlace,
    /// The source.
    pub source: Arc<dyn BlockDevice>,
    /// The machine's order.
    pub order: Arc<Order>,
    /// Bounds what waits to be sealed.
    pub admission: Arc<Admission>,
    /// The disk's activity log.
    pub activity: Arc<Activity>,
    /// Serialises overlapping writes, and bulk reads against them.
    pub ranges: RangeLock,
    /// Who is told.
    pub events: Arc<dyn CaptureEvents>,
}
