//! Retention in a generation's work: locks, deletions of many points, policies, thinning, and a
//! wall clock that jumps.
//!
//! What must hold:
//! * a point whose lock was acknowledged is there until wall clock and real time have passed it;
//! * points of one deletion go together or stay together, and not at all when one is locked;
//! * a policy that was acknowledged is there, and nothing that was not asked for;
//! * a thinning drops exactly what `thin` says of the points that were there;
//! * a floor never falls, and leaves every whole state of a disk's newest data addressable.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{Clock, HistoryId, Lsn, MachineId, Monotonic, PointId, Timestamp};
use afterimage_seed::engine::{EngineInfo, PolicyInfo};
use afterimage_seed::manifest::{PointKind, PointRecord};
use afterimage_seed::retention::{Candidate, DOWNTIME_MAX, LockRule, Policy, Tier, thin};
use afterimage_seed::{Request, Response, SeedError};

use super::{Campaign, Waiting, fork_of};
use crate::store_rig::StoreRig;

/// Distance of thinnings: no other work of a generation lets so much time pass.
pub(super) const INTERVAL: Duration = Duration::from_secs(3600);
/// How long a policy locks new points.
const POLICY_LOCK: Duration = Duration::from_secs(2 * 3600);

pub(super) type Key = (MachineId, String);
type Answer = Result<Response, SeedError>;

/// A lock's end by both clocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct End {
    wall: Timestamp,
    real: Monotonic,
}

impl End {
    fn is_past(self, clock: &dyn Clock) -> bool {
        clock.wall() >= self.wall && clock.monotonic() >= self.real
    }
}

/// What is known of a point's lock.
#[derive(Clone, Default, Debug)]
struct KnownLock {
    promised: Option<End>,
    asked: Vec<End>,
}

impl KnownLock {
    fn holds(&self, clock: &dyn Clock) -> bool {
        let mut ends = self.promised.iter().chain(&self.asked);
        ends.any(|end| !end.is_past(clock))
    }
}

/// Says whether a lock was refused because the store cannot carry it at its churn.
fn is_of_forecast(error: &SeedError) -> bool {
    error.to_string().contains("at the churn that was measured")
}

/// What is known of a machine's policy.
#[derive(Clone)]
struct KnownPolicy {
    promised: PolicyInfo,
    asked: Vec<PolicyInfo>,
}

impl Default for KnownPolicy {
    fn default() -> Self {
        let promised = PolicyInfo {
            version: 0,
            policy: Policy::default(),
        };
        Self {
            promised,
            asked: Vec::new(),
        }
    }
}

/// What is known of retention.
#[derive(Clone, Default)]
pub(super) struct Kept {
    locks: BTreeMap<Key, KnownLock>,
    policies: BTreeMap<MachineId, KnownPolicy>,
    /// Points that a thinning under way drops.
    pub(super) thinning: BTreeSet<Key>,
    /// Deletions under way.
    groups: Vec<BTreeSet<Key>>,
    floors: BTreeMap<HistoryId, Lsn>,
    /// When points were asked for.
    asked_at: BTreeMap<Key, Monotonic>,
}

impl Campaign {
    /// Some points of one machine that nothing happens to.
    fn some_points(&mut self, count: usize) -> Vec<Key> {
        let machine = self.writers[self.random.index(self.writers.len())].machine;
        let mut found: Vec<Key> = self
            .known
            .points
            .iter()
            .filter(|(key, point)| {
                let is_quiet = point.is_acknowledged && !point.is_dropping;
                key.0 == machine && is_quiet && !self.known.kept.thinning.contains(*key)
            })
            .map(|(key, _)| key.clone())
            .collect();
        self.random.shuffle(&mut found);
        found.truncate(1 + self.random.index(count));
        found
    }

