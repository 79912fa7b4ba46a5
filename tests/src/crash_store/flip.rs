//! Flips bytes of a whole store that is at rest, one at a time, or destroys a sector of 512 bytes.
//!
//! What must hold, wherever the byte lies:
//! * the store starts;
//! * every block of every view is right, or an error; never wrong;
//! * a byte of the manifest, of a run, of a directory or a footer costs nothing at all;
//! * a byte of a seed segment's slot costs that slot: the blocks of one cell;
//! * a byte of the log costs no view below the record that it belongs to, and what cannot be shown
//!   is named.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use afterimage_blockdev::simulated::{CompletionOrder, SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{DiskId, FileName, HistoryId, Lsn, Random};
use afterimage_cache::frame::FRAME_HEADER_BYTES;
use afterimage_cache::record::RECORD_HEADER_BYTES;
use afterimage_seed::notes::NotesFile;
use afterimage_seed::segment::{SECTOR, SeedFooter, parse_seed_file};
use afterimage_seed::verify::{Verification, verify_file};
use afterimage_seed::{Request, Response, SeedError};

use super::{Campaign, SEED};
use crate::report::Report;
use crate::store_model::content;
use crate::store_rig::StoreRig;

/// Events without which a campaign proves too little.
pub const FLIP_MUST_OCCUR: &[&str] = &[
    "flip-in-log",
    "flip-in-manifest",
    "flip-in-run",
    "flip-in-notes",
    "flip-in-seed-slots",
    "flip-in-seed-directory",
    "flip-mended",
    "blocks-refused",
    "blocks-right",
    "record-lost",
    "damage-named",
    "found-by-verify",
];

/// Seeds that once found something.
pub const FLIP_REGRESSIONS: &[u64] = &[];

/// Bytes of a destroyed sector.
const SMASH_BYTES: usize = 512;
/// Flips made in one store.
const FLIPS: u64 = 24;

/// Flips at least `count` bytes, in stores of the seeds from `seed_from` on.
///
/// # Panics
/// When a view shows something wrong, or damage spreads; the message names the seed.
#[must_use]
pub fn flip_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        report.merge(&flip_seed(seed));
        seed += 1;
    }
    report
}

/// Flips bytes in the store of one seed.
///
/// # Panics
/// As [`flip_campaign`].
#[must_use]
pub fn flip_seed(seed: u64) -> Report {
    SEED.store(seed, std::sync::atomic::Ordering::Relaxed);
    let mut campaign = Campaign::new(seed);
    // Nobody reads the reserve.
    campaign.options.reserve_file_bytes = 0;
    campaign.run_flips();
    campaign.report
}

/// Which part of the store a byte belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Log,
    Manifest,
    Run,
    Notes,
    SeedSlots,
    SeedDirectory,
}

/// One state of one disk, and what it must be.
struct Sample {
    name: String,
    disk: DiskId,
    history: HistoryId,
    asked: Lsn,
    shown: Lsn,
    expected: Vec<u64>,
}

impl Campaign {
    fn run_flips(&mut self) {
        let order = CompletionOrder::Submission;
        let options = SimulatedOptions {
            order,
            ..SimulatedOptions::default()
        };
        let storage = SimulatedStorage::new(self.random.next_u64(), options);
        for _ in 0..2 {
            let seed = self.random.next_u64();
            let mut rig = StoreRig::new(&storage, &self.clock, self.options.clone(), seed);
            assert!(
                rig.run_until(|rig| rig.is_ready),
                "seed {}: no start",
                self.seed
            );
            self.check(&mut rig);
            for writer in &mut self.writers {
                writer.stream = None;
            }
            self.work(&mut rig);
            self.go_on(&mut rig);
            if self.random.chance(0.6) {
                assert!(rig.stop(), "seed {}: no stop", self.seed);
            }
            self.hear(&mut rig);
            self.waiting.clear();
            drop(rig);
            storage.run_until_idle();
        }
        // Everything is durable now, also what was on its way when the program died.
        let seed = self.random.next_u64();
        let mut rig = StoreRig::new(&storage, &self.clock, self.options.clone(), seed);
        assert!(
            rig.run_until(|rig| rig.is_ready),
            "seed {}: no start",
            self.seed
        );
        self.check(&mut rig);
        drop(rig);
        storage.run_until_idle();
        for _ in 0..FLIPS {
            self.flip(&storage);
        }
    }

