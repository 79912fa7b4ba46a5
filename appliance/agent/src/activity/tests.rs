//! The promise of the activity log: what may differ is marked, durably, before it can differ.
#![allow(clippy::single_range_in_vec_init)]

use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicUsize;

use super::*;

const DISK: DiskId = DiskId([6; 16]);
const MIB: u64 = 1 << 20;

struct Count(AtomicUsize);

impl Resume for Count {
    fn resume(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn count() -> Arc<Count> {
    Arc::new(Count(AtomicUsize::new(0)))
}

struct Rig {
    directory: tempfile::TempDir,
    acknowledged: Arc<AtomicU64>,
    size: u64,
}

impl Rig {
    fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            directory,
            acknowledged: Arc::default(),
            size,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("activity")
    }

    fn open(&self, is_new: bool) -> (Arc<Activity>, Opened) {
        let acknowledged = Arc::clone(&self.acknowledged);
        Activity::open(
            &self.path(),
            DISK,
            self.size,
            is_new,
            Arc::default(),
            acknowledged,
        )
        .unwrap()
    }
}

#[test]
fn regions_are_powers_of_two_and_few() {
    assert_eq!(region_bytes(1), MIB);
    assert_eq!(region_bytes(64 << 30), MIB);
    assert_eq!(region_bytes((64 << 30) + 1), 2 * MIB);
    assert_eq!(region_bytes(1 << 40), 16 * MIB);
}

#[test]
fn a_write_waits_for_its_mark_and_later_ones_do_not() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    let (first, second) = (count(), count());
    assert!(!activity.begin(0..4096, &first));
    assert!(
        !activity.begin(8192..12288, &second),
        "the mark is not durable yet"
    );
    activity.commit();
    assert_eq!(first.0.load(Ordering::SeqCst), 1);
    assert_eq!(second.0.load(Ordering::SeqCst), 1);
    assert!(
        activity.begin(4096..8192, &count()),
        "the region is marked now"
    );
    assert!(
        !activity.begin(MIB - 4096..MIB + 4096, &count()),
        "the next one is not"
    );
    let (again, opened) = rig.open(false);
    assert_eq!(
        opened.marked, 1,
        "what was not committed is not on the disk"
    );
    assert_eq!(again.tainted(rig.size), [0..MIB]);
}

#[test]
fn a_region_is_unmarked_only_when_idle_acknowledged_and_flushed() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    activity.begin(0..4096, &count());
    activity.commit();
    assert!(
        activity.plan_unmark(0, u64::MAX).is_empty(),
        "a write is in flight"
    );
    activity.end(0..4096, Some(Lsn(7)));
    assert!(
        activity.plan_unmark(0, u64::MAX).is_empty(),
        "it is not acknowledged"
    );
    rig.acknowledged.store(7, Ordering::SeqCst);
    assert!(
        activity.plan_unmark(1, u64::MAX).is_empty(),
        "it is not idle"
    );
    let plan = activity.plan_unmark(0, u64::MAX);
    assert!(!plan.is_empty());
    // Another write comes while the source is flushed.
    assert!(activity.begin(4096..8192, &count()));
    activity.end(4096..8192, Some(Lsn(8)));
    activity.unmark(&plan);
    assert_eq!(
        activity.marked_bytes(),
        MIB,
        "the flush began before that write"
    );
    rig.acknowledged.store(8, Ordering::SeqCst);
    activity.unmark(&activity.plan_unmark(0, u64::MAX));
    assert_eq!(activity.marked_bytes(), 0);
    activity.commit();
    assert_eq!(rig.open(false).1, Opened::default());
}

#[test]
fn above_the_cap_the_least_recently_written_regions_go() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    for region in (0..8).rev() {
        let range = region * MIB..region * MIB + 4096;
        activity.begin(range.clone(), &count());
        activity.commit();
        activity.advance();
        activity.end(range, Some(Lsn(9 - region)));
    }
    rig.acknowledged.store(100, Ordering::SeqCst);
    activity.unmark(&activity.plan_unmark(1000, 5 * MIB));
    assert_eq!(activity.marked_bytes(), 5 * MIB);
    let last = 7 * MIB..7 * MIB + 4096;
    assert!(!activity.begin(last, &count()), "the oldest went");
    assert!(activity.begin(0..4096, &count()), "the newest stayed");
}

#[test]
fn a_sequential_writer_finds_its_regions_marked() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    let mut waits = 0;
    for region in 10..60 {
        let range = region * MIB..(region + 1) * MIB;
        if !activity.begin(range.clone(), &count()) {
            waits += 1;
            activity.commit();
        }
        activity.end(range, Some(Lsn(region)));
    }
    assert!(waits < 8, "{waits} waits for 50 regions");
}

#[test]
fn a_taint_outlives_everything_but_its_resync() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    activity.begin(0..4096, &count());
    activity.commit();
    activity.taint(&(0..4096));
    activity.end(0..4096, None);
    rig.acknowledged.store(100, Ordering::SeqCst);
    assert!(activity.plan_unmark(0, 0).is_empty());
    let taints = activity.taints();
    activity.clear(&activity.tainted(rig.size), taints);
    assert!(!activity.plan_unmark(0, u64::MAX).is_empty());
}

