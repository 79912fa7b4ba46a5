//! Archives: they come back, every flipped byte is named, and every cut goes on.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use afterimage_blockdev::{ErrorClass, Random};
use proptest::prelude::*;

use super::*;
use crate::{BlockSource, IoChoice, Options, Progress, Report};

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// A disk in memory, with holes where it is zero.
pub(crate) struct Memory(pub(crate) Vec<u8>, PathBuf);

impl BlockSource for Memory {
    fn path(&self) -> &Path {
        &self.1
    }

    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError> {
        let blocks = (range.start / 4096)..range.end.div_ceil(4096);
        let part =
            |block: u64| (block * 4096).max(range.start)..(block * 4096 + 4096).min(range.end);
        let is_data = |part: &Range<u64>| {
            self.0[index(part.start)..index(part.end)]
                .iter()
                .any(|byte| *byte != 0)
        };
        Ok(blocks.map(part).filter(is_data).collect())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError> {
        let at = index(offset);
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }
}

fn disk(bytes: Vec<u8>) -> Arc<dyn BlockSource> {
    Arc::new(Memory(bytes, PathBuf::from("memory")))
}

/// A disk of some blocks: random, repeated or zero.
fn random_disk(seed: u64, blocks: usize, tail: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; blocks * 4096 + tail];
    for block in bytes.chunks_mut(4096) {
        match random.below(4) {
            0 => random.fill(block),
            1 => block.fill(0x5a),
            _ => {}
        }
    }
    bytes
}

fn options(segment_bytes: usize) -> Options {
    Options {
        io: IoChoice::Threads,
        lanes: 3,
        segment_bytes,
        ..Options::default()
    }
}

fn key() -> Secret {
    Secret::Key(b"0123456789abcdef".to_vec())
}

fn export(
    source: &Arc<dyn BlockSource>,
    directory: &Path,
    secret: Option<&Secret>,
    segment_bytes: usize,
) -> Result<Report, BulkError> {
    let target = ArchiveTarget {
        directory,
        identity: "web1/root@h:lsn:7",
        secret,
        is_forced: false,
    };
    export_archive(
        source,
        target,
        &options(segment_bytes),
        &Progress::default(),
    )
}

fn content(directory: &Path, secret: Option<&Secret>) -> Result<Vec<u8>, BulkError> {
    let reader = ArchiveReader::open(directory, secret)?;
    reader.verify(&Progress::default())?;
    let size = reader.size_bytes();
    let mut bytes = vec![0; index(size)];
    for part in reader.data(0..size)? {
        reader.read(part.start, &mut bytes[index(part.start)..index(part.end)])?;
    }
    let mut whole = vec![1; index(size)];
    reader.read(0, &mut whole)?;
    assert_eq!(bytes, whole, "what is no data is zero");
    Ok(bytes)
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_archive_comes_back(
        seed in any::<u64>(),
        blocks in 0usize..400,
        tail in 0usize..4096,
        segment_bytes in 1usize..300_000,
        is_plain in any::<bool>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("new");
        let bytes = random_disk(seed, blocks, tail);
        let secret = (!is_plain).then(key);
        export(&disk(bytes.clone()), &directory, secret.as_ref(), segment_bytes).unwrap();
        prop_assert_eq!(content(&directory, secret.as_ref()).unwrap(), bytes);
    }
}

#[test]
fn an_archive_is_written_by_the_ring_too() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = random_disk(1, 2000, 512);
    let target = ArchiveTarget {
        directory: &directory.path().join("a"),
        identity: "x",
        secret: Some(&key()),
        is_forced: false,
    };
    let options = Options {
        io: IoChoice::Auto,
        segment_bytes: 1 << 20,
        ..Options::default()
    };
    let source = disk(bytes.clone());
    export_archive(&source, target, &options, &Progress::default()).unwrap();
    assert_eq!(content(target.directory, target.secret).unwrap(), bytes);
}

#[test]
fn every_flipped_byte_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("a");
    let mut bytes = vec![0; 5 * SLOT];
    Random::new(3).fill(&mut bytes[..600]);
    Random::new(4).fill(&mut bytes[3 * SLOT..3 * SLOT + 300]);
    for secret in [None, Some(key())] {
        let source = disk(bytes.clone());
        let target = ArchiveTarget {
            directory: &directory,
            identity: "x",
            secret: secret.as_ref(),
            is_forced: true,
        };
        export_archive(&source, target, &options(1), &Progress::default()).unwrap();
        let mut flips = 0;
        for path in files(&directory) {
            let good = fs::read(&path).unwrap();
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                fs::write(&path, &bad).unwrap();
                let error = content(&directory, secret.as_ref()).err();
                let error = error.unwrap_or_else(|| panic!("{at} of {path:?} is not named"));
                assert_eq!(
                    error.class(),
                    ErrorClass::Corrupt,
                    "{at} of {path:?}: {error}"
                );
                let name = path.file_name().unwrap().to_str().unwrap();
                assert!(
                    error.to_string().contains(name),
                    "{at} of {path:?}: {error}"
                );
                flips += 1;
            }
            fs::write(&path, &good).unwrap();
        }
        assert!(flips > 1500, "{flips}");
        assert_eq!(content(&directory, secret.as_ref()).unwrap(), bytes);
    }
}

