//! Writers on a file system that note, outside of it, what was acknowledged to them.
//!
//! Each appends records to one file, and overwrites slots of another; every write is synchronous
//! (`O_DSYNC`, or `fsync` after it). A record says its number and content follows from it, so that
//! a lost, old, torn or foreign block is seen.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const RECORD: usize = 1024;
const SLOTS: u64 = 32;
const SLOT: usize = 4096;

/// Content of record `number` of a writer.
fn content(writer: u64, number: u64, length: usize) -> Vec<u8> {
    let mut state = (writer << 40) ^ (number << 1) ^ 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&number.to_le_bytes());
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What one writer was told; numbers of records, 0 for none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Journal {
    writer: u64,
    /// Records that were appended and acknowledged.
    pub appended: u64,
    /// Newest acknowledged number of each slot.
    slots: Vec<u64>,
}

impl Journal {
    fn new(writer: u64) -> Self {
        Self {
            writer,
            appended: 0,
            slots: vec![0; usize::try_from(SLOTS).expect("few")],
        }
    }

    /// Asserts that a file system holds all that was acknowledged, and nothing foreign.
    ///
    /// # Panics
    /// When it does not.
    pub fn check(&self, directory: &Path) {
        let read = |name: String| {
            let path = directory.join(name);
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let writer = self.writer;
        if self.appended > 0 {
            let bytes = read(format!("append-{writer}"));
            let wanted = usize::try_from(self.appended).expect("fits") * RECORD;
            assert!(
                bytes.len() >= wanted,
                "writer {writer}: {} acknowledged records, {} bytes",
                self.appended,
                bytes.len()
            );
            for (number, record) in (1..=self.appended).zip(bytes.chunks(RECORD)) {
                let is_right = record == content(writer, number, RECORD);
                assert!(is_right, "writer {writer}: record {number} is not there");
            }
        }
        if self.slots.iter().any(|number| *number > 0) {
            self.check_slots(&read(format!("slots-{writer}")));
        }
    }

    fn check_slots(&self, bytes: &[u8]) {
        for (index, (acknowledged, slot)) in self.slots.iter().zip(bytes.chunks(SLOT)).enumerate() {
            let head = slot.first_chunk().expect("a whole slot");
            let found = u64::from_le_bytes(*head);
            let name = format!("writer {}, slot {index}", self.writer);
            assert!(
                found >= *acknowledged,
                "{name}: {acknowledged} was acknowledged, {found} is there"
            );
            if found > 0 {
                let is_whole = slot == content(self.writer, found, SLOT);
                assert!(is_whole, "{name}: {found} is torn");
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    acknowledged: AtomicU64,
    is_failed: AtomicU64,
}

/// Writers at work.
#[derive(Debug)]
pub struct Writers {
    shared: Arc<Shared>,
    journals: Vec<Arc<parking_lot::Mutex<Journal>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    /// Starts writers numbered from `first` in a directory.
    #[must_use]
    pub fn start(directory: &Path, first: u64, count: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let mut journals = Vec::new();
        let mut threads = Vec::new();
        for writer in first..first + count {
            let journal = Arc::new(parking_lot::Mutex::new(Journal::new(writer)));
            journals.push(Arc::clone(&journal));
            let (shared, directory) = (Arc::clone(&shared), directory.to_owned());
            threads.push(std::thread::spawn(move || {
                if work(&directory, writer, &journal, &shared).is_err() {
                    shared.is_failed.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        Self {
            shared,
            journals,
            threads,
        }
    }

    /// Writes that were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// What has been acknowledged up to now.
    #[must_use]
    pub fn so_far(&self) -> Vec<Journal> {
        let journals = self.journals.iter();
        journals.map(|journal| journal.lock().clone()).collect()
    }

    /// Waits until so many more writes are acknowledged.
    pub fn progress(&self, count: u64) {
        let wanted = self.acknowledged() + count;
        super::until("more acknowledged writes", || {
            assert_eq!(self.failed(), 0, "a writer failed");
            self.acknowledged() >= wanted
        });
    }

    /// Writers that got an error.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.shared.is_failed.load(Ordering::SeqCst)
    }

    /// Ends them; gives what was acknowledged, and how many had got an error.
    ///
    /// # Panics
    /// When one panicked.
    #[must_use]
    pub fn stop(mut self) -> (Vec<Journal>, u64) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.join();
        (self.so_far(), self.failed())
    }

    /// Waits until each has got an error: their disk is gone.
    #[must_use]
    pub fn wait_for_errors(mut self) -> Vec<Journal> {
        self.join();
        self.so_far()
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer");
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

struct Files {
    append: File,
    slots: File,
    syncs: bool,
}

impl Files {
    fn open(directory: &Path, writer: u64) -> std::io::Result<Self> {
        // Every other writer opens with O_DSYNC; the rest call fsync.
        let syncs = writer.is_multiple_of(2);
        let flags = if syncs { 0 } else { libc::O_DSYNC };
        let open = |name: String| {
            let path: PathBuf = directory.join(name);
            let mut options = OpenOptions::new();
            options.create(true).truncate(true).write(true);
            options.custom_flags(flags).open(path)
        };
        let append = open(format!("append-{writer}"))?;
        let slots = open(format!("slots-{writer}"))?;
        append.sync_all()?;
        slots.write_all_at(&vec![0; usize::try_from(SLOTS).expect("few") * SLOT], 0)?;
        slots.sync_all()?;
        File::open(directory)?.sync_all()?;
        Ok(Self {
            append,
            slots,
            syncs,
        })
    }

    fn write(&self, file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
        file.write_all_at(bytes, at)?;
        if self.syncs {
            file.sync_data()?;
        }
        Ok(())
    }
}

fn work(
    directory: &Path,
    writer: u64,
    journal: &parking_lot::Mutex<Journal>,
    shared: &Shared,
) -> std::io::Result<()> {
    let files = Files::open(directory, writer)?;
    let (mut appended, mut number) = (0, 0);
    while !shared.is_over.load(Ordering::SeqCst) {
        number += 1;
        if number % 3 == 0 {
            let slot = (number * 7) % SLOTS;
            let bytes = content(writer, number, SLOT);
            let at = slot * u64::try_from(SLOT).expect("fits");
            files.write(&files.slots, &bytes, at)?;
            let index = usize::try_from(slot).expect("few");
            journal.lock().slots[index] = number;
        } else {
            let bytes = content(writer, appended + 1, RECORD);
            let at = appended * u64::try_from(RECORD).expect("fits");
            files.write(&files.append, &bytes, at)?;
            appended += 1;
            journal.lock().appended = appended;
        }
        shared.acknowledged.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}
