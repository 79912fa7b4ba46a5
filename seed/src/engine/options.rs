//! What an engine is started with.

use std::time::Duration;

use crate::reader::ReaderOptions;

/// Bounds and timers of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Wraps the keys of all disks.
    pub store_key: [u8; 32],
    /// Bytes that the log may take.
    pub budget_bytes: u64,
    /// Bytes of the medium that are left free.
    pub reserve_bytes: u64,
    /// Bytes of a log segment.
    pub segment_bytes: u64,
    /// Bytes after which a seed segment is sealed.
    pub bulk_segment_bytes: u64,
    /// Age at which a seed segment is sealed whatever its size.
    pub bulk_age: Duration,
    /// Open map entries, over all disks, at which a run is written.
    pub flush_entries: usize,
    /// Bytes of a manifest file at which the next one is begun.
    pub manifest_bytes: u64,
    /// How long after the last data the log writes an idle commit.
    pub idle_commit: Duration,
    /// Wait before a full medium is tried again.
    pub retry: Duration,
    /// Time between crash marks.
    pub crash_mark_interval: Duration,
    /// Time between two collections of what nobody needs.
    pub collect_interval: Duration,
    /// Bytes of the log beyond which its oldest segments are destaged, whatever the window.
    pub cache_bytes: u64,
    /// Bytes of a file that only keeps room for the manifest; 0 for none.
    pub reserve_file_bytes: u64,
    /// Shortest journal window that a lack of room leaves.
    pub window_min: Duration,
    /// How often points are thinned and journal windows move.
    pub retention_interval: Duration,
    /// Least time between two states in notes, but for those of a collection.
    pub notes_interval: Duration,
    /// Grain of the mapping from time to LSN.
    pub time_grain: Duration,
    /// Bounds of reading.
    pub reader: ReaderOptions,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            store_key: [0; 32],
            budget_bytes: u64::MAX,
            reserve_bytes: 256 << 20,
            segment_bytes: 64 << 20,
            bulk_segment_bytes: 64 << 20,
            bulk_age: Duration::from_millis(50),
            flush_entries: 1 << 20,
            manifest_bytes: 16 << 20,
            idle_commit: Duration::from_millis(100),
            retry: Duration::from_secs(1),
            crash_mark_interval: Duration::from_secs(300),
            collect_interval: Duration::from_secs(600),
            cache_bytes: u64::MAX,
            reserve_file_bytes: 32 << 20,
            window_min: Duration::from_secs(60),
            retention_interval: Duration::from_secs(60),
            notes_interval: Duration::from_secs(60),
            time_grain: Duration::from_millis(100),
            reader: ReaderOptions::default(),
        }
    }
}
