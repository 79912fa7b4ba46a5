//! What takes room, how long it lasts, and quotas.

use afterimage_blockdev::{DiskId, MachineId, PointId, Timestamp};
use serde::{Deserialize, Serialize};

/// Part of the room that is taken. Rows of one report add up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpaceRow {
    /// A word for programs: `current`, `window`, `locked`, `named`, `fork`, `view`, `application`,
    /// `tier`, `other`, `shared`, `dead`, `since`, `log-room`, `map`, `manifest`, `reserve`,
    /// `other-files`.
    pub kind: String,
    /// What it is, for people.
    pub what: String,
    /// Bytes; negative only where more has gone than was known to be dead.
    pub bytes: i64,
}

/// What is to be expected at the churn that was measured.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SpaceForecast {
    /// In words.
    pub text: String,
    /// Seconds until history must be thinned; `None` when it never must, or nothing is known.
    pub lasts_s: Option<u64>,
    /// Bytes needed now.
    pub used_bytes: u64,
    /// Bytes needed once all that the policies ask for is there.
    pub full_bytes: u64,
    /// Bytes that there may be; `None` for any number.
    pub limit_bytes: Option<u64>,
    /// For how long churn was measured, in seconds.
    pub measured_s: u64,
}

/// What a disk takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskSpace {
    /// The disk.
    pub disk: DiskId,
    /// Its name.
    pub name: String,
    /// Its quota.
    pub quota_bytes: Option<u64>,
    /// Bytes that it needs.
    pub needed_bytes: u64,
    /// Of its newest state.
    pub current_bytes: u64,
    /// Of history.
    pub history_bytes: u64,
    /// Stored bytes that it writes in a day.
    pub written_per_day_bytes: u64,
    /// Of them, those that are not written over on the same day.
    pub distinct_per_day_bytes: u64,
    /// How far back its history goes, in seconds.
    pub held_s: u64,
}

/// What a machine takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSpace {
    /// The machine.
    pub machine: MachineId,
    /// Its name.
    pub name: String,
    /// Its quota.
    pub quota_bytes: Option<u64>,
    /// Bytes that it needs: its rows together.
    pub needed_bytes: u64,
    /// What for.
    pub rows: Vec<SpaceRow>,
    /// Its disks.
    pub disks: Vec<DiskSpace>,
    /// Against its quota; without one nothing is said.
    pub forecast: Option<SpaceForecast>,
    /// The journal window that it gets now, in seconds.
    pub window_s: u64,
    /// Why its ingest waits, if it does.
    pub waits: Option<String>,
}

/// `GET /v1/space`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpaceReport {
    /// When it was worked out who needs what; `None` before that was done once.
    pub account_time: Option<Timestamp>,
    /// Bytes that the file system gives to all files of the data directory.
    pub disk_bytes: u64,
    /// What they are: rows that add up to them.
    pub rows: Vec<SpaceRow>,
    /// Bytes free on the file system.
    pub free_bytes: u64,
    /// The quota of the store.
    pub quota_bytes: Option<u64>,
    /// What ends its growth: `medium`, `budget` or `quota`.
    pub limited_by: Option<String>,
    /// For the whole store.
    pub forecast: SpaceForecast,
    /// The machine that is thinned first when there is no room.
    pub thins_first: Option<String>,
    /// The machines.
    pub machines: Vec<MachineSpace>,
}

/// What a point takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PointSpace {
    /// Identity.
    pub id: PointId,
    /// Name.
    pub name: String,
    /// Time of its cut.
    pub time: Timestamp,
    /// It is locked.
    pub is_locked: bool,
    /// Bytes that come back if it alone goes; `None` when it is younger than the account.
    pub unique_bytes: Option<u64>,
    /// Bytes that it shows and something else needs as well.
    pub shared_bytes: Option<u64>,
}

/// `GET /v1/machines/{machine}/space?after=N&limit=M`: a page of points, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PointSpaces {
    /// When it was worked out.
    pub account_time: Option<Timestamp>,
    /// The points.
    pub points: Vec<PointSpace>,
}

/// `POST /v1/quotas`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetQuota {
    /// A machine, or a disk as `machine/disk`; `None` for the whole store.
    pub of: Option<String>,
    /// Most bytes; `None` for any number.
    pub bytes: Option<u64>,
}
