//! Promotions: the state of a branch as an image of its own, made in the background.
//!
//! Invariants
//! * The image shows one LSN of the branch, which was durable when the promotion began; the branch
//!   is written meanwhile.
//! * It is called done after every byte of it was read back and compared with the branch, and it is
//!   on the medium.
//! * One that was stopped goes on where it was, with the same LSN.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use afterimage_blockdev::{
    BlockDevice, BlockErrorKind, BlockOp, BlockOutcome, ErrorClass, ExtentKind, HistoryId,
    IoBuffer, Lsn, wait,
};
use afterimage_bulk::{
    BlockSource, BulkError, Options, Progress, RawTarget, export_raw, resume_identity,
};
use afterimage_export::forget_cached;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::branch::{Promotion, PromotionState};
use parking_lot::Mutex;

use super::branches::Branches;
use crate::appliance::api_error;
use crate::catalogue::{BranchRow, PromotionRow};
use crate::engine::{Command, EngineHandle, ViewOpened, ViewRequest};

/// Bytes that are compared at once.
const COMPARE_BYTES: u64 = 1 << 20;
/// Promotions at once.
const RUNNING_MAX: usize = 4;

struct Shown {
    state: PromotionState,
    error: String,
    /// Of the comparing pass.
    compared_bytes: u64,
}

struct Job {
    target: PathBuf,
    /// What the image is called before it is whole.
    partial: PathBuf,
    lsn: Lsn,
    /// Only the comparing pass is missing.
    is_copied: bool,
    size_bytes: u64,
    progress: Progress,
    shown: Mutex<Shown>,
}

impl Job {
    fn promotion(&self) -> Promotion {
        let shown = self.shown.lock();
        let done_bytes = match shown.state {
            PromotionState::Verifying => shown.compared_bytes,
            PromotionState::Done => self.size_bytes,
            _ => self.progress.position_bytes(),
        };
        Promotion {
            target: self.target.display().to_string(),
            lsn: self.lsn,
            state: shown.state,
            done_bytes,
            total_bytes: self.size_bytes,
            error: shown.error.clone(),
        }
    }
}

struct Running {
    job: Arc<Job>,
    thread: Option<JoinHandle<()>>,
}

/// The promotions of this daemon.
pub(super) struct Promotions {
    engine: EngineHandle,
    branches: Arc<Branches>,
    jobs: Mutex<BTreeMap<HistoryId, Running>>,
}

impl Promotions {
    pub(super) fn new(engine: EngineHandle, branches: Arc<Branches>) -> Self {
        Self {
            engine,
            branches,
            jobs: Mutex::default(),
        }
    }

    /// Begins or goes on.
    pub(super) fn start(
        &self,
        history: HistoryId,
        target: &Path,
        is_forced: bool,
    ) -> Result<Promotion, ApiError> {
        if !target.is_absolute() {
            return Err(api_error(
                ErrorClass::Refused,
                format!("{} is not an absolute path", target.display()),
                "name the image from the root",
            ));
        }
        let mut jobs = self.jobs.lock();
        let is_running = |running: &Running| running.job.shown.lock().state.is_running();
        if jobs.get(&history).is_some_and(is_running) {
            return Err(api_error(
                ErrorClass::Refused,
                "the branch is being promoted already",
                "`aft branch list` shows how far it is",
            ));
        }
        if jobs.values().filter(|running| is_running(running)).count() >= RUNNING_MAX {
            return Err(api_error(
                ErrorClass::Retry,
                format!("{RUNNING_MAX} branches are being promoted already"),
                "wait until one of them has ended",
            ));
        }
        let row = self.branches.row(history)?;
        let partial = partial_of(target);
        let begun = begun(&row, target, &partial).filter(|_| !is_forced);
        prepare(target, &partial, is_forced)?;
        let using = self.branches.acquire(history)?;
        wait::device(&*using.device(), BlockOp::Flush)
            .map_err(|error| api_error(error.class(), error.to_string(), ""))?;
        let lsn = match &begun {
            Some(begun) => begun.lsn,
            None => self.branches.durable(history)?,
        };
        let is_copied = begun.is_some_and(|begun| begun.is_copied);
        let view = self.view(&row, lsn)?;
        let job = Arc::new(Job {
            target: target.to_owned(),
            partial,
            lsn,
            is_copied,
            size_bytes: view.device.geometry().size_bytes,
            progress: Progress::default(),
            shown: Mutex::new(Shown {
                state: PromotionState::Copying,
                error: String::new(),
                compared_bytes: 0,
            }),
        });
        self.note(&row, &job, false)?;
        let (working, branches) = (Arc::clone(&job), Arc::clone(&self.branches));
        let spawned = std::thread::Builder::new()
            .name("promotion".to_owned())
            .spawn(move || {
                // While it runs, nobody drops the branch.
                let _using = using;
                run(&working, &row, view, &branches);
            });
        let thread = spawned.map_err(|error| {
            let message = format!("cannot start a thread: {error}");
            api_error(ErrorClass::Retry, message, "try again")
        })?;
        let promotion = job.promotion();
        let thread = Some(thread);
        jobs.insert(history, Running { job, thread });
        Ok(promotion)
    }

