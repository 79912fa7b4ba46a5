//! Policies, thinning and the clock that locks trust, as records of the manifest.
//!
//! Invariants
//! * What is decided is in memory before its commit is written, and what undoes protection (a
//!   deletion, a thinning, a raised floor) is in force only when its commit is durable. So a crash
//!   never leaves less than was acknowledged.
//! * A point with a lock that holds is in no `PointDropped`, whoever asks.
//! * The clock is read before any decision that depends on it. While it is frozen nothing is
//!   thinned and no floor rises.
//! * At most one commit of the timer is on its way, with at most [`THIN_MAX`] points.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use afterimage_blockdev::{HistoryId, Lsn, MachineId, Monotonic, PointId, Timestamp};

use super::points::is_generated_name;
use super::{AfterCommit, Engine, Event, Output, RequestId, Response};
use crate::error::SeedError;
use crate::manifest::{Edit, PointRecord};
use crate::retention::{Candidate, ClockRecord, Lock, LockClock, Policy, thin};

/// Points that one commit drops by policy.
const THIN_MAX: usize = 1000;
/// Points looked at in one step, but for the last machine's.
const LOOK_MAX: usize = 20_000;
/// How often the time lived through is recorded.
const RECORD_EVERY: Duration = Duration::from_secs(60);

type Answer = Result<Option<Response>, SeedError>;

/// What the engine knows of retention.
#[derive(Debug, Default)]
pub(super) struct Retention {
    /// There once the store runs.
    clock: Option<LockClock>,
    recorded: Option<ClockRecord>,
    /// When the clock was recorded last in this run.
    recorded_at: Option<Monotonic>,
    policies: BTreeMap<MachineId, (u64, Policy)>,
    pub(super) locks: BTreeMap<PointId, Lock>,
    /// Points of which a deletion is on its way.
    pub(super) dropping: BTreeSet<PointId>,
    next_at: Monotonic,
    /// The machine to go on with; `None` at the beginning of a round.
    cursor: Option<MachineId>,
    is_committing: bool,
}

/// What comes into force with a commit.
#[derive(Debug, Default)]
pub(super) struct Applied {
    pub(super) dropped: Vec<(MachineId, PointId)>,
    pub(super) floors: Vec<(HistoryId, Lsn)>,
    pub(super) request: Option<RequestId>,
    /// It is the timer's.
    pub(super) is_timed: bool,
}

/// A machine's policy and how often it was changed; 0 while it is the default.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyInfo {
    /// Rises by one with each change.
    pub version: u64,
    /// The policy.
    pub policy: Policy,
}

/// How the clock that locks trust is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ClockInfo {
    /// Time that the store has lived through, as far as is known.
    pub elapsed: Duration,
    /// How far the wall clock is ahead of where it should be, while it is not trusted.
    pub frozen_ahead: Option<Duration>,
}

impl Engine {
    pub(super) fn replay_retention(&mut self, edit: Edit) {
        match edit {
            Edit::Policy {
                machine,
                version,
                policy,
            } => {
                self.retention.policies.insert(machine, (version, policy));
            }
            Edit::PointLocked { point, lock } => {
                let known = self.retention.locks.entry(point).or_default();
                *known = known.and(lock);
            }
            Edit::Clock(clock) => self.retention.recorded = Some(clock),
            Edit::Floor { history, lsn } => {
                if let Some(entry) = self.histories.get_mut(&history) {
                    entry.floor = entry.floor.max(lsn);
                }
            }
            _ => {}
        }
    }

    /// The state as edits; behind the points.
    pub(super) fn retention_state(&self) -> Vec<Edit> {
        let policies = self.retention.policies.iter();
        let mut edits: Vec<Edit> = policies
            .map(|(machine, (version, policy))| Edit::Policy {
                machine: *machine,
                version: *version,
                policy: policy.clone(),
            })
            .collect();
        let locks = self.retention.locks.iter();
        edits.extend(locks.map(|(point, lock)| Edit::PointLocked {
            point: *point,
            lock: *lock,
        }));
        edits.extend(self.retention.recorded.map(Edit::Clock));
        let raised = self.histories.iter();
        let raised = raised.filter(|(_, entry)| entry.floor > Lsn::ZERO);
        edits.extend(raised.map(|(history, entry)| Edit::Floor {
            history: *history,
            lsn: entry.floor,
        }));
        edits.extend(self.space_state());
        edits
    }

