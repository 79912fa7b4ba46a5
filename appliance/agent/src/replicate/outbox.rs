//! What a copy has for the connection: bulk frames and questions, kept until they are answered, so
//! that a new connection sends them again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::Lsn;
use afterimage_cache::Frame;
use afterimage_protocol::sender::{Question, SourceBulk};
use parking_lot::{Condvar, Mutex};

use crate::pipeline::FrameBytes;

struct Bulk {
    after: Lsn,
    frame: Arc<Frame>,
}

#[derive(Default)]
struct State {
    next_number: u64,
    bulk: BTreeMap<u64, Bulk>,
    bulk_bytes: usize,
    questions: BTreeMap<u64, Question>,
    answers: BTreeMap<u64, Vec<bool>>,
    changes: u64,
    /// Bulk of other generations of the machine's epoch is not taken.
    generation: u64,
}

/// See the module's text.
pub struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
    available: Box<dyn Fn() + Send + Sync>,
}

impl Outbox {
    /// Makes an empty one; `available` is called when there is something new to send.
    #[must_use]
    pub fn new(available: Box<dyn Fn() + Send + Sync>) -> Self {
        let state = State {
            next_number: 1,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            available,
        }
    }

    /// Adds a bulk frame that may leave once the record at `after` has. One of a generation that
    /// was given up is dropped: the record that begins its batch never leaves.
    pub fn push_bulk(&self, generation: u64, after: Lsn, frame: Frame) {
        {
            let mut state = self.state.lock();
            if state.generation != generation {
                return;
            }
            let number = state.number();
            state.bulk_bytes += frame.bytes.len();
            state.bulk.insert(
                number,
                Bulk {
                    after,
                    frame: Arc::new(frame),
                },
            );
        }
        (self.available)();
    }

    /// Asks a question; returns its number.
    pub fn ask(&self, make: impl FnOnce(u64) -> Question) -> u64 {
        let number = {
            let mut state = self.state.lock();
            let number = state.number();
            state.questions.insert(number, make(number));
            number
        };
        (self.available)();
        number
    }

    /// Takes the answer to a question, if it is there.
    pub fn take_answer(&self, number: u64) -> Option<Vec<bool>> {
        self.state.lock().answers.remove(&number)
    }

    /// Bytes of bulk that are not acknowledged.
    #[must_use]
    pub fn bulk_bytes(&self) -> usize {
        self.state.lock().bulk_bytes
    }

    /// Counts changes; to be read before looking at what [`Outbox::wait`] waits for.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.state.lock().changes
    }

    /// Waits until something was acknowledged or answered since `changes` was read, or somebody
    /// nudged, or the time is up.
    pub fn wait(&self, changes: u64, at_most: Duration) {
        let mut state = self.state.lock();
        if state.changes == changes {
            let _timed_out = self.changed.wait_for(&mut state, at_most);
        }
    }

    /// Makes whoever waits look again.
    pub fn nudge(&self) {
        self.state.lock().changes += 1;
        self.changed.notify_all();
    }

    /// These bulk frames are durable.
    pub fn acknowledge(&self, numbers: &[u64]) {
        {
            let mut state = self.state.lock();
            for number in numbers {
                if let Some(bulk) = state.bulk.remove(number) {
                    state.bulk_bytes -= bulk.frame.bytes.len();
                }
            }
        }
        self.nudge();
    }

    /// A question was answered.
    pub fn answer(&self, number: u64, differs: Vec<bool>) {
        {
            let mut state = self.state.lock();
            let is_fitting = (state.questions.get(&number))
                .is_some_and(|question| question.tags.len() == differs.len());
            if is_fitting {
                state.questions.remove(&number);
                state.answers.insert(number, differs);
            }
        }
        self.nudge();
    }

    /// Gives everything up; from now on it takes what is of this generation.
    pub fn clear(&self, generation: u64) {
        {
            let mut state = self.state.lock();
            state.generation = generation;
            state.bulk.clear();
            state.bulk_bytes = 0;
            state.questions.clear();
            state.answers.clear();
        }
        self.nudge();
    }

    /// The first bulk frame above `number`.
    #[must_use]
    pub fn next_bulk(&self, number: u64) -> Option<SourceBulk<FrameBytes>> {
        let state = self.state.lock();
        let (number, bulk) = state.bulk.range(number.checked_add(1)?..).next()?;
        let bytes = FrameBytes(Arc::clone(&bulk.frame));
        Some(SourceBulk {
            number: *number,
            after: bulk.after,
            bytes,
        })
    }

    /// The first question above `number`.
    #[must_use]
    pub fn next_question(&self, number: u64) -> Option<Question> {
        let state = self.state.lock();
        let (_, question) = state.questions.range(number.checked_add(1)?..).next()?;
        Some(question.clone())
    }
}

impl State {
    fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }
}

#[cfg(test)]
mod tests {
    use afterimage_blockdev::{AgentId, BatchId, DiskId, Epoch, HistoryId, MachineId, Timestamp};
    use afterimage_cache::{FrameBuilder, FrameIdentity, RecordHeader, RecordKind};

    use super::*;

    fn bulk_frame() -> Frame {
        let identity = FrameIdentity {
            machine: MachineId([1; 16]),
            history: HistoryId([2; 16]),
            origin: AgentId([3; 16]),
            epoch: Epoch(1),
        };
        let header = RecordHeader {
            kind: RecordKind::EpochStart,
            lsn: Lsn(5),
            previous: Lsn::ZERO,
            time: Timestamp(1),
            disk: DiskId::NIL,
            offset: 0,
            length: 0,
            batch: BatchId(0),
            argument: 0,
        };
        let mut builder = FrameBuilder::new(identity, false);
        builder.push_note(&header, &[]);
        builder.finish()
    }

    #[test]
    fn bulk_of_an_epoch_that_was_given_up_never_leaves() {
        let outbox = Outbox::new(Box::new(|| {}));
        outbox.push_bulk(0, Lsn(5), bulk_frame());
        assert!(outbox.next_bulk(0).is_some());
        outbox.clear(1);
        outbox.push_bulk(0, Lsn(5), bulk_frame());
        assert!(outbox.next_bulk(0).is_none());
        assert_eq!(outbox.bulk_bytes(), 0);
        outbox.push_bulk(1, Lsn(9), bulk_frame());
        assert!(outbox.next_bulk(0).is_some());
    }
}
