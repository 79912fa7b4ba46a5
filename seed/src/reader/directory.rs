//! Where the slots of a segment lie.

use std::sync::Arc;

use afterimage_blockdev::{IoBuffer, StorageError};
use afterimage_cache::Damage;
use afterimage_cache::segment::{Directory, FOOTER_BYTES, Footer, SegmentScan};

use super::Reader;
use super::files::{FileKey, OpenFile, SegmentFile};
use crate::error::SeedError;
use crate::patchwork::Patchwork;
use crate::segment::{FOOTERS_BYTES, SECTOR, SeedFooter};

/// A directory as the reader holds it.
#[derive(Clone)]
pub(crate) enum Slots {
    /// Of a segment that does not change any more.
    Sealed(Arc<Directory>),
    /// Of a segment of the log that was begun since the start.
    Live(Arc<parking_lot::RwLock<Directory>>),
}

impl Slots {
    /// Byte offset of a slot, and the offset below which it surely ends.
    pub(crate) fn place(&self, slot: u32) -> Option<(u64, u64)> {
        let find = |directory: &Directory| {
            let start = directory.get(slot)?;
            let most = start + afterimage_cache::slot::SLOT_BYTES_MAX as u64;
            let next = directory.get(slot + 1).filter(|next| *next > start);
            Some((start, next.map_or(most, |next| next.min(most))))
        };
        match self {
            Self::Sealed(directory) => find(directory),
            Self::Live(directory) => find(&directory.read()),
        }
    }
}

/// Longest file that is read whole, in bytes; no log segment is longer.
const WHOLE_BYTES_MAX: u64 = 4 << 30;

type BytesDone = Box<dyn FnOnce(Result<IoBuffer, StorageError>) + Send>;

fn damaged(file: SegmentFile, offset: u64, damage: Damage) -> SeedError {
    SeedError::Damaged {
        file: FileKey::Segment(file).name().to_string(),
        offset,
        damage,
    }
}

impl Reader {
    /// Reads a range, as far as it can be read: what cannot is zero.
    pub(super) fn read_patched(
        self: Arc<Self>,
        file: Arc<OpenFile>,
        offset: u64,
        len: usize,
        done: impl FnOnce(Result<IoBuffer, StorageError>) + Send + 'static,
    ) {
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        self.read_file(file, offset, len, move |result| match result {
            Err(error) => {
                tracing::error!(%error, "read in pieces");
                let patchwork = Patchwork::new(offset, len);
                reader.patch(again, patchwork, Box::new(done));
            }
            whole => done(whole),
        });
    }

    fn patch(self: Arc<Self>, file: Arc<OpenFile>, mut patchwork: Patchwork, done: BytesDone) {
        let Some((offset, len)) = patchwork.wanted() else {
            return done(Ok(patchwork.finish().0));
        };
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        self.read_file(file, offset, len, move |result| {
            if patchwork.take(result.as_ref().ok().map(|bytes| &bytes[..])) {
                reader.patch(again, patchwork, done);
            } else {
                done(result);
            }
        });
    }

    /// The directory of a segment's file.
    pub(crate) fn slots(
        self: &Arc<Self>,
        name: SegmentFile,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let live = self.live.read().get(&name.segment).cloned();
        if let Some(live) = live.filter(|_| name.generation == 0) {
            return done(Ok(Slots::Live(live)));
        }
        let weigh = |directory: &Directory| directory.offsets.len() * 4 + 64;
        if let Some(directory) = self.directories.get(&name, weigh) {
            return done(Ok(Slots::Sealed(directory)));
        }
        // A directory may be long to come by, so one load serves all who want it meanwhile.
        {
            let mut loading = self.loading.lock();
            let waiting = loading.entry(name).or_default();
            waiting.push(Box::new(done));
            if waiting.len() > 1 {
                return;
            }
        }
        let reader = Arc::clone(self);
        let deliver = move |result: Result<Slots, SeedError>| reader.loaded(name, result);
        let reader = Arc::clone(self);
        self.file(FileKey::Segment(name), move |file| match file {
            Ok(file) => reader.load_directory(name, file, deliver),
            Err(error) => deliver(Err(error)),
        });
    }

