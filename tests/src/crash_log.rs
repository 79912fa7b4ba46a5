//! Crash images of the shared log, each compared with a model.
//!
//! One seed is one medium that lives through several crashes. Each time a log is started on it,
//! checked against the model, given frames, and cut at a random storage operation: by a power cut
//! (what was not synced is lost, torn, reordered or late), by the program's death, or by a failing
//! operation. In a quarter of the cases the next recovery is cut as well.
//!
//! The model is the list of frames in append order. What must hold after every recovery:
//! * what comes back is a prefix of that list, byte for byte;
//! * it is no shorter than what was reported durable, or recovered, before;
//! * nothing is reported lost, and frames beyond the prefix never come back later.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::Random;
use afterimage_blockdev::simulated::{
    CompletionOrder, Fault, FaultEffect, SimulatedOptions, SimulatedStorage,
};
use afterimage_cache::log::{LogInput, LogOptions, LogOutput};

use crate::frames::FrameMaker;
use crate::log_rig::{LogRig, small_options};
use crate::report::Report;

/// Events without which a campaign proves too little.
pub const MUST_OCCUR: &[&str] = &[
    "power-cut",
    "cut-in-recovery",
    "killed",
    "fault-failed-log",
    "reopened-after-fault",
    "tail-dropped",
    "unacknowledged-kept",
    "durable",
    "segment-sealed",
    "several-segments",
    "paused",
    "resumed",
    "closed",
    "released",
    "released-came-back",
    "sync-failed",
    "sync-interrupted",
    "write-torn-512",
    "write-torn-4096",
    "write-lost",
    "write-reordered",
    "name-lost",
    "length-lost",
    "fault-no-space",
    "fault-short",
];

/// Events without which a campaign that looks at every set proves too little.
pub const EVERY_MUST_OCCUR: &[&str] = &["every-set-of-a-cut", "power-cut", "cut-in-recovery"];

/// Changes without a sync of which every set is looked at: 1024 sets.
pub const EVERY_MAX: usize = 10;

/// Generations of one medium.
const GENERATIONS: u64 = 4;
/// Images made of one cut.
const IMAGES: u64 = 3;

/// Checks at least `count` crash images, of the seeds from `seed_from` on.
///
/// # Panics
/// When an image does not agree with the model; the message names the seed.
#[must_use]
pub fn crash_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        report.merge(&Campaign::new(seed).run());
        seed += 1;
    }
    report
}

/// As [`crash_campaign`], but where a cut finds at most [`EVERY_MAX`] changes without a sync it
/// looks at every set of them.
///
/// # Panics
/// As [`crash_campaign`].
#[must_use]
pub fn every_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        let mut campaign = Campaign::new(seed);
        campaign.looks_at_every_set = true;
        report.merge(&campaign.run());
        seed += 1;
    }
    report
}

/// The frames in append order.
#[derive(Clone, Default)]
struct Model {
    frames: Vec<Arc<[u8]>>,
    /// Sequence of the commit of each that was promised.
    sequences: Vec<u64>,
    /// So many of them, from the first on, may be gone.
    released: usize,
}

struct Campaign {
    seed: u64,
    random: Random,
    maker: FrameMaker,
    options: LogOptions,
    model: Model,
    has_failed: bool,
    looks_at_every_set: bool,
    report: Report,
}

