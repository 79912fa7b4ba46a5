//! Failing storage operations under the whole store.
//!
//! What must hold, whichever operation fails and however:
//! * what was acknowledged is there after the next start, also when that follows a power cut;
//! * a full medium pauses the store, which goes on by itself when there is room;
//! * a failure that the store cannot bear ends it, and it can be started again at once.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::simulated::{
    CompletionOrder, Fault, FaultEffect, SimulatedOptions, SimulatedStorage,
};

use super::{Campaign, GENERATIONS, SEED};
use crate::report::Report;
use crate::store_rig::StoreRig;

/// Events without which a campaign proves too little.
pub const FAULT_MUST_OCCUR: &[&str] = &[
    "engine-failed",
    "failed-in-recovery",
    "resumed-after-fault",
    "paused",
    "resumed",
    "fault-io",
    "fault-no-space",
    "fault-short",
    "sync-failed",
    "no-space",
    "window-shortened",
    "power-cut",
    "killed",
];

/// Seeds that once found something.
pub const FAULT_REGRESSIONS: &[u64] = &[];

/// Room that is always enough.
const ROOM: u64 = 1 << 40;
/// How long a store is waited for while its medium fails.
const PATIENCE: Duration = Duration::from_secs(5);
/// Steps in which a store that has room again must come to rest.
const STEPS_MAX: u64 = 200_000;

/// Checks at least `count` recoveries after failures, of the seeds from `seed_from` on.
///
/// # Panics
/// When a store does not agree with the model; the message names the seed.
#[must_use]
pub fn fault_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        report.merge(&fault_seed(seed));
        seed += 1;
    }
    report
}

/// Checks the failures of one seed.
///
/// # Panics
/// As [`fault_campaign`].
#[must_use]
pub fn fault_seed(seed: u64) -> Report {
    SEED.store(seed, std::sync::atomic::Ordering::Relaxed);
    let mut campaign = Campaign::new(seed);
    campaign.run_faults();
    campaign.report
}

impl Campaign {
    fn run_faults(&mut self) {
        let order = CompletionOrder::Random;
        let options = SimulatedOptions {
            order,
            ..SimulatedOptions::default()
        };
        let storage = SimulatedStorage::new(self.random.next_u64(), options);
        for _ in 0..GENERATIONS {
            let Some(mut rig) = self.start_faulty(&storage) else {
                continue;
            };
            for machine in 0..self.writers.len() {
                self.writers[machine].stream = None;
                self.restart_writer(machine, 0.4);
            }
            self.is_faulty = true;
            self.inject(&storage, 300);
            rig.patience = PATIENCE;
            self.work(&mut rig);
            storage.clear_faults();
            storage.set_capacity(ROOM);
            if rig.failure.is_some() {
                self.report.count("engine-failed");
            } else if self.random.chance(0.7) {
                self.go_on(&mut rig);
            }
            self.is_faulty = false;
            self.hear(&mut rig);
            self.waiting.clear();
            drop(rig);
            if self.random.chance(0.5) {
                storage.power_cut();
            } else {
                storage.run_until_idle();
                self.report.count("killed");
            }
        }
        for (event, times) in storage.counters() {
            self.report.add(event, times);
        }
    }

    /// Starts with a failing medium; what fails then must not matter to the next start.
    fn start_faulty(&mut self, storage: &Arc<SimulatedStorage>) -> Option<StoreRig> {
        if self.random.chance(0.4) {
            self.inject(storage, 30);
            let seed = self.random.next_u64();
            let mut rig = StoreRig::new(storage, &self.clock, self.options.clone(), seed);
            rig.patience = PATIENCE;
            let is_ready = rig.run_until(|rig| rig.is_ready);
            storage.clear_faults();
            storage.set_capacity(ROOM);
            if rig.failure.is_some() {
                self.report.count("failed-in-recovery");
            } else {
                let is_late = is_ready || rig.run_until(|rig| rig.is_ready);
                assert!(is_late, "seed {}: recovery stalls", self.seed);
            }
            drop(rig);
            if self.random.chance(0.5) {
                storage.power_cut();
            } else {
                storage.run_until_idle();
            }
        }
        let seed = self.random.next_u64();
        let mut rig = StoreRig::new(storage, &self.clock, self.options.clone(), seed);
        rig.run_until(|rig| rig.is_ready);
        let seed = self.seed;
        assert!(
            rig.is_ready,
            "seed {seed}: no start after a failure: {:?}",
            rig.failure
        );
        self.check(&mut rig);
        self.report.images += 1;
        Some(rig)
    }

    fn inject(&mut self, storage: &SimulatedStorage, skip_max: u64) {
        if self.random.chance(0.3) {
            // Room for what is there and a little more.
            let names = storage.file_names();
            let files = names.iter().filter_map(|name| storage.read_live(name));
            let used: usize = files.map(|bytes| bytes.len()).sum();
            let more = self.random.below(4 * self.options.segment_bytes);
            storage.set_capacity(used as u64 + more);
            return;
        }
        let operations = [
            Some("write"),
            Some("sync"),
            Some("create"),
            Some("sync-directory"),
            Some("set-length"),
            Some("read"),
            None,
            None,
        ];
        let operation = operations[self.random.index(operations.len())];
        let effects = [FaultEffect::Io, FaultEffect::NoSpace, FaultEffect::Short];
        storage.inject(Fault {
            operation,
            skip: self.random.below(if operation.is_some() {
                skip_max / 4
            } else {
                skip_max
            }),
            effect: effects[self.random.index(3)],
            is_permanent: self.random.chance(0.4),
        });
    }

    /// With room on the medium everything that was sent must become durable.
    pub(super) fn go_on(&mut self, rig: &mut StoreRig) {
        for _ in 0..STEPS_MAX {
            self.hear(rig);
            if rig.failure.is_some() {
                // What failed before had not been heard of yet.
                self.report.count("engine-failed");
                return;
            }
            if self.is_at_rest() {
                self.report.count("resumed-after-fault");
                return;
            }
            if !rig.run_one() && !rig.wake() {
                break;
            }
        }
        self.hear(rig);
        assert!(
            self.is_at_rest(),
            "seed {}: the store does not go on",
            self.seed
        );
    }

    fn is_at_rest(&self) -> bool {
        self.writers
            .iter()
            .filter(|writer| writer.stream.is_some())
            .all(|writer| {
                let history = &self.known.model.histories[&writer.history];
                let is_sent = writer.kept.iter().any(|kept| kept.is_sent);
                !is_sent && history.bulk.iter().all(|bulk| bulk.is_acknowledged)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_operations_cost_nothing_that_was_acknowledged() {
        // `crash store-fault` runs many more, and asks that each kind of fault occurs.
        let report = fault_campaign(1, 24);
        assert!(report.images > 0, "{report}");
    }

    #[test]
    fn seeds_that_once_failed_hold() {
        for seed in FAULT_REGRESSIONS {
            assert!(fault_seed(*seed).images > 0);
        }
    }
}
