//! Starts the engine thread on a data directory, and waits until recovery is done.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_blockdev::{
    Backend, Entropy, ErrorClass, RealOptions, RealStorage, SystemClock, SystemEntropy,
};
use afterimage_protocol::rest::ApiError;
use afterimage_seed::EngineOptions;
use crossbeam::channel::bounded;

use super::command::EngineHandle;
use super::inbox::Inbox;
use super::thread::EngineThread;

/// Commands that may wait for the engine thread.
const COMMANDS_MAX: usize = 256;

/// What the engine is started with.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Bytes that the log may take; `None` for what the file system has.
    pub budget_bytes: Option<u64>,
    /// Share of the file system that stays free, in percent.
    pub reserve_percent: u8,
    /// Bytes of a log segment.
    pub segment_bytes: u64,
    /// Open map entries at which a run is written.
    pub flush_entries: usize,
    /// Time between crash marks.
    pub crash_mark_interval: Duration,
    /// Time between two collections of what nobody needs.
    pub collect_interval: Duration,
    /// Bytes of the log beyond which its oldest segments are destaged.
    pub cache_bytes: Option<u64>,
    /// Shortest journal window that a lack of room leaves.
    pub window_min: Duration,
    /// How often points are thinned and journal windows move.
    pub retention_interval: Duration,
    /// How long after the last data the log writes an idle commit.
    pub idle_commit: Duration,
    /// Wait before a full medium is tried again.
    pub retry: Duration,
    /// How files are read and written.
    pub backend: Backend,
}

fn failed(message: String, hint: &str) -> ApiError {
    ApiError {
        class: ErrorClass::Operator,
        message,
        hint: hint.to_owned(),
    }
}

/// Reads the key that wraps the keys of all disks; makes it at the first start.
fn store_key(data_dir: &Path, entropy: &dyn Entropy) -> Result<[u8; 32], ApiError> {
    let path = data_dir.join("store.key");
    let explain = |error: std::io::Error| failed(format!("{}: {error}", path.display()), "");
    match OpenOptions::new().read(true).open(&path) {
        Ok(mut file) => {
            let mut key = [0; 32];
            file.read_exact(&mut key).map_err(explain)?;
            Ok(key)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if data_dir.join("manifest").exists() {
                let message = format!("{} is missing", path.display());
                return Err(failed(
                    message,
                    "put the key back that belongs to this directory",
                ));
            }
            let mut key = [0; 32];
            entropy.fill(&mut key);
            // Whole and durable before any disk's key is wrapped by it.
            let temporary = data_dir.join("store.key.new");
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&temporary).map_err(explain)?;
            file.write_all(&key).map_err(explain)?;
            file.sync_all().map_err(explain)?;
            std::fs::rename(&temporary, &path).map_err(explain)?;
            let directory = std::fs::File::open(data_dir).map_err(explain)?;
            directory.sync_all().map_err(explain)?;
            Ok(key)
        }
        Err(error) => Err(explain(error)),
    }
}

/// Starts the engine and waits until it has recovered.
///
/// # Errors
/// [`ApiError`] with what to do: no access, a newer format, damage, a wrong key.
pub fn start(settings: &EngineSettings) -> Result<(EngineHandle, JoinHandle<()>), ApiError> {
    let entropy = Arc::new(SystemEntropy);
    let clock = Arc::new(SystemClock::default());
    let store_key = store_key(&settings.data_dir, &*entropy)?;
    let options = RealOptions {
        backend: settings.backend,
        ..RealOptions::default()
    };
    let storage = RealStorage::open(&settings.data_dir, options)
        .map_err(|error| failed(format!("{}: {error}", settings.data_dir.display()), ""))?;
    let (total, _) = super::room(&*storage);
    let share = total / 100 * u64::from(settings.reserve_percent.min(50));
    // Never less than four segments, never so much that a small disk takes nothing at all.
    let reserve_bytes = share.max(settings.segment_bytes * 4).min(total / 4);
    let engine = EngineOptions {
        store_key,
        budget_bytes: settings.budget_bytes.unwrap_or(u64::MAX),
        reserve_bytes,
        segment_bytes: settings.segment_bytes,
        flush_entries: settings.flush_entries,
        crash_mark_interval: settings.crash_mark_interval,
        collect_interval: settings.collect_interval,
        cache_bytes: settings.cache_bytes.unwrap_or(u64::MAX),
        window_min: settings.window_min,
        retention_interval: settings.retention_interval,
        idle_commit: settings.idle_commit,
        retry: settings.retry,
        ..EngineOptions::default()
    };
    let inbox = Arc::new(Inbox::default());
    let (sender, commands) = bounded(COMMANDS_MAX);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let waker = Arc::clone(&inbox);
    let handle = EngineHandle::new(sender, Arc::new(move || waker.wake()));
    let thread = EngineThread::new(engine, storage, clock, entropy, inbox, commands);
    let join = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || thread.run(ready))
        .map_err(|error| failed(format!("cannot start a thread: {error}"), ""))?;
    match is_ready.recv() {
        Ok(Ok(())) => Ok((handle, join)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(failed(
            "the engine ended while it was starting".to_owned(),
            "see the log",
        )),
    }
}