    pub(super) fn lock_points(&mut self, rig: &mut StoreRig) {
        let keys = self.some_points(3);
        let Some(machine) = keys.first().map(|key| key.0) else {
            return;
        };
        let length = Duration::from_secs(1 + self.random.below(4 * 3600));
        let until = Timestamp(rig.clock.wall().0 + nanoseconds(length));
        let end = End {
            wall: until,
            real: rig.clock.monotonic().after(length),
        };
        let shortens = keys.iter().any(|key| {
            let known = self.known.kept.locks.get(key);
            known.is_some_and(|lock| {
                let ends = lock.promised.iter().chain(&lock.asked);
                ends.clone()
                    .any(|known| known.wall > until && !known.is_past(&*rig.clock))
            })
        });
        if !shortens {
            for key in &keys {
                let lock = self.known.kept.locks.entry(key.clone()).or_default();
                lock.asked.push(end);
            }
        }
        let names: Vec<String> = keys.iter().map(|key| key.1.clone()).collect();
        let request = rig.request(Request::LockPoints {
            machine: self.name_of(machine).to_owned(),
            names,
            until,
        });
        let waiting = Waiting::Locked {
            keys,
            end: (end.wall, end.real),
            shortens,
        };
        self.waiting.insert(request, waiting);
        self.hear(rig);
    }

    pub(super) fn drop_points(&mut self, rig: &mut StoreRig) {
        let count = [1, 6][self.random.index(2)];
        let keys = self.some_points(count);
        let Some(machine) = keys.first().map(|key| key.0) else {
            return;
        };
        let is_locked = keys.iter().any(|key| {
            let lock = self.known.kept.locks.get(key);
            lock.is_some_and(|lock| lock.holds(&*rig.clock))
        });
        if !is_locked {
            for key in &keys {
                let point = self.known.points.get_mut(key).expect("a known point");
                point.is_dropping = true;
            }
            self.known.kept.groups.push(keys.iter().cloned().collect());
        }
        let request = rig.request(Request::DeletePoints {
            machine: self.name_of(machine).to_owned(),
            names: keys.iter().map(|key| key.1.clone()).collect(),
        });
        self.waiting
            .insert(request, Waiting::PointsDropped { keys, is_locked });
        self.hear(rig);
    }

    pub(super) fn set_policy(&mut self, rig: &mut StoreRig) {
        let place = self.random.index(self.writers.len());
        let machine = self.writers[place].machine;
        let policy = self.some_policy();
        let known = self.known.kept.policies.entry(machine).or_default();
        let last = known.asked.last().unwrap_or(&known.promised).version;
        let is_stale = self.random.chance(0.1);
        let expected = is_stale.then_some(last + 1);
        if !is_stale {
            known.asked.push(PolicyInfo {
                version: last + 1,
                policy: policy.clone(),
            });
        }
        let request = rig.request(Request::SetPolicy {
            machine: self.writers[place].name.clone(),
            policy,
            expected,
        });
        self.waiting
            .insert(request, Waiting::Policy { machine, is_stale });
        self.hear(rig);
    }

    fn some_policy(&mut self) -> Policy {
        let hours = |count: u64| Duration::from_secs(count * 3600);
        let tier = |interval, keep_for| Tier {
            interval: Duration::from_secs(interval),
            keep_for,
        };
        let tiers = match self.random.below(4) {
            0 => Vec::new(),
            1 => vec![tier(1, hours(3))],
            2 => vec![tier(4, hours(2)), tier(30, hours(30))],
            _ => Policy::default().tiers,
        };
        let lock = self.random.chance(0.3).then(|| LockRule {
            duration: POLICY_LOCK,
            kinds: vec![PointKind::Bookmark],
        });
        Policy {
            journal_window: [Duration::ZERO, hours(1), hours(5), hours(24)][self.random.index(4)],
            tiers,
            keep_application: Duration::ZERO,
            keep_named: [None, Some(Duration::ZERO), Some(hours(2))][self.random.index(3)],
            lock,
        }
    }

