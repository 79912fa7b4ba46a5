//! Damage of a store at rest, sectors that cannot be read included: what is there twice costs
//! nothing, the rest is named, and wrong data is never shown.
//!
//! Each case once ended the start, or was not noticed: one bad sector stopped a store with two
//! copies; a run that was lost after the log had been given away left holes that read as zeroes.
#![allow(clippy::unwrap_used)]

mod rig;

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{FileName, Lsn, PointId, SegmentId, StoreId, Timestamp, wait};
use afterimage_cache::Damage;
use afterimage_seed::manifest::{
    Edit, Manifest, ManifestCommit, ManifestOutput, PointKind, PointRecord,
};
use afterimage_seed::run::{PAGE_BYTES, RunFooter, RunId, encode_run, parse_run_file};
use afterimage_seed::{Request, SeedError};
use rig::{HISTORY, MACHINE, Medium, Rig, SECTOR, closed_store};

/// Drives a manifest until it wants nothing more; gives back what it said.
struct Driver {
    medium: Arc<Medium>,
    manifest: Manifest,
    said: Vec<ManifestOutput>,
}

impl Driver {
    fn start(medium: &Arc<Medium>) -> Self {
        let mut driver = Self {
            medium: Arc::clone(medium),
            manifest: Manifest::new(64 << 10),
            said: Vec::new(),
        };
        driver.step(Manifest::start);
        driver
    }

    fn step(&mut self, act: impl FnOnce(&mut Manifest, &mut Vec<ManifestOutput>)) {
        let mut out = Vec::new();
        act(&mut self.manifest, &mut out);
        while !out.is_empty() {
            let mut next = Vec::new();
            for output in out {
                match output {
                    ManifestOutput::Storage(op) => {
                        let result = wait::storage(&*self.medium, op);
                        self.manifest.completed(result, &mut next);
                    }
                    ManifestOutput::WantsSnapshot => self.manifest.rotate(vec![store()], &mut next),
                    said => self.said.push(said),
                }
            }
            out = next;
        }
    }

    fn commit(&mut self, edits: Vec<Edit>) {
        self.step(|manifest, out| manifest.commit(1, edits, out));
    }

    fn failure(&self) -> Option<&SeedError> {
        self.said.iter().find_map(|said| match said {
            ManifestOutput::Failed(error) => Some(error),
            _ => None,
        })
    }

    fn recovered(&self) -> Option<&Vec<Edit>> {
        self.said.iter().find_map(|said| match said {
            ManifestOutput::Recovered(edits) => Some(edits),
            _ => None,
        })
    }
}

fn store() -> Edit {
    Edit::Store {
        store: StoreId([7; 16]),
        created: Timestamp(1),
        next_segment: SegmentId(1),
        next_run: RunId(1),
        next_point: PointId(1),
    }
}

fn point(number: u64, name: String) -> Edit {
    Edit::Point(PointRecord {
        id: PointId(number),
        machine: MACHINE,
        history: HISTORY,
        lsn: Lsn(1),
        time: Timestamp(1),
        kind: PointKind::Crash,
        locked_until: Timestamp(0),
        name,
    })
}

// --- Manifest ------------------------------------------------------------------------------

#[test]
fn a_state_of_any_size_is_cut_into_commits_that_can_be_read() {
    let medium = Medium::new();
    let mut driver = Driver::start(&medium);
    let mut state = vec![store()];
    state.extend((0..100_000).map(|number| point(number, format!("point-{number}"))));
    state.extend((0..300).map(|number| point(number, "x".repeat(300_000))));
    let count = state.len();
    driver.step(|manifest, out| manifest.rotate(state, out));
    driver.commit(Vec::new());
    let again = Driver::start(&medium);
    assert!(again.failure().is_none(), "{:?}", again.failure());
    assert_eq!(again.recovered().unwrap().len(), count);
}

#[test]
fn a_commit_that_is_too_long_goes_into_a_snapshot() {
    let medium = Medium::new();
    let mut driver = Driver::start(&medium);
    driver.commit(vec![store()]);
    let long = (0..300).map(|number| point(number, "x".repeat(300_000)));
    driver.commit(long.collect());
    driver.commit(vec![point(1000, "last".to_owned())]);
    assert!(driver.failure().is_none(), "{:?}", driver.failure());
    let again = Driver::start(&medium);
    let edits = again.recovered().unwrap();
    assert!(edits.contains(&point(299, "x".repeat(300_000))));
    assert!(edits.contains(&point(1000, "last".to_owned())));
}

