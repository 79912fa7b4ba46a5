//! Locks against the forecast: one that cannot be carried is refused, with the figures.
//!
//! What a lock holds at its end is what is written at least once between the points that are locked
//! and from the last of them on. All else can be thinned but the newest states and the shortest
//! windows; so these three together must fit, for the machine's quota and for the store.

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{DiskId, MachineId, PointId, Timestamp};

use super::Engine;
use crate::error::SeedError;
use crate::manifest::PointKind;
use crate::reference::format_time;
use crate::retention::{LockRule, locked_bytes, scaled};

/// A number of bytes with a binary unit.
pub(super) fn in_words(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes >> shift > 0);
    let Some((shift, name)) = unit else {
        return format!("{bytes} B");
    };
    let tenths = scaled(bytes, 10, 1 << shift);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// What cannot be thinned of some machines.
#[derive(Clone, Copy, Default)]
struct Fixed {
    newest: u64,
    window: u64,
    locked: u64,
}

impl Fixed {
    fn all(self) -> u64 {
        self.newest
            .saturating_add(self.window)
            .saturating_add(self.locked)
    }

    fn and(self, other: Self) -> Self {
        Self {
            newest: self.newest.saturating_add(other.newest),
            window: self.window.saturating_add(other.window),
            locked: self.locked.saturating_add(other.locked),
        }
    }
}

impl Engine {
    /// What will be fixed of a machine when it also locks points of these times, until then.
    fn fixed_of(&self, machine: MachineId, asked: &[Timestamp], until: Timestamp) -> Fixed {
        let mut fixed = Fixed::default();
        let Some(state) = self.machines.get(&machine) else {
            return fixed;
        };
        let mut times = asked.to_vec();
        let mut end = until;
        for (point, lock) in &self.retention.locks {
            if let Some(known) = state.points.get(point) {
                if self.held_lock(*point).is_some() {
                    times.push(known.time);
                    end = end.max(lock.until);
                }
            }
        }
        for disk in &state.disks {
            let (newest, window) = self.least_of(machine, *disk);
            fixed.newest = fixed.newest.saturating_add(newest);
            fixed.window = fixed.window.saturating_add(window);
            if let Some(churn) = self.space.churn.get(disk).filter(|_| !times.is_empty()) {
                let held = locked_bytes(churn, newest, &times, end);
                fixed.locked = fixed.locked.saturating_add(held);
            }
        }
        fixed
    }

    /// Bytes of a disk's newest state and of its shortest window.
    fn least_of(&self, machine: MachineId, disk: DiskId) -> (u64, u64) {
        let account = self.space.account.as_ref();
        let known = account.and_then(|account| account.disks.get(&disk));
        let newest = known.map_or(0, |known| known.current.bytes);
        let window = self.policy_of(machine).policy.journal_window;
        let shortest = self.options.window_min.min(window);
        let churn = self.space.churn.get(&disk);
        let window = churn.map_or(0, |churn| churn.record().written_in(shortest));
        (newest, window)
    }

    /// Refuses locks that do not fit. Before the first account nothing is known to refuse by.
    pub(super) fn can_carry_locks(
        &self,
        machine: MachineId,
        points: impl Iterator<Item = PointId>,
        until: Timestamp,
    ) -> Result<(), SeedError> {
        let Some(state) = self.machines.get(&machine) else {
            return Ok(());
        };
        let times: Vec<Timestamp> = points
            .filter(|point| self.held_lock(*point).is_none())
            .filter_map(|point| Some(state.points.get(&point)?.time))
            .collect();
        let fixed = self.fixed_of(machine, &times, until);
        let what = format!("until {} locked points", format_time(until));
        self.fits(machine, fixed, &what)
    }

    /// Refuses a policy that locks more than fits, once it is filled.
    pub(super) fn can_carry_rule(
        &self,
        machine: MachineId,
        rule: &LockRule,
    ) -> Result<(), SeedError> {
        let now = self.trusted_time().unwrap_or_default();
        let mut fixed = self.fixed_of(machine, &[], now);
        let disks = self.machines.get(&machine).map(|state| &state.disks);
        for disk in disks.into_iter().flatten() {
            let Some(churn) = self.space.churn.get(disk) else {
                continue;
            };
            let (newest, _) = self.least_of(machine, *disk);
            let every = if rule.kinds.contains(&PointKind::Crash) {
                self.options.crash_mark_interval.min(rule.duration)
            } else {
                // How often a person or an application makes points is not known: one at a time.
                rule.duration
            };
            let one = churn.distinct_in(every).min(newest);
            let held = scaled(one, nanoseconds(rule.duration), nanoseconds(every));
            fixed.locked = fixed.locked.saturating_add(held);
        }
        let tenths = scaled(rule.duration.as_secs(), 10, 86_400);
        let (days, tenths) = (tenths / 10, tenths % 10);
        let what = format!("points locked by the policy for {days}.{tenths} days");
        self.fits(machine, fixed, &what)
    }

    fn fits(&self, machine: MachineId, fixed: Fixed, what: &str) -> Result<(), SeedError> {
        if self.space.account.is_none() {
            return Ok(());
        }
        let name = self.machines.get(&machine).map_or("", |state| &state.name);
        let refuse = |fixed: Fixed, of: &str, limit: u64, whose: &str| {
            Err(SeedError::refused(
                format!(
                    "nothing was locked: at the churn that was measured {what} hold {}; with the \
                     newest state {} and the shortest window {} {of} needs {}, and {whose} {}",
                    in_words(fixed.locked),
                    in_words(fixed.newest),
                    in_words(fixed.window),
                    in_words(fixed.all()),
                    in_words(limit),
                ),
                "lock fewer points or for a shorter time, or give it more room; `aft space show` \
                 has the figures",
            ))
        };
        if let Some(quota) = self.space.quotas.of_machine(machine) {
            if fixed.all() > quota {
                return refuse(fixed, &format!("machine {name}"), quota, "its quota is");
            }
        }
        let Some((limit, _)) = self.store_limit() else {
            return Ok(());
        };
        let others = self.machines.keys().filter(|other| **other != machine);
        let others = others.map(|other| self.fixed_of(*other, &[], Timestamp(0)));
        let all = others.fold(fixed, Fixed::and);
        let files = self.file_bytes();
        let limit = limit.saturating_sub(files.map_bytes + files.manifest_bytes);
        if all.all() > limit {
            return refuse(all, "the store", limit, "there may be");
        }
        Ok(())
    }
}
