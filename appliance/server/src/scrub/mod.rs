//! The scrub: a thread that reads every byte of the store again and again, long before somebody
//! needs it.
//!
//! Invariants
//! * It takes no more of the medium than it is given, and ingest goes first.
//! * At most one file is kept from removal at a time.
//! * Damage that was found stays known, also over a restart, until a whole pass does not find it.

mod paced;
mod pass;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_blockdev::{Clock, Timestamp};
use afterimage_protocol::rest::scrub::{ScrubResult, ScrubStatus};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::config::ms;
use crate::engine::EngineHandle;
use crate::events::EventLog;
pub(crate) use pass::describe;
use pass::{Ended, HURTS};

/// File below the data directory that keeps what the last scrub found.
const FILE: &str = "scrub.json";
/// How soon after the start the first one begins, when it is due.
const SETTLE: Duration = Duration::from_secs(60);

/// When and how fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScrubSettings {
    /// Time from the end of one to the begin of the next; 0: only when asked for.
    pub interval_ms: u64,
    /// How much of the medium it takes.
    pub bytes_per_second: u64,
}

/// What is kept over a restart.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
struct Kept {
    last: Option<ScrubResult>,
    damage: Vec<String>,
}

#[derive(Default)]
struct State {
    status: ScrubStatus,
    /// Bytes of the files before the present one.
    reached_bytes: u64,
    is_wanted: bool,
    is_stopping: bool,
    is_over: bool,
}

/// What the thread and its callers share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// Waits until a time; false when the pass is to stop.
    fn rest_until(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        while !state.is_stopping && !state.is_over {
            if self.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        !state.is_stopping && !state.is_over
    }

    fn is_stopping(&self) -> bool {
        let state = self.state.lock();
        state.is_stopping || state.is_over
    }

    fn begin(&self, total_bytes: u64) {
        let mut state = self.state.lock();
        state.reached_bytes = 0;
        state.status.done_bytes = 0;
        state.status.total_bytes = total_bytes;
    }

    fn reached(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.reached_bytes = bytes;
        state.status.done_bytes = bytes;
    }

    fn was_read(&self, bytes: u64) {
        let mut state = self.state.lock();
        let total = state.status.total_bytes;
        state.status.done_bytes = state.status.done_bytes.saturating_add(bytes).min(total);
    }

    fn waits(&self, is_waiting: bool) {
        self.state.lock().status.is_waiting = is_waiting;
    }

    /// Waits until the next pass; false when there is none.
    fn next(&self, due: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.is_over {
                return false;
            }
            if std::mem::take(&mut state.is_wanted) {
                break;
            }
            match due {
                None => self.changed.wait(&mut state),
                Some(due) => {
                    if self.changed.wait_until(&mut state, due).timed_out() {
                        break;
                    }
                }
            }
        }
        state.status.is_running = true;
        true
    }
}

/// The scrub of an appliance.
pub struct Scrub {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scrub {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(
        data_dir: &Path,
        settings: ScrubSettings,
        engine: EngineHandle,
        events: EventLog,
        clock: Arc<dyn Clock>,
    ) -> std::io::Result<Self> {
        let kept = read_kept(&data_dir.join(FILE));
        let shared = Arc::new(Shared::default());
        {
            let mut state = shared.state.lock();
            state.status.last.clone_from(&kept.last);
            state.status.damage = kept.damage;
        }
        let worker = Worker {
            shared: Arc::clone(&shared),
            data_dir: data_dir.to_owned(),
            settings,
            engine,
            events,
            clock,
        };
        let thread = std::thread::Builder::new()
            .name("scrub".to_owned())
            .spawn(move || worker.run(kept.last))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How far it is, and what is known.
    #[must_use]
    pub fn status(&self) -> ScrubStatus {
        self.shared.state.lock().status.clone()
    }

    /// Begins a pass, or joins the one under way; gives what was known before.
    #[must_use]
    pub fn begin(&self) -> ScrubStatus {
        let mut state = self.shared.state.lock();
        let before = state.status.clone();
        if !state.status.is_running {
            state.is_wanted = true;
            state.status.is_running = true;
            self.shared.changed.notify_all();
        }
        before
    }

    /// Stops the pass under way, if there is one.
    pub fn cancel(&self) {
        let mut state = self.shared.state.lock();
        if state.status.is_running {
            state.is_stopping = true;
            self.shared.changed.notify_all();
        }
    }

    /// Ends the thread, and waits for it.
    pub fn stop(&self) {
        self.shared.state.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            if thread.join().is_err() {
                tracing::error!("the scrub's thread has failed");
            }
        }
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    shared: Arc<Shared>,
    data_dir: PathBuf,
    settings: ScrubSettings,
    engine: EngineHandle,
    events: EventLog,
    clock: Arc<dyn Clock>,
}

impl Worker {
    fn run(self, last: Option<ScrubResult>) {
        let mut due = self.first_due(last.map(|last| last.ended));
        while self.shared.next(due) {
            self.pass();
            due = self.interval().map(|interval| Instant::now() + interval);
        }
    }

    fn interval(&self) -> Option<Duration> {
        (self.settings.interval_ms > 0).then(|| ms(self.settings.interval_ms))
    }

    fn first_due(&self, ended: Option<Timestamp>) -> Option<Instant> {
        let interval = self.interval()?;
        let passed = ended.map_or(Duration::MAX, |ended| {
            Duration::from_nanos(self.clock.wall().0.saturating_sub(ended.0))
        });
        let settle = SETTLE.min(interval);
        Some(Instant::now() + interval.saturating_sub(passed).max(settle))
    }

    fn pass(&self) {
        let before = self.shared.state.lock().status.damage.clone();
        let now = || self.clock.wall();
        let mut tell = |text: String| self.found(text);
        let pace = (&*self.data_dir, self.settings.bytes_per_second);
        let ended = pass::run(&self.shared, &self.engine, pace, &now, &mut tell);
        let mut state = self.shared.state.lock();
        state.status.is_running = false;
        state.status.is_waiting = false;
        // Whoever wants the next one after this was told that it was stopped.
        state.is_stopping = false;
        if let Ok(Ended::Whole(result)) = ended {
            state.status.passes += 1;
            state.status.damage.clone_from(&result.damage);
            state.status.last = Some(result);
        }
        let kept = Kept {
            last: state.status.last.clone(),
            damage: state.status.damage.clone(),
        };
        drop(state);
        for text in before.iter().filter(|text| !is_known(&kept.damage, text)) {
            self.events.note("damage-gone", text.clone());
        }
        if let Err(error) = write_kept(&self.data_dir.join(FILE), &kept) {
            tracing::warn!(%error, "what the scrub found is not kept over a restart");
        }
    }

    /// Tells damage that was not known.
    fn found(&self, text: String) {
        let mut state = self.shared.state.lock();
        if !is_known(&state.status.damage, &text) {
            state.status.damage.push(text.clone());
            drop(state);
            self.events.note("damaged", text);
        }
    }
}

/// Says whether a place is among those that are known; how many points it hurts may have changed.
fn is_known(damage: &[String], text: &str) -> bool {
    let place = |text: &str| text.split(HURTS).next().map(str::to_owned);
    damage.iter().any(|known| place(known) == place(text))
}

fn read_kept(path: &Path) -> Kept {
    // Without it the next scrub finds the same again.
    std::fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

fn write_kept(path: &Path, kept: &Kept) -> std::io::Result<()> {
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, serde_json::to_vec(kept)?)?;
    std::fs::File::open(&temporary)?.sync_all()?;
    std::fs::rename(&temporary, path)
}
