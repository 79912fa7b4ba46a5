//! Requests and answers over `io_uring` (`Documentation/filesystems/fuse/fuse-io-uring.rst`).
//!
//! The kernel has one queue for each processor that there could be, and puts a request into the
//! queue of the processor that its caller runs on. Each processor that runs has a ring thread of
//! its own, bound to it, that serves its queue: the request changes hands without waking another
//! processor, and an answer goes out with the wait for the next request, in one system call.
//! Queues of processors that do not run have an entry too, since the kernel waits for it.
//!
//! Only requests that want an answer come here. Forgotten names and interrupts come over
//! `/dev/fuse`, and so does everything when the kernel refuses the ring.
//!
//! Invariant: the kernel is asked for the ring only when all threads, rings and memory are there.
//! From its word on, requests wait until every queue has an entry.

mod command;
mod cpus;
mod lane;
mod memory;
mod thread;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use self::cpus::Cpus;
use self::lane::Lane;
use self::thread::Runner;
use super::server::{REQUEST_BYTES_MAX, Server};

pub(super) use self::cpus::pin;
pub(super) use self::lane::Entry;

/// Entries of a queue, at most: the requests that one processor's callers have under way.
const DEPTH_MAX: usize = 64;
/// Fewest entries with which a queue is of use.
const DEPTH_MIN: usize = 4;
/// Payloads of all entries together. Only what was used once takes memory.
const PAYLOADS_BYTES_MAX: usize = 512 << 20;

/// The processors on which the kernel's queues are served; to try each of them.
pub(super) fn online_cpus() -> io::Result<Vec<u16>> {
    Ok(Cpus::read()?.online)
}

/// A thread that waits for its connection.
struct Waiting {
    lane: Arc<Lane>,
    start: SyncSender<File>,
    answer: Receiver<io::Result<usize>>,
    thread: JoinHandle<io::Result<()>>,
}

/// Ring threads, made before the kernel is asked for a ring.
pub(super) struct Prepared(Vec<Waiting>);

/// Ring threads that serve a connection.
pub(super) struct Rings(Vec<(Arc<Lane>, JoinHandle<io::Result<()>>)>);

impl Prepared {
    /// Makes the threads, their rings and their memory.
    ///
    /// # Errors
    /// When the kernel has or permits no `io_uring`, or has too many processors.
    pub(super) fn new(server: &Arc<Server>) -> io::Result<Self> {
        let cpus = Cpus::read()?;
        let others = usize::from(cpus.possible_count) - cpus.online.len();
        let room = PAYLOADS_BYTES_MAX / REQUEST_BYTES_MAX as usize;
        let depth = room.saturating_sub(others) / cpus.online.len();
        if depth < DEPTH_MIN {
            let count = cpus.possible_count;
            return Err(io::Error::other(format!(
                "{count} queues take too much memory"
            )));
        }
        let mut waiting = Vec::with_capacity(cpus.online.len());
        for (turn, cpu) in cpus.online.iter().enumerate() {
            let mut queues = vec![*cpu; depth.min(DEPTH_MAX)];
            let absent = (0..cpus.possible_count).filter(|cpu| !cpus.online.contains(cpu));
            queues.extend(absent.skip(turn).step_by(cpus.online.len()));
            let lane = Lane::new(&queues, REQUEST_BYTES_MAX as usize)?;
            waiting.push(Waiting::spawn(lane, *cpu, server)?);
        }
        Ok(Self(waiting))
    }

    /// Registers all entries with a connection that has agreed to it, and serves them.
    ///
    /// # Errors
    /// When a queue has no entry: the kernel then sends everything over `/dev/fuse`. The rings
    /// are there all the same, since they may hold entries of other queues.
    pub(super) fn start(self, fuse: &File) -> (Rings, io::Result<()>) {
        let mut result = Ok(());
        let mut rings = Vec::with_capacity(self.0.len());
        let mut answers = Vec::with_capacity(self.0.len());
        for waiting in self.0 {
            let ended = |_| io::Error::other("a ring thread has ended");
            let clone = fuse.try_clone();
            match clone.and_then(|fuse| waiting.start.send(fuse).map_err(ended)) {
                Ok(()) => answers.push(waiting.answer),
                Err(error) => result = Err(error),
            }
            rings.push((waiting.lane, waiting.thread));
        }
        for answer in answers {
            match answer.recv() {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => result = Err(error),
                Err(_) => result = Err(io::Error::other("a ring thread has ended")),
            }
        }
        (Rings(rings), result)
    }
}

impl Prepared {
    /// Ends the threads, when the kernel did not agree.
    pub(super) fn end(self) {
        for waiting in self.0 {
            drop(waiting.start);
            if waiting.thread.join().is_err() {
                tracing::error!("a ring thread panicked");
            }
        }
    }
}

impl Rings {
    /// Ends the threads of a connection that has ended.
    pub(super) fn join(self) -> io::Result<()> {
        for (lane, _) in &self.0 {
            lane.close();
        }
        let mut result = Ok(());
        for (_, thread) in self.0 {
            let ended = thread.join();
            let ended = ended.unwrap_or_else(|_| Err(io::Error::other("a ring thread panicked")));
            result = result.and(ended);
        }
        result
    }
}

impl Waiting {
    fn spawn(lane: Arc<Lane>, cpu: u16, server: &Arc<Server>) -> io::Result<Self> {
        let (start, started) = sync_channel(1);
        let (answer_to, answer) = sync_channel(2);
        let (own, server) = (Arc::clone(&lane), Arc::clone(server));
        let thread = std::thread::Builder::new()
            .name(format!("fuse-ring-{cpu}"))
            .spawn(move || serve(own, cpu, server, &started, &answer_to))?;
        match answer.recv() {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(io::Error::other("a ring thread has ended")),
        }
        Ok(Self {
            lane,
            start,
            answer,
            thread,
        })
    }
}

/// The life of a ring thread: says that its ring is there, waits for a connection, says what
/// came of the registration, serves.
fn serve(
    lane: Arc<Lane>,
    cpu: u16,
    server: Arc<Server>,
    started: &Receiver<File>,
    answer: &SyncSender<io::Result<usize>>,
) -> io::Result<()> {
    if let Err(error) = pin(cpu) {
        // A container may have other processors; the thread works there too.
        tracing::debug!(%error, cpu, "a ring thread is not bound to its processor");
    }
    let told = |result| answer.send(result).is_ok();
    let mut runner = match Runner::new(lane, server) {
        Ok(runner) => runner,
        Err(error) => {
            told(Err(error));
            return Ok(());
        }
    };
    if !told(Ok(0)) {
        return Ok(());
    }
    // No connection: the kernel did not agree.
    let Ok(fuse) = started.recv() else {
        return Ok(());
    };
    let registered = runner.register(&fuse);
    // The ring has its own hold of the connection now; it must not outlive the ring's.
    drop(fuse);
    let is_refused = registered.is_err();
    told(registered);
    if is_refused {
        return Ok(());
    }
    runner.run().inspect_err(|error| {
        tracing::error!(%error, cpu, "a ring thread failed: unmount the tree to end its requests");
    })
}
