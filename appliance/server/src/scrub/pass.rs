//! One walk over all files of the store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{FileName, Timestamp};
use afterimage_cache::segment::segment_file;
use afterimage_protocol::rest::scrub::ScrubResult;
use afterimage_seed::engine::StoreFile;
use afterimage_seed::manifest::manifest_file;
use afterimage_seed::run::run_file;
use afterimage_seed::segment::seed_file;
use afterimage_seed::verify::{DamageReport, Verification, verify_file};

use super::Shared;
use super::paced::{Gate, Paced};
use crate::engine::{Command, Cut, EngineGone, EngineHandle, FileCommand};

/// Bytes that wait in the engine, from which on ingest goes first.
const QUEUED_BYTES_HIGH: u64 = 4 << 20;
/// How often it is looked whether ingest still goes first.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long ingest goes first at most: a scrub that never ends finds nothing.
const YIELD_MAX: Duration = Duration::from_secs(5);
/// Damage that is listed.
const DAMAGE_MAX: usize = 1000;

/// Stands before the points that damage may hurt.
pub(super) const HURTS: &str = "; may hurt ";

/// How a pass ended.
pub(super) enum Ended {
    /// All was read.
    Whole(ScrubResult),
    /// It was stopped, or the engine was.
    Stopped,
}

/// Lets a read go on when its time has come and ingest does not need the medium.
struct Yielding {
    shared: Arc<Shared>,
    engine: EngineHandle,
}

impl Yielding {
    fn is_busy(&self) -> bool {
        let queued = self
            .engine
            .ask_blocking(|reply| Command::Files(FileCommand::Queued(reply)));
        queued.is_ok_and(|bytes| bytes > QUEUED_BYTES_HIGH)
    }
}

impl Gate for Yielding {
    fn pass(&self, until: Instant) -> bool {
        if !self.shared.rest_until(until) {
            return false;
        }
        let give_up = Instant::now() + YIELD_MAX;
        let mut goes_on = true;
        while goes_on && Instant::now() < give_up && self.is_busy() {
            self.shared.waits(true);
            goes_on = self.shared.rest_until(Instant::now() + LOOK_EVERY);
        }
        self.shared.waits(false);
        goes_on
    }

    fn was_read(&self, bytes: u64) {
        self.shared.was_read(bytes);
    }
}

/// Reads everything once. What is damaged is told as it is found.
pub(super) fn run(
    shared: &Arc<Shared>,
    engine: &EngineHandle,
    (data_dir, bytes_per_second): (&Path, u64),
    now: &dyn Fn() -> Timestamp,
    tell: &mut dyn FnMut(String),
) -> Result<Ended, EngineGone> {
    let begun = now();
    let listed = engine.ask_blocking(|reply| Command::Files(FileCommand::List(reply)))?;
    let length = |name: &str| std::fs::metadata(data_dir.join(name)).map_or(0, |found| found.len());
    let files: Vec<_> = listed
        .files
        .into_iter()
        .map(|file| (file, length(&name_of(file).to_string())))
        .collect();
    shared.begin(files.iter().map(|(_, length)| length).sum());
    let gate = Arc::new(Yielding {
        shared: Arc::clone(shared),
        engine: engine.clone(),
    });
    let storage = Paced::new(listed.storage, gate, bytes_per_second);
    let mut found = Verification::default();
    let mut damage = Vec::new();
    let mut done = 0;
    for (file, length) in files {
        // Only one file is held back from removal at a time.
        let pin = engine.ask_blocking(|reply| Command::Files(FileCommand::Pin(file, reply)))?;
        if let Some(pin) = pin {
            let result = verify_file(&storage, listed.store, file, &mut found);
            drop(pin);
            if shared.is_stopping() {
                return Ok(Ended::Stopped);
            }
            let mut said = Vec::new();
            if let Err(error) = result {
                said.push(format!("{}: {error}", name_of(file)));
            }
            if !found.damage.is_empty() {
                let cuts = engine.ask_blocking(|reply| Command::Files(FileCommand::Cuts(reply)))?;
                let reports = found.damage.drain(..);
                said.extend(reports.map(|report| describe(&report, &cuts)));
            }
            for text in said {
                if damage.len() < DAMAGE_MAX {
                    tell(text.clone());
                    damage.push(text);
                }
            }
        }
        if shared.is_stopping() {
            return Ok(Ended::Stopped);
        }
        done += length;
        shared.reached(done);
    }
    Ok(Ended::Whole(ScrubResult {
        begun,
        ended: now(),
        files: found.files,
        slots: found.slots,
        bytes: found.bytes,
        damage,
    }))
}

fn name_of(file: StoreFile) -> FileName {
    match file {
        StoreFile::Manifest(number) => manifest_file(number),
        StoreFile::Log(segment) => segment_file("log", segment),
        StoreFile::Seed(segment, generation) => seed_file(segment, generation),
        StoreFile::Run(run) => run_file(run),
        StoreFile::Notes(notes) => notes.name(),
    }
}

/// Damage in words, with the points that it may hurt.
pub(crate) fn describe(report: &DamageReport, cuts: &[Cut]) -> String {
    let mut text = format!("{} at {}: {}", report.file, report.offset, report.damage);
    if let Some((history, lsn)) = report.hurts {
        let mut hurt = cuts
            .iter()
            .filter(|cut| cut.1 == history && cut.2 >= lsn)
            .map(|cut| cut.0.as_str());
        let first = hurt.next();
        let count = first.map_or(0, |_| 1 + hurt.count());
        text.push_str(&format!("{HURTS}{count} points"));
        if let Some(first) = first {
            text.push_str(&format!(", the first is {first}"));
        }
    }
    text
}