impl Campaign {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let segment_bytes = [128 << 10, 192 << 10, 256 << 10][random.index(3)];
        let mut options = small_options(segment_bytes, random.chance(0.7));
        options.commits_in_flight_max = 1 + random.index(4);
        options.recycles = !options.seals && random.chance(0.5);
        options.commit_bytes_max = [1, 16 << 10, segment_bytes / 2][random.index(3)];
        Self {
            seed,
            maker: FrameMaker::new(random.next_u64()),
            random,
            options,
            model: Model::default(),
            has_failed: false,
            looks_at_every_set: false,
            report: Report::default(),
        }
    }

    fn run(mut self) -> Report {
        let order = if self.random.chance(0.5) {
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
                storage = self.cut(&storage);
                continue;
            };
            self.has_failed = false;
            self.write(&mut rig);
            storage = self.end(rig);
        }
        let counters = storage.counters();
        for (event, times) in counters {
            self.report.add(event, times);
        }
        self.report
    }

    /// Starts a log and checks what comes back; `None` when it was cut before it was ready.
    fn start(&mut self, storage: &Arc<SimulatedStorage>) -> Option<LogRig> {
        if self.random.chance(0.25) {
            let operations = storage.operations() + 1 + self.random.below(24);
            storage.stop_after(Some(operations));
        }
        let mut rig = LogRig::new(Arc::clone(storage), self.options.clone());
        rig.step(LogInput::Start { from_sequence: 0 });
        let mut frames: Vec<(u64, Arc<[u8]>)> = Vec::new();
        let mut is_ready = false;
        loop {
            for output in rig.heard() {
                match output {
                    LogOutput::Recovered { location, frame } => {
                        frames.push((location.sequence, frame.bytes.into()));
                    }
                    LogOutput::Ready { segments, .. } => {
                        is_ready = true;
                        if segments.len() > 1 {
                            self.report.count("several-segments");
                        }
                    }
                    LogOutput::Mended { .. } => self.report.count("mended"),
                    other => panic!("seed {}: {other:?} in recovery", self.seed),
                }
            }
            if is_ready || !rig.run_one() {
                break;
            }
        }
        if !is_ready {
            assert!(storage.is_stopped(), "seed {}: recovery stalls", self.seed);
            self.report.count("cut-in-recovery");
            return None;
        }
        storage.stop_after(None);
        self.compare(&frames);
        Some(rig)
    }

    fn compare(&mut self, found: &[(u64, Arc<[u8]>)]) {
        let Self { seed, model, .. } = self;
        let (appended, durable) = (model.frames.len(), model.sequences.len());
        // Released frames may be gone, or come back.
        let first = found.first().map_or(model.released, |(_, first)| {
            let is_it = |frame: &Arc<[u8]>| frame == first;
            let place = model.frames.iter().position(is_it);
            place.unwrap_or_else(|| panic!("seed {seed}: the first frame was never appended"))
        });
        assert!(
            first <= model.released,
            "seed {seed}: frames from {} on are missing, {} were released",
            model.released,
            model.released
        );
        let end = first + found.len();
        assert!(
            end >= durable,
            "seed {seed}: {end} frames recovered, {durable} were durable"
        );
        assert!(
            end <= appended,
            "seed {seed}: {end} frames recovered, {appended} were appended"
        );
        for (place, (_, found)) in (first..).zip(found) {
            assert!(
                *found == model.frames[place],
                "seed {seed}: frame {place} differs"
            );
        }
        if end > durable {
            self.report.count("unacknowledged-kept");
        }
        if end < appended {
            self.report.count("tail-dropped");
        }
        if !found.is_empty() && first < self.model.released {
            self.report.count("released-came-back");
        }
        // What was given back is promised: its reader acts on it.
        self.model.frames.truncate(end);
        let kept = end.min(durable) - first.min(durable);
        let new = found[kept..].iter().map(|(sequence, _)| *sequence);
        self.model.sequences.extend(new);
        self.report.images += 1;
    }

    /// Appends frames until the medium stops, fails, or enough were written.
    fn write(&mut self, rig: &mut LogRig) {
        let has_fault = self.random.chance(0.25);
        if has_fault {
            self.inject(rig);
        } else if self.random.chance(0.9) {
            let operations = rig.storage.operations() + 1 + self.random.below(120);
            rig.storage.stop_after(Some(operations));
        }
        let frames = 1 + self.random.below(60);
        let records_max = [1, 4, 12][self.random.index(3)];
        let pace = [1, 2, 4, 9][self.random.index(4)];
        for _ in 0..frames {
            let frame = self.maker.next_frame(records_max);
            self.model.frames.push(frame.bytes.clone().into());
            rig.append(self.model.frames.len() as u64, frame);
            let operations = self.random.below(pace);
            for _ in 0..operations {
                if !rig.run_one() {
                    break;
                }
            }
            if !self.options.seals && self.random.chance(0.2) {
                self.release(rig);
            }
            if self.random.chance(0.05) {
                rig.pass(Duration::from_millis(120));
            }
            if self.hear(rig) || rig.storage.is_stopped() {
                return;
            }
        }
        let idles = self.random.below(4);
        for _ in 0..idles {
            for _ in 0..self.random.below(100) {
                if !rig.run_one() {
                    break;
                }
            }
            rig.wake();
            if self.hear(rig) {
                return;
            }
        }
    }

    /// Gives frames away that were promised.
    fn release(&mut self, rig: &mut LogRig) {
        let model = &mut self.model;
        if model.sequences.is_empty() {
            return;
        }
        let through_sequence = model.sequences[self.random.index(model.sequences.len())];
        let released = model
            .sequences
            .partition_point(|sequence| *sequence <= through_sequence);
        model.released = model.released.max(released);
        rig.step(LogInput::Release { through_sequence });
    }

    /// Takes what the log said; true when it has failed.
    fn hear(&mut self, rig: &mut LogRig) -> bool {
        let mut has_failed = false;
        for output in rig.heard() {
            match output {
                LogOutput::Durable {
                    token,
                    location,
                    frame,
                } => {
                    assert!(!has_failed, "seed {}: durable after a failure", self.seed);
                    let place = self.model.sequences.len();
                    assert_eq!(
                        token.0,
                        place as u64 + 1,
                        "seed {}: durable in order",
                        self.seed
                    );
                    assert_eq!(*frame.bytes, *self.model.frames[place]);
                    self.model.sequences.push(location.sequence);
                    self.report.count("durable");
                }
                LogOutput::Sealed { .. } => self.report.count("segment-sealed"),
                LogOutput::Paused { .. } => {
                    self.report.count("paused");
                    rig.storage.set_capacity(1 << 40);
                }
                LogOutput::Resumed => self.report.count("resumed"),
                LogOutput::Released { .. } => self.report.count("released"),
                LogOutput::Failed(_) => {
                    has_failed = true;
                    self.has_failed = true;
                    self.report.count("fault-failed-log");
                }
                LogOutput::Closed => self.report.count("closed"),
                other => panic!("seed {}: {other:?} while writing", self.seed),
            }
        }
        has_failed
    }

    fn inject(&mut self, rig: &LogRig) {
        if self.random.chance(0.3) {
            // Room for what is there and a little more.
            let names = rig.storage.file_names();
            let used: usize = names
                .iter()
                .filter_map(|name| rig.storage.read_live(name))
                .map(|bytes| bytes.len())
                .sum();
            let more = self.random.below(3 * self.options.segment_bytes);
            rig.storage.set_capacity(used as u64 + more);
            return;
        }
        let operation = [Some("write"), Some("sync"), Some("sync"), None][self.random.index(4)];
        let effects = [FaultEffect::Io, FaultEffect::NoSpace, FaultEffect::Short];
        rig.storage.inject(Fault {
            operation,
            skip: self.random.below(30),
            effect: effects[self.random.index(3)],
            is_permanent: self.random.chance(0.5),
        });
    }

    /// Ends a generation: by a power cut, the program's death, or in order.
    fn end(&mut self, mut rig: LogRig) -> Arc<SimulatedStorage> {
        rig.storage.clear_faults();
        match self.random.below(8) {
            0 => {
                self.close(&mut rig);
                self.survive(rig)
            }
            1 | 2 => self.survive(rig),
            _ => self.cut(&rig.storage),
        }
    }

    fn close(&mut self, rig: &mut LogRig) {
        rig.storage.stop_after(None);
        rig.step(LogInput::Close);
        for _ in 0..200 {
            rig.run();
            let is_closed = rig.said.iter().any(|o| matches!(o, LogOutput::Closed));
            if self.hear(rig) || is_closed || !rig.wake() {
                break;
            }
        }
    }

    /// The program is gone; the kernel finishes what was submitted, and all of it is in memory.
    fn survive(&mut self, mut rig: LogRig) -> Arc<SimulatedStorage> {
        rig.storage.stop_after(None);
        self.hear(&mut rig);
        if self.has_failed {
            self.report.count("reopened-after-fault");
        }
        rig.storage.run_until_idle();
        rig.storage.set_capacity(1 << 40);
        self.report.count("killed");
        rig.storage
    }

    /// Cuts the power, looks at several images of that cut, and goes on with one.
    fn cut(&mut self, storage: &Arc<SimulatedStorage>) -> Arc<SimulatedStorage> {
        self.report.count("power-cut");
        if self.looks_at_every_set && storage.unsynced_changes() <= EVERY_MAX {
            self.report.count("every-set-of-a-cut");
        }
        let before = self.model.clone();
        for image in images(storage, &mut self.random, IMAGES, self.looks_at_every_set) {
            image.set_capacity(1 << 40);
            self.start(&image);
            let counters = image.counters();
            for (event, times) in counters {
                self.report.add(event, times);
            }
            self.model = before.clone();
        }
        storage.power_cut();
        storage.set_capacity(1 << 40);
        Arc::clone(storage)
    }
}

/// Images of a cut at this moment: every one where that is wanted and they are few, otherwise some
/// less than `count`.
pub(crate) fn images(
    storage: &Arc<SimulatedStorage>,
    random: &mut Random,
    count: u64,
    wants_all: bool,
) -> Vec<Arc<SimulatedStorage>> {
    let changes = storage.unsynced_changes();
    if wants_all && changes <= EVERY_MAX {
        let sets = 0..1_u64 << changes;
        return sets
            .map(|kept| storage.power_cut_image_with(kept))
            .collect();
    }
    let seeds: Vec<u64> = (1..count).map(|_| random.next_u64()).collect();
    let image = |seed| storage.power_cut_image(seed);
    seeds.into_iter().map(image).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_agrees_with_the_model_after_every_crash() {
        let report = crash_campaign(1, 1500);
        let missing = report.missing(MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }
}