    fn loaded(&self, name: SegmentFile, result: Result<Slots, SeedError>) {
        let waiting = self.loading.lock().remove(&name).unwrap_or_default();
        let failure = result.as_ref().err().map(ToString::to_string);
        let mut result = Some(result);
        for done in waiting {
            let again = match &result {
                Some(Ok(slots)) => Ok(slots.clone()),
                _ => result.take().unwrap_or_else(|| {
                    Err(SeedError::refused(failure.clone().unwrap_or_default(), ""))
                }),
            };
            done(again);
        }
    }

    fn load_directory(
        self: Arc<Self>,
        name: SegmentFile,
        file: Arc<OpenFile>,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let is_seed = name.is_seed();
        let len = if is_seed { FOOTERS_BYTES } else { FOOTER_BYTES };
        let at = file.length.saturating_sub(len as u64) / SECTOR as u64 * SECTOR as u64;
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        self.read_patched(file, at, len, move |footer| {
            let footer = match footer {
                Ok(footer) => footer,
                Err(error) => return done(Err(error.into())),
            };
            if is_seed {
                match SeedFooter::find(&footer, reader.store, name.segment) {
                    Ok(footer) => reader.load_seed(name, again, footer, done),
                    Err(damage) => done(Err(damaged(name, at, damage))),
                }
                return;
            }
            match Footer::decode(&footer) {
                Ok(footer) if footer.identity.segment == name.segment => {
                    reader.load_log(name, again, footer, done);
                }
                // Without a footer (or with a damaged one) the segment itself tells.
                _ => reader.walk_log(name, again, done),
            }
        });
    }

    fn keep(&self, name: SegmentFile, directory: Directory) -> Slots {
        let directory = Arc::new(directory);
        let bytes = directory.offsets.len() * 4 + 64;
        self.directories.insert(name, Arc::clone(&directory), bytes);
        Slots::Sealed(directory)
    }

    fn load_seed(
        self: Arc<Self>,
        name: SegmentFile,
        file: Arc<OpenFile>,
        footer: SeedFooter,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let len = footer.directories_len();
        let at = footer.directory_offset;
        if len as u64 > file.length {
            let damage = Damage::Field {
                structure: "seed segment",
                field: "slot count",
            };
            return done(Err(damaged(name, at, damage)));
        }
        let reader = Arc::clone(&self);
        self.read_patched(file, at, len, move |bytes| match bytes {
            Ok(bytes) => match footer.find_directory(&bytes) {
                Ok((directory, _)) => done(Ok(reader.keep(name, directory))),
                Err(damage) => done(Err(damaged(name, at, damage))),
            },
            Err(error) => done(Err(error.into())),
        });
    }

    fn load_log(
        self: Arc<Self>,
        name: SegmentFile,
        file: Arc<OpenFile>,
        footer: Footer,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let len = footer.directory_len().next_multiple_of(SECTOR).max(SECTOR);
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        if len as u64 > file.length {
            return self.walk_log(name, file, done);
        }
        self.read_patched(
            file,
            footer.directory_offset,
            len,
            move |bytes| match bytes {
                Ok(bytes) => match Directory::decode(&bytes, &footer) {
                    Ok(directory) => done(Ok(reader.keep(name, directory))),
                    Err(_) => reader.walk_log(name, again, done),
                },
                Err(error) => done(Err(error.into())),
            },
        );
    }

    fn walk_log(
        self: Arc<Self>,
        name: SegmentFile,
        file: Arc<OpenFile>,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        if file.length > WHOLE_BYTES_MAX {
            let (structure, field) = ("log segment", "length");
            let damage = Damage::Field { structure, field };
            return done(Err(damaged(name, WHOLE_BYTES_MAX, damage)));
        }
        let len = usize::try_from(file.length)
            .unwrap_or(0)
            .next_multiple_of(SECTOR);
        let reader = Arc::clone(&self);
        self.read_patched(file, 0, len, move |bytes| {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => return done(Err(error.into())),
            };
            let mut directory = Directory::default();
            let mut scan = SegmentScan::new(&bytes, reader.store, name.segment);
            while let Some(item) = scan.step() {
                let Ok(commit) = item else { continue };
                let mut first_slot = commit.header.first_slot;
                for at in &commit.frames {
                    let Some(frame) = scan.frame(*at) else {
                        continue;
                    };
                    directory.note_frame(first_slot, *at, &frame);
                    first_slot = first_slot.saturating_add(frame.header.slot_count);
                }
            }
            done(Ok(reader.keep(name, directory)));
        });
    }
}
