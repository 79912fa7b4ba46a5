//! Raw images: sparse, resumable, and never where something else is.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::Random;
use afterimage_bulk::{
    BlockSource, BulkError, FileSource, IoChoice, Options, Progress, RawTarget, export_raw,
    resume_file, resume_identity,
};

const MIB: u64 = 1 << 20;

/// A sparse file: some data, explicit zeroes, and a tail that is no whole block.
fn image(path: &Path, seed: u64) -> Vec<u8> {
    let size = 40 * MIB + 700;
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let mut random = Random::new(seed);
    let mut bytes = vec![0; 300_000];
    for at in [0, 5 * MIB + 512, 17 * MIB, 40 * MIB - 100_000] {
        random.fill(&mut bytes);
        let end = usize::try_from((size - at).min(bytes.len() as u64)).unwrap();
        file.write_all_at(&bytes[..end], at).unwrap();
    }
    file.write_all_at(&vec![0; 2 << 20], 30 * MIB).unwrap();
    fs::read(path).unwrap()
}

fn options(io: IoChoice) -> Options {
    Options {
        io,
        lanes: 4,
        checkpoint_bytes: 2 << 20,
        ..Options::default()
    }
}

fn target(path: &Path) -> RawTarget<'_> {
    RawTarget {
        path,
        identity: "web1/root@h:lsn:7",
        is_forced: false,
    }
}

fn source(path: &Path) -> Arc<dyn BlockSource> {
    Arc::new(FileSource::open(path).unwrap())
}

#[test]
fn a_raw_image_is_equal_and_sparse_both_ways() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    let bytes = image(&from, 1);
    for (io, name) in [(IoChoice::Auto, "auto"), (IoChoice::Threads, "threads")] {
        let to = root.path().join(name);
        let progress = Progress::default();
        let report = export_raw(&source(&from), target(&to), &options(io), &progress).unwrap();
        assert!(fs::read(&to).unwrap() == bytes, "{name}");
        assert!(report.written_bytes < 2 * MIB, "{report:?}");
        let stored = fs::metadata(&to).unwrap().blocks() * 512;
        assert!(stored < 3 * MIB, "{stored} bytes of the medium");
        assert_eq!(progress.position_bytes(), bytes.len() as u64);
        assert!(!resume_file(&to).exists());
    }
}

/// Stops the work, or fails, after so many reads.
struct Faulty {
    inner: FileSource,
    reads: AtomicU64,
    limit: u64,
    progress: Arc<Progress>,
    fails: bool,
}

impl BlockSource for Faulty {
    fn path(&self) -> &Path {
        self.inner.path()
    }
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }
    fn data(&self, range: std::ops::Range<u64>) -> Result<Vec<std::ops::Range<u64>>, BulkError> {
        Ok(vec![range])
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError> {
        if self.reads.fetch_add(1, Ordering::Relaxed) >= self.limit {
            if self.fails {
                let path = PathBuf::from("source");
                return Err(BulkError::Short { path, at: offset });
            }
            self.progress.stop();
        }
        self.inner.read(offset, buffer)
    }
}

#[test]
fn an_image_that_was_stopped_goes_on_where_it_was() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    let bytes = image(&from, 2);
    let to = root.path().join("to");
    let mut furthest = 0;
    for (limit, fails) in [(3, false), (8, true), (12, false)] {
        let progress = Arc::new(Progress::default());
        let faulty: Arc<dyn BlockSource> = Arc::new(Faulty {
            inner: FileSource::open(&from).unwrap(),
            reads: AtomicU64::new(0),
            limit,
            progress: Arc::clone(&progress),
            fails,
        });
        let result = export_raw(&faulty, target(&to), &options(IoChoice::Threads), &progress);
        match result {
            Err(BulkError::Interrupted) => assert!(!fails),
            Err(BulkError::Short { .. }) => assert!(fails),
            other => panic!("{other:?}"),
        }
        let known = resume_identity(&to).unwrap();
        assert_eq!(known.as_deref(), Some("web1/root@h:lsn:7"));
    }
    // What was copied before is not copied again: it may be gone from the source.
    let file = OpenOptions::new().write(true).open(&from).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    drop(file);
    let progress = Progress::default();
    let report = export_raw(
        &source(&from),
        target(&to),
        &options(IoChoice::Auto),
        &progress,
    );
    let report = report.unwrap();
    furthest = report.resumed_at.max(furthest);
    assert!(furthest > 8 * MIB, "{furthest}");
    assert!(fs::read(&to).unwrap() == bytes);
    assert!(!resume_file(&to).exists());
}

#[test]
fn nothing_else_is_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    let bytes = image(&from, 3);
    let to = root.path().join("to");
    fs::write(&to, b"precious").unwrap();
    let go = |target| {
        let progress = Progress::default();
        export_raw(
            &source(&from),
            target,
            &options(IoChoice::Threads),
            &progress,
        )
    };
    assert!(matches!(go(target(&to)), Err(BulkError::Exists { .. })));
    assert_eq!(fs::read(&to).unwrap(), b"precious");
    let forced = RawTarget {
        is_forced: true,
        ..target(&to)
    };
    go(forced).unwrap();
    assert!(fs::read(&to).unwrap() == bytes);
    let busy = File::open(&to).unwrap();
    busy.try_lock().unwrap();
    assert!(matches!(go(forced), Err(BulkError::Busy { .. })));
    drop(busy);
    let kind = go(target(root.path()));
    assert!(matches!(kind, Err(BulkError::Kind { .. })));
}

#[test]
fn a_target_that_was_cut_is_named() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    image(&from, 4);
    let to = root.path().join("to");
    let progress = Arc::new(Progress::default());
    let faulty: Arc<dyn BlockSource> = Arc::new(Faulty {
        inner: FileSource::open(&from).unwrap(),
        reads: AtomicU64::new(0),
        limit: 9,
        progress: Arc::clone(&progress),
        fails: false,
    });
    let stopped = export_raw(&faulty, target(&to), &options(IoChoice::Threads), &progress);
    assert!(matches!(stopped, Err(BulkError::Interrupted)));
    OpenOptions::new()
        .write(true)
        .open(&to)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    let progress = Progress::default();
    let result = export_raw(
        &source(&from),
        target(&to),
        &options(IoChoice::Threads),
        &progress,
    );
    assert!(
        matches!(result, Err(BulkError::Shrunk { .. })),
        "{result:?}"
    );
}