    /// Lets the time of a thinning come, and works out what it drops.
    pub(super) fn retain(&mut self, rig: &mut StoreRig) {
        if self.is_faulty {
            return;
        }
        rig.run();
        self.hear(rig);
        if rig.storage.is_stopped() || rig.failure.is_some() {
            return;
        }
        let mut jumped = Duration::ZERO;
        if self.random.chance(0.15) {
            jumped = self.jump(rig);
        }
        let before: Vec<_> = self
            .writers
            .iter()
            .map(|writer| (writer.machine, writer.name.clone()))
            .filter_map(|(machine, name)| Some((machine, list(rig, &name)?)))
            .collect();
        rig.pass(INTERVAL);
        let Some(Ok(Response::Info(info))) = rig.ask(Request::Info) else {
            self.doubt_locks(jumped);
            return;
        };
        if info.clock.frozen_ahead.is_some() {
            rig.run();
            if !rig.storage.is_stopped() && rig.failure.is_none() {
                // That the clock is frozen is durable: the jump counts for nothing.
                jumped = Duration::ZERO;
            }
        }
        self.doubt_locks(jumped);
        if info.clock.frozen_ahead.is_some() {
            self.report.count("thinning-frozen");
            if self.random.chance(0.6) {
                let request = rig.request(Request::ConfirmClock);
                self.waiting.insert(request, Waiting::Confirmed);
            }
            return;
        }
        let now = rig.clock.wall();
        for (machine, points) in before {
            let known = self.known.kept.policies.get(&machine).cloned();
            let known = known.unwrap_or_default();
            let policy = &known.asked.last().unwrap_or(&known.promised).policy;
            // They are dropped when that is durable, and still there now.
            let name = self.name_of(machine).to_owned();
            let shown = list(rig, &name).unwrap_or_default();
            assert_eq!(shown.len(), points.len(), "seed {}", self.seed);
            let candidates: Vec<Candidate> = shown
                .iter()
                .map(|point| self.candidate(rig, machine, point))
                .collect();
            let dropped: BTreeSet<PointId> = thin(&candidates, policy, now).into_iter().collect();
            let dropped = points.iter().filter(|point| dropped.contains(&point.id));
            let names = dropped.map(|point| (machine, point.name.clone()));
            self.known.kept.thinning.extend(names);
        }
    }

    /// As the engine sees a point at the time of a thinning. All of them were named. It may hold a
    /// lock for longer than is promised, but not for less.
    fn candidate(&self, rig: &StoreRig, machine: MachineId, point: &PointRecord) -> Candidate {
        let lock = self.known.kept.locks.get(&(machine, point.name.clone()));
        let holds = lock.is_some_and(|lock| lock.holds(&*rig.clock));
        let is_locked = point.locked_until > Timestamp(0);
        assert!(is_locked || !holds, "seed {}: {point:?} is open", self.seed);
        Candidate {
            id: point.id,
            history: point.history,
            time: point.time,
            kind: point.kind,
            is_named: true,
            is_locked,
        }
    }

    /// A jump that nobody noted before the end counts as downtime, as far as that is believed.
    fn doubt_locks(&mut self, jumped: Duration) {
        let by = nanoseconds(jumped.min(DOWNTIME_MAX));
        for lock in self.known.kept.locks.values_mut() {
            for end in lock.promised.iter_mut().chain(&mut lock.asked) {
                end.real = Monotonic(end.real.0.saturating_sub(by));
            }
        }
        for at in self.known.kept.asked_at.values_mut() {
            *at = Monotonic(at.0.saturating_sub(by));
        }
    }