    fn flip(&mut self, storage: &Arc<SimulatedStorage>) {
        let names = storage.file_names();
        let name = names[self.random.index(names.len())].clone();
        let bytes = storage.read_live(&name).expect("a listed file");
        if bytes.is_empty() {
            return;
        }
        // Where something was written a flip says more.
        let mut offset = self.random.index(bytes.len());
        for _ in 0..20 {
            if bytes[offset] != 0 {
                break;
            }
            offset = self.random.index(bytes.len());
        }
        let image = storage.power_cut_image(self.random.next_u64());
        if image.read_live(&name).as_deref() != Some(&bytes[..]) {
            // It was not durable in all its parts; the cut changed more than one byte.
            return;
        }
        let range = match (self.random.below(8), some_record(&bytes, &mut self.random)) {
            (0..3, Some(header)) => header,
            (3 | 4, _) => {
                offset / SMASH_BYTES * SMASH_BYTES..(offset / SMASH_BYTES + 1) * SMASH_BYTES
            }
            _ => offset..offset + 1,
        };
        for offset in range.clone() {
            assert!(image.flip_byte(&name, offset as u64));
        }
        self.flipped(&image, &name, &range);
        self.report.images += 1;
    }

    fn flipped(&mut self, image: &Arc<SimulatedStorage>, name: &FileName, range: &Range<usize>) {
        let says = format!("seed {}: bytes {range:?} of {name}", self.seed);
        let bytes = image.read_live(name).expect("a listed file");
        let seed = self.random.next_u64();
        let mut rig = StoreRig::new(image, &self.clock, self.options.clone(), seed);
        rig.run_until(|rig| rig.is_ready);
        assert!(rig.is_ready, "{says}: no start: {:?}", rig.failure);
        let part = self.part_of(&rig, name, &bytes, range.start);
        let mut refused = BTreeSet::new();
        let mut texts = Vec::new();
        for sample in self.samples() {
            let may_differ = part == Part::Log;
            self.look_at(
                &mut rig,
                &sample,
                &says,
                may_differ,
                &mut refused,
                &mut texts,
            );
        }
        let info = match rig.ask(Request::Info) {
            Some(Ok(Response::Info(info))) => info,
            other => panic!("{says}: {other:?}"),
        };
        if !info.damage.is_empty() {
            self.report.count("damage-named");
        }
        let is_free = !matches!(part, Part::Log | Part::SeedSlots);
        assert!(
            !is_free || refused.is_empty(),
            "{says} ({part:?}) costs {refused:?}: {texts:?}"
        );
        if part == Part::SeedSlots {
            let cells: BTreeSet<_> = refused
                .iter()
                .map(|(disk, block)| (disk, block / 4))
                .collect();
            // A sector may hold the end of one slot and the begin of another, or several.
            let most = if range.len() > 1 { 8 } else { 1 };
            assert!(cells.len() <= most, "{says} costs {refused:?}: {texts:?}");
        }
        if texts.iter().any(|text| text.contains("were lost")) {
            assert!(
                !info.damage.is_empty(),
                "{says}: something was lost, and nothing is said"
            );
            self.report.count("record-lost");
        }
        if refused.is_empty() {
            self.report.count("flip-mended");
        } else {
            self.report.add("blocks-refused", refused.len() as u64);
        }
        let must_find = !refused.is_empty() && info.damage.is_empty();
        self.verify(&mut rig, image, &says, must_find);
    }

    /// A walk over all files finds the damage too, where the start has neither mended nor named it.
    fn verify(
        &mut self,
        rig: &mut StoreRig,
        image: &Arc<SimulatedStorage>,
        says: &str,
        must_find: bool,
    ) {
        let files = match rig.ask(Request::Files) {
            Some(Ok(Response::Files(files))) => files,
            other => panic!("{says}: {other:?}"),
        };
        let store = rig.engine.store();
        rig.run();
        let mut found = Verification::default();
        for file in files {
            let direct = Direct(Arc::clone(image));
            verify_file(&direct, store, file, &mut found).expect("a medium that works");
        }
        if !found.damage.is_empty() {
            self.report.count("found-by-verify");
        }
        assert!(
            !must_find || !found.damage.is_empty(),
            "{says} costs blocks, and a walk over all files finds nothing"
        );
    }

    fn part_of(&mut self, rig: &StoreRig, name: &FileName, bytes: &[u8], offset: usize) -> Part {
        let is_new = name.base().ends_with(".new");
        let part = match name.directory() {
            "log" => Part::Log,
            "manifest" => Part::Manifest,
            "runs" => Part::Run,
            // Also one that a crash has left without its name.
            _ if is_new || NotesFile::parse(name).is_some() => Part::Notes,
            _ => {
                let (segment, _) = parse_seed_file(name).unwrap_or_else(|| panic!("{name:?}"));
                let tail = &bytes[bytes.len() - 2 * SECTOR..];
                let footer = SeedFooter::find(tail, rig.engine.store(), segment);
                let slots_end = footer.expect("one of two footers").directory_offset;
                if (offset as u64) < slots_end {
                    Part::SeedSlots
                } else {
                    Part::SeedDirectory
                }
            }
        };
        self.report.count(match part {
            Part::Log => "flip-in-log",
            Part::Manifest => "flip-in-manifest",
            Part::Run => "flip-in-run",
            Part::Notes => "flip-in-notes",
            Part::SeedSlots => "flip-in-seed-slots",
            Part::SeedDirectory => "flip-in-seed-directory",
        });
        part
    }

