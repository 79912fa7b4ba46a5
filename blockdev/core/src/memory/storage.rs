//! Files in memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::convert::to_usize;
use crate::id::Token;
use crate::pages::{PAGE_BYTES, Pages};
use crate::storage::{
    Capacity, FileId, FileName, Storage, StorageCompleter, StorageCompletion, StorageError,
    StorageErrorKind, StorageOp, StorageOutcome,
};

/// A [`Storage`] in memory.
pub struct MemoryStorage {
    capacity_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    names: BTreeMap<FileName, Arc<File>>,
    open: HashMap<u64, (FileName, Arc<File>)>,
    opened: u64,
    used_bytes: Arc<AtomicU64>,
}

struct File {
    content: RwLock<Content>,
    /// Bytes of all files of the storage.
    used_bytes: Arc<AtomicU64>,
}

impl Drop for File {
    fn drop(&mut self) {
        let bytes = self.content.get_mut().pages.count() * PAGE_BYTES;
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Content {
    length: u64,
    pages: Pages,
}

type Outcome = Result<StorageOutcome, StorageErrorKind>;

impl MemoryStorage {
    /// Makes an empty storage of one tebibyte.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_capacity(1 << 40)
    }

    /// Makes an empty storage that holds so many bytes, counted in pages of 4 KiB that were
    /// written.
    #[must_use]
    pub fn with_capacity(capacity_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            capacity_bytes,
            state: Mutex::new(State::default()),
        })
    }

    fn perform(&self, op: StorageOp) -> Result<StorageOutcome, StorageError> {
        let mut state = self.state.lock();
        let mut file_name = None;
        if let Some(id) = op.file() {
            let Some((name, _)) = state.open.get(&id.0) else {
                return Err(op.error("", StorageErrorKind::NotOpen));
            };
            file_name = Some(name.clone());
        }
        let blame = op.error(
            file_name.as_ref().map_or("", FileName::as_str),
            StorageErrorKind::NotOpen,
        );
        let result = op
            .validate()
            .and_then(|()| state.perform(op, self.capacity_bytes));
        result.map_err(|kind| StorageError { kind, ..blame })
    }
}

impl State {
    fn file(&self, id: FileId) -> Result<Arc<File>, StorageErrorKind> {
        self.open
            .get(&id.0)
            .map(|(_, file)| Arc::clone(file))
            .ok_or(StorageErrorKind::NotOpen)
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    fn perform(&mut self, op: StorageOp, capacity_bytes: u64) -> Outcome {
        match op {
            StorageOp::Create { name } => {
                if self.names.contains_key(&name) {
                    return Err(StorageErrorKind::Exists);
                }
                let used_bytes = Arc::clone(&self.used_bytes);
                let file = File {
                    content: RwLock::default(),
                    used_bytes,
                };
                self.names.insert(name.clone(), Arc::new(file));
                self.open(name)
            }
            StorageOp::Open { name } => self.open(name),
            StorageOp::Close { file } => {
                self.open.remove(&file.0);
                Ok(StorageOutcome::Done)
            }
            StorageOp::Read {
                file,
                offset,
                mut buffer,
            } => {
                let file = self.file(file)?;
                let content = file.content.read();
                let left = content.length.saturating_sub(offset);
                buffer.set_len(to_usize(left.min(buffer.len() as u64)));
                content.pages.read(offset, &mut buffer);
                Ok(StorageOutcome::Read(buffer))
            }
            StorageOp::Write {
                file,
                offset,
                buffer,
            } => {
                let file = self.file(file)?;
                let added = file.content.read().pages.missing(offset, buffer.len()) * PAGE_BYTES;
                if added > 0 && self.used_bytes() + added > capacity_bytes {
                    return Err(StorageErrorKind::NoSpace);
                }
                self.used_bytes.fetch_add(added, Ordering::Relaxed);
                let mut content = file.content.write();
                content.pages.write(offset, &buffer);
                if !buffer.is_empty() {
                    content.length = content.length.max(offset + buffer.len() as u64);
                }
                Ok(StorageOutcome::Written(buffer))
            }
            StorageOp::Sync { .. } | StorageOp::SyncDirectory { .. } => Ok(StorageOutcome::Done),
            StorageOp::SetLength { file, length } => {
                let file = self.file(file)?;
                let mut content = file.content.write();
                let before = content.pages.count();
                content.pages.truncate(length);
                let freed = (before - content.pages.count()) * PAGE_BYTES;
                self.used_bytes.fetch_sub(freed, Ordering::Relaxed);
                content.length = length;
                Ok(StorageOutcome::Done)
            }
            StorageOp::Rename { from, to } => {
                let file = self.names.remove(&from).ok_or(StorageErrorKind::NotFound)?;
                self.names.insert(to, file);
                Ok(StorageOutcome::Done)
            }
            StorageOp::Remove { name } => match self.names.remove(&name) {
                Some(_) => Ok(StorageOutcome::Done),
                None => Err(StorageErrorKind::NotFound),
            },
            StorageOp::List { directory } => {
                let inside = |name: &&FileName| name.directory() == directory;
                Ok(StorageOutcome::Listed(
                    self.names.keys().filter(inside).cloned().collect(),
                ))
            }
            StorageOp::Capacity { .. } => {
                let free_bytes = capacity_bytes.saturating_sub(self.used_bytes());
                Ok(StorageOutcome::Capacity(Capacity {
                    total_bytes: capacity_bytes,
                    free_bytes,
                }))
            }
        }
    }

    fn open(&mut self, name: FileName) -> Outcome {
        let file = self.names.get(&name).ok_or(StorageErrorKind::NotFound)?;
        let file = Arc::clone(file);
        let length = file.content.read().length;
        self.opened += 1;
        self.open.insert(self.opened, (name, file));
        Ok(StorageOutcome::Opened {
            file: FileId(self.opened),
            length,
        })
    }
}

impl Storage for MemoryStorage {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        let result = self.perform(op);
        to.complete(StorageCompletion { token, result });
    }
}
