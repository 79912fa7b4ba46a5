//! What gives way when there is no room: the machine that holds most beyond its share keeps a
//! shorter journal window, and at its shortest loses its oldest points.
//!
//! Invariants
//! * Only a collection that gave no room leads here, one step each.
//! * While there is still some room only windows give way, so that ingest need not pause; they get
//!   longer again only when the doubled one would fit.
//! * A lock holds, and the last good point of a machine stays, whatever the pressure.
//! * One machine's churn never shortens another's history: it is always the one over its share.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_blockdev::{MachineId, Monotonic, PointId};

use super::points::is_generated_name;
use super::retention::Applied;
use super::{AfterCommit, Engine, Event, Output};
use crate::manifest::{Edit, PointKind};
use crate::section::Section;

/// A budget of which only such a part is left is short.
const SHORT_PART: u64 = 8;
/// Segments for whose rewriting the log leaves room.
const REWRITES: u64 = 4;
/// Of a small budget at most such a part is left for that.
const SPARE_PART: u64 = 16;
/// A window is halved at most so often.
pub(super) const HALVINGS_MAX: u32 = 16;
/// Part of a machine's points that goes in one step.
const POINTS_PART: usize = 8;

/// How long what is known of a shortage counts.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What runs short, as it was seen last: looking goes through all segments, which no frame of
/// ingest should pay for.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Shortage {
    next_look: Monotonic,
    is_budget_short: bool,
    is_log_long: bool,
}

impl Engine {
    /// Looks again at what runs short, when the last look is old.
    pub(super) fn look_for_shortage(&mut self) {
        if self.now >= self.shortage.next_look {
            self.shortage = Shortage {
                next_look: self.now.after(LOOK_EVERY),
                is_budget_short: self.is_budget_used(),
                is_log_long: self.is_log_used(),
            };
        }
    }

    /// Says whether the budget was nearly used up.
    pub(super) fn is_budget_short(&self) -> bool {
        self.shortage.is_budget_short
    }

    /// Says whether the log held more that is sealed than its cache may.
    pub(super) fn is_log_long(&self) -> bool {
        self.shortage.is_log_long
    }

    /// The journal window that a machine gets now.
    pub(super) fn journal_window(&self, machine: MachineId) -> Duration {
        let window = self.policy_of(machine).policy.journal_window;
        let halvings = self.halvings.get(&machine).copied().unwrap_or(0);
        let shortest = self.options.window_min.min(window);
        (window / (1 << halvings.min(HALVINGS_MAX))).max(shortest)
    }

    /// Gives the log what the rest of the store leaves of the budget.
    pub(super) fn share_budget(&mut self) {
        if self.options.budget_bytes == u64::MAX {
            return;
        }
        let seeds: u64 = self.seed_segments.values().map(|state| state.bytes).sum();
        let runs: u64 = self.runs.values().sum();
        let notes = self.notes.stored_bytes();
        self.kept_bytes = seeds + runs + notes + self.manifest.stored_bytes();
        // Room for segments that are rewritten before what they replace is given back.
        let budget = self.options.budget_bytes;
        let spare = (REWRITES * self.options.segment_bytes).min(budget / SPARE_PART);
        let of_others = self.kept_bytes.saturating_add(spare);
        self.log.set_budget(budget.saturating_sub(of_others));
    }

    /// Says whether a lack of room keeps a machine's window shorter than its policy says.
    pub(super) fn is_window_shortened(&self, machine: MachineId) -> bool {
        self.halvings.contains_key(&machine)
    }

    /// The part of the budget that is left.
    fn budget_left(&self) -> u64 {
        let used = self.kept_bytes.saturating_add(self.log.stored_bytes());
        self.options.budget_bytes.saturating_sub(used)
    }

    /// Says whether the budget is nearly used up now.
    pub(super) fn is_budget_used(&self) -> bool {
        let budget = self.options.budget_bytes;
        budget != u64::MAX && self.budget_left() < budget / SHORT_PART
    }

    /// Says whether the log holds more that is sealed than its cache may.
    fn is_log_used(&self) -> bool {
        if self.options.cache_bytes == u64::MAX {
            return false;
        }
        let sealed = self.log.sealed_segments().into_iter();
        let staged = sealed.filter(|sealed| !self.seed_segments.contains_key(&sealed.segment));
        staged.map(|sealed| sealed.bytes).sum::<u64>() > self.options.cache_bytes
    }

    /// Lets go what windows have left behind since the timer last looked.
    pub(super) fn move_windows(&mut self, out: &mut Vec<Output>) {
        self.observe_clock(out);
        self.raise_floors(out);
    }

    /// Takes one step of giving way: windows get shorter, then points go. False when nobody can
    /// give anything.
    pub(super) fn give_way(&mut self, may_drop_points: bool, out: &mut Vec<Output>) -> bool {
        self.observe_clock(out);
        for machine in self.by_excess() {
            let halvings = self.halvings.get(&machine).copied().unwrap_or(0);
            let can_shorten = halvings < HALVINGS_MAX;
            if can_shorten && self.journal_window(machine) > self.options.window_min {
                let window = self.shorten_window(machine);
                out.push(Output::Event(Event::WindowShortened { machine, window }));
                self.raise_floors(out);
                return true;
            }
            // At its shortest a window still moves on.
            if self.raise_floors(out) {
                return true;
            }
            let points = self.points_to_yield(machine);
            if may_drop_points && !points.is_empty() {
                let count = points.len();
                out.push(Output::Event(Event::PointsYielded { machine, count }));
                self.yield_points(machine, points, out);
                return true;
            }
        }
        false
    }

