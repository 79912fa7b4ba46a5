//! Locking and deleting points, many in one commit: all of them or none.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_blockdev::{MachineId, PointId, Timestamp};

use super::points::nearest;
use super::retention::Applied;
use super::{AfterCommit, Engine, Output, RequestId, Response};
use crate::error::SeedError;
use crate::manifest::Edit;
use crate::reference::format_time;
use crate::retention::{LOCK_MAX, Lock, LockClock};

/// Most points of one request.
const POINTS_MAX: usize = 10_000;
/// Reasons that a refusal spells out.
const REASONS_MAX: usize = 3;

type Answer = Result<Option<Response>, SeedError>;

/// Why points stand in the way of a request.
#[derive(Default)]
struct Reasons {
    texts: Vec<String>,
    hint: String,
    count: usize,
}

impl Reasons {
    fn add(&mut self, text: String, hint: impl FnOnce() -> String) {
        self.count += 1;
        if self.texts.len() < REASONS_MAX {
            self.texts.push(text);
        }
        if self.hint.is_empty() {
            self.hint = hint();
        }
    }

    fn refuse(self, what: &str) -> Result<(), SeedError> {
        if self.count == 0 {
            return Ok(());
        }
        let mut message = format!("nothing was {what}: {}", self.texts.join("; "));
        let more = self.count - self.texts.len();
        if more > 0 {
            message.push_str(&format!("; and {more} more"));
        }
        Err(SeedError::refused(message, self.hint))
    }
}

impl Engine {
    /// The points that names stand for, each once. What cannot be found is noted.
    fn points_named(
        &self,
        machine: MachineId,
        names: &[String],
        reasons: &mut Reasons,
    ) -> Result<BTreeMap<PointId, String>, SeedError> {
        if names.is_empty() || names.len() > POINTS_MAX {
            return Err(SeedError::refused(
                format!("{} points are named in one request", names.len()),
                format!("name 1 to {POINTS_MAX}"),
            ));
        }
        let mut found = BTreeMap::new();
        let Some(state) = self.machines.get(&machine) else {
            return Ok(found);
        };
        for name in names {
            if let Some(point) = state.names.get(name) {
                found.insert(*point, name.clone());
            } else {
                reasons.add(format!("there is no point {name:?}"), || {
                    nearest(name, state.names.keys().map(String::as_str))
                });
            }
        }
        Ok(found)
    }

    pub(super) fn delete_points(
        &mut self,
        id: RequestId,
        machine: &str,
        names: &[String],
        out: &mut Vec<Output>,
    ) -> Answer {
        let machine = self.machine_named(machine)?;
        let clock = self.lock_clock(out)?;
        let mut reasons = Reasons::default();
        let points = self.points_named(machine, names, &mut reasons)?;
        for (point, name) in &points {
            if let Some(lock) = self.held_lock(*point) {
                reasons.add(locked(name, lock, &clock), || how_it_ends(&clock));
            }
        }
        reasons.refuse("deleted")?;
        let mut edits = Vec::new();
        let mut dropped = Vec::new();
        for point in points.into_keys() {
            dropped.push((machine, point));
            // A deletion that is on its way already is durable before this commit is.
            if self.retention.dropping.insert(point) {
                edits.push(Edit::PointDropped { point });
            }
        }
        let applied = Applied {
            dropped,
            request: Some(id),
            ..Applied::default()
        };
        self.commit(edits, AfterCommit::Retention(applied), out);
        Ok(None)
    }

    pub(super) fn lock_points(
        &mut self,
        id: RequestId,
        machine: &str,
        names: &[String],
        until: Timestamp,
        out: &mut Vec<Output>,
    ) -> Answer {
        let machine = self.machine_named(machine)?;
        let clock = self.lock_clock(out)?;
        let Some(asked) = clock.lock_until(until) else {
            let message = format!("{} is past", format_time(until));
            return Err(SeedError::refused(message, "name a time to come"));
        };
        if clock.left(asked) > LOCK_MAX {
            return Err(SeedError::refused(
                format!("{} is more than 10 years ahead", format_time(until)),
                "name an earlier time: a lock cannot be taken back",
            ));
        }
        let mut reasons = Reasons::default();
        let points = self.points_named(machine, names, &mut reasons)?;
        for (point, name) in &points {
            if self.retention.dropping.contains(point) {
                reasons.add(format!("point {name:?} is being deleted"), String::new);
            }
            if let Some(lock) = self.held_lock(*point).filter(|lock| lock.until > until) {
                let hint = || "locks can be lengthened, never shortened".to_owned();
                reasons.add(locked(name, lock, &clock), hint);
            }
        }
        reasons.refuse("locked")?;
        self.can_carry_locks(machine, points.keys().copied(), until)?;
        let mut edits: Vec<Edit> = Vec::new();
        for point in points.into_keys() {
            let known = self.retention.locks.entry(point).or_default();
            *known = known.and(asked);
            edits.push(Edit::PointLocked {
                point,
                lock: *known,
            });
        }
        edits.extend(self.due_clock_edit());
        let after = AfterCommit::Reply(id, Box::new(Response::Done));
        self.commit(edits, after, out);
        Ok(None)
    }
}

fn locked(name: &str, lock: Lock, clock: &LockClock) -> String {
    let until = format_time(lock.until);
    let left = clock.left(lock);
    if clock.is_frozen() {
        format!("point {name:?} is locked until {until}, and the clock is not trusted")
    } else if lock.until.0.saturating_add(1_000_000_000) < clock.expected().0
        && left > Duration::ZERO
    {
        let hours = left.as_secs().div_ceil(3600);
        format!(
            "point {name:?} was locked until {until}, but the store has yet to run for {hours} h \
             of that"
        )
    } else {
        format!("point {name:?} is locked until {until}")
    }
}

fn how_it_ends(clock: &LockClock) -> String {
    if clock.is_frozen() {
        "look at the time of the appliance; `aft policy confirm-clock` says that it is right"
            .to_owned()
    } else {
        "leave the locked points out, or wait until their locks end".to_owned()
    }
}
