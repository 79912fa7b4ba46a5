//! Frames that were sealed ahead of time, in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage_blockdev::Lsn;
use afterimage_cache::Frame;
use afterimage_protocol::sender::{Question, RecordSource, SourceBulk, SourceFrame};
use parking_lot::Mutex;

use super::machine::{Machine, block_bytes};

/// A frame as it is sent, in a buffer of its exact size.
#[derive(Clone)]
pub(crate) struct PoolFrame {
    first: Lsn,
    last: Lsn,
    bytes: Arc<[u8]>,
}

impl PoolFrame {
    /// LSN of its last record.
    pub(crate) fn last(&self) -> Lsn {
        self.last
    }
}

impl From<Frame> for PoolFrame {
    fn from(frame: Frame) -> Self {
        Self {
            first: frame.header.first,
            last: frame.header.last,
            bytes: frame.bytes.into(),
        }
    }
}

/// The frames of one machine. They are freed after a replay, not within it.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Vec<PoolFrame>>);

impl Pool {
    pub(crate) fn new(frames: Vec<PoolFrame>) -> Self {
        Self(Arc::new(frames))
    }
}

impl RecordSource for Pool {
    type Bytes = Arc<[u8]>;

    fn next_frame(&mut self, after: Lsn) -> Option<SourceFrame<Self::Bytes>> {
        let place = self.0.partition_point(|frame| frame.last <= after);
        let frame = self.0.get(place)?;
        Some(SourceFrame {
            first: frame.first,
            last: frame.last,
            bytes: Arc::clone(&frame.bytes),
        })
    }

    fn next_bulk(&mut self, _number: u64) -> Option<SourceBulk<Self::Bytes>> {
        None
    }

    fn next_question(&mut self, _number: u64) -> Option<Question> {
        None
    }
}

/// Frames of all machines, in the machines' order.
#[derive(Default)]
pub(crate) struct Prepared {
    pub(crate) frames: Vec<Vec<PoolFrame>>,
    pub(crate) user_bytes: u64,
    pub(crate) frame_bytes: u64,
}

/// Seals `bytes` of user data, the same share for each machine, on all cores.
pub(crate) fn prepare(machines: &mut [Machine], bytes: u64, frame_records: usize) -> Prepared {
    let frame_user = block_bytes() * u64::try_from(frame_records).unwrap_or(u64::MAX);
    let count = u64::try_from(machines.len()).unwrap_or(u64::MAX);
    let frames_each = (bytes / frame_user / count.max(1)).max(1);
    let made: Vec<Mutex<Vec<PoolFrame>>> = machines.iter().map(|_| Mutex::default()).collect();
    let machines: Vec<Mutex<&mut Machine>> = machines.iter_mut().map(Mutex::new).collect();
    let turn = AtomicUsize::new(0);
    let work = || {
        loop {
            let place = turn.fetch_add(1, Ordering::Relaxed);
            let (Some(machine), Some(made)) = (machines.get(place), made.get(place)) else {
                return;
            };
            *made.lock() = seal(&mut machine.lock(), frames_each, frame_records);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let frames: Vec<Vec<PoolFrame>> = made.into_iter().map(Mutex::into_inner).collect();
    let frame_bytes = frames
        .iter()
        .flatten()
        .map(|frame| length(&frame.bytes))
        .sum();
    Prepared {
        frames,
        user_bytes: frames_each * count * frame_user,
        frame_bytes,
    }
}

fn seal(machine: &mut Machine, frames: u64, records: usize) -> Vec<PoolFrame> {
    machine.set_time();
    let start = machine.is_new().then(|| machine.start());
    let rest = (0..frames).map(|_| machine.frame(records));
    start.into_iter().chain(rest).map(Into::into).collect()
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