    fn view(&self, row: &BranchRow, lsn: Lsn) -> Result<ViewOpened, ApiError> {
        let reference = format!("{}/{}@{}:lsn:{lsn}", row.machine, row.disk, row.history);
        let request = ViewRequest {
            reference,
            allow_incomplete: true,
        };
        let opened = self
            .engine
            .ask_blocking(|reply| Command::OpenView(request, reply))?;
        opened.map_err(|mut error| {
            if error.class == ErrorClass::Refused {
                error.hint = format!(
                    "the state that the image was begun with is no longer kept ({}); begin anew \
                     with --force",
                    error.hint
                );
            }
            error
        })
    }

    fn note(&self, row: &BranchRow, job: &Job, is_done: bool) -> Result<(), ApiError> {
        note(&self.branches, row.history, job, is_done)
    }

    /// Stops one; it can go on later.
    pub(super) fn stop(&self, history: HistoryId) -> Result<(), ApiError> {
        let thread = {
            let mut jobs = self.jobs.lock();
            let running = jobs.get_mut(&history).filter(|running| {
                running.job.shown.lock().state.is_running() && running.thread.is_some()
            });
            let Some(running) = running else {
                return Err(api_error(
                    ErrorClass::Refused,
                    "the branch is not being promoted",
                    "",
                ));
            };
            running.job.progress.stop();
            running.thread.take()
        };
        join(thread);
        Ok(())
    }

    /// Stops all.
    pub(super) fn stop_all(&self) {
        let threads: Vec<_> = {
            let mut jobs = self.jobs.lock();
            for running in jobs.values() {
                running.job.progress.stop();
            }
            jobs.values_mut()
                .map(|running| running.thread.take())
                .collect()
        };
        threads.into_iter().for_each(join);
    }

    /// Forgets one of a branch that is gone.
    pub(super) fn forget(&self, history: HistoryId) {
        self.jobs.lock().remove(&history);
    }

    /// How the promotion of a branch is.
    pub(super) fn shown(&self, row: &BranchRow) -> Option<Promotion> {
        if let Some(running) = self.jobs.lock().get(&row.history) {
            return Some(running.job.promotion());
        }
        let noted = row.promotion.as_ref()?;
        let state = if noted.is_done {
            PromotionState::Done
        } else {
            PromotionState::Stopped
        };
        Some(Promotion {
            target: noted.target.clone(),
            lsn: noted.lsn,
            state,
            done_bytes: if noted.is_done { row.size_bytes } else { 0 },
            total_bytes: row.size_bytes,
            error: String::new(),
        })
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if thread.is_some_and(|thread| thread.join().is_err()) {
        tracing::error!("a promotion has panicked");
    }
}

fn note(branches: &Branches, history: HistoryId, job: &Job, is_done: bool) -> Result<(), ApiError> {
    let promotion = PromotionRow {
        target: job.target.display().to_string(),
        lsn: job.lsn,
        is_done,
    };
    branches.set_promotion(history, promotion)
}

/// One line that says which state an image is of.
fn identity(row: &BranchRow, lsn: Lsn) -> String {
    format!(
        "branch {} of {}/{} lsn {lsn}",
        row.history, row.machine, row.disk
    )
}

/// The name of an unfinished image.
fn partial_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    target.with_file_name(name)
}

