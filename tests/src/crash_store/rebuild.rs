//! Stores that are rebuilt from their segments alone: manifest and runs are taken away, and what
//! the rebuild makes of the rest is compared with the model.
//!
//! What must hold:
//! * a store that was stopped, or had a while to write its notes, shows all that it showed;
//! * of a store that was cut anywhere, what is shown at a point is right, and points are there with
//!   the cut that they had; the newest may be missing, and those just deleted be there again;
//! * a rebuild that is refused says why.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::PointId;
use afterimage_blockdev::simulated::{CompletionOrder, SimulatedOptions, SimulatedStorage};
use afterimage_seed::{Request, Response};

use super::golden::load;
use super::{Campaign, SEED};
use crate::report::Report;
use crate::store_model::content;
use crate::store_rig::StoreRig;

/// Events without which a campaign proves too little.
pub const REBUILD_MUST_OCCUR: &[&str] = &[
    "rebuilt-stopped",
    "rebuilt-killed",
    "rebuilt-cut",
    "rebuilt-destaged",
    "rebuilt-rewritten",
    "rebuilt-with-rest",
    "rebuild-refused",
    "point-compared",
    "segment-destaged",
    "segment-rewritten",
    "segment-dropped",
];

/// Seeds that once found something.
pub const REBUILD_REGRESSIONS: &[u64] = &[];

/// Rebuilds the store in a data directory, or says why not.
pub type Rebuild<'a> = &'a dyn Fn(&Path) -> Result<(), String>;

/// Generations of one medium.
const GENERATIONS: u64 = 4;
/// Points of a machine that are looked at.
const POINTS: usize = 5;
/// Longer than notes wait for each other.
const A_WHILE: Duration = Duration::from_secs(70);

/// How a generation ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Stopped,
    Killed,
    Cut,
}

/// Rebuilds at least `count` stores, of the seeds from `seed_from` on.
///
/// # Panics
/// When a rebuilt store shows something wrong; the message names the seed.
#[must_use]
pub fn rebuild_campaign(seed_from: u64, count: u64, rebuild: Rebuild<'_>) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        report.merge(&rebuild_seed(seed, rebuild));
        seed += 1;
    }
    report
}

/// Rebuilds the stores of one seed.
///
/// # Panics
/// As [`rebuild_campaign`].
#[must_use]
pub fn rebuild_seed(seed: u64, rebuild: Rebuild<'_>) -> Report {
    SEED.store(seed, std::sync::atomic::Ordering::Relaxed);
    let mut campaign = Campaign::new(seed);
    campaign.options.reserve_file_bytes = 0;
    campaign.run_rebuilds(rebuild);
    campaign.report
}

fn quiet() -> SimulatedOptions {
    let order = CompletionOrder::Submission;
    SimulatedOptions {
        order,
        ..SimulatedOptions::default()
    }
}

impl Campaign {
    fn run_rebuilds(&mut self, rebuild: Rebuild<'_>) {
        let mut storage = SimulatedStorage::new(self.random.next_u64(), quiet());
        for _ in 0..GENERATIONS {
            let seed = self.random.next_u64();
            let mut rig = StoreRig::new(&storage, &self.clock, self.options.clone(), seed);
            let is_ready = rig.run_until(|rig| rig.is_ready);
            assert!(is_ready, "seed {}: no start: {:?}", self.seed, rig.failure);
            self.check(&mut rig);
            for writer in &mut self.writers {
                writer.stream = None;
            }
            let end = [End::Stopped, End::Stopped, End::Killed, End::Cut][self.random.index(4)];
            if end == End::Cut {
                let operations = rig.storage.operations() + 1 + self.random.below(600);
                rig.storage.stop_after(Some(operations));
            }
            self.work(&mut rig);
            if end != End::Cut {
                self.go_on(&mut rig);
            }
            match end {
                End::Stopped => assert!(rig.stop(), "seed {}: no stop", self.seed),
                End::Killed => {
                    rig.pass(A_WHILE);
                    rig.run();
                    rig.pass(A_WHILE);
                    rig.run();
                }
                End::Cut => {}
            }
            self.hear(&mut rig);
            self.waiting.clear();
            drop(rig);
            if end == End::Cut {
                storage.stop_after(None);
                let seed = self.random.next_u64();
                storage = storage.power_cut_image(seed);
            } else {
                storage.run_until_idle();
            }
            self.rebuild_one(&storage, end, rebuild);
        }
    }

