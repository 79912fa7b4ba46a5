//! The scrub: every byte of the store is read again and again.

use afterimage_blockdev::Timestamp;
use serde::{Deserialize, Serialize};

/// `GET /v1/store/scrub`: how far it is. `POST` starts one, or joins the one under way; `DELETE`
/// stops that.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// One is under way.
    pub is_running: bool,
    /// It waits, because ingest needs the medium.
    pub is_waiting: bool,
    /// How many came to their end since the appliance was started.
    pub passes: u64,
    /// Bytes of the present one that were read.
    pub done_bytes: u64,
    /// Bytes of the present one.
    pub total_bytes: u64,
    /// The last one that came to its end.
    pub last: Option<ScrubResult>,
    /// Damage that is known, also from one that was stopped; it stays until a whole one no longer
    /// finds it.
    pub damage: Vec<String>,
}

/// A scrub that came to its end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScrubResult {
    /// When it began.
    pub begun: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// Files read.
    pub files: u64,
    /// Slots checked.
    pub slots: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What was damaged, and which points it may hurt.
    pub damage: Vec<String>,
}
