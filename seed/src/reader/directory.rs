//! Where the slots of a segment lie.

use std::sync::Arc;

use afterimage_blockdev::SegmentId;
use afterimage_cache::Damage;
use afterimage_cache::segment::{Directory, FOOTER_BYTES, Footer, SegmentScan};

use super::Reader;
use super::files::{FileKey, OpenFile, SEED_BIT};
use crate::error::SeedError;
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

fn damaged(segment: SegmentId, offset: u64, damage: Damage) -> SeedError {
    SeedError::Damaged {
        file: FileKey::Segment(segment).name().to_string(),
        offset,
        damage,
    }
}

impl Reader {
    pub(crate) fn slots(
        self: &Arc<Self>,
        segment: SegmentId,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        if let Some(live) = self.live.read().get(&segment) {
            let live = Slots::Live(Arc::clone(live));
            return done(Ok(live));
        }
        let weigh = |directory: &Directory| directory.offsets.len() * 4 + 64;
        if let Some(directory) = self.directories.get(&segment, weigh) {
            return done(Ok(Slots::Sealed(directory)));
        }
        // A directory may be long to come by, so one load serves all who want it meanwhile.
        {
            let mut loading = self.loading.lock();
            let waiting = loading.entry(segment).or_default();
            waiting.push(Box::new(done));
            if waiting.len() > 1 {
                return;
            }
        }
        let reader = Arc::clone(self);
        let deliver = move |result: Result<Slots, SeedError>| reader.loaded(segment, result);
        let reader = Arc::clone(self);
        self.file(FileKey::Segment(segment), move |file| match file {
            Ok(file) => reader.load_directory(segment, file, deliver),
            Err(error) => deliver(Err(error)),
        });
    }

    fn loaded(&self, segment: SegmentId, result: Result<Slots, SeedError>) {
        let waiting = self.loading.lock().remove(&segment).unwrap_or_default();
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
        segment: SegmentId,
        file: Arc<OpenFile>,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let is_seed = segment.0 & SEED_BIT != 0;
        let len = if is_seed { FOOTERS_BYTES } else { FOOTER_BYTES };
        let at = file.length.saturating_sub(len as u64) / SECTOR as u64 * SECTOR as u64;
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        self.read_file(file, at, len, move |footer| {
            let footer = match footer {
                Ok(footer) => footer,
                Err(error) => return done(Err(error.into())),
            };
            if is_seed {
                match SeedFooter::find(&footer, reader.store, segment) {
                    Ok(footer) => reader.load_seed(segment, again, footer, done),
                    Err(damage) => done(Err(damaged(segment, at, damage))),
                }
                return;
            }
            match Footer::decode(&footer) {
                Ok(footer) if footer.identity.segment == segment => {
                    reader.load_log(segment, again, footer, done);
                }
                // Without a footer (or with a damaged one) the segment itself tells.
                _ => reader.walk_log(segment, again, done),
            }
        });
    }

    fn keep(&self, segment: SegmentId, directory: Directory) -> Slots {
        let directory = Arc::new(directory);
        let bytes = directory.offsets.len() * 4 + 64;
        self.directories
            .insert(segment, Arc::clone(&directory), bytes);
        Slots::Sealed(directory)
    }

    fn load_seed(
        self: Arc<Self>,
        segment: SegmentId,
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
            return done(Err(damaged(segment, at, damage)));
        }
        let reader = Arc::clone(&self);
        self.read_file(file, at, len, move |bytes| match bytes {
            Ok(bytes) => match footer.find_directory(&bytes) {
                Ok((directory, _)) => done(Ok(reader.keep(segment, directory))),
                Err(damage) => done(Err(damaged(segment, at, damage))),
            },
            Err(error) => done(Err(error.into())),
        });
    }

    fn load_log(
        self: Arc<Self>,
        segment: SegmentId,
        file: Arc<OpenFile>,
        footer: Footer,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let len = footer.directory_len().next_multiple_of(SECTOR).max(SECTOR);
        let (reader, again) = (Arc::clone(&self), Arc::clone(&file));
        self.read_file(
            file,
            footer.directory_offset,
            len,
            move |bytes| match bytes {
                Ok(bytes) => match Directory::decode(&bytes, &footer) {
                    Ok(directory) => done(Ok(reader.keep(segment, directory))),
                    Err(_) => reader.walk_log(segment, again, done),
                },
                Err(error) => done(Err(error.into())),
            },
        );
    }

    fn walk_log(
        self: Arc<Self>,
        segment: SegmentId,
        file: Arc<OpenFile>,
        done: impl FnOnce(Result<Slots, SeedError>) + Send + 'static,
    ) {
        let len = usize::try_from(file.length)
            .unwrap_or(0)
            .next_multiple_of(SECTOR);
        let reader = Arc::clone(&self);
        self.read_file(file, 0, len, move |bytes| {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => return done(Err(error.into())),
            };
            let mut directory = Directory::default();
            let mut scan = SegmentScan::new(&bytes, reader.store, segment);
            while let Some(item) = scan.step() {
                let Ok(commit) = item else { continue };
                let mut first_slot = commit.header.first_slot;
                for at in &commit.frames {
                    let Some(frame) = scan.frame(*at) else {
                        continue;
                    };
                    directory.note_frame(first_slot, *at, &frame);
                    first_slot += frame.header.slot_count;
                }
            }
            done(Ok(reader.keep(segment, directory)));
        });
    }
}