    /// States of every disk of every history: the newest one and some others.
    fn samples(&mut self) -> Vec<Sample> {
        let mut samples = Vec::new();
        let histories: Vec<_> = self.known.model.histories.keys().copied().collect();
        for history in histories {
            let known = &self.known.model.histories[&history];
            let durable = known.durable;
            let Some(machine) = self.machine_of(history).filter(|_| !known.is_branch) else {
                continue;
            };
            let disks: Vec<_> = self.writers[machine]
                .disks
                .iter()
                .map(|disk| disk.id)
                .collect();
            for disk in disks {
                if !self.known.declared.contains(&disk) {
                    continue;
                }
                for asked in [durable, Lsn(self.random.below(durable.0 + 1))] {
                    let model = &self.known.model;
                    let shown = model.shown(history, disk, asked);
                    if model.is_copied(history, disk, shown) {
                        let expected = model.image(history, disk, shown);
                        let name = self.writers[machine].name.clone();
                        samples.push(Sample {
                            name,
                            disk,
                            history,
                            asked,
                            shown,
                            expected,
                        });
                    }
                }
            }
        }
        samples
    }

    fn look_at(
        &mut self,
        rig: &mut StoreRig,
        sample: &Sample,
        says: &str,
        may_differ: bool,
        refused: &mut BTreeSet<(DiskId, usize)>,
        texts: &mut Vec<String>,
    ) {
        let Sample {
            name,
            disk,
            history,
            asked,
            shown,
            expected,
        } = sample;
        let reference = format!("{name}/{disk}@{history}:lsn:{asked}");
        let taken = match rig.snapshot(&reference, false) {
            Some(Ok(taken)) => taken,
            // The newest records may be gone, which is said; they are no part of any view.
            Some(Err(error @ (SeedError::Refused { .. } | SeedError::Incomplete { .. }))) => {
                texts.push(error.to_string());
                self.report.count("state-refused");
                return;
            }
            other => panic!("{says}: {reference}: {other:?}"),
        };
        let is_other = taken.snapshot.lsn != *shown;
        if is_other {
            // The begin or the end of a batch is lost. What is shown is still a state, and its own.
            assert!(
                may_differ && !rig_damage(rig).is_empty(),
                "{says}: {reference}"
            );
            self.report.count("other-state-shown");
        }
        let other = is_other.then(|| self.known.model.image(*history, *disk, taken.snapshot.lsn));
        let expected = other.as_ref().unwrap_or(expected);
        let view = rig.view(&taken);
        let mut bad = 0;
        for (block, stamp) in expected.iter().enumerate() {
            let Some(found) = rig.read(&*view, block as u64 * 4096, 4096) else {
                panic!("{says}: {reference} cannot be read");
            };
            match found {
                Ok(found) => assert!(
                    found[..] == content(&[*stamp])[..],
                    "{says}: {reference} block {block} is wrong: {:02x?} for {stamp:#x}",
                    &found[..8]
                ),
                Err(error) => {
                    bad += 1;
                    refused.insert((*disk, block));
                    texts.push(error.to_string());
                }
            }
        }
        self.report
            .add("blocks-right", (expected.len() - bad) as u64);
    }
}

fn rig_damage(rig: &mut StoreRig) -> Vec<String> {
    match rig.ask(Request::Info) {
        Some(Ok(Response::Info(info))) => info.damage,
        other => panic!("{other:?} for the state"),
    }
}

/// The header of the first record of a frame of a log file.
fn some_record(bytes: &[u8], random: &mut Random) -> Option<Range<usize>> {
    let is_frame = |at: &usize| bytes[*at..].starts_with(b"AIFRAME\0");
    let frames: Vec<usize> = (0..bytes.len()).step_by(8).filter(is_frame).collect();
    let frame = frames.get(random.index(frames.len()))?;
    let record = frame + FRAME_HEADER_BYTES;
    Some(record..record + RECORD_HEADER_BYTES)
}

/// A simulated medium that performs each operation at once.
pub(super) struct Direct(pub(super) Arc<SimulatedStorage>);

impl afterimage_blockdev::Storage for Direct {
    fn submit(
        &self,
        token: afterimage_blockdev::Token,
        op: afterimage_blockdev::StorageOp,
        to: Arc<dyn afterimage_blockdev::StorageCompleter>,
    ) {
        self.0.submit(token, op, to);
        self.0.run_until_idle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_byte_is_never_served() {
        let report = flip_campaign(1, 4000);
        let missing = report.missing(FLIP_MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }

    #[test]
    fn seeds_that_once_failed_hold() {
        for seed in FLIP_REGRESSIONS {
            assert!(flip_seed(*seed).images > 0);
        }
    }
}