#[test]
fn what_no_reader_would_take_is_not_written() {
    let long = "x".repeat((64 << 20) + 1);
    let commit = ManifestCommit {
        sequence: 1,
        previous: [0; 32],
        is_snapshot: false,
        ends_snapshot: false,
        edits: vec![point(1, long.clone())],
    };
    assert!(commit.encode().is_err());
    let medium = Medium::new();
    let mut driver = Driver::start(&medium);
    driver.commit(vec![store()]);
    driver.commit(vec![point(1, long)]);
    assert!(driver.failure().is_some());
    let again = Driver::start(&medium);
    assert!(again.recovered().is_some(), "the old file is as it was");
}

fn commit(sequence: u64, previous: [u8; 32], is_last: bool, edits: Vec<Edit>) -> ManifestCommit {
    ManifestCommit {
        sequence,
        previous,
        is_snapshot: true,
        ends_snapshot: is_last,
        edits,
    }
}

/// With part 1 bad in both copies, part 2, of twice its length, looked like the second copy of a
/// first part.
#[test]
fn a_snapshot_does_not_begin_with_its_second_part() {
    let (first, hash) = commit(1, [0; 32], false, vec![store()])
        .encode_twice()
        .unwrap();
    let edits = (0..60).map(|number| point(number, "y".repeat(20)));
    let (second, _) = commit(2, hash, true, edits.collect())
        .encode_twice()
        .unwrap();
    assert_eq!(second.len(), 2 * first.len(), "the case that was met");
    let name = FileName::new("manifest/0000000001.manifest");
    let medium = Medium::new();
    medium.put(&name, &[&first[..], &second[..]].concat());
    assert_eq!(Driver::start(&medium).recovered().unwrap().len(), 61);
    medium.put(&name, &[&first[..], &second[..]].concat());
    medium.flip(&name, 200);
    medium.flip(&name, 200 + first.len() / 2);
    let driver = Driver::start(&medium);
    assert!(driver.recovered().is_none(), "part 2 counts without part 1");
}

#[test]
fn both_copies_of_the_last_real_commit_are_no_torn_end() {
    let medium = Medium::new();
    let mut driver = Driver::start(&medium);
    driver.commit(vec![store()]);
    driver.commit(vec![point(1, "kept".to_owned())]);
    assert!(driver.manifest.is_unproven());
    driver.step(Manifest::prove);
    assert!(!driver.manifest.is_unproven());
    let name = medium.only("manifest");
    assert_eq!(medium.content(&name).len(), 6 * 4096);
    medium.flip(&name, 2 * 4096 + 200);
    medium.flip(&name, 3 * 4096 + 200);
    let driver = Driver::start(&medium);
    assert!(
        driver.recovered().is_none(),
        "an acknowledged point is gone"
    );
    assert!(matches!(
        driver.failure(),
        Some(SeedError::Damaged { offset: 8192, .. })
    ));
}

#[test]
fn an_idle_commit_follows_the_last_one_in_time_and_at_the_end() {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    let name = medium.only("manifest");
    let before = medium.content(&name).len();
    rig.pass(Duration::from_secs(1));
    let after = medium.content(&name);
    assert_eq!(after.len(), before + 8192);
    rig.pass(Duration::from_secs(5));
    assert_eq!(medium.content(&name).len(), after.len(), "one is enough");
    rig.write(0, 1);
    rig.stop();
    let end = medium.content(&name);
    let (last, _, _) = ManifestCommit::decode(&end[end.len() - 4096..]).unwrap();
    assert!(last.edits.is_empty());
}

#[test]
fn one_sector_of_the_manifest_that_cannot_be_read_costs_nothing() {
    let medium = closed_store();
    let name = medium.only("manifest");
    let sectors = medium.content(&name).len() as u64 / SECTOR;
    for sector in 0..sectors {
        let medium = closed_store();
        medium.spoil(&name, sector * SECTOR);
        let mut rig = Rig::start(&medium);
        assert!(rig.is_ready, "sector {sector}: {:?}", rig.failure);
        assert_eq!(rig.read(0), Ok(7));
        assert_eq!(rig.read(1), Ok(8));
    }
}

#[test]
fn a_last_commit_that_cannot_be_read_is_not_torn() {
    let medium = closed_store();
    let name = medium.only("manifest");
    let len = medium.content(&name).len() as u64;
    medium.spoil(&name, len - SECTOR);
    medium.spoil(&name, len - 2 * SECTOR);
    let rig = Rig::start(&medium);
    assert!(rig.failure.is_some() && !rig.is_ready);
}