    /// Sets the wall clock; gives back how far forward.
    fn jump(&mut self, rig: &StoreRig) -> Duration {
        let by = Duration::from_secs(600 + self.random.below(5 * 86_400));
        let by = nanoseconds(by);
        let wall = rig.clock.wall().0;
        if self.random.chance(0.7) {
            rig.clock.set_wall(Timestamp(wall + by));
            self.report.count("clock-jumped-forward");
            Duration::from_nanos(by)
        } else {
            rig.clock.set_wall(Timestamp(wall - by / 16));
            self.report.count("clock-jumped-back");
            Duration::ZERO
        }
    }

    /// A thinning became durable.
    pub(super) fn thinned(&mut self, points: usize) {
        let thinned = core::mem::take(&mut self.known.kept.thinning);
        assert_eq!(thinned.len(), points, "seed {}: {thinned:?}", self.seed);
        for key in thinned {
            self.forget(&key);
        }
        self.report.count("thinned");
    }

    fn forget(&mut self, key: &Key) {
        self.known.points.remove(key);
        self.known.kept.locks.remove(key);
        self.known.kept.asked_at.remove(key);
    }

    /// Notes when a point was asked for: a policy's lock of it is no older.
    pub(super) fn point_asked(&mut self, rig: &StoreRig, key: &Key) {
        let now = rig.clock.monotonic();
        self.known.kept.asked_at.insert(key.clone(), now);
    }

    /// Takes what the store says of a new point's lock.
    pub(super) fn point_made(&mut self, key: &Key, record: &PointRecord) {
        let asked_at = self.known.kept.asked_at.get(key).copied();
        let asked_at = asked_at.expect("a point that was asked for");
        if record.locked_until > Timestamp(0) {
            let end = End {
                wall: record.locked_until,
                real: asked_at.after(POLICY_LOCK),
            };
            let lock = self.known.kept.locks.entry(key.clone()).or_default();
            lock.promised = lock.promised.max(Some(end));
            self.report.count("locked-by-policy");
        }
    }

    /// Takes an answer about retention; gives back any other.
    pub(super) fn retention_answered(
        &mut self,
        waiting: Waiting,
        answer: Answer,
    ) -> Option<(Waiting, Answer)> {
        let seed = self.seed;
        match (waiting, answer) {
            (
                Waiting::Locked {
                    keys,
                    end,
                    shortens,
                },
                Ok(_),
            ) => {
                assert!(!shortens, "seed {seed}: a lock was shortened");
                let (wall, real) = end;
                for key in keys {
                    // It may be gone since: its lock ended, and it was dropped.
                    if let Some(lock) = self.known.kept.locks.get_mut(&key) {
                        lock.promised = lock.promised.max(Some(End { wall, real }));
                        lock.asked.retain(|asked| *asked != End { wall, real });
                    }
                }
                self.report.count("point-locked");
            }
            (
                Waiting::Locked {
                    keys,
                    end,
                    shortens,
                },
                Err(error),
            ) => {
                let (wall, real) = end;
                let mut is_known = shortens || is_of_forecast(&error);
                for key in keys {
                    if let Some(lock) = self.known.kept.locks.get_mut(&key) {
                        lock.asked.retain(|asked| *asked != End { wall, real });
                        // While the clock is frozen, a lock that is over still holds.
                        is_known |= lock.promised.is_some_and(|known| known.wall > wall);
                    }
                }
                assert!(is_known, "seed {seed}: {error}");
                self.report.count("shorter-lock-refused");
            }
            (Waiting::PointsDropped { keys, is_locked }, Ok(_)) => {
                assert!(!is_locked, "seed {seed}: a locked point was deleted");
                if keys.len() > 1 {
                    self.report.count("points-dropped-at-once");
                }
                let group: BTreeSet<Key> = keys.iter().cloned().collect();
                self.known.kept.groups.retain(|known| *known != group);
                for key in keys {
                    self.forget(&key);
                }
                self.report.count("point-dropped");
            }
            (Waiting::PointsDropped { keys, .. }, Err(error)) => {
                let locks = &self.known.kept.locks;
                let is_known = keys.iter().any(|key| locks.contains_key(key));
                assert!(is_known, "seed {seed}: {error}");
                let group: BTreeSet<Key> = keys.iter().cloned().collect();
                self.known.kept.groups.retain(|known| *known != group);
                for key in keys {
                    if let Some(point) = self.known.points.get_mut(&key) {
                        point.is_dropping = false;
                    }
                }
                self.report.count("locked-deletion-refused");
            }
            (Waiting::Policy { machine, is_stale }, Ok(Response::Policy(info))) => {
                assert!(!is_stale, "seed {seed}: a stale policy was taken");
                let known = self.known.kept.policies.get_mut(&machine).expect("asked");
                // Answers are not taken in their order.
                if info.version > known.promised.version {
                    assert!(known.asked.contains(&info), "seed {seed}: {info:?}");
                    known.asked.retain(|asked| asked.version > info.version);
                    known.promised = info;
                }
                self.report.count("policy-set");
            }
            (Waiting::Policy { is_stale: true, .. }, Err(_)) => {
                self.report.count("stale-policy-refused");
            }
            (Waiting::Policy { machine, .. }, Err(error)) if is_of_forecast(&error) => {
                // It is refused in the step that asks, so that it is the last one.
                if let Some(known) = self.known.kept.policies.get_mut(&machine) {
                    known.asked.pop();
                }
                self.report.count("lock-beyond-forecast-refused");
            }
            (Waiting::Confirmed, Ok(_)) => self.report.count("clock-confirmed"),
            other => return Some(other),
        }
        None
    }