    /// Takes manifest and runs away, and looks at what is made anew.
    fn rebuild_one(&mut self, storage: &Arc<SimulatedStorage>, end: End, rebuild: Rebuild<'_>) {
        let directory = tempfile::tempdir().expect("a directory");
        let keeps_runs = self.random.chance(0.25);
        let key = self.options.store_key;
        std::fs::write(directory.path().join("store.key"), key).expect("writable");
        for name in storage.file_names() {
            let is_kept = match name.directory() {
                "log" | "segments" => true,
                "runs" => keeps_runs,
                _ => false,
            };
            if is_kept {
                self.count_segment(name.as_str());
                let path = directory.path().join(name.as_str());
                std::fs::create_dir_all(path.parent().expect("a parent")).expect("writable");
                let bytes = storage.read_live(&name).expect("listed");
                std::fs::write(path, bytes).expect("writable");
            }
        }
        self.report.images += 1;
        if let Err(why) = rebuild(directory.path()) {
            println!("seed {} ({end:?}): refused: {why}", self.seed);
            self.report.count("rebuild-refused");
            return;
        }
        self.report.count(match end {
            End::Stopped => "rebuilt-stopped",
            End::Killed => "rebuilt-killed",
            End::Cut => "rebuilt-cut",
        });
        let rebuilt = load(directory.path());
        let seed = self.random.next_u64();
        let mut rig = StoreRig::new(&rebuilt, &self.clock, self.options.clone(), seed);
        let is_ready = rig.run_until(|rig| rig.is_ready);
        assert!(
            is_ready,
            "seed {}: no start of the rebuilt store: {:?}",
            self.seed, rig.failure
        );
        if end == End::Cut {
            return self.check_points_shown(&mut rig);
        }
        let before = self.known.clone();
        self.check(&mut rig);
        // It goes on as any other store does.
        let collected = rig.ask(Request::Collect);
        assert!(matches!(collected, Some(Ok(_))), "{collected:?}");
        self.check(&mut rig);
        self.check_points_shown(&mut rig);
        self.known = before;
    }

    fn count_segment(&mut self, name: &str) {
        let base = name.strip_prefix("segments/").unwrap_or_default();
        let of_log = base.starts_with('0') && base.ends_with(".seed");
        if of_log {
            self.report.count("rebuilt-destaged");
        }
        if base.starts_with("rest-") {
            self.report.count("rebuilt-with-rest");
        }
        if base.ends_with(".seed") && !of_log && !base.ends_with("-0.seed") {
            self.report.count("rebuilt-rewritten");
        }
    }

    /// What is shown at points is what was there.
    fn check_points_shown(&mut self, rig: &mut StoreRig) {
        for place in 0..self.writers.len() {
            let writer = &self.writers[place];
            let (machine, name) = (writer.machine, writer.name.clone());
            let disks: Vec<_> = writer.disks.iter().map(|disk| disk.id).collect();
            let listing = Request::ListPoints {
                machine: name.clone(),
                after: PointId(0),
                limit: 100_000,
            };
            let Some(Ok(Response::Points(mut points, _))) = rig.ask(listing) else {
                continue;
            };
            self.random.shuffle(&mut points);
            for point in points.into_iter().take(POINTS) {
                let known = self.known.points.get(&(machine, point.name.clone()));
                if let Some(known) = known {
                    let cut = (known.history, known.lsn);
                    assert_eq!((point.history, point.lsn), cut, "seed {}", self.seed);
                }
                for disk in disks.iter().copied() {
                    if self.known.declared.contains(&disk) {
                        let reference = format!("{name}/{disk}@{}", point.name);
                        self.check_point(rig, &reference, disk, &point);
                    }
                }
            }
        }
    }

    fn check_point(
        &mut self,
        rig: &mut StoreRig,
        reference: &str,
        disk: afterimage_blockdev::DiskId,
        point: &afterimage_seed::manifest::PointRecord,
    ) {
        let seed = self.seed;
        let model = &self.known.model;
        if !model.histories.contains_key(&point.history) {
            return;
        }
        let shown = model.shown(point.history, disk, point.lsn);
        let Some(Ok(taken)) = rig.snapshot(reference, false) else {
            let is_whole = self.known.model.is_copied(point.history, disk, shown);
            assert!(!is_whole, "seed {seed}: {reference} is not shown");
            return;
        };
        assert_eq!(taken.snapshot.lsn, shown, "seed {seed}: {reference}");
        let expected = self.known.model.image(point.history, disk, shown);
        let view = rig.view(&taken);
        let found = rig.read(&*view, 0, expected.len() * 4096);
        let found = found.expect("an answer");
        let found = found.unwrap_or_else(|error| panic!("seed {seed}: {reference}: {error}"));
        for (block, (stamp, found)) in expected.iter().zip(found.chunks(4096)).enumerate() {
            assert!(
                found[..] == content(&[*stamp])[..],
                "seed {seed}: {reference} block {block} is wrong: {:02x?} for {stamp:#x}",
                &found[..8]
            );
        }
        self.report.count("point-compared");
    }
}