#[test]
fn a_name_that_is_not_written_so_is_no_file_of_ours() {
    let medium = closed_store();
    let bytes = medium.content(&medium.only("manifest"));
    medium.put(&FileName::new("manifest/5.manifest"), &bytes);
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert_eq!(rig.read(0), Ok(7));
    assert!(parse_run_file(&FileName::new("runs/5.run")).is_none());
}

// --- Runs ----------------------------------------------------------------------------------

#[test]
fn one_sector_of_a_run_that_cannot_be_read_costs_nothing() {
    let name = closed_store().only("runs");
    let sectors = closed_store().content(&name).len() as u64 / SECTOR;
    for sector in 0..sectors {
        let medium = closed_store();
        medium.spoil(&name, sector * SECTOR);
        let mut rig = Rig::start(&medium);
        assert!(rig.is_ready, "sector {sector}: {:?}", rig.failure);
        assert_eq!(rig.read(0), Ok(7), "sector {sector}");
        assert_eq!(rig.read(1), Ok(8), "sector {sector}");
        assert_eq!(rig.damage(), Vec::<String>::new());
    }
}

#[test]
fn a_run_that_cannot_be_read_is_made_anew() {
    let medium = closed_store();
    let name = medium.only("runs");
    let len = medium.content(&name).len() as u64;
    medium.spoil(&name, len - SECTOR);
    medium.spoil(&name, len - 2 * SECTOR);
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert_eq!((rig.read(0), rig.read(1)), (Ok(7), Ok(8)));
    assert_eq!(rig.damage().len(), 1);
}

/// The log had been given away: what the run held is in no other place.
#[test]
fn a_run_that_is_lost_behind_a_released_log_leaves_no_silent_hole() {
    let medium = closed_store();
    let mut driver = Driver::start(&medium);
    driver.commit(vec![Edit::LogReleased { log_sequence: 1 }]);
    let run = medium.only("runs");
    let bytes = medium.remove(&run);
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert!(rig.read(0).is_err() && rig.read(1).is_err() && rig.read(2).is_err());
    assert!(rig.damage()[0].contains("0000000001.run"));
    assert!(rig.ask(Request::Collect).is_err(), "slots would be lost");
    rig.open();
    rig.write(3, 9);
    rig.stop();
    // Put back, the file counts again.
    medium.put(&run, &bytes);
    let mut rig = Rig::start(&medium);
    assert_eq!(rig.damage(), Vec::<String>::new());
    let read: Vec<_> = (0..4).map(|block| rig.read(block)).collect();
    assert_eq!(read, [Ok(7), Ok(8), Ok(0), Ok(9)]);
}

#[test]
fn no_footer_of_a_run_makes_a_reader_panic() {
    let run = RunId(1);
    let bytes = encode_run(StoreId([7; 16]), run, &[]).0;
    let footer = &bytes[bytes.len() - PAGE_BYTES..];
    for at in (12..96).step_by(4) {
        for length in [4, 8] {
            let mut footer = footer.to_vec();
            footer[at..(at + length).min(96)].fill(0xff);
            let hash = blake3::hash(&footer[..96]);
            footer[96..128].copy_from_slice(hash.as_bytes());
            if let Ok(footer) = RunFooter::decode(&footer, StoreId([7; 16]), run) {
                let _any = (footer.tails_len(), footer.padding_len());
                let _refused = footer.find_tail(&bytes);
            }
        }
    }
}

// --- Segments of bulk blocks ---------------------------------------------------------------

/// A store whose bulk is in no run yet, as a power cut leaves it.
fn cut_store() -> Arc<Medium> {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    rig.copy(0, 7);
    rig.write(1, 8);
    rig.pass(Duration::from_secs(1));
    medium
}

#[test]
fn a_bulk_segment_that_is_put_back_heals_what_its_loss_hurt() {
    let medium = cut_store();
    let segment = medium.only("segments");
    let bytes = medium.remove(&segment);
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert!(rig.read(0).is_err() && rig.read(2).is_err());
    assert_eq!(rig.damage().len(), 1);
    // What is written meanwhile makes a run.
    rig.epoch = 2;
    rig.open();
    let header = rig.header(afterimage_cache::RecordKind::EpochStart);
    rig.note(&header, &[]);
    rig.write(2, 9);
    rig.stop();
    medium.put(&segment, &bytes);
    let mut rig = Rig::start(&medium);
    assert_eq!(rig.damage(), Vec::<String>::new());
    let read: Vec<_> = (0..3).map(|block| rig.read(block)).collect();
    assert_eq!(read, [Ok(7), Ok(8), Ok(9)]);
}