/// What an earlier promotion left.
struct Begun {
    lsn: Lsn,
    is_copied: bool,
}

fn begun(row: &BranchRow, target: &Path, partial: &Path) -> Option<Begun> {
    if let Some(known) = resume_identity(partial).ok()? {
        let lsn = Lsn(known.rsplit(' ').next()?.parse().ok()?);
        let is_copied = false;
        return (known == identity(row, lsn)).then_some(Begun { lsn, is_copied });
    }
    // All was written, and not yet compared.
    let noted = row.promotion.as_ref().filter(|noted| !noted.is_done)?;
    let is_here = Path::new(&noted.target) == target && partial.is_file();
    is_here.then_some(Begun {
        lsn: noted.lsn,
        is_copied: true,
    })
}

/// Makes sure that the image can take its name in the end.
fn prepare(target: &Path, partial: &Path, is_forced: bool) -> Result<(), ApiError> {
    let wrong = |message: String, hint: &str| api_error(ErrorClass::Refused, message, hint);
    match std::fs::symlink_metadata(target) {
        Ok(found) if !found.is_file() => {
            let message = format!("{} is there, and is no image file", target.display());
            return Err(wrong(message, "name a file"));
        }
        Ok(_) if !is_forced => {
            let message = format!("{} is there already", target.display());
            return Err(wrong(message, "name another, or overwrite it with --force"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            let message = format!("{} cannot be looked at: {error}", target.display());
            return Err(wrong(message, "name a file in a directory that is there"));
        }
    }
    if !is_forced {
        return Ok(());
    }
    match std::fs::remove_file(partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            let message = format!("{} cannot be removed: {error}", partial.display());
            Err(wrong(message, ""))
        }
        _ => Ok(()),
    }
}

fn run(job: &Job, row: &BranchRow, view: ViewOpened, branches: &Branches) {
    let source = Arc::new(ViewSource {
        path: PathBuf::from(format!("branch {}", row.name)),
        device: view.device,
    });
    let result = copy(job, row, &source);
    let result = result.and_then(|()| {
        let noted = note(branches, row.history, job, true);
        noted.map_err(|error| (PromotionState::Failed, error.to_string()))
    });
    let mut shown = job.shown.lock();
    (shown.state, shown.error) = match result {
        Ok(()) => (PromotionState::Done, String::new()),
        Err(ended) => ended,
    };
    let (name, state) = (&row.name, shown.state);
    tracing::info!(
        branch = name,
        ?state,
        error = shown.error,
        "a promotion ended"
    );
}

type Ended = (PromotionState, String);

fn copy(job: &Job, row: &BranchRow, source: &Arc<ViewSource>) -> Result<(), Ended> {
    let ended = |error: BulkError| match error {
        BulkError::Interrupted => (PromotionState::Stopped, String::new()),
        other => (PromotionState::Failed, with_hint(&other)),
    };
    if !job.is_copied {
        let identity = identity(row, job.lsn);
        let target = RawTarget {
            path: &job.partial,
            identity: &identity,
            is_forced: false,
        };
        let from = Arc::clone(source) as Arc<dyn BlockSource>;
        export_raw(&from, target, &Options::default(), &job.progress).map_err(ended)?;
    }
    job.shown.lock().state = PromotionState::Verifying;
    compare(job, source).map_err(ended)?;
    let publish = || {
        std::fs::rename(&job.partial, &job.target)?;
        let parent = job.target.parent().unwrap_or(Path::new("/"));
        File::open(parent)?.sync_all()
    };
    publish().map_err(|error| ended(io("name", &job.target)(error)))
}

fn with_hint(error: &BulkError) -> String {
    match error.hint() {
        "" => error.to_string(),
        hint => format!("{error}; {hint}"),
    }
}

/// Reads the image back from the medium, and compares it with the branch.
fn compare(job: &Job, source: &ViewSource) -> Result<(), BulkError> {
    let path = &job.partial;
    let file = File::open(path).map_err(io("open", path))?;
    let size_bytes = source.size_bytes();
    let (mut here, mut there) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < size_bytes {
        if job.progress.is_stopping() {
            return Err(BulkError::Interrupted);
        }
        let length = COMPARE_BYTES.min(size_bytes - at);
        let count = usize::try_from(length).unwrap_or(0);
        here.resize(count, 0);
        there.resize(count, 0);
        // The next read is one of the medium.
        if let Err(error) = forget_cached(&file, at, length) {
            tracing::debug!(%error, "the page cache keeps an image");
        }
        file.read_exact_at(&mut here, at)
            .map_err(io("read", path))?;
        source.read(at, &mut there)?;
        if here != there {
            let differs = here.iter().zip(&there).position(|(a, b)| a != b);
            let offset = at + differs.unwrap_or(0) as u64;
            let error = std::io::Error::other(format!(
                "the image differs from the branch at byte {offset}; its medium is not to be \
                 trusted"
            ));
            return Err(io("compare", path)(error));
        }
        at += length;
        job.shown.lock().compared_bytes = at;
    }
    Ok(())
}

fn io(operation: &'static str, path: &Path) -> impl Fn(std::io::Error) -> BulkError {
    move |source| BulkError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// A view as something to export.
struct ViewSource {
    path: PathBuf,
    device: Arc<dyn BlockDevice>,
}

impl ViewSource {
    fn failed(&self, error: &afterimage_blockdev::BlockError) -> BulkError {
        let kind = match error.kind {
            BlockErrorKind::NoSpace => std::io::ErrorKind::StorageFull,
            _ => std::io::ErrorKind::Other,
        };
        io("read", &self.path)(std::io::Error::new(kind, error.to_string()))
    }
}

impl BlockSource for ViewSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size_bytes(&self) -> u64 {
        self.device.geometry().size_bytes
    }

    fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError> {
        let unit = u64::from(self.device.geometry().logical_block_bytes).max(512);
        let offset = range.start / unit * unit;
        let end = range.end.next_multiple_of(unit).min(self.size_bytes());
        let length = end.saturating_sub(offset);
        match wait::device(&*self.device, BlockOp::Extents { offset, length }) {
            Ok(BlockOutcome::Extents(extents)) => Ok(extents
                .iter()
                .filter(|extent| extent.kind == ExtentKind::Data)
                .map(|extent| {
                    extent.offset.max(range.start)..(extent.offset + extent.length).min(range.end)
                })
                .filter(|part| part.start < part.end)
                .collect()),
            Ok(_) => Ok(vec![range]),
            Err(error) => Err(self.failed(&error)),
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError> {
        let unit = u64::from(self.device.geometry().logical_block_bytes).max(512);
        let start = offset / unit * unit;
        let end = (offset + buffer.len() as u64).next_multiple_of(unit);
        let count = usize::try_from(end - start).unwrap_or(0);
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let op = BlockOp::Read {
            offset: start,
            buffer: IoBuffer::zeroed(count),
        };
        match wait::device(&*self.device, op) {
            Ok(BlockOutcome::Data(data)) => {
                buffer.copy_from_slice(&data[skip..skip + buffer.len()]);
                Ok(())
            }
            Ok(_) => Err(io("read", &self.path)(std::io::Error::other(
                "the branch answered something else",
            ))),
            Err(error) => Err(self.failed(&error)),
        }
    }
}