    /// Compares what a recovered store says of retention.
    pub(super) fn check_retention(&mut self, rig: &mut StoreRig, found: &BTreeMap<Key, Timestamp>) {
        let seed = self.seed;
        for group in core::mem::take(&mut self.known.kept.groups) {
            let there = group.iter().filter(|key| found.contains_key(*key)).count();
            assert!(
                there == 0 || there == group.len(),
                "seed {seed}: {there} of {group:?} are left"
            );
        }
        let thinning = core::mem::take(&mut self.known.kept.thinning);
        let there = thinning.iter().filter(|key| found.contains_key(*key));
        let there = there.count();
        assert!(
            there == 0 || there == thinning.len(),
            "seed {seed}: {there} of {thinning:?} are left by a thinning"
        );
        if !thinning.is_empty() {
            self.report.count("thinning-undecided");
        }
        self.check_locks(rig, found);
        self.check_policies(rig);
    }

    fn check_locks(&mut self, rig: &StoreRig, found: &BTreeMap<Key, Timestamp>) {
        let seed = self.seed;
        self.known.kept.locks.retain(|key, lock| {
            let until = found.get(key).copied();
            if let Some(promised) = lock.promised.filter(|end| !end.is_past(&*rig.clock)) {
                let until = until.unwrap_or_else(|| panic!("seed {seed}: locked {key:?} is gone"));
                assert!(
                    until >= promised.wall,
                    "seed {seed}: the lock of {key:?} fell: {lock:?} {until:?}"
                );
                self.report.count("lock-recovered");
            } else if lock.promised.is_some() {
                self.report.count("lock-expired");
            }
            let until = until.unwrap_or_default();
            let kept = lock.promised.iter().chain(&lock.asked);
            let kept = kept.filter(|end| end.wall == until).max().copied();
            lock.promised = kept.or(lock.promised);
            lock.asked.clear();
            lock.promised.is_some()
        });
        // A point whose making was never acknowledged may have been locked by the policy.
        for (key, until) in found.iter().filter(|(_, until)| **until > Timestamp(0)) {
            let real = self.known.kept.asked_at.get(key).copied();
            let lock = self.known.kept.locks.entry(key.clone()).or_default();
            if lock.promised.is_none() {
                let real = real.unwrap_or_default().after(POLICY_LOCK);
                lock.promised = Some(End { wall: *until, real });
            }
        }
    }