    /// Reads the clocks, and says when that makes the wall clock untrusted.
    pub(super) fn observe_clock(&mut self, out: &mut Vec<Output>) {
        let (wall, now) = (self.clock.wall(), self.now);
        let recorded = self.retention.recorded;
        let was_frozen = recorded.is_some_and(|recorded| recorded.is_frozen);
        let is_new = self.retention.clock.is_none();
        let clock = self
            .retention
            .clock
            .get_or_insert_with(|| LockClock::start(recorded, wall, now));
        let is_frozen_now = clock.observe(wall, now);
        let (is_frozen, ahead) = (clock.is_frozen(), clock.ahead());
        if is_frozen_now || (is_new && is_frozen) {
            out.push(Output::Event(Event::ClockFrozen { ahead }));
        }
        if is_frozen && !was_frozen {
            // A restart must find it so.
            let record = self.record_clock();
            self.commit(
                vec![record],
                AfterCommit::Retention(Applied::default()),
                out,
            );
        }
    }

    fn record_clock(&mut self) -> Edit {
        let clock = self.retention.clock.as_ref();
        let record = clock.map(LockClock::record).unwrap_or_default();
        self.retention.recorded = Some(record);
        self.retention.recorded_at = Some(self.now);
        Edit::Clock(record)
    }

    /// The record of the clock that goes along with a commit, when one is due.
    pub(super) fn due_clock_edit(&mut self) -> Option<Edit> {
        self.retention.clock.as_ref()?;
        let last = self.retention.recorded_at;
        let is_due = last.is_none_or(|last| self.now >= last.after(RECORD_EVERY));
        is_due.then(|| self.record_clock())
    }

    /// The clock that locks trust, read just now.
    pub(super) fn lock_clock(&mut self, out: &mut Vec<Output>) -> Result<LockClock, SeedError> {
        self.observe_clock(out);
        self.retention
            .clock
            .clone()
            .ok_or_else(|| SeedError::refused("the store is not open", "wait until it has started"))
    }

    /// The time by which things become old, as it was read last.
    pub(super) fn trusted_time(&self) -> Option<Timestamp> {
        self.retention.clock.as_ref()?.trusted()
    }

    pub(super) fn clock_info(&self) -> ClockInfo {
        let clock = self.retention.clock.as_ref();
        ClockInfo {
            elapsed: Duration::from_nanos(clock.map_or(0, |clock| clock.elapsed().0)),
            frozen_ahead: clock
                .filter(|clock| clock.is_frozen())
                .map(LockClock::ahead),
        }
    }

    /// The lock of a point while it holds.
    pub(super) fn held_lock(&self, point: PointId) -> Option<Lock> {
        let lock = *self.retention.locks.get(&point)?;
        let clock = self.retention.clock.as_ref();
        clock.is_none_or(|clock| clock.holds(lock)).then_some(lock)
    }

    /// A point as it is shown: locked as far as that holds.
    pub(super) fn shown_point(&self, point: &PointRecord) -> PointRecord {
        PointRecord {
            locked_until: self
                .held_lock(point.id)
                .map_or(Timestamp(0), |lock| lock.until),
            ..point.clone()
        }
    }

    pub(super) fn policy_of(&self, machine: MachineId) -> PolicyInfo {
        let known = self.retention.policies.get(&machine).cloned();
        let (version, policy) = known.unwrap_or_default();
        PolicyInfo { version, policy }
    }

    pub(super) fn set_policy(
        &mut self,
        id: RequestId,
        machine: &str,
        policy: Policy,
        expected: Option<u64>,
        out: &mut Vec<Output>,
    ) -> Answer {
        let machine = self.machine_named(machine)?;
        let known = self.policy_of(machine).version;
        if let Some(expected) = expected.filter(|expected| *expected != known) {
            return Err(SeedError::refused(
                format!("the policy has version {known} by now, not {expected}"),
                "look at it again, and decide anew",
            ));
        }
        if let Err(error) = policy.validate() {
            return Err(SeedError::refused(error.to_string(), ""));
        }
        if let Some(rule) = &policy.lock {
            self.can_carry_rule(machine, rule)?;
        }
        let version = known + 1;
        let info = PolicyInfo {
            version,
            policy: policy.clone(),
        };
        self.retention
            .policies
            .insert(machine, (version, policy.clone()));
        let edit = Edit::Policy {
            machine,
            version,
            policy,
        };
        let after = AfterCommit::Reply(id, Box::new(Response::Policy(info)));
        self.commit(vec![edit], after, out);
        Ok(None)
    }

