//! Flips bytes of a durable log, one at a time, and looks what that costs.
//!
//! What must hold, wherever the byte lies:
//! * every frame that does not hold it comes back byte for byte, at its place;
//! * the frame that holds it comes back with at most one slot damaged and named, or with at most
//!   one record lost and named, its other records whole and their slots rightly numbered;
//! * something is said about it, and no commit is reported lost;
//! * the log goes on, and the directories that it then writes name every other slot.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use afterimage_blockdev::simulated::{CompletionOrder, SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{FileName, Lsn, Random, SegmentId};
use afterimage_cache::frame::FRAME_HEADER_BYTES;
use afterimage_cache::log::{FrameLocation, LogInput, LogOptions, LogOutput, SalvagedRecord};
use afterimage_cache::record::RECORD_HEADER_BYTES;
use afterimage_cache::segment::{Directory, FOOTER_BYTES, Footer, SECTOR, segment_file};
use afterimage_cache::{Frame, FrameView, RecordView};

use crate::frames::FrameMaker;
use crate::log_rig::{LogRig, small_options};
use crate::report::Report;

/// Events without which a campaign proves too little.
pub const MUST_OCCUR: &[&str] = &[
    "mended",
    "slot-damaged",
    "record-lost",
    "frame-unharmed",
    "unused-byte",
];

/// The same of [`smash_campaign`].
pub const SMASH_MUST_OCCUR: &[&str] = &["salvaged", "lost", "mended"];

/// A log that is durable in all its parts.
pub struct DurableLog {
    seed: u64,
    options: LogOptions,
    medium: Arc<SimulatedStorage>,
    frames: Vec<(FrameLocation, Frame)>,
    /// Files, and how many of their bytes mean something.
    files: Vec<(FileName, SegmentId, u64)>,
}

/// Flips `count` bytes of logs made from the seeds from `seed_from` on.
///
/// # Panics
/// When a flipped byte costs what it must not; the message names seed, file and offset.
#[must_use]
pub fn flip_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        let log = DurableLog::new(seed);
        let mut random = Random::new(seed ^ 0xf11b);
        for _ in 0..500.min(count - report.images) {
            let (name, segment, bytes) = &log.files[random.index(log.files.len())];
            let offset = random.below(*bytes);
            log.check(name, *segment, offset, &mut report);
        }
        seed += 1;
    }
    report
}

