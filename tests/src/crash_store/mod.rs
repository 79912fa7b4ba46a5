//! Crash images of the whole store, each compared with a model.
//!
//! One seed is one medium that lives through several crashes. Each time an engine is started on
//! it, checked against the model, given work, and cut at a random storage operation: by a power
//! cut, by the program's death, by a failing operation, or stopped in order. In a third of the
//! cases the next recovery is cut as well.
//!
//! What must hold after every recovery:
//! * a history's durable LSN is no lower than what was acknowledged, and ends a frame;
//! * the image of a disk at every LSN up to there is what the records up to there make; inside a
//!   batch the state before its begin is shown, and without a whole first copy nothing is;
//! * acknowledged points have their cut, deleted ones stay deleted, and there are no others; what
//!   holds of locks, policies and journal windows is said in `retain.rs`;
//! * acknowledged bulk frames are there, and a bulk frame is there whole or not at all;
//! * a branch holds everything up to its last completed flush, and nothing that was not written.

mod branch;
mod changes;
mod check;
mod fault;
mod flip;
pub mod golden;
mod rebuild;
mod retain;
mod work;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use afterimage_blockdev::simulated::{
    CompletionOrder, SimulatedClock, SimulatedOptions, SimulatedStorage,
};
use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, Monotonic, Random, Timestamp};
use afterimage_seed::RequestId;
use afterimage_seed::engine::EngineOptions;

use crate::crash_log::{EVERY_MAX, images};
use crate::report::Report;
use crate::store_model::{Model, Point};
use crate::store_rig::{StoreRig, small_store};
use crate::store_writer::Writer;
use branch::BranchRun;

pub use fault::{FAULT_MUST_OCCUR, FAULT_REGRESSIONS, fault_campaign, fault_seed};
pub use flip::{FLIP_MUST_OCCUR, FLIP_REGRESSIONS, flip_campaign, flip_seed};
pub use rebuild::{
    REBUILD_MUST_OCCUR, REBUILD_REGRESSIONS, Rebuild, rebuild_campaign, rebuild_seed,
};

/// Events without which a campaign proves too little.
pub const MUST_OCCUR: &[&str] = &[
    "power-cut",
    "killed",
    "stopped",
    "cut-in-recovery",
    "cut-in-manifest-recovery",
    "cut-in-run-recovery",
    "cut-in-log-recovery",
    "cut-in-log",
    "cut-in-flush",
    "cut-in-bulk",
    "cut-in-manifest",
    "cut-in-rotation",
    "run-read-at-start",
    "tail-dropped",
    "unacknowledged-kept",
    "unacknowledged-bulk-kept",
    "bulk-dropped",
    "bulk-acknowledged",
    "batch-ended",
    "batch-unfinished",
    "shown-before-batch",
    "incomplete-refused",
    "epoch-begun",
    "history-begun",
    "stream-reopened",
    "disk-grown",
    "point-acknowledged",
    "point-of-a-mark",
    "point-dropped",
    "point-undecided",
    "branch-forked",
    "branch-of-a-branch",
    "branch-flushed",
    "branch-dropped",
    "branch-tail-dropped",
    "several-layers",
    "runs-merged",
    "entry-left-out",
    "collected",
    "segment-destaged",
    "segment-rewritten",
    "segment-dropped",
    "cut-in-segment-recovery",
    "image-compared",
    "change-told",
    "unchanged-told",
    "point-locked",
    "locked-by-policy",
    "lock-recovered",
    "lock-expired",
    "locked-deletion-refused",
    "shorter-lock-refused",
    "points-dropped-at-once",
    "policy-set",
    "stale-policy-refused",
    "thinned",
    "thinning-undecided",
    "thinning-frozen",
    "clock-jumped-forward",
    "clock-jumped-back",
    "clock-frozen",
    "clock-confirmed",
    "floor-raised",
    "below-window-refused",
];

/// Seeds that once found something, and what it was.
pub const REGRESSIONS: &[u64] = &[];

/// Generations of one medium.
const GENERATIONS: u64 = 4;
/// Images made of one cut.
const IMAGES: u64 = 4;

/// Checks at least `count` crash images, of the seeds from `seed_from` on.
///
/// # Panics
/// When an image does not agree with the model; the message names the seed.
#[must_use]
pub fn crash_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        report.merge(&crash_seed(seed));
        seed += 1;
    }
    report
}