/// Every way in which the last write of the file can be torn leaves all marks that were relied on.
#[test]
fn a_torn_write_loses_no_mark_that_was_relied_on() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    activity.begin(3 * MIB..3 * MIB + 4096, &count());
    activity.commit();
    let before = std::fs::read(rig.path()).unwrap();
    activity.begin(5 * MIB..5 * MIB + 4096, &count());
    activity.commit();
    let after = std::fs::read(rig.path()).unwrap();
    drop(activity);
    let file = std::fs::File::options()
        .write(true)
        .open(rig.path())
        .unwrap();
    for sectors in 0_u32..256 {
        // Each bit says whether a 512-byte sector of the changed block reached the disk.
        let mut image = before.clone();
        let changed = (0..before.len() / 4096)
            .find(|block| before[block * 4096..][..4096] != after[block * 4096..][..4096])
            .unwrap();
        for sector in (0..8).filter(|sector| sectors >> sector & 1 == 1) {
            let at = changed * 4096 + sector * 512;
            image[at..at + 512].copy_from_slice(&after[at..at + 512]);
        }
        file.write_all_at(&image, 0).unwrap();
        let (again, opened) = rig.open(false);
        assert!(opened.reason.is_empty());
        assert!(
            again
                .tainted(rig.size)
                .iter()
                .any(|range| range.contains(&(3 * MIB)))
        );
    }
}

#[test]
fn what_cannot_be_trusted_counts_as_marked() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    activity.commit();
    drop(activity);
    let file = std::fs::File::options()
        .write(true)
        .open(rig.path())
        .unwrap();
    file.write_all_at(&[1; 100], 4096 + 500).unwrap();
    file.write_all_at(&[1; 100], 8192 + 500).unwrap();
    let (_, opened) = rig.open(false);
    assert_eq!(opened.marked, 64);
    assert!(opened.reason.contains("damaged"), "{}", opened.reason);
    file.write_all_at(&[1; 100], 20).unwrap();
    std::fs::remove_file(rig.path()).unwrap();
    let (_, opened) = rig.open(false);
    assert_eq!(
        opened.marked, 64,
        "a missing log of a known disk marks all of it"
    );
}

#[test]
fn marks_survive_a_larger_region() {
    let rig = Rig::new(64 << 30);
    let (activity, _) = rig.open(true);
    activity.begin(10 * MIB..10 * MIB + 4096, &count());
    activity.commit();
    drop(activity);
    let rig = Rig {
        size: 200 << 30,
        ..rig
    };
    let (activity, opened) = rig.open(false);
    assert_eq!(opened.marked, 1);
    assert_eq!(activity.tainted(rig.size), [8 * MIB..12 * MIB]);
}

/// The file is gone: writes go on, the loss of the bound is told, and it comes back by itself.
#[test]
fn a_broken_file_is_told_and_made_anew() {
    let rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    activity.begin(0..4096, &count());
    activity.commit();
    *activity.file.lock() = {
        let (file, _) = ActivityFile::open(&rig.path(), DISK).unwrap();
        file.read_only(&rig.path())
    };
    let waiting = count();
    assert!(!activity.begin(2 * MIB..2 * MIB + 4096, &waiting));
    activity.commit();
    assert!(activity.is_broken());
    assert_eq!(
        waiting.0.load(Ordering::SeqCst),
        1,
        "the write is not held up"
    );
    activity.commit();
    assert!(!activity.is_broken());
    assert_eq!(rig.open(false).1.marked, 2);
}

/// Regions of the new space are marked for themselves, however many there are, and a restart finds
/// them: a mark of the old last region would stand for writes that it does not cover then.
#[test]
fn a_disk_that_grows_has_regions_for_its_new_space() {
    let mut rig = Rig::new(64 * MIB);
    let (activity, _) = rig.open(true);
    for size in [96 * MIB, 40_000 * MIB] {
        activity.grow(size);
        rig.size = size;
        let last = size - MIB / 2..size - MIB / 4;
        assert!(!activity.begin(last.clone(), &count()));
        activity.commit();
        activity.end(last, None);
        let (again, opened) = rig.open(false);
        let marked = again.tainted(size);
        assert_eq!(marked.last(), Some(&(size - MIB..size)), "{opened:?}");
        assert!(opened.marked <= 2, "{opened:?}");
    }
    assert_eq!(activity.marked_bytes(), 2 * MIB);
    activity.grow(MIB);
    assert_eq!(activity.marked_bytes(), 2 * MIB, "nothing ever shrinks");
}

/// A forged generation with no room to count on ended the agent at its next mark.
#[test]
fn a_generation_that_nobody_reaches_is_damage() {
    let rig = Rig::new(64 * MIB);
    drop(rig.open(true));
    let mut bytes = std::fs::read(rig.path()).unwrap();
    for block in bytes.chunks_mut(4096).skip(1) {
        block[8..16].fill(0xff);
        let hash = *blake3::hash(&block[..4064]).as_bytes();
        block[4064..].copy_from_slice(&hash);
    }
    std::fs::write(rig.path(), bytes).unwrap();
    let (activity, opened) = rig.open(false);
    assert_eq!(opened.marked, 64, "{opened:?}");
    activity.taint_new(&(0..4096));
    activity.commit();
}