impl DurableLog {
    /// Writes a log of several segments; a part of the seeds closes it, so that all is sealed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let options = small_options(128 << 10, random.chance(0.8));
        let order = CompletionOrder::Random;
        let simulated = SimulatedOptions {
            order,
            ..SimulatedOptions::default()
        };
        let medium = SimulatedStorage::new(random.next_u64(), simulated);
        let mut rig = LogRig::new(Arc::clone(&medium), options.clone());
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        let mut maker = FrameMaker::new(random.next_u64());
        for token in 1..=60 {
            rig.append(token, maker.next_frame(8));
            if random.chance(0.6) {
                rig.run();
            }
        }
        rig.run();
        if random.chance(0.5) {
            rig.step(LogInput::Close);
        }
        while rig.wake() {
            rig.run();
        }
        let mut frames = Vec::new();
        for output in rig.heard() {
            if let LogOutput::Durable {
                location, frame, ..
            } = output
            {
                frames.push((location, frame));
            }
        }
        assert_eq!(frames.len(), 60, "seed {seed}: all is durable");
        let files = used_files(&medium, &frames);
        Self {
            seed,
            options,
            medium,
            frames,
            files,
        }
    }

    /// Flips one byte and checks what comes of it.
    ///
    /// # Panics
    /// When it costs what it must not.
    pub fn check(&self, name: &FileName, segment: SegmentId, offset: u64, report: &mut Report) {
        let image = self.medium.power_cut_image(1);
        let says = format!("seed {}: {name} at {offset}", self.seed);
        assert!(image.flip_byte(name, offset), "{says}: no such byte");
        let mut rig = LogRig::new(Arc::clone(&image), self.options.clone());
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        let mut outcome = Outcome::default();
        let mut frames = self.frames.iter();
        for output in rig.heard() {
            match output {
                LogOutput::Recovered { location, frame } => {
                    let (expected, whole) = frames.next().expect(&says);
                    assert_eq!(location, *expected, "{says}");
                    let place = offset.wrapping_sub(location.offset);
                    let is_hit = location.segment == segment && place < frame.bytes.len() as u64;
                    if frame.bytes != whole.bytes {
                        assert!(is_hit, "{says}: another frame changed");
                        outcome.changed = Some((location, differing_slot(whole, &frame, &says)));
                    }
                    report.count("frame-unharmed");
                }
                LogOutput::Salvaged {
                    location,
                    identity,
                    bytes,
                    intact,
                    lost,
                } => {
                    let (expected, whole) = frames.next().expect(&says);
                    assert_eq!(location, *expected, "{says}");
                    assert_eq!(identity, whole.header.identity, "{says}");
                    check_salvaged(&location, whole, &bytes, &intact, &lost, &says);
                    outcome.is_named = true;
                    report.count("record-lost");
                }
                LogOutput::DamagedSlot { location, slot, .. } => {
                    outcome.damaged.push((location, slot.0));
                    outcome.is_named = true;
                    report.count("slot-damaged");
                }
                LogOutput::Mended { segment: place, .. } => {
                    assert_eq!(place, segment, "{says}");
                    outcome.is_named = true;
                    report.count("mended");
                }
                LogOutput::Ready { .. } => outcome.is_ready = true,
                other => panic!("{says}: {other:?}"),
            }
        }
        assert!(outcome.is_ready, "{says}: not ready");
        assert!(frames.next().is_none(), "{says}: frames are missing");
        outcome.check(&says);
        let is_used = self.is_used(&image, name, segment, offset);
        assert!(outcome.is_named || !is_used, "{says}: nothing was said");
        if !outcome.is_named {
            report.count("unused-byte");
        }
        self.go_on(&mut rig, segment, offset, &says);
        report.images += 1;
    }

    /// Says whether the log is bound to notice this byte: all but the last, idle commit, which
    /// nothing proves, and what lies behind it in a file that is not sealed.
    fn is_used(
        &self,
        image: &SimulatedStorage,
        name: &FileName,
        segment: SegmentId,
        offset: u64,
    ) -> bool {
        let bytes = self.medium.read_live(name).unwrap_or_default();
        drop(image.read_live(name));
        let footer = bytes.len().checked_sub(FOOTER_BYTES).map(|at| &bytes[at..]);
        if footer.is_some_and(|footer| Footer::decode(footer).is_ok()) {
            let footer = Footer::decode(&bytes[bytes.len() - FOOTER_BYTES..]).expect("decoded");
            let directory = footer.directory_offset..;
            let padding = footer.directory_offset + footer.directory_len() as u64;
            let is_padding = (padding..bytes.len() as u64 - FOOTER_BYTES as u64).contains(&offset);
            // A footer whose magic is gone is not told from no footer.
            return !(directory.contains(&offset) && is_padding);
        }
        let in_segment = self.frames.iter().filter(|(at, _)| at.segment == segment);
        let end = in_segment
            .map(|(at, frame)| at.offset + frame.bytes.len() as u64)
            .max();
        end.is_some_and(|end| offset < end.next_multiple_of(SECTOR as u64))
    }

    /// The log takes more frames, seals what it found, and gives all back at the next start.
    fn go_on(&self, rig: &mut LogRig, segment: SegmentId, offset: u64, says: &str) {
        let mut maker = FrameMaker::new(self.seed ^ offset);
        for token in 1..=3 {
            rig.append(token, maker.next_frame(2));
        }
        rig.run();
        rig.step(LogInput::Close);
        while rig.wake() {
            rig.run();
        }
        rig.run();
        let said = rig.heard();
        let is_closed = said.iter().any(|said| matches!(said, LogOutput::Closed));
        assert!(is_closed, "{says}: does not close");
        if self.options.seals {
            self.check_directories(&rig.storage, segment, offset, says);
        }
        let mut again = LogRig::new(Arc::clone(&rig.storage), self.options.clone());
        again.step(LogInput::Start { from_sequence: 0 });
        again.run();
        let count = |output: &&LogOutput| {
            matches!(
                output,
                LogOutput::Recovered { .. } | LogOutput::Salvaged { .. }
            )
        };
        let given = again.said.iter().filter(count).count();
        assert_eq!(given, self.frames.len() + 3, "{says}: at the next start");
    }

    fn check_directories(
        &self,
        storage: &SimulatedStorage,
        segment: SegmentId,
        offset: u64,
        says: &str,
    ) {
        let mut directories: HashMap<SegmentId, Directory> = HashMap::new();
        let mut missing = 0;
        for (location, frame) in &self.frames {
            let id = location.segment;
            let directory = directories.entry(id).or_insert_with(|| {
                let name = segment_file("log", id);
                let bytes = storage.read_live(&name).expect(says);
                read_directory(&bytes).unwrap_or_else(|| panic!("{says}: {name} has no directory"))
            });
            for (slot, at) in (location.first_slot..).zip(frame.view().slot_offsets()) {
                let place = location.offset + at as u64;
                match directory.get(slot) {
                    Some(found) => assert_eq!(found, place, "{says}: slot {slot} of {id}"),
                    None => {
                        let frame_end = location.offset + frame.bytes.len() as u64;
                        let is_hit =
                            id == segment && (location.offset..frame_end).contains(&offset);
                        assert!(is_hit, "{says}: slot {slot} of {id} has no place");
                        missing += 1;
                    }
                }
            }
        }
        assert!(missing <= 8 * 2, "{says}: {missing} slots have no place");
    }
}

