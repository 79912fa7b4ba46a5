//! What takes room: the state behind accounts, churn and quotas, and all of it as figures.
//!
//! Invariants
//! * The rows of [`Files`] and what they are split into always add up to the bytes of the files
//!   that are named now; what came since the account is a row of its own.
//! * Churn goes into the manifest along with commits of the timer; nothing but forecasts rests on
//!   it, so what a crash forgets of it does not matter.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_blockdev::{
    DiskId, MachineId, Monotonic, SegmentId, StorageError, StorageOp, StorageOutcome, Timestamp,
};

use super::account::{Account, DiskAccount, PointAccount};
use super::quota::Quotas;
use super::{Engine, Output, Owner, Response};
use crate::error::SeedError;
use crate::manifest::{Edit, PointRecord};
use crate::retention::{Churn, Keeping, Stored, lasts};

/// Churn is recorded after so many of the timer's intervals.
const INTERVALS_PER_RECORD: u32 = 5;
const DAY: Duration = Duration::from_secs(86_400);
/// Most points of one page.
const PAGE_MAX: usize = 10_000;

/// Room on the medium when it was asked last.
#[derive(Clone, Copy, Debug)]
struct Room {
    free_bytes: u64,
    total_bytes: u64,
    /// What the store took then.
    stored_bytes: u64,
}

/// What the engine knows of space.
#[derive(Debug, Default)]
pub(super) struct Space {
    pub(super) account: Option<Account>,
    /// Accounts so far.
    pub(super) accounts: u64,
    pub(super) churn: BTreeMap<DiskId, Churn>,
    recorded_at: Option<Monotonic>,
    pub(super) quotas: Quotas,
    /// The segment of the log that was written last, and the bytes of it that are used.
    log_used: Option<(SegmentId, u64)>,
    room: Option<Room>,
    is_asking: bool,
    /// The budget before a quota of the store.
    configured_budget: Option<u64>,
}

impl Space {
    pub(super) fn accounted(&mut self, account: Account) {
        self.account = Some(account);
        self.accounts += 1;
    }

    pub(super) fn log_written(&mut self, segment: SegmentId, end: u64) {
        self.log_used = Some((segment, end));
    }

    pub(super) fn written(
        &mut self,
        now: Monotonic,
        disk: DiskId,
        stored: Stored,
        cells: impl Iterator<Item = u64>,
    ) {
        let churn = self.churn.entry(disk).or_default();
        churn.written(now, stored, cells);
    }

    /// Counts bulk: what a segment's file takes, and the disks and masks of its slots.
    pub(super) fn copied(&mut self, bytes: u64, slots: impl Iterator<Item = (DiskId, u8)>) {
        let mut by_disk: BTreeMap<DiskId, u64> = BTreeMap::new();
        for (disk, mask) in slots {
            *by_disk.entry(disk).or_default() += u64::from(mask.count_ones());
        }
        let all = by_disk.values().sum();
        for (disk, blocks) in by_disk {
            let bytes = crate::retention::scaled(bytes, blocks, all);
            let churn = self.churn.entry(disk).or_default();
            churn.copied(Stored { bytes, blocks });
        }
    }
}

/// Bytes of the files that count.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Files {
    /// Segments of the log.
    pub log_bytes: u64,
    /// Of that, room for what is yet to come.
    pub log_room_bytes: u64,
    /// Seed segments.
    pub seed_bytes: u64,
    /// The map.
    pub map_bytes: u64,
    /// The manifest, and the notes of it.
    pub manifest_bytes: u64,
    /// The file that keeps room for the manifest.
    pub reserve_bytes: u64,
}

impl Files {
    /// All of them.
    #[must_use]
    pub fn all_bytes(&self) -> u64 {
        self.log_bytes + self.seed_bytes + self.map_bytes + self.manifest_bytes + self.reserve_bytes
    }

    fn used_segment_bytes(&self) -> u64 {
        self.log_bytes.saturating_sub(self.log_room_bytes) + self.seed_bytes
    }
}

/// What ends the store's growth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// The medium, less what is left free.
    Medium,
    /// The budget of the configuration.
    Budget,
    /// A quota.
    Quota,
}

