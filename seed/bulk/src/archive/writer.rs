//! Writes an archive, and goes on with one that was cut off.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{Entropy, SystemEntropy};
use aws_lc_rs::aead::LessSafeKey;
use tokio::task::JoinHandle;

use super::chain::{COMMIT_BYTES, Chain, HEADER_BYTES, Header, IDENTITY_BYTES_MAX};
use super::chain::{end_commit, hash_of, is_end, segment_commit};
use super::secret::{Keys, Protection, Secret};
use super::segment::{Builder, Finished, Named, Segment};
use super::slot::{SLOT_BYTES, Sealed, seal};
use super::{CHAIN, chain_path, damaged, segment_number, segment_path};
use crate::Options;
use crate::error::BulkError;
use crate::io::{BulkFile, Way, blocking, run};
use crate::lanes::{ChunkReader, Chunks};
use crate::progress::{Progress, Report};
use crate::resume::sync_parent;
use crate::source::BlockSource;

/// Bytes of a segment that are written by one request.
const PIECE: usize = 1 << 20;

/// Where an archive goes.
#[derive(Clone, Copy, Debug)]
pub struct ArchiveTarget<'a> {
    /// A directory; made when it is missing.
    pub directory: &'a Path,
    /// Which state of which disk it is: only an unfinished archive of the same goes on.
    pub identity: &'a str,
    /// What it is encrypted with; `None` leaves it readable by everybody.
    pub secret: Option<&'a Secret>,
    /// Replaces an archive that is there. Other files of the directory are left alone.
    pub is_forced: bool,
}

/// Says whether a path is an archive, finished or not.
#[must_use]
pub fn is_archive(path: &Path) -> bool {
    chain_path(path).is_file()
}

/// What can be said of an archive without its secret; nothing of it is authenticated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArchiveState {
    /// Which state of which disk it is.
    pub identity: String,
    /// It seems to have its end.
    pub is_finished: bool,
}

/// Looks at the archive in a directory; `None` when there is no whole header.
///
/// # Errors
/// `Damaged`, `Version`, `Io`.
pub fn archive_state(directory: &Path) -> Result<Option<ArchiveState>, BulkError> {
    let path = chain_path(directory);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(BulkError::io("open", &path))?,
    };
    let length = file
        .metadata()
        .map_err(BulkError::io("look at", &path))?
        .len();
    if length < HEADER_BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_BYTES];
    let read = file.read_exact_at(&mut bytes, 0);
    read.map_err(BulkError::io("read", &path))?;
    let mut last = [0; COMMIT_BYTES];
    let commits = length - HEADER_BYTES as u64;
    if commits > 0 && commits.is_multiple_of(COMMIT_BYTES as u64) {
        let read = file.read_exact_at(&mut last, length - COMMIT_BYTES as u64);
        read.map_err(BulkError::io("read", &path))?;
    }
    Ok(Some(ArchiveState {
        identity: Header::decode(&path, &bytes)?.identity,
        is_finished: is_end(&last),
    }))
}

/// An archive that is open for writing.
struct Open {
    directory: PathBuf,
    /// Locked while this lives.
    chain: Arc<File>,
    chain_bytes: u64,
    id: [u8; 16],
    keys: Keys,
    size_bytes: u64,
    last_hash: [u8; 32],
    segments: u64,
    position: u64,
    is_finished: bool,
}