/// Destroys `count` runs of sectors of logs made from the seeds from `seed_from` on.
///
/// # Panics
/// When a frame that lies elsewhere is lost or changed, or a bad byte is served as good.
#[must_use]
pub fn smash_campaign(seed_from: u64, count: u64) -> Report {
    let mut report = Report::default();
    let mut seed = seed_from;
    while report.images < count {
        let log = DurableLog::new(seed);
        let mut random = Random::new(seed ^ 0x5ec7);
        for _ in 0..100.min(count - report.images) {
            let (name, segment, bytes) = &log.files[random.index(log.files.len())];
            let length = [512, 4096, 4096, 12288][random.index(4)];
            let offset = random.below(*bytes) / 512 * 512;
            log.check_smash(name, *segment, offset..offset + length, &mut report);
        }
        seed += 1;
    }
    report
}

impl DurableLog {
    fn all_sealed(&self) -> bool {
        self.files.iter().all(|(name, ..)| {
            let bytes = self.medium.read_live(name).unwrap_or_default();
            read_directory(&bytes).is_some()
        })
    }

    fn check_smash(
        &self,
        name: &FileName,
        segment: SegmentId,
        range: Range<u64>,
        report: &mut Report,
    ) {
        let image = self.medium.power_cut_image(1);
        let says = format!("seed {}: {name} at {range:?}", self.seed);
        for offset in range.clone() {
            image.flip_byte(name, offset);
        }
        let mut rig = LogRig::new(Arc::clone(&image), self.options.clone());
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        let is_hit = |at: &FrameLocation, frame: &Frame| {
            let end = at.offset + frame.bytes.len() as u64;
            at.segment == segment && at.offset < range.end && end > range.start
        };
        // A frame may be missing when other bytes of its commit are destroyed.
        let of_hit = |at: &FrameLocation| {
            let of_commit = || {
                self.frames
                    .iter()
                    .filter(|(of, _)| of.sequence == at.sequence)
            };
            let start = of_commit().map(|(of, _)| of.offset).min().unwrap_or(0);
            let end = of_commit()
                .map(|(of, frame)| of.offset + frame.bytes.len() as u64)
                .max();
            let start = start / SECTOR as u64 * SECTOR as u64;
            let end = end.unwrap_or(0).next_multiple_of(SECTOR as u64);
            at.segment == segment && start < range.end && end > range.start
        };
        let mut frames = self.frames.iter();
        let mut next_of = |location: &FrameLocation| {
            frames.by_ref().find(|(at, _)| {
                let is_it = at.offset == location.offset && at.segment == location.segment;
                assert!(
                    is_it || of_hit(at),
                    "{says}: the frame at {at:?} is missing"
                );
                is_it
            })
        };
        let mut was_named = false;
        for output in rig.heard() {
            match output {
                LogOutput::Recovered { location, frame } => {
                    let (at, whole) = next_of(&location).expect(&says);
                    assert_eq!(at.first_slot, location.first_slot, "{says}");
                    let is_same = whole.bytes == frame.bytes;
                    assert!(
                        is_same || is_hit(at, whole),
                        "{says}: another frame changed"
                    );
                    assert_eq!(whole.header.identity, frame.header.identity, "{says}");
                }
                LogOutput::Salvaged {
                    location,
                    identity,
                    bytes,
                    intact,
                    ..
                } => {
                    let (at, whole) = next_of(&location).expect(&says);
                    assert!(is_hit(at, whole), "{says}");
                    assert_eq!(whole.header.identity, identity, "{says}: {intact:?}");
                    check_intact(at, whole, &bytes, &intact, &says);
                    was_named = true;
                    report.count("salvaged");
                }
                LogOutput::DamagedSlot { .. } => was_named = true,
                LogOutput::Mended { .. } => {
                    was_named = true;
                    report.count("mended");
                }
                LogOutput::Lost { .. } => {
                    was_named = true;
                    report.count("lost");
                }
                LogOutput::Ready { .. } => {}
                other => panic!("{says}: {other:?}"),
            }
        }
        for (at, _) in frames {
            assert!(of_hit(at), "{says}: the frame at {at:?} is missing");
        }
        // When the last frames are hit, so may be what tells them from a torn tail. A commit tells
        // it of all that were durable when it was built: of those before the ones in flight.
        let length = self.medium.read_live(name).unwrap_or_default().len();
        let spares_footer = range.end <= (length - FOOTER_BYTES) as u64;
        let is_told = |at: &FrameLocation| {
            let tells = |(of, frame): &(FrameLocation, Frame)| {
                of.sequence > at.sequence + 2 && !is_hit(of, frame)
            };
            self.frames.iter().any(tells) || (self.all_sealed() && spares_footer)
        };
        let was_hit = self
            .frames
            .iter()
            .any(|(at, frame)| is_hit(at, frame) && is_told(at));
        assert!(was_named || !was_hit, "{says}: nothing was said");
        report.images += 1;
    }
}