/// What is to be expected at the churn that was measured.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Forecast {
    /// Bytes that there may be; `None` for any number.
    pub limit_bytes: Option<u64>,
    /// Bytes that are needed now.
    pub used_bytes: u64,
    /// Bytes needed once all that the policies ask for is there.
    pub full_bytes: u64,
    /// After how long history must be thinned; `None` when it never must, or nothing was measured.
    pub lasts: Option<Duration>,
    /// For how long churn was measured, at least.
    pub measured: Duration,
}

/// What a disk takes.
#[derive(Clone, Debug)]
pub struct DiskSpace {
    /// The disk.
    pub disk: DiskId,
    /// Its name.
    pub name: String,
    /// Its quota.
    pub quota_bytes: Option<u64>,
    /// By the last account.
    pub account: DiskAccount,
    /// Stored since.
    pub since_bytes: u64,
    /// Stored bytes that are written in a day.
    pub written_per_day: u64,
    /// Of them, those that are not written over on the same day.
    pub distinct_per_day: u64,
    /// How far back its history goes.
    pub held: Duration,
}

/// What a machine takes.
#[derive(Clone, Debug)]
pub struct MachineSpace {
    /// The machine.
    pub machine: MachineId,
    /// Its name.
    pub name: String,
    /// Its quota.
    pub quota_bytes: Option<u64>,
    /// Its disks.
    pub disks: Vec<DiskSpace>,
    /// Against its own quota, if it has one.
    pub forecast: Forecast,
    /// The journal window that it gets now.
    pub window: Duration,
    /// Why its ingest waits, if it does.
    pub held: Option<String>,
}

/// What takes room.
#[derive(Clone, Default, Debug)]
pub struct SpaceInfo {
    /// When the account was worked out; `None` before the first one.
    pub at: Option<Timestamp>,
    /// All files.
    pub files: Files,
    /// Of log and seed segments: needed by the last account.
    pub needed_bytes: u64,
    /// Needed by nothing; comes back with collections.
    pub reclaimable_bytes: u64,
    /// Came since the account; negative when more is gone than was reclaimable.
    pub since_bytes: i64,
    /// The quota of the store.
    pub quota_bytes: Option<u64>,
    /// What ends its growth.
    pub limit: Option<Limit>,
    /// For the whole store.
    pub forecast: Forecast,
    /// Who is thinned first when it is full.
    pub thins_first: Option<MachineId>,
    /// The machines.
    pub machines: Vec<MachineSpace>,
}

impl Space {
    /// Says whether so much was free when that was last asked.
    pub(super) fn has_free(&self, bytes: u64) -> bool {
        self.room.is_some_and(|room| room.free_bytes >= bytes)
    }
}

impl Engine {
    pub(super) fn active_log_segment(&self) -> Option<(SegmentId, u64)> {
        let sealed = self.log.sealed_segments();
        let is_open = |segment| sealed.iter().all(|sealed| sealed.segment != segment);
        self.space.log_used.filter(|(segment, _)| is_open(*segment))
    }

    pub(super) fn file_bytes(&self) -> Files {
        let log_bytes = self.log.stored_bytes();
        let sealed = self.log.sealed_segments();
        let sealed: u64 = sealed.iter().map(|sealed| sealed.bytes).sum();
        let used = self.active_log_segment().map_or(0, |(_, used)| used);
        Files {
            log_bytes,
            log_room_bytes: log_bytes.saturating_sub(sealed + used),
            seed_bytes: self.seed_segments.values().map(|state| state.bytes).sum(),
            map_bytes: self.runs.values().sum(),
            manifest_bytes: self.manifest.stored_bytes() + self.notes.stored_bytes(),
            reserve_bytes: self.reserve_bytes(),
        }
    }

    /// Asks how much room the medium has.
    pub(super) fn ask_room(&mut self, out: &mut Vec<Output>) {
        if !core::mem::replace(&mut self.space.is_asking, true) {
            let directory = "segments".to_owned();
            self.submit(Owner::Space, StorageOp::Capacity { directory }, out);
        }
    }

    pub(super) fn room_is(&mut self, result: Result<StorageOutcome, StorageError>) {
        self.space.is_asking = false;
        if let Ok(StorageOutcome::Capacity(room)) = result {
            self.space.room = Some(Room {
                free_bytes: room.free_bytes,
                total_bytes: room.total_bytes,
                stored_bytes: self.file_bytes().all_bytes(),
            });
        }
    }