/// Writes the whole of a source.
///
/// # Errors
/// What keeps the archive from being finished. What was written stays, and the same call goes on
/// after the last whole segment.
///
/// # Durability
/// The archive is on the medium when this returns.
pub fn export_archive(
    source: &Arc<dyn BlockSource>,
    target: ArchiveTarget<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Report, BulkError> {
    if let Some(secret) = target.secret {
        secret.check()?;
    }
    let open = prepare(target, source.size_bytes())?;
    progress.begin(source.size_bytes(), open.position);
    if open.is_finished {
        progress.reached(source.size_bytes());
        return Ok(Report {
            size_bytes: source.size_bytes(),
            resumed_at: source.size_bytes(),
            ..Report::default()
        });
    }
    run(options.io, |way| {
        write_all(way, Arc::clone(source), open, options, progress)
    })
}

fn identity_of(text: &str) -> String {
    let mut identity = text.replace(char::is_control, "?");
    while identity.len() > IDENTITY_BYTES_MAX {
        identity.pop();
    }
    identity
}

fn prepare(target: ArchiveTarget<'_>, size_bytes: u64) -> Result<Open, BulkError> {
    let directory = target.directory;
    fs::create_dir_all(directory).map_err(BulkError::io("make", directory))?;
    let exists = || BulkError::Exists {
        path: directory.to_owned(),
    };
    let path = chain_path(directory);
    let entries = fs::read_dir(directory).map_err(BulkError::io("list", directory))?;
    let is_empty = entries.into_iter().next().is_none();
    if !is_empty && !path.exists() && !target.is_forced {
        return Err(exists());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(&path).map_err(BulkError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(BulkError::Busy { path }),
        Err(TryLockError::Error(error)) => return Err(BulkError::io("lock", &path)(error)),
    }
    let identity = identity_of(target.identity);
    let known = if target.is_forced {
        None
    } else {
        Chain::load(directory, target.secret)?
    };
    if let Some(chain) = known {
        if chain.header.identity != identity || chain.header.size_bytes != size_bytes {
            return Err(exists());
        }
        return resume(directory, file, chain);
    }
    begin(target, file, identity, size_bytes)
}

fn begin(
    target: ArchiveTarget<'_>,
    file: File,
    identity: String,
    size_bytes: u64,
) -> Result<Open, BulkError> {
    let directory = target.directory;
    let path = chain_path(directory);
    file.set_len(0).map_err(BulkError::io("empty", &path))?;
    remove_segments_above(directory, 0)?;
    let (mut id, mut salt) = ([0; 16], [0; 32]);
    SystemEntropy.fill(&mut id);
    SystemEntropy.fill(&mut salt);
    let protection = Protection::of(target.secret);
    let keys = Keys::new(target.secret, protection, &id, &salt).ok_or(BulkError::WrongKey {
        path: directory.to_owned(),
    })?;
    let header = Header {
        id,
        salt,
        protection,
        size_bytes,
        identity,
    };
    let bytes = header.encode(&keys);
    let write = || {
        file.write_all_at(&bytes, 0)?;
        file.sync_all()?;
        sync_parent(&path)?;
        sync_parent(directory)
    };
    write().map_err(BulkError::io("write", &path))?;
    let mut last_hash = [0; 32];
    last_hash.copy_from_slice(&bytes[448..480]);
    Ok(Open {
        directory: directory.to_owned(),
        chain: Arc::new(file),
        chain_bytes: HEADER_BYTES as u64,
        id,
        keys,
        size_bytes,
        last_hash,
        segments: 0,
        position: 0,
        is_finished: false,
    })
}

/// Goes back to the last segment that is whole, and removes what came after it.
fn resume(directory: &Path, file: File, mut chain: Chain) -> Result<Open, BulkError> {
    if let Some(at) = chain.broken_at
        && (!chain.is_torn || chain.is_finished)
    {
        return Err(damaged(&chain.path, at, "a commit of the chain"));
    }
    if !chain.is_finished {
        let mut later = None;
        while let Some(last) = chain.segments.last() {
            let whole = Segment::open(directory, &chain.keys, &chain.header.id, last)
                .and_then(|segment| segment.verify(&chain.keys));
            match whole {
                Ok(_) => break,
                // Only a cut can undo a segment that was synced; one further back is damage.
                Err(error) if later.is_some() => return Err(error),
                Err(error) => later = Some(error),
            }
            chain.segments.pop();
            chain.hashes.pop();
        }
    }
    let commits = chain.segments.len() + usize::from(chain.is_finished);
    let chain_bytes = (HEADER_BYTES + commits * COMMIT_BYTES) as u64;
    if !chain.is_finished {
        let cut = || {
            file.set_len(chain_bytes)?;
            file.sync_all()
        };
        cut().map_err(BulkError::io("cut", &chain.path))?;
        remove_segments_above(directory, chain.segments.len() as u64)?;
    }
    Ok(Open {
        directory: directory.to_owned(),
        chain: Arc::new(file),
        chain_bytes,
        id: chain.header.id,
        last_hash: chain.last_hash(),
        segments: chain.segments.len() as u64,
        position: chain.position(),
        is_finished: chain.is_finished,
        size_bytes: chain.header.size_bytes,
        keys: chain.keys,
    })
}

fn remove_segments_above(directory: &Path, last: u64) -> Result<(), BulkError> {
    let list = || fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>();
    for entry in list().map_err(BulkError::io("list", directory))? {
        let name = entry.file_name();
        let number = name.to_str().and_then(segment_number);
        if number.is_some_and(|number| number > last) {
            let path = entry.path();
            fs::remove_file(&path).map_err(BulkError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// A chunk on its way: read and sealed beside the others, taken in order.
struct Lane {
    chunk: Range<u64>,
    sealed: JoinHandle<Result<Vec<Sealed>, BulkError>>,
}

struct Writer<'a> {
    way: Way,
    open: Open,
    keys: Arc<Keys>,
    cipher: Option<Arc<LessSafeKey>>,
    session: [u8; 16],
    builder: Builder,
    options: &'a Options,
    progress: &'a Progress,
    report: Report,
    lanes: VecDeque<Lane>,
}

async fn write_all(
    way: Way,
    source: Arc<dyn BlockSource>,
    open: Open,
    options: &Options,
    progress: &Progress,
) -> Result<Report, BulkError> {
    let unit = SLOT_BYTES as u64;
    let mut chunks = Chunks::new(Arc::clone(&source), open.position, unit, false);
    let reader = ChunkReader::open(way, &source)?;
    let mut session = [0; 16];
    SystemEntropy.fill(&mut session);
    let mut writer = Writer {
        way,
        keys: Arc::new(open.keys.clone()),
        cipher: open.keys.session(&session).map(Arc::new),
        session,
        builder: Builder::new(&open.id, open.segments + 1, &session),
        report: Report {
            size_bytes: open.size_bytes,
            resumed_at: open.position,
            ..Report::default()
        },
        open,
        options,
        progress,
        lanes: VecDeque::new(),
    };
    let result = writer.work(&mut chunks, &reader).await;
    // The kernel may still own buffers.
    while let Some(lane) = writer.lanes.pop_front() {
        let _given_up = lane.sealed.await;
    }
    let report = writer.report;
    reader.close().await;
    result.map(|()| report)
}

impl Writer<'_> {
    async fn work(&mut self, chunks: &mut Chunks, reader: &ChunkReader) -> Result<(), BulkError> {
        loop {
            while self.lanes.len() < self.options.lanes.max(1) {
                if self.progress.is_stopping() {
                    return Err(BulkError::Interrupted);
                }
                let Some(chunk) = chunks.next().await? else {
                    break;
                };
                self.begin(chunk, reader);
            }
            let Some(lane) = self.lanes.pop_front() else {
                break;
            };
            let sealed = match lane.sealed.await {
                Ok(sealed) => sealed?,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
            self.progress.moved(lane.chunk.end - lane.chunk.start);
            self.report.read_bytes += lane.chunk.end - lane.chunk.start;
            for slot in sealed {
                self.push(slot).await?;
            }
            self.progress.reached(lane.chunk.end);
        }
        self.seal(self.open.size_bytes).await?;
        let end = end_commit(
            &self.open.keys,
            &self.open.last_hash,
            self.open.segments,
            self.open.size_bytes,
        );
        self.commit(end).await?;
        self.progress.reached(self.open.size_bytes);
        Ok(())
    }

    fn begin(&mut self, chunk: Range<u64>, reader: &ChunkReader) {
        let (keys, cipher) = (Arc::clone(&self.keys), self.cipher.clone());
        let (id, level, reader) = (self.open.id, self.options.level, reader.clone());
        let range = chunk.clone();
        let work = async move {
            let buffer = reader.read(&range).await?;
            drop(reader);
            let seal_all = move || {
                let slots = buffer.bytes().chunks(SLOT_BYTES);
                let places = (range.start..).step_by(SLOT_BYTES);
                let sealed = places.zip(slots).filter_map(|(offset, plain)| {
                    seal(&keys, cipher.as_deref(), &id, offset, plain, level)
                });
                sealed.collect()
            };
            Ok(blocking(seal_all).await)
        };
        let sealed = tokio::task::spawn_local(work);
        self.lanes.push_back(Lane { chunk, sealed });
    }

    async fn push(&mut self, slot: Sealed) -> Result<(), BulkError> {
        if self.builder.stored_bytes() >= self.options.segment_bytes {
            // Whatever is not in it lies from this slot on.
            self.seal(slot.entry.offset).await?;
        }
        self.builder.push(slot);
        Ok(())
    }

    /// Writes the segment that fills, which then holds everything below `to`.
    ///
    /// # Durability
    /// The segment and its name are on the medium before the chain names it.
    async fn seal(&mut self, to: u64) -> Result<(), BulkError> {
        if self.builder.is_empty() {
            return Ok(());
        }
        let next = Builder::new(&self.open.id, self.builder.number() + 1, &self.session);
        let finished = std::mem::replace(&mut self.builder, next).finish(&self.open.keys);
        let named = Named {
            number: finished.number,
            bytes: finished.buffer.len() as u64,
            slot_count: finished.slot_count,
            from: self.open.position,
            to,
            hash: finished.hash,
        };
        self.write_segment(finished).await?;
        let commit = segment_commit(&self.open.keys, &self.open.last_hash, &named);
        self.commit(commit).await?;
        self.open.last_hash = hash_of(&commit);
        self.open.segments = named.number;
        self.open.position = to;
        self.report.written_bytes += named.bytes;
        Ok(())
    }

    async fn write_segment(&self, finished: Finished) -> Result<(), BulkError> {
        let path = segment_path(&self.open.directory, finished.number);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let created = options.open(&path).map_err(BulkError::io("make", &path))?;
        let file = BulkFile::new(self.way, &path, created, true);
        let mut buffer = finished.buffer;
        let mut result = Ok(());
        let mut at = 0;
        while at < buffer.len() && result.is_ok() {
            let end = (at + PIECE).min(buffer.len());
            let (written, back) = file.write(buffer, at..end, at as u64).await;
            buffer = back;
            result = written;
            at = end;
        }
        let result = match result {
            Ok(()) => file.sync().await,
            Err(error) => Err(error),
        };
        file.close().await;
        result?;
        blocking(move || sync_parent(&path).map_err(BulkError::io("sync", &path))).await
    }

    /// # Durability
    /// The commit is on the medium when this returns.
    async fn commit(&mut self, commit: [u8; COMMIT_BYTES]) -> Result<(), BulkError> {
        let (file, at) = (Arc::clone(&self.open.chain), self.open.chain_bytes);
        let path = self.open.directory.join(CHAIN);
        let write = move || {
            file.write_all_at(&commit, at)?;
            file.sync_all()
        };
        let written = blocking(write).await;
        written.map_err(BulkError::io("write", &path))?;
        self.open.chain_bytes += COMMIT_BYTES as u64;
        Ok(())
    }
}