/// Checks the records of a salvaged frame against the whole one.
fn check_intact(
    location: &FrameLocation,
    whole: &Frame,
    bytes: &[u8],
    intact: &[SalvagedRecord],
    says: &str,
) {
    let mut slot = location.first_slot;
    let mut places = HashMap::new();
    for record in whole.view().records() {
        let (range, record) = record.expect(says);
        places.insert(range.start, (range, slot));
        slot += u32::from(record.slot_count);
    }
    for found in intact {
        let (range, first_slot) = places.get(&found.range.start).expect(says);
        assert_eq!(
            (range, first_slot),
            (&found.range, &found.first_slot),
            "{says}"
        );
        let header = range.start..range.start + RECORD_HEADER_BYTES;
        assert_eq!(whole.bytes[header.clone()], bytes[header], "{says}");
    }
}

#[derive(Default)]
struct Outcome {
    is_ready: bool,
    is_named: bool,
    damaged: Vec<(FrameLocation, u32)>,
    /// A frame that came back with other bytes, and the slot that differs.
    changed: Option<(FrameLocation, u32)>,
}

impl Outcome {
    fn check(&self, says: &str) {
        assert!(self.damaged.len() <= 1, "{says}: {:?}", self.damaged);
        if let Some((location, slot)) = self.changed {
            let expected = (location, location.first_slot + slot);
            assert_eq!(
                self.damaged,
                [expected],
                "{says}: the changed slot is named"
            );
        }
    }
}