    fn check_policies(&mut self, rig: &mut StoreRig) {
        let seed = self.seed;
        let machines: Vec<_> = self.known.kept.policies.keys().copied().collect();
        for machine in machines {
            let name = self.name_of(machine).to_owned();
            let found = match rig.ask(Request::GetPolicy { machine: name }) {
                Some(Ok(Response::Policy(found))) => found,
                other => panic!("seed {seed}: {other:?} for a policy"),
            };
            let known = self.known.kept.policies.get_mut(&machine).expect("listed");
            assert!(
                found == known.promised || known.asked.contains(&found),
                "seed {seed}: {found:?} is no policy of {machine}"
            );
            *known = KnownPolicy {
                promised: found,
                asked: Vec::new(),
            };
        }
    }

    /// Compares the floors that a store shows.
    pub(super) fn check_floors(&mut self, info: &EngineInfo) {
        let seed = self.seed;
        for history in info.machines.iter().flat_map(|machine| &machine.histories) {
            let (id, floor) = (history.history, history.floor);
            let known = self.known.kept.floors.insert(id, floor).unwrap_or_default();
            assert!(
                floor >= known,
                "seed {seed}: the floor of {id} fell from {known}"
            );
            assert!(
                floor <= history.durable,
                "seed {seed}: {id} has floor {floor}"
            );
            if floor > Lsn::ZERO {
                self.report.count("floor-raised");
            }
            let Some(machine) = self.machine_of(id) else {
                continue;
            };
            let Some(model) = self.known.model.histories.get(&id) else {
                continue;
            };
            let (durable, fork) = (model.durable, fork_of(model.parent));
            let disks = self.writers[machine].disks.iter().map(|disk| disk.id);
            for disk in disks.filter(|disk| self.known.declared.contains(disk)) {
                let shown = self.known.model.shown(id, disk, durable);
                let is_own = shown > fork && self.known.model.is_copied(id, disk, shown);
                assert!(
                    !is_own || floor <= shown,
                    "seed {seed}: floor {floor} of {id} is above the newest state {shown}"
                );
            }
        }
    }

    /// The floor of a history, as it was seen last.
    pub(super) fn floor_of(&self, history: HistoryId) -> Lsn {
        let floor = self.known.kept.floors.get(&history).copied();
        floor.unwrap_or_default()
    }

    /// Says whether an LSN lies below the journal window, and that no point names it.
    pub(super) fn is_below_window(
        &mut self,
        rig: &mut StoreRig,
        history: HistoryId,
        lsn: Lsn,
    ) -> bool {
        let Some(Ok(Response::Info(info))) = rig.ask(Request::Info) else {
            return true;
        };
        self.check_floors(&info);
        let is_named = self.known.points.iter().any(|(key, point)| {
            let stays = point.is_acknowledged && !point.is_dropping;
            let is_there = stays && !self.known.kept.thinning.contains(key);
            is_there && (point.history, point.lsn) == (history, lsn)
        });
        let (mut owner, mut cap) = (history, lsn);
        while let Some((parent, fork)) = self.known.model.histories[&owner].parent {
            if cap > fork {
                break;
            }
            (owner, cap) = (parent, cap.min(fork));
        }
        let floor = self.known.kept.floors.get(&owner).copied();
        let is_below = !is_named && cap < floor.unwrap_or_default();
        if is_below {
            self.report.count("below-window-refused");
        }
        is_below
    }
}

/// Says whether an error is about the journal window.
pub(super) fn is_of_window(error: &SeedError) -> bool {
    error.to_string().contains("before the journal window")
}

fn list(rig: &mut StoreRig, machine: &str) -> Option<Vec<PointRecord>> {
    let request = Request::ListPoints {
        machine: machine.to_owned(),
        after: PointId(0),
        limit: 100_000,
    };
    match rig.ask(request) {
        Some(Ok(Response::Points(found, _))) => Some(found),
        _ => None,
    }
}
