//! A storage whose reads take no more of the medium than they are given.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{
    FileId, IoBuffer, Storage, StorageCompleter, StorageCompletion, StorageError, StorageErrorKind,
    StorageOp, StorageOutcome, Token, wait,
};

/// Longest read at once, so that a pause comes soon.
const PIECE_BYTES: usize = 1 << 20;

/// Who says when a read may go on.
pub(super) trait Gate: Send + Sync {
    /// Waits as long as the medium is wanted for more, and until `until`. False: give up.
    fn pass(&self, until: Instant) -> bool;
    /// So many bytes were read.
    fn was_read(&self, bytes: u64);
}

/// See the module's text. Whoever submits a read waits for it: only for threads of their own.
pub(super) struct Paced<G> {
    inner: Arc<dyn Storage>,
    gate: Arc<G>,
    bytes_per_second: u64,
    /// When the next read may begin.
    next: parking_lot::Mutex<Instant>,
}

impl<G: Gate> Paced<G> {
    pub(super) fn new(inner: Arc<dyn Storage>, gate: Arc<G>, bytes_per_second: u64) -> Self {
        Self {
            inner,
            gate,
            bytes_per_second: bytes_per_second.max(1),
            next: parking_lot::Mutex::new(Instant::now()),
        }
    }

    /// Takes the time that a read may take; false when it is not to be done.
    fn wait(&self, bytes: usize) -> bool {
        let ns = (bytes as u128 * 1_000_000_000) / u128::from(self.bytes_per_second);
        let span = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
        let at = {
            let mut next = self.next.lock();
            // What was not used in a pause is not made up for.
            let at = (*next).max(Instant::now());
            *next = at + span;
            at
        };
        self.gate.pass(at)
    }

    fn read(
        &self,
        file: FileId,
        offset: u64,
        mut whole: IoBuffer,
    ) -> Result<StorageOutcome, StorageError> {
        let wanted = whole.len();
        let mut at = 0;
        while at < wanted {
            let len = PIECE_BYTES.min(wanted - at);
            if !self.wait(len) {
                return Err(StorageError {
                    operation: "read",
                    file: file.0.to_string(),
                    offset,
                    kind: StorageErrorKind::Io(std::io::ErrorKind::Interrupted.into()),
                });
            }
            let op = StorageOp::Read {
                file,
                offset: offset + at as u64,
                buffer: IoBuffer::zeroed(len),
            };
            let StorageOutcome::Read(piece) = wait::storage(&*self.inner, op)? else {
                break;
            };
            self.gate.was_read(piece.len() as u64);
            whole[at..at + piece.len()].copy_from_slice(&piece);
            at += piece.len();
            if piece.len() < len {
                break;
            }
        }
        whole.set_len(at);
        Ok(StorageOutcome::Read(whole))
    }
}

impl<G: Gate> Storage for Paced<G> {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        match op {
            StorageOp::Read {
                file,
                offset,
                buffer,
            } => {
                let result = self.read(file, offset, buffer);
                to.complete(StorageCompletion { token, result });
            }
            other => self.inner.submit(token, other, to),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use afterimage_blockdev::{FileName, MemoryStorage};

    use super::*;

    /// Notes how long was to be waited, and waits not at all.
    #[derive(Default)]
    struct Noted {
        pieces: AtomicU64,
        bytes: AtomicU64,
        latest: parking_lot::Mutex<Option<Instant>>,
        pieces_max: u64,
    }

    impl Gate for Noted {
        fn pass(&self, until: Instant) -> bool {
            *self.latest.lock() = Some(until);
            self.pieces.fetch_add(1, Ordering::Relaxed) < self.pieces_max
        }

        fn was_read(&self, bytes: u64) {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn written(bytes: usize) -> (Arc<dyn Storage>, FileId, Vec<u8>) {
        let storage: Arc<dyn Storage> = MemoryStorage::new();
        let name = FileName::new("log/a");
        let created = wait::storage(&*storage, StorageOp::Create { name }).unwrap();
        let StorageOutcome::Opened { file, .. } = created else {
            panic!("{created:?}");
        };
        let block = |at: usize| u8::try_from(at / 4096 % 251).unwrap();
        let content: Vec<u8> = (0..bytes).map(block).collect();
        let mut buffer = IoBuffer::with_capacity(bytes);
        buffer.extend_from_slice(&content);
        let (offset, op) = (0, buffer);
        let write = StorageOp::Write {
            file,
            offset,
            buffer: op,
        };
        wait::storage(&*storage, write).unwrap();
        (storage, file, content)
    }

    fn read(
        storage: &dyn Storage,
        file: FileId,
        len: usize,
    ) -> Result<StorageOutcome, StorageError> {
        let buffer = IoBuffer::zeroed(len);
        let offset = 0;
        wait::storage(
            storage,
            StorageOp::Read {
                file,
                offset,
                buffer,
            },
        )
    }

    #[test]
    fn a_long_read_is_the_same_in_pieces_and_takes_its_time() {
        let (inner, file, content) = written(3 * PIECE_BYTES + 8192);
        let gate = Arc::new(Noted {
            pieces_max: u64::MAX,
            ..Noted::default()
        });
        let begun = Instant::now();
        let paced = Paced::new(inner, Arc::clone(&gate), 1 << 20);
        let found = read(&paced, file, 5 * PIECE_BYTES).unwrap();
        let StorageOutcome::Read(bytes) = found else {
            panic!("{found:?}");
        };
        assert!(bytes[..] == content[..], "shortened at the end of the file");
        assert_eq!(gate.bytes.load(Ordering::Relaxed), content.len() as u64);
        // The fourth piece waits for three seconds' worth of bytes before it.
        let latest = gate.latest.lock().unwrap();
        assert!(latest >= begun + Duration::from_secs(3));
        assert!(latest < begun + Duration::from_secs(4));
    }

    #[test]
    fn a_read_that_is_given_up_is_an_error() {
        let (inner, file, _) = written(2 * PIECE_BYTES);
        let gate = Arc::new(Noted {
            pieces_max: 1,
            ..Noted::default()
        });
        let paced = Paced::new(inner, gate, u64::MAX);
        assert!(read(&paced, file, 2 * PIECE_BYTES).is_err());
    }
}