    pub(super) fn confirm_clock(&mut self, id: RequestId, out: &mut Vec<Output>) -> Answer {
        self.observe_clock(out);
        if let Some(clock) = &mut self.retention.clock {
            clock.confirm();
        }
        let record = self.record_clock();
        let after = AfterCommit::Reply(id, Box::new(Response::Done));
        self.commit(vec![record], after, out);
        Ok(None)
    }

    /// Thins, raises floors and records the clock, when the time has come.
    pub(super) fn retain_when_due(&mut self, out: &mut Vec<Output>) {
        if self.retention.clock.is_none() {
            self.observe_clock(out);
            self.retention.next_at = self.now.after(self.options.retention_interval);
        }
        if self.retention.is_committing {
            return;
        }
        if self.now < self.retention.next_at {
            out.push(Output::WakeAt(self.retention.next_at));
            return;
        }
        self.observe_clock(out);
        let (mut dropped, mut floors) = (Vec::new(), Vec::new());
        if let Some(now) = self.trusted_time() {
            if self.retention.cursor.is_none() {
                floors = self.floors_to_raise();
            }
            dropped = self.thin_some(now);
        }
        self.retention.next_at = if self.retention.cursor.is_some() {
            self.now
        } else {
            self.now.after(self.options.retention_interval)
        };
        let mut edits: Vec<Edit> = floors
            .iter()
            .map(|(history, lsn)| Edit::Floor {
                history: *history,
                lsn: *lsn,
            })
            .collect();
        for (_, point) in &dropped {
            self.retention.dropping.insert(*point);
            edits.push(Edit::PointDropped { point: *point });
        }
        edits.extend(self.due_clock_edit());
        edits.extend(self.due_churn_edits());
        if edits.is_empty() {
            out.push(Output::WakeAt(self.retention.next_at));
            return;
        }
        self.retention.is_committing = true;
        let applied = Applied {
            dropped,
            floors,
            request: None,
            is_timed: true,
        };
        self.commit(edits, AfterCommit::Retention(applied), out);
    }

    /// What policies drop of the next machines; the cursor says where to go on.
    fn thin_some(&mut self, now: Timestamp) -> Vec<(MachineId, PointId)> {
        let mut dropped = Vec::new();
        let mut looked_at = 0;
        let first = self.retention.cursor.take();
        let first = first.unwrap_or(MachineId([0; 16]));
        for (machine, state) in self.machines.range(first..) {
            if looked_at >= LOOK_MAX || dropped.len() >= THIN_MAX {
                self.retention.cursor = Some(*machine);
                break;
            }
            looked_at += state.points.len();
            let remaining = state
                .points
                .values()
                .filter(|point| !self.retention.dropping.contains(&point.id));
            let candidates: Vec<Candidate> = remaining.map(|point| self.candidate(point)).collect();
            let policy = self.policy_of(*machine).policy;
            let mut unwanted = thin(&candidates, &policy, now);
            let room = THIN_MAX - dropped.len();
            if unwanted.len() > room {
                unwanted.truncate(room);
                self.retention.cursor = Some(*machine);
            }
            dropped.extend(unwanted.into_iter().map(|point| (*machine, point)));
            if self.retention.cursor.is_some() {
                break;
            }
        }
        dropped
    }

    fn candidate(&self, point: &PointRecord) -> Candidate {
        Candidate {
            id: point.id,
            history: point.history,
            time: point.time,
            kind: point.kind,
            is_named: !is_generated_name(point),
            is_locked: self.held_lock(point.id).is_some(),
        }
    }

    pub(super) fn retention_committed(&mut self, applied: Applied, out: &mut Vec<Output>) {
        for (machine, point) in &applied.dropped {
            self.forget_point(*machine, *point);
            self.retention.dropping.remove(point);
            self.retention.locks.remove(point);
        }
        for (history, lsn) in applied.floors {
            if let Some(entry) = self.histories.get_mut(&history) {
                entry.floor = entry.floor.max(lsn);
            }
        }
        if !applied.dropped.is_empty() {
            self.hope_for_room();
        }
        if applied.is_timed {
            self.retention.is_committing = false;
            out.push(Output::WakeAt(self.retention.next_at));
            let points = applied.dropped.len();
            if points > 0 {
                out.push(Output::Event(Event::Thinned { points }));
            }
        }
        if let Some(request) = applied.request {
            out.push(Output::Reply(request, Ok(Response::Done)));
        }
    }
}