/// As [`crash_campaign`], but where a cut finds few changes without a sync it looks at every set of
/// them.
///
/// # Panics
/// As [`crash_campaign`].
#[must_use]
pub fn every_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        SEED.store(seed, Ordering::Relaxed);
        let mut campaign = Campaign::new(seed);
        campaign.looks_at_every_set = true;
        campaign.run();
        report.merge(&campaign.report);
        seed += 1;
    }
    report
}

/// The seed that is being checked, for the message of a check that fails.
static SEED: AtomicU64 = AtomicU64::new(0);

/// The seed that is being checked.
#[must_use]
pub fn seed_in_hand() -> u64 {
    SEED.load(Ordering::Relaxed)
}

/// Checks the images of one seed.
///
/// # Panics
/// As [`crash_campaign`].
#[must_use]
pub fn crash_seed(seed: u64) -> Report {
    SEED.store(seed, Ordering::Relaxed);
    let mut campaign = Campaign::new(seed);
    campaign.run();
    campaign.report
}

/// What an answer is waited for.
#[derive(Clone)]
enum Waiting {
    Point {
        machine: MachineId,
        name: String,
    },
    PointsDropped {
        keys: Vec<retain::Key>,
        is_locked: bool,
    },
    Locked {
        keys: Vec<retain::Key>,
        end: (Timestamp, Monotonic),
        shortens: bool,
    },
    Policy {
        machine: MachineId,
        is_stale: bool,
    },
    Confirmed,
    Fork {
        machine: usize,
    },
    Dropped(HistoryId),
}

/// What is known of the world outside of the medium.
#[derive(Clone, Default)]
struct Known {
    model: Model,
    /// Points that were asked for, by machine and name.
    points: BTreeMap<(MachineId, String), Point>,
    /// Branches, by history.
    branches: BTreeMap<HistoryId, BranchRun>,
    /// Histories whose existence was acknowledged.
    opened: Vec<HistoryId>,
    /// Disks whose existence was acknowledged.
    declared: BTreeSet<DiskId>,
    /// Locks, policies and floors.
    kept: retain::Kept,
}

struct Campaign {
    seed: u64,
    random: Random,
    options: EngineOptions,
    clock: Arc<SimulatedClock>,
    known: Known,
    writers: Vec<Writer>,
    waiting: HashMap<RequestId, Waiting>,
    next_point: u64,
    /// Operations of the medium may fail now.
    is_faulty: bool,
    looks_at_every_set: bool,
    report: Report,
}