/// The one slot, within the frame, that differs between two frames.
fn differing_slot(whole: &Frame, found: &Frame, says: &str) -> u32 {
    assert_eq!(whole.bytes.len(), found.bytes.len(), "{says}");
    let view = whole.view();
    let starts: Vec<usize> = view.slot_offsets().collect();
    let pairs = whole.bytes.iter().zip(&found.bytes);
    // The frame's hash may have been worked out anew; it then covers the slot's.
    let differing = pairs.enumerate().filter(|(_, (a, b))| a != b);
    let places: Vec<usize> = differing.map(|(place, _)| place).collect();
    let slots: Vec<usize> = places
        .iter()
        .map(|place| starts.partition_point(|start| start <= place))
        .collect();
    let first = slots.first().copied().expect(says);
    assert!(first > 0, "{says}: header differs at {places:?}");
    assert!(
        slots.iter().all(|slot| *slot == first),
        "{says}: {places:?}"
    );
    u32::try_from(first - 1).expect(says)
}

fn check_salvaged(
    location: &FrameLocation,
    whole: &Frame,
    bytes: &[u8],
    intact: &[SalvagedRecord],
    lost: &[Lsn],
    says: &str,
) {
    let view: FrameView<'_> = whole.view();
    let mut slot = location.first_slot;
    let mut expected = Vec::new();
    for record in view.records() {
        let (range, record) = record.expect(says);
        expected.push((range, slot, record.header.lsn));
        slot += u32::from(record.slot_count);
    }
    assert!(
        lost.len() == 1,
        "{says}: lost {lost:?} of {:?}, {intact:?} of {expected:?}",
        whole.header
    );
    expected.retain(|(_, _, lsn)| *lsn != lost[0]);
    assert_eq!(expected.len(), intact.len(), "{says}");
    for ((range, first_slot, _), found) in expected.iter().zip(intact) {
        assert_eq!(
            (range, first_slot),
            (&found.range, &found.first_slot),
            "{says}"
        );
        assert_eq!(whole.bytes[range.clone()], bytes[range.clone()], "{says}");
        let (record, _) = RecordView::parse(&bytes[found.range.clone()]).expect(says);
        let count = record.slots(whole.header.identity.history).count();
        assert_eq!(count, usize::from(record.slot_count), "{says}");
    }
    assert!(bytes.len() >= FRAME_HEADER_BYTES + RECORD_HEADER_BYTES);
}

fn read_directory(bytes: &[u8]) -> Option<Directory> {
    let footer = Footer::decode(bytes.get(bytes.len().checked_sub(FOOTER_BYTES)?..)?).ok()?;
    let at = usize::try_from(footer.directory_offset).ok()?;
    Directory::decode(bytes.get(at..)?, &footer).ok()
}

fn used_files(
    medium: &SimulatedStorage,
    frames: &[(FrameLocation, Frame)],
) -> Vec<(FileName, SegmentId, u64)> {
    let mut ids: Vec<SegmentId> = frames.iter().map(|(at, _)| at.segment).collect();
    ids.dedup();
    let named = |id: SegmentId| {
        let name = segment_file("log", id);
        let length = medium.read_live(&name).unwrap_or_default().len() as u64;
        (name, id, length)
    };
    ids.into_iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_byte_is_named_and_costs_no_other_record() {
        let report = flip_campaign(1, 3000);
        let missing = report.missing(MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }

    #[test]
    fn a_destroyed_sector_costs_nothing_elsewhere() {
        let report = smash_campaign(1, 1000);
        let missing = report.missing(SMASH_MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }

    #[test]
    fn every_byte_of_headers_can_be_flipped() {
        let log = DurableLog::new(4);
        let mut report = Report::default();
        let (at, _) = log.frames[7];
        let (name, segment, _) = log
            .files
            .iter()
            .find(|(_, id, _)| *id == at.segment)
            .unwrap();
        let commit = at.offset / SECTOR as u64 * SECTOR as u64;
        for offset in commit..commit + 700 {
            log.check(name, *segment, offset, &mut report);
        }
        for offset in (0..160).chain(SECTOR as u64..SECTOR as u64 + 700) {
            log.check(name, *segment, offset, &mut report);
        }
    }
}