    /// A quota of the store holds as its budget does; the lower one counts.
    pub(super) fn limit_budget(&mut self) {
        let configured = self.options.budget_bytes;
        let configured = *self.space.configured_budget.get_or_insert(configured);
        let quota = self.space.quotas.of_store().unwrap_or(u64::MAX);
        self.options.budget_bytes = configured.min(quota);
        self.share_budget();
    }

    /// Bytes that all files may take, and why no more.
    pub(super) fn store_limit(&self) -> Option<(u64, Limit)> {
        let budget = self.space.configured_budget;
        let budget = budget.unwrap_or(self.options.budget_bytes);
        let quota = self.space.quotas.of_store();
        let medium = self.space.room.filter(|room| room.total_bytes > 0);
        let medium = medium.map(|room| {
            let all = room.stored_bytes.saturating_add(room.free_bytes);
            (
                all.saturating_sub(self.options.reserve_bytes),
                Limit::Medium,
            )
        });
        let budget = (budget != u64::MAX).then_some((budget, Limit::Budget));
        let quota = quota.map(|quota| (quota, Limit::Quota));
        let all = [medium, budget, quota].into_iter().flatten();
        all.min_by_key(|(bytes, _)| *bytes)
    }

    /// What was measured, when it is to be recorded again.
    pub(super) fn due_churn_edits(&mut self) -> Vec<Edit> {
        let every = self.options.retention_interval * INTERVALS_PER_RECORD;
        let last = *self.space.recorded_at.get_or_insert(self.now);
        if self.now < last.after(every) {
            return Vec::new();
        }
        self.space.recorded_at = Some(self.now);
        for churn in self.space.churn.values_mut() {
            churn.advance(self.now);
        }
        self.churn_edits()
    }

    fn churn_edits(&self) -> Vec<Edit> {
        let churn = self.space.churn.iter();
        let edits = churn.map(|(disk, churn)| Edit::Churn {
            disk: *disk,
            churn: *churn.record(),
        });
        edits.collect()
    }

    /// The state as edits; behind machines and disks.
    pub(super) fn space_state(&self) -> Vec<Edit> {
        let mut edits = self.space.quotas.edits();
        edits.extend(self.churn_edits());
        edits
    }

    pub(super) fn replay_space(&mut self, edit: &Edit) {
        match edit {
            Edit::Quota { of, bytes } => self.space.quotas.set(*of, *bytes),
            Edit::Churn { disk, churn } => {
                self.space.churn.insert(*disk, Churn::new(*churn));
            }
            _ => {}
        }
    }

    /// How far back the history of a machine goes now.
    fn held_history(&self, machine: MachineId) -> Duration {
        let trunk = self.machines.get(&machine).map(|state| state.trunk);
        let entry = trunk.and_then(|trunk| self.histories.get(&trunk));
        let since = entry.and_then(|entry| {
            let samples = entry.timeline.iter().chain(&entry.open_timeline);
            entry
                .time_of(entry.floor)
                .or_else(|| samples.map(|sample| sample.time).next())
        });
        let oldest = self.machines.get(&machine).and_then(|state| {
            let first = state.points.values().next();
            first.map(|point| point.time)
        });
        let now = self.trusted_time().unwrap_or_default();
        let begin = since.into_iter().chain(oldest).min().unwrap_or(now);
        Duration::from_nanos(now.0.saturating_sub(begin.0))
    }

    pub(super) fn space_info(&mut self) -> SpaceInfo {
        for churn in self.space.churn.values_mut() {
            churn.advance(self.now);
        }
        let files = self.file_bytes();
        let account = self.space.account.as_ref();
        let needed = account.map_or(0, |account| account.log_bytes + account.seed_bytes);
        let judged = account.map_or(0, |account| account.judged_bytes);
        let used = files.used_segment_bytes();
        let gone = judged.saturating_sub(used);
        let reclaimable = judged.saturating_sub(needed).saturating_sub(gone);
        let accounted = needed.saturating_add(reclaimable);
        let since = i128::from(used) - i128::from(accounted);
        let limit = self.store_limit();
        let room = files.log_room_bytes.saturating_add(reclaimable);
        let machines: Vec<MachineId> = self.machines.keys().copied().collect();
        let forecast = self.forecast(
            &machines,
            files.all_bytes().saturating_sub(room),
            limit.map(|limit| limit.0),
        );
        SpaceInfo {
            at: account.map(|account| account.at),
            files,
            needed_bytes: needed,
            reclaimable_bytes: reclaimable,
            since_bytes: i64::try_from(since).unwrap_or(i64::MAX),
            quota_bytes: self.space.quotas.of_store(),
            limit: limit.map(|limit| limit.1),
            forecast,
            thins_first: self.by_excess().first().copied(),
            machines: machines.iter().map(|id| self.machine_space(*id)).collect(),
        }
    }