const SLOT: usize = 64 << 10;

/// The order in which the bytes of an archive reach the medium: header, then each segment with the
/// commit that names it.
fn written_order(directory: &Path) -> Vec<(PathBuf, Range<usize>)> {
    let chain = directory.join("chain.aft");
    let length = index(fs::metadata(&chain).unwrap().len());
    let mut order = vec![(chain.clone(), 0..512)];
    for (number, at) in (1u64..).zip((512..length).step_by(128)) {
        let segment = segment_path(directory, number);
        if let Ok(metadata) = fs::metadata(&segment) {
            order.push((segment, 0..index(metadata.len())));
        }
        order.push((chain.clone(), at..at + 128));
    }
    order
}

#[test]
fn an_archive_that_was_cut_anywhere_goes_on() {
    // Each of a thousand cuts costs some syncs: memory is quicker than a medium.
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    };
    let whole = root.path().join("whole");
    let mut bytes = vec![0; 4 * SLOT + 40];
    Random::new(5).fill(&mut bytes[..60]);
    bytes[2 * SLOT..2 * SLOT + 400].fill(9);
    Random::new(6).fill(&mut bytes[4 * SLOT..]);
    let (source, secret) = (disk(bytes.clone()), key());
    export(&source, &whole, Some(&secret), 1).unwrap();
    let order = written_order(&whole);
    let total: usize = order.iter().map(|(_, range)| range.len()).sum();
    let mut resumed = 0;
    for cut in 0..=total {
        let directory = root.path().join("cut");
        let _missing = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).unwrap();
        let mut left = cut;
        for (path, range) in &order {
            let part = left.min(range.len());
            left -= part;
            let target = directory.join(path.file_name().unwrap());
            let mut file = fs::OpenOptions::new()
                .create(part > 0)
                .append(true)
                .open(&target);
            if part > 0 {
                let from = &fs::read(path).unwrap()[range.start..range.start + part];
                io::Write::write_all(file.as_mut().unwrap(), from).unwrap();
            }
        }
        if cut < total && cut > 0 {
            let error = content(&directory, Some(&secret)).unwrap_err();
            assert!(
                matches!(error, BulkError::Unfinished { .. }),
                "{cut}: {error}"
            );
        }
        let report = export(&source, &directory, Some(&secret), 1);
        let report = report.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        resumed += u64::from(report.resumed_at > 0);
        assert!(
            content(&directory, Some(&secret)).unwrap() == bytes,
            "cut at {cut}"
        );
    }
    assert!(total > 1200 && resumed > 500, "{resumed} of {total}");
}

#[test]
fn a_wrong_key_and_a_foreign_archive_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("a");
    let source = disk(random_disk(8, 50, 0));
    let secret = Secret::Passphrase(b"correct horse".to_vec());
    export(&source, &directory, Some(&secret), 1 << 20).unwrap();
    let other = Secret::Passphrase(b"battery staple".to_vec());
    let open = |secret: Option<&Secret>| ArchiveReader::open(&directory, secret).err().unwrap();
    assert!(matches!(open(Some(&other)), BulkError::WrongKey { .. }));
    assert!(matches!(open(Some(&key())), BulkError::WrongKey { .. }));
    let is_missing = |error| {
        matches!(
            error,
            BulkError::KeyMismatch {
                is_encrypted: true,
                ..
            }
        )
    };
    assert!(is_missing(open(None)));
    // Nothing of the plain bytes is in the files.
    let again = export(&source, &directory, Some(&secret), 1 << 20).unwrap();
    assert_eq!(
        (again.resumed_at, again.written_bytes),
        (source.size_bytes(), 0)
    );
    let other_state = ArchiveTarget {
        directory: &directory,
        identity: "another",
        secret: Some(&secret),
        is_forced: false,
    };
    let refused = export_archive(&source, other_state, &options(1), &Progress::default());
    assert!(matches!(refused, Err(BulkError::Exists { .. })));
    let weak = Secret::Passphrase(b"short".to_vec());
    let refused = export(&source, &root.path().join("b"), Some(&weak), 1);
    assert!(matches!(refused, Err(BulkError::WeakSecret { .. })));
    fs::write(root.path().join("stranger"), b"x").unwrap();
    let refused = export(&source, root.path(), Some(&secret), 1);
    assert!(matches!(refused, Err(BulkError::Exists { .. })));
}

#[test]
fn an_interrupted_export_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("a");
    let bytes = random_disk(9, 3000, 0);
    let stopped = Progress::default();
    stopped.stop();
    let target = ArchiveTarget {
        directory: &directory,
        identity: "web1/root@h:lsn:7",
        secret: None,
        is_forced: false,
    };
    let source = disk(bytes.clone());
    let result = export_archive(&source, target, &options(1 << 16), &stopped);
    assert!(matches!(result, Err(BulkError::Interrupted)));
    export(&source, &directory, None, 1 << 16).unwrap();
    assert_eq!(content(&directory, None).unwrap(), bytes);
}
