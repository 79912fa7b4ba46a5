//! Retention: policies, locks, and deleting many points at once.

use afterimage_blockdev::Timestamp;
use serde::{Deserialize, Serialize};

/// One point is kept of each interval, for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tier {
    /// The interval, in seconds.
    pub interval_s: u64,
    /// For how long after its end, in seconds.
    pub keep_for_s: u64,
}

/// New points are locked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockRule {
    /// For how long from when they are made, in seconds.
    pub duration_s: u64,
    /// Those of these kinds: `crash`, `application`, `bookmark`, `resync-incomplete`.
    pub kinds: Vec<String>,
}

/// What of a machine's history is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// How far back every LSN stays addressable, in seconds.
    pub journal_window_s: u64,
    /// Which points are kept, from the finest interval to the coarsest.
    pub tiers: Vec<Tier>,
    /// Application-consistent points younger than this stay, in seconds.
    #[serde(default)]
    pub keep_application_s: u64,
    /// Named points younger than this stay, in seconds; `None` for until they are deleted.
    #[serde(default)]
    pub keep_named_s: Option<u64>,
    /// Whether new points are locked.
    #[serde(default)]
    pub lock: Option<LockRule>,
}

/// `GET /v1/machines/{machine}/policy`, and the answer to [`SetPolicy`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachinePolicy {
    /// Rises by one with each change; 0 for the default.
    pub version: u64,
    /// The policy.
    pub policy: Policy,
}

/// `POST /v1/machines/{machine}/policy`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPolicy {
    /// The policy.
    pub policy: Policy,
    /// The version that it was made from; refused when there is a newer one.
    pub expected_version: Option<u64>,
}

/// `POST /v1/machines/{machine}/deletions`: deletes points, all of them or none.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletePoints {
    /// Their names; at most 10,000.
    pub names: Vec<String>,
}

/// `POST /v1/machines/{machine}/locks`: locks points or lengthens their locks, all of them or none.
/// `POST /v1/clock/confirm`, with `null`, says that the wall clock is right.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockPoints {
    /// Their names; at most 10,000.
    pub names: Vec<String>,
    /// Until when.
    pub until: Timestamp,
}