    fn machine_space(&self, machine: MachineId) -> MachineSpace {
        let state = &self.machines[&machine];
        let account = self.space.account.as_ref();
        let held = self.held_history(machine);
        let disks = state.disks.iter().map(|disk| {
            let churn = self.space.churn.get(disk).cloned().unwrap_or_default();
            let known = account.and_then(|account| account.disks.get(disk));
            DiskSpace {
                disk: *disk,
                name: self
                    .disks
                    .get(disk)
                    .map_or(String::new(), |d| d.name.clone()),
                quota_bytes: self.space.quotas.of_disk(*disk),
                account: known.copied().unwrap_or_default(),
                since_bytes: self.stored_since(*disk),
                written_per_day: churn.record().written_in(DAY),
                distinct_per_day: churn.distinct_in(DAY),
                held,
            }
        });
        let quota_bytes = self.space.quotas.of_machine(machine);
        let used = self.needed_by(machine).unwrap_or(0);
        MachineSpace {
            machine,
            name: state.name.clone(),
            quota_bytes,
            disks: disks.collect(),
            forecast: self.forecast(&[machine], used, quota_bytes),
            window: self.journal_window(machine),
            held: self.space.quotas.why_held(machine),
        }
    }

    fn forecast(&self, machines: &[MachineId], used: u64, limit: Option<u64>) -> Forecast {
        let policies: Vec<_> = machines
            .iter()
            .map(|machine| (*machine, self.policy_of(*machine).policy))
            .collect();
        let mut keeping = Vec::new();
        let mut current = 0u64;
        for (machine, policy) in &policies {
            let held = self.held_history(*machine);
            let disks = self.machines.get(machine);
            for disk in disks.into_iter().flat_map(|state| &state.disks) {
                let account = self.space.account.as_ref();
                let known = account.and_then(|account| account.disks.get(disk));
                current += known.map_or(0, |known| known.current.bytes);
                if let Some(churn) = self.space.churn.get(disk) {
                    let keeping_it = Keeping {
                        policy,
                        churn,
                        held,
                    };
                    let history = known.map_or(0, |known| {
                        known.needed().bytes.saturating_sub(known.current.bytes)
                    });
                    let history = history.saturating_add(self.stored_since(*disk));
                    keeping.push(keeping_it.no_older_than(history));
                }
            }
        }
        let full = keeping.iter().map(Keeping::full_bytes);
        let measured = keeping.iter().map(|k| k.churn.record().measured_ns).max();
        let left = limit.map(|limit| limit.saturating_sub(used));
        Forecast {
            limit_bytes: limit,
            used_bytes: used,
            full_bytes: full.fold(current, u64::saturating_add),
            lasts: left.and_then(|left| lasts(&keeping, left)),
            measured: Duration::from_nanos(measured.unwrap_or(0)),
        }
    }

    /// A page of points with what they need.
    pub(super) fn point_space(
        &self,
        machine: &str,
        after: afterimage_blockdev::PointId,
        limit: usize,
    ) -> Result<Response, SeedError> {
        let machine = self.machine_named(machine)?;
        let account = self.space.account.as_ref();
        let Some(state) = self.machines.get(&machine) else {
            return Ok(Response::PointSpace(Vec::new(), None));
        };
        let from = afterimage_blockdev::PointId(after.0.saturating_add(1));
        let page = state.points.range(from..).take(limit.min(PAGE_MAX));
        let points = page.map(|(id, point)| {
            let known = account.and_then(|account| account.points.get(id).copied());
            (self.shown_point(point), known)
        });
        let at = account.map(|account| account.at);
        Ok(Response::PointSpace(points.collect(), at))
    }
}

/// A point, and what it needs if an account knows it.
pub type PointSpace = (PointRecord, Option<PointAccount>);
