//! Writes a disk as a raw image or onto a block device. Holes and zeroes are not written to a file.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::Options;
use crate::buffer::Buffer;
use crate::error::BulkError;
use crate::io::{BulkFile, Way, blocking, run};
use crate::lanes::{ChunkReader, Chunks};
use crate::progress::{Progress, Report};
use crate::resume::{Resume, sync_parent};
use crate::source::BlockSource;

/// Grain of what is left out.
const BLOCK: usize = 4096;

/// Where a raw image goes.
#[derive(Clone, Copy, Debug)]
pub struct RawTarget<'a> {
    /// A file, or a block device.
    pub path: &'a Path,
    /// Which state of which disk it is, in one line: only an unfinished image of the same goes on.
    pub identity: &'a str,
    /// Overwrites what is there. A block device always needs it.
    pub is_forced: bool,
}

struct Opened {
    file: File,
    is_device: bool,
    resume: Resume,
    resumed_at: u64,
}

/// Writes the whole of a source.
///
/// # Errors
/// What keeps the target from being whole. What was written stays, and the same call goes on there.
///
/// # Durability
/// The image is on the medium when this returns.
pub fn export_raw(
    source: &Arc<dyn BlockSource>,
    target: RawTarget<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Report, BulkError> {
    let opened = open(target, source.size_bytes())?;
    progress.begin(source.size_bytes(), opened.resumed_at);
    let is_device = opened.is_device;
    // Holds the lock until the end.
    let held = opened.file.try_clone();
    let held = held.map_err(BulkError::io("open", target.path))?;
    let report = run(options.io, |way| {
        write_all(
            way,
            Arc::clone(source),
            target.path,
            opened,
            options,
            progress,
        )
    })?;
    if !is_device {
        let found_bytes = held
            .metadata()
            .map_err(BulkError::io("look at", target.path))?
            .len();
        if found_bytes != source.size_bytes() {
            return Err(BulkError::Shrunk {
                path: target.path.to_owned(),
                found_bytes,
                expected_bytes: source.size_bytes(),
            });
        }
        sync_parent(target.path).map_err(BulkError::io("sync", target.path))?;
        Resume::remove(target.path)?;
    }
    Ok(report)
}

fn open(target: RawTarget<'_>, size_bytes: u64) -> Result<Opened, BulkError> {
    let path = target.path;
    let found = match std::fs::metadata(path) {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(BulkError::io("look at", path)(error)),
    };
    let kind = found.as_ref().map(std::fs::Metadata::file_type);
    let is_device = kind.is_some_and(|kind| kind.is_block_device());
    if kind.is_some_and(|kind| !kind.is_file() && !kind.is_block_device()) {
        return Err(BulkError::Kind {
            path: path.to_owned(),
        });
    }
    let mut resume = Resume {
        identity: target.identity.replace(char::is_control, "?"),
        size_bytes,
        done_bytes: 0,
    };
    let is_fresh = is_device || found.is_none();
    let known = if is_fresh { None } else { Resume::load(path)? };
    let known = known.filter(|known| {
        known.identity == resume.identity && known.size_bytes == size_bytes && !target.is_forced
    });
    if found.is_some() && known.is_none() && !target.is_forced {
        return Err(BulkError::Exists {
            path: path.to_owned(),
        });
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(found.is_none());
    if is_device {
        // Refused while it is mounted or otherwise in use.
        options.custom_flags(libc::O_EXCL);
    }
    let mut file = options.open(path).map_err(BulkError::io("open", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(BulkError::Busy {
                path: path.to_owned(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(BulkError::io("lock", path)(error)),
    }
    let end = file.seek(SeekFrom::End(0));
    let found_bytes = end.map_err(BulkError::io("look at", path))?;
    if is_device && found_bytes < size_bytes {
        return Err(BulkError::TooSmall {
            path: path.to_owned(),
            found_bytes,
            needed_bytes: size_bytes,
        });
    }
    match known {
        Some(known) if found_bytes != size_bytes && known.done_bytes > 0 => {
            return Err(BulkError::Shrunk {
                path: path.to_owned(),
                found_bytes,
                expected_bytes: size_bytes,
            });
        }
        Some(known) => resume.done_bytes = known.done_bytes.min(size_bytes),
        None if is_device => {}
        None => file.set_len(0).map_err(BulkError::io("empty", path))?,
    }
    if !is_device {
        file.set_len(size_bytes)
            .map_err(BulkError::io("enlarge", path))?;
        resume.save(path)?;
    }
    Ok(Opened {
        file,
        is_device,
        resumed_at: resume.done_bytes,
        resume,
    })
}

/// One chunk that is done, and how much of it was written.
type Done = Result<(Range<u64>, u64), BulkError>;

struct Copy<'a> {
    target: &'a Path,
    reader: ChunkReader,
    file: Rc<BulkFile>,
    is_device: bool,
    resume: Resume,
    report: Report,
    progress: &'a Progress,
    /// Where the chunks under way begin.
    open: BTreeSet<u64>,
    lanes: JoinSet<Done>,
}

async fn write_all(
    way: Way,
    source: Arc<dyn BlockSource>,
    target: &Path,
    opened: Opened,
    options: &Options,
    progress: &Progress,
) -> Result<Report, BulkError> {
    let start = opened.resumed_at;
    // Blocks below a checkpoint that lies within a unit were written with it.
    let chunks = start / BLOCK as u64 * BLOCK as u64;
    let mut chunks = Chunks::new(Arc::clone(&source), chunks, BLOCK as u64, opened.is_device);
    let file = Rc::new(BulkFile::new(way, target, opened.file, true));
    let mut copy = Copy {
        target,
        reader: ChunkReader::open(way, &source)?,
        file,
        is_device: opened.is_device,
        resume: opened.resume,
        report: Report {
            size_bytes: source.size_bytes(),
            resumed_at: start,
            ..Report::default()
        },
        progress,
        open: BTreeSet::new(),
        lanes: JoinSet::new(),
    };
    let result = copy.work(&mut chunks, options).await;
    // Whatever happened, the kernel may still own buffers.
    let mut failure = result.err();
    while let Some(done) = copy.lanes.join_next().await {
        if let Err(error) = copy.settle(done) {
            // Its chunk stays open, so that nothing behind it counts.
            failure.get_or_insert(error);
        }
    }
    let reached = copy.reached(&chunks);
    let saved = copy.checkpoint(reached).await;
    let Copy {
        reader,
        file,
        report,
        ..
    } = copy;
    reader.close().await;
    if let Some(file) = Rc::into_inner(file) {
        file.close().await;
    }
    match failure {
        Some(error) => Err(error),
        None => saved.map(|()| report),
    }
}

impl Copy<'_> {
    async fn work(&mut self, chunks: &mut Chunks, options: &Options) -> Result<(), BulkError> {
        loop {
            while self.lanes.len() < options.lanes.max(1) {
                if self.progress.is_stopping() {
                    return Err(BulkError::Interrupted);
                }
                let Some(chunk) = chunks.next().await? else {
                    break;
                };
                self.open.insert(chunk.start);
                let (reader, file) = (self.reader.clone(), Rc::clone(&self.file));
                let is_device = self.is_device;
                self.lanes
                    .spawn_local(async move { lane(reader, file, chunk, is_device).await });
            }
            let Some(done) = self.lanes.join_next().await else {
                return Ok(());
            };
            self.settle(done)?;
            let reached = self.reached(chunks);
            self.progress.reached(reached);
            if reached - self.resume.done_bytes >= options.checkpoint_bytes {
                self.checkpoint(reached).await?;
            }
        }
    }

    /// Everything below is written.
    fn reached(&self, chunks: &Chunks) -> u64 {
        self.open
            .first()
            .map_or(chunks.position(), |open| (*open).min(chunks.position()))
    }

    fn settle(&mut self, done: Result<Done, tokio::task::JoinError>) -> Result<(), BulkError> {
        let (chunk, written) = match done {
            Ok(done) => done?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.open.remove(&chunk.start);
        self.progress.moved(chunk.end - chunk.start);
        self.report.written_bytes += written;
        self.report.read_bytes = self.progress.moved_bytes();
        Ok(())
    }

    /// # Durability
    /// Syncs the image before the resume file speaks of it.
    async fn checkpoint(&mut self, reached: u64) -> Result<(), BulkError> {
        self.file.sync().await?;
        self.resume.done_bytes = reached;
        if !self.is_device {
            let (resume, target) = (self.resume.clone(), self.target.to_owned());
            blocking(move || resume.save(&target)).await?;
        }
        Ok(())
    }
}

async fn lane(reader: ChunkReader, file: Rc<BulkFile>, chunk: Range<u64>, is_device: bool) -> Done {
    let mut buffer = reader.read(&chunk).await?;
    let mut written = 0;
    let parts = used(&buffer, is_device);
    for part in parts {
        let at = chunk.start + part.start as u64;
        let length = (part.end - part.start) as u64;
        let (result, back) = file.write(buffer, part, at).await;
        buffer = back;
        result?;
        written += length;
    }
    Ok((chunk, written))
}

/// The runs of blocks that are not all zero; or all of them.
fn used(buffer: &Buffer, with_zeroes: bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, block) in buffer.bytes().chunks(BLOCK).enumerate() {
        if !with_zeroes && is_zero(block) {
            continue;
        }
        let start = number * BLOCK;
        let end = start + block.len();
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Says whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    rest.iter().all(|byte| *byte == 0)
        && chunks.iter().all(|chunk| u128::from_le_bytes(*chunk) == 0)
}