#[test]
fn one_sector_of_a_segments_end_that_cannot_be_read_costs_nothing() {
    for store in [cut_store, closed_store] {
        let name = store().only("segments");
        let sectors = store().content(&name).len() as u64 / SECTOR;
        // Directory and footer, twice each.
        for sector in sectors - 4..sectors {
            let medium = store();
            medium.spoil(&name, sector * SECTOR);
            let mut rig = Rig::start(&medium);
            assert!(rig.is_ready, "sector {sector}: {:?}", rig.failure);
            assert_eq!(
                (rig.read(0), rig.read(1)),
                (Ok(7), Ok(8)),
                "sector {sector}"
            );
        }
    }
}

#[test]
fn a_segment_of_a_newer_program_ends_the_start() {
    let medium = cut_store();
    let name = medium.only("segments");
    let mut bytes = medium.content(&name);
    let len = bytes.len();
    for at in [len - 8192, len - 4096] {
        bytes[at + 8] = 9;
        let hash = blake3::hash(&bytes[at..at + 120]);
        bytes[at + 120..at + 152].copy_from_slice(hash.as_bytes());
    }
    medium.put(&name, &bytes);
    let rig = Rig::start(&medium);
    assert!(matches!(
        rig.failure,
        Some(SeedError::NewerFormat { found: 9, .. })
    ));
}

// --- Log -----------------------------------------------------------------------------------

#[test]
fn a_log_that_ends_below_the_checkpoint_is_named_and_goes_on_above_it() {
    let medium = closed_store();
    for name in medium.names("log") {
        medium.remove(&name);
    }
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert_eq!(rig.damage().len(), 1, "{:?}", rig.damage());
    assert_eq!(rig.read(0), Ok(7));
    assert!(rig.read(1).is_err());
    rig.open();
    let last = rig.last;
    assert_eq!(
        last,
        Lsn(3),
        "LSNs that were acknowledged are not given out again"
    );
    rig.write(1, 9);
    assert_eq!(rig.durable(), Lsn(4));
    // Not closed in order: what was acknowledged is found in the log.
    let mut rig = Rig::start(&medium);
    assert_eq!((rig.read(0), rig.read(1)), (Ok(7), Ok(9)));
}

// --- Verification --------------------------------------------------------------------------

fn damaged_files(rig: &mut Rig) -> Vec<String> {
    let found = rig.verify();
    found.damage.into_iter().map(|report| report.file).collect()
}

#[test]
fn a_file_that_is_missing_or_unreadable_is_a_finding_among_others() {
    let medium = closed_store();
    let mut rig = Rig::start(&medium);
    assert!(rig.verify().damage.is_empty());
    let (run, segment) = (medium.only("runs"), medium.only("segments"));
    medium.remove(&run);
    medium.spoil(&segment, SECTOR);
    let found = rig.verify();
    let missing = Damage::Missing { structure: "file" };
    assert!(found.damage.iter().any(|report| report.damage == missing));
    let unreadable = Damage::Unreadable {
        structure: "sector",
    };
    let is_named = |report: &&afterimage_seed::verify::DamageReport| {
        report.damage == unreadable && report.file == segment.to_string()
    };
    assert_eq!(found.damage.iter().filter(is_named).count(), 1);
}

#[test]
fn every_byte_of_manifest_run_and_segment_is_looked_at() {
    for directory in ["manifest", "runs", "segments"] {
        let name = closed_store().only(directory);
        let len = closed_store().content(&name).len();
        let medium = closed_store();
        let mut rig = Rig::start(&medium);
        // The last commit is not judged: it may be on its way.
        let end = if directory == "manifest" {
            len - 16384
        } else {
            len
        };
        for at in (5..end).step_by(1009) {
            medium.flip(&name, at);
            let files = damaged_files(&mut rig);
            assert!(files.contains(&name.to_string()), "{name} at {at}");
            medium.flip(&name, at);
        }
    }
}

/// Another file of the same store under the name that the manifest knows: whole, and not it.
#[test]
fn a_segment_other_than_the_manifest_says_is_a_finding() {
    let medium = cut_store();
    let other = cut_store();
    let name = medium.only("segments");
    let mut rig = Rig::start(&medium);
    assert!(rig.verify().damage.is_empty());
    // The same numbers, another cipher stream or content: only root and hashes differ.
    let mut bytes = other.content(&name);
    let len = bytes.len();
    for at in [len - 8192, len - 4096] {
        bytes[at + 56] ^= 1;
        let hash = blake3::hash(&bytes[at..at + 120]);
        bytes[at + 120..at + 152].copy_from_slice(hash.as_bytes());
    }
    medium.put(&name, &bytes);
    assert!(damaged_files(&mut rig).contains(&name.to_string()));
}