    /// Halves a window until a quarter of what it holds goes, or it is at its shortest.
    pub(super) fn shorten_window(&mut self, machine: MachineId) -> Duration {
        loop {
            let halvings = self.halvings.entry(machine).or_default();
            *halvings += 1;
            let is_last = *halvings >= HALVINGS_MAX;
            let window = self.journal_window(machine);
            let is_shortest = is_last || window <= self.options.window_min;
            let is_enough = window <= self.held_span(machine) / 4 * 3;
            if is_shortest || (is_enough && !self.floors_to_raise().is_empty()) {
                return window;
            }
        }
    }

    /// How far back a machine's histories reach now.
    fn held_span(&self, machine: MachineId) -> Duration {
        let Some(now) = self.trusted_time() else {
            return Duration::ZERO;
        };
        let of_machine = self
            .histories
            .values()
            .filter(|entry| entry.machine == machine);
        let begins = of_machine.filter_map(|entry| {
            let first = entry.timeline.iter().chain(&entry.open_timeline).next();
            let first = first.map(|sample| sample.time);
            entry.time_of(entry.floor).or(first)
        });
        let span = begins
            .min()
            .map_or(0, |begin| now.0.saturating_sub(begin.0));
        Duration::from_nanos(span)
    }

    /// When there is room again, windows get longer step by step.
    pub(super) fn recover_windows(&mut self) {
        if self.budget_left() < self.options.budget_bytes / 2 {
            return;
        }
        let machines: Vec<MachineId> = self.halvings.keys().copied().collect();
        for machine in machines {
            if self.is_near_quota(machine) {
                continue;
            }
            if let Some(halvings) = self.halvings.get_mut(&machine) {
                *halvings = halvings.saturating_sub(1);
            }
        }
        self.halvings.retain(|_, halvings| *halvings > 0);
    }

    /// Machines that hold more than their share, the one with most of it first; all of them when
    /// there is but one.
    pub(super) fn by_excess(&self) -> Vec<MachineId> {
        let mut held: BTreeMap<MachineId, u64> = BTreeMap::new();
        for entry in self.histories.values() {
            let maps = entry.disks.values();
            let entries = maps.map(|map| {
                let sections = map.sections.iter().chain(&map.base_parts);
                let in_sections: u64 = sections.map(|section| entries_of(section)).sum();
                in_sections + map.entries.len() as u64
            });
            *held.entry(entry.machine).or_default() += entries.sum::<u64>();
        }
        // Once there is an account, bytes count.
        for (machine, held) in &mut held {
            if let Some(bytes) = self.needed_by(*machine) {
                *held = bytes;
            }
        }
        let share = held.values().sum::<u64>() / (held.len().max(1) as u64);
        let mut over: Vec<_> = held
            .into_iter()
            .filter(|(_, held)| *held >= share)
            .collect();
        over.sort_by_key(|(machine, held)| (core::cmp::Reverse(*held), *machine));
        over.into_iter().map(|(machine, _)| machine).collect()
    }

    /// Records the floors that have moved; false when none has.
    pub(super) fn raise_floors(&mut self, out: &mut Vec<Output>) -> bool {
        let floors = self.floors_to_raise();
        if floors.is_empty() {
            return false;
        }
        let edits = floors.iter().map(|(history, lsn)| Edit::Floor {
            history: *history,
            lsn: *lsn,
        });
        let edits = edits.collect();
        let applied = Applied {
            floors,
            ..Applied::default()
        };
        self.commit(edits, AfterCommit::Retention(applied), out);
        true
    }

    /// The oldest points of a machine that no lock holds and no person named; one good point stays.
    pub(super) fn points_to_yield(&self, machine: MachineId) -> Vec<PointId> {
        let Some(state) = self.machines.get(&machine) else {
            return Vec::new();
        };
        let good = |kind| kind != PointKind::ResyncIncomplete;
        let last_good = state.points.values().rfind(|point| good(point.kind));
        let last_good = last_good.map(|point| point.id);
        let can_go = |id: &PointId| {
            let point = &state.points[id];
            Some(*id) != last_good
                && is_generated_name(point)
                && self.held_lock(*id).is_none()
                && !self.retention.dropping.contains(id)
        };
        let free: Vec<_> = state.points.keys().copied().filter(can_go).collect();
        let count = free.len().div_ceil(POINTS_PART);
        free.into_iter().take(count).collect()
    }

    pub(super) fn yield_points(
        &mut self,
        machine: MachineId,
        points: Vec<PointId>,
        out: &mut Vec<Output>,
    ) {
        let edits = points
            .iter()
            .map(|point| Edit::PointDropped { point: *point });
        let edits = edits.collect();
        self.retention.dropping.extend(points.iter().copied());
        let applied = Applied {
            dropped: points.into_iter().map(|point| (machine, point)).collect(),
            ..Applied::default()
        };
        self.commit(edits, AfterCommit::Retention(applied), out);
    }
}

fn entries_of(section: &Section) -> u64 {
    match section {
        Section::Memory { entries, .. } => entries.len() as u64,
        Section::File { table, .. } => table.entry_count,
    }
}