impl Campaign {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut options = small_store();
        options.retention_interval = retain::INTERVAL;
        options.flush_entries = [8, 40, 200][random.index(3)];
        options.bulk_segment_bytes = [32 << 10, 96 << 10][random.index(2)];
        options.manifest_bytes = [16 << 10, 64 << 10, 1 << 20][random.index(3)];
        options.reserve_file_bytes = [0, 8 << 10][random.index(2)];
        options.cache_bytes = [u64::MAX, 512 << 10, 0][random.index(3)];
        options.time_grain = Duration::from_millis([1, 100, 1000][random.index(3)]);
        let machines = 1 + random.index(2);
        let writers = (0..machines)
            .map(|number| {
                let disks = 1 + random.index(3);
                Writer::new(random.next_u64(), number, disks, 32 + random.index(64))
            })
            .collect();
        Self {
            seed,
            random,
            options,
            clock: StoreRig::new_clock(),
            known: Known::default(),
            writers,
            waiting: HashMap::new(),
            next_point: 1,
            is_faulty: false,
            looks_at_every_set: false,
            report: Report::default(),
        }
    }

    fn run(&mut self) {
        let order = if self.random.chance(0.7) {
            CompletionOrder::Random
        } else {
            CompletionOrder::Submission
        };
        let options = SimulatedOptions {
            order,
            ..SimulatedOptions::default()
        };
        let mut storage = SimulatedStorage::new(self.random.next_u64(), options);
        for _ in 0..GENERATIONS {
            let Some(mut rig) = self.start(&storage) else {
                self.cut(&storage);
                continue;
            };
            for machine in 0..self.writers.len() {
                self.writers[machine].stream = None;
                self.restart_writer(machine, 0.4);
            }
            let operations = rig.storage.operations() + 1 + self.random.below(400);
            rig.storage.stop_after(Some(operations));
            self.work(&mut rig);
            storage = self.end(rig);
        }
        let counters = storage.counters();
        for (event, times) in counters {
            self.report.add(event, times);
        }
    }

    /// Starts an engine and checks what it shows; `None` when it was cut before it was ready.
    fn start(&mut self, storage: &Arc<SimulatedStorage>) -> Option<StoreRig> {
        if self.random.chance(0.33) {
            let operations = storage.operations() + 1 + self.random.below(40);
            storage.stop_after(Some(operations));
        }
        let seed = self.random.next_u64();
        let mut rig = StoreRig::new(storage, &self.clock, self.options.clone(), seed);
        rig.run_until(|rig| rig.is_ready);
        if let Some(failure) = &rig.failure {
            panic!("seed {}: recovery failed: {failure}", self.seed);
        }
        if !rig.is_ready {
            assert!(storage.is_stopped(), "seed {}: recovery stalls", self.seed);
            self.count_areas(&rig, "-recovery");
            self.report.count("cut-in-recovery");
            return None;
        }
        storage.stop_after(None);
        self.check(&mut rig);
        self.report.images += 1;
        Some(rig)
    }

    /// Counts what was under way when the medium stopped.
    fn count_areas(&mut self, rig: &StoreRig, suffix: &str) {
        for area in rig.areas() {
            let event = match (area, suffix) {
                ("log", "") => "cut-in-log",
                ("runs", "") => "cut-in-flush",
                ("segments", "") => "cut-in-bulk",
                ("manifest", "") => "cut-in-manifest",
                ("rotation", "") => "cut-in-rotation",
                ("log", _) => "cut-in-log-recovery",
                ("runs", _) => "cut-in-run-recovery",
                ("segments", _) => "cut-in-segment-recovery",
                ("manifest" | "rotation", _) => "cut-in-manifest-recovery",
                _ => continue,
            };
            self.report.count(event);
        }
    }

    /// Ends a generation: by a power cut, the program's death, or in order.
    fn end(&mut self, mut rig: StoreRig) -> Arc<SimulatedStorage> {
        self.hear(&mut rig);
        let storage = Arc::clone(&rig.storage);
        match self.random.below(8) {
            0 => {
                storage.stop_after(None);
                let is_stopped = rig.stop();
                assert!(is_stopped, "seed {}: the engine does not stop", self.seed);
                self.hear(&mut rig);
                self.report.count("stopped");
                drop(rig);
                storage.run_until_idle();
            }
            1 => {
                // The program is gone; the kernel finishes what was submitted.
                drop(rig);
                storage.stop_after(None);
                storage.run_until_idle();
                self.report.count("killed");
            }
            _ => {
                self.count_areas(&rig, "");
                drop(rig);
                self.cut(&storage);
            }
        }
        self.waiting.clear();
        storage
    }

    /// Cuts the power, looks at several images of that cut, and goes on with one.
    fn cut(&mut self, storage: &Arc<SimulatedStorage>) {
        let before = self.known.clone();
        if self.looks_at_every_set && storage.unsynced_changes() <= EVERY_MAX {
            self.report.count("every-set-of-a-cut");
        }
        for image in images(storage, &mut self.random, IMAGES, self.looks_at_every_set) {
            if self.start(&image).is_none() {
                image.power_cut();
                image.stop_after(None);
                self.start_whole(&image);
            }
            let counters = image.counters();
            for (event, times) in counters {
                self.report.add(event, times);
            }
            self.known = before.clone();
        }
        storage.power_cut();
    }

    /// Starts without a second cut.
    fn start_whole(&mut self, storage: &Arc<SimulatedStorage>) {
        for _ in 0..8 {
            if self.start(storage).is_some() {
                return;
            }
            storage.power_cut();
        }
    }

    fn name_of(&self, machine: MachineId) -> &str {
        let writer = self.writers.iter().find(|writer| writer.machine == machine);
        &writer.expect("a known machine").name
    }
}

/// The fork of a history, 0 without one.
fn fork_of(parent: Option<(HistoryId, Lsn)>) -> Lsn {
    parent.map_or(Lsn::ZERO, |(_, fork)| fork)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_agrees_with_the_model_after_every_crash() {
        let report = crash_campaign(1, 3000);
        let missing = report.missing(MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }

    #[test]
    fn seeds_that_once_failed_hold() {
        for seed in REGRESSIONS {
            assert!(crash_seed(*seed).images > 0);
        }
    }
}
