//! Golden images: files that an earlier version wrote, which every later one must read.
//!
//! Each directory below `golden/` holds files and an `expected.txt` with one line a frame: segment,
//! offset, first slot, sequence, first and last LSN, hash of the frame, hash of its plain content.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{
    DiskId, FileName, IoBuffer, KeyId, MemoryStorage, StorageOp, StorageOutcome, wait,
};
use afterimage_cache::log::FrameLocation;
use afterimage_cache::{DiskKey, Frame, KeySource, Opener, RecordBody};

use crate::frames::disk_key;

struct EveryDisk;

impl KeySource for EveryDisk {
    fn disk_key(&self, _: DiskId, id: KeyId) -> Option<DiskKey> {
        (id == disk_key().id).then(disk_key)
    }
}

/// Where the image of a format version lies.
#[must_use]
pub fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

/// One line of `expected.txt`: opens every slot, so that ciphers and codecs are covered too.
///
/// # Panics
/// When a slot does not open.
#[must_use]
pub fn describe(location: &FrameLocation, frame: &Frame) -> String {
    let mut opener = Opener::new(Arc::new(EveryDisk));
    let mut plain_hash = blake3::Hasher::new();
    let history = frame.header.identity.history;
    for record in frame.view().records() {
        let (_, record) = record.expect("a frame that was accepted");
        if let RecordBody::Note(note) = record.body {
            plain_hash.update(note);
        }
        for slot in record.slots(history) {
            let (_, context, slot) = slot.expect("a frame that was accepted");
            let mut plain = vec![0; slot.header.plain_len()];
            opener
                .open(&context, &slot, &mut plain)
                .expect("the key is known");
            plain_hash.update(&plain);
        }
    }
    let mut line = String::new();
    let FrameLocation {
        segment,
        offset,
        first_slot,
        sequence,
    } = location;
    let header = &frame.header;
    let hash = blake3::hash(&frame.bytes).to_hex();
    let plain = plain_hash.finalize().to_hex();
    write!(
        line,
        "{segment} {offset} {first_slot} {sequence} {} {} {hash} {plain}",
        header.first, header.last
    )
    .expect("a string grows");
    line
}

/// Puts files of a directory into a storage in memory, below `log/`.
///
/// # Panics
/// When they cannot be read.
#[must_use]
pub fn load(directory: &Path) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new();
    for entry in std::fs::read_dir(directory).expect("the golden image is there") {
        let path = entry.expect("a directory entry").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        if !name.ends_with(".log") {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a golden file");
        let name = FileName::new(format!("log/{name}"));
        let created = wait::storage(&*storage, StorageOp::Create { name });
        let Ok(StorageOutcome::Opened { file, .. }) = created else {
            panic!("{created:?}");
        };
        let buffer = IoBuffer::copy_of(&bytes);
        let offset = 0;
        let write = StorageOp::Write {
            file,
            offset,
            buffer,
        };
        wait::storage(&*storage, write).expect("memory takes it");
    }
    storage
}

#[cfg(test)]
mod tests {
    use afterimage_blockdev::simulated::{SimulatedOptions, SimulatedStorage};
    use afterimage_blockdev::{Storage, StorageCompleter, StorageCompletion};
    use afterimage_cache::log::{Log, LogInput, LogOptions, LogOutput};
    use parking_lot::Mutex;

    use super::*;
    use crate::frames::FrameMaker;
    use crate::log_rig::{LogRig, small_options};

    fn options() -> LogOptions {
        LogOptions {
            commit_bytes_max: 12 << 10,
            ..small_options(64 << 10, true)
        }
    }

    #[derive(Default)]
    struct Inbox(Mutex<Vec<StorageCompletion>>);

    impl StorageCompleter for Inbox {
        fn complete(&self, completion: StorageCompletion) {
            self.0.lock().push(completion);
        }
    }

    fn read(storage: &MemoryStorage) -> Vec<String> {
        let mut log = Log::new(options());
        let inbox = Arc::new(Inbox::default());
        let mut lines = Vec::new();
        let mut inputs = vec![LogInput::Start { from_sequence: 0 }];
        while !inputs.is_empty() {
            for input in core::mem::take(&mut inputs) {
                let mut out = Vec::new();
                log.step(afterimage_blockdev::Monotonic(1), input, &mut out);
                for output in out {
                    match output {
                        LogOutput::Storage(token, op) => {
                            storage.submit(token, op, Arc::<Inbox>::clone(&inbox) as _);
                        }
                        LogOutput::Recovered { location, frame } => {
                            lines.push(describe(&location, &frame));
                        }
                        LogOutput::Ready { .. } => return lines,
                        other => panic!("{other:?}"),
                    }
                }
            }
            inputs.extend(inbox.0.lock().drain(..).map(LogInput::Storage));
        }
        panic!("recovery stalls");
    }

    /// Writes the image of version 1 anew. Only a change of the format is a reason to run it, and
    /// then it writes the next version's directory.
    #[test]
    #[ignore = "writes the golden image"]
    fn generate_log_v1() {
        let medium = SimulatedStorage::new(1, SimulatedOptions::default());
        let mut rig = LogRig::new(Arc::clone(&medium), options());
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        let mut maker = FrameMaker::new(1);
        for token in 0..24 {
            rig.append(token, maker.next_frame(5));
            if token % 2 == 0 {
                rig.run();
            }
        }
        rig.run();
        rig.wake();
        rig.run();
        let target = directory("log-v1");
        std::fs::create_dir_all(&target).unwrap();
        let mut lines = Vec::new();
        for output in rig.heard() {
            if let LogOutput::Durable {
                location, frame, ..
            } = output
            {
                lines.push(describe(&location, &frame));
            }
        }
        assert_eq!(lines.len(), 24);
        for name in medium.file_names() {
            let bytes = medium.read_live(&name).unwrap();
            std::fs::write(target.join(name.base()), bytes).unwrap();
        }
        std::fs::write(target.join("expected.txt"), lines.join("\n") + "\n").unwrap();
    }

    #[test]
    fn the_log_of_version_1_is_read() {
        let directory = directory("log-v1");
        let expected = std::fs::read_to_string(directory.join("expected.txt")).unwrap();
        let expected: Vec<_> = expected.lines().collect();
        assert_eq!(read(&load(&directory)), expected);
    }
}
