//! Requests that a device works on, from submission to reply.

use std::sync::Arc;

use afterimage_blockdev::{BlockCompleter, BlockCompletion, BlockOutcome, IoBuffer, Token};
use parking_lot::Mutex;

use super::outbox::{Body, Frame, Outbox};
use crate::number::error;
use crate::reply::{self, Failure, ReplyStyle};

/// One request on its way.
#[derive(Clone, Copy)]
pub(super) struct Pending {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: usize,
    pub(super) is_read: bool,
    /// The read must be answered with data, not with a hole.
    pub(super) is_dense: bool,
    /// What the outbox counts for it.
    pub(super) bytes: usize,
}

#[derive(Default)]
struct Slots {
    all: Vec<Option<Pending>>,
    free: Vec<usize>,
}

/// Turns completions of a device into replies of a connection.
pub(super) struct Replies {
    pub(super) outbox: Outbox,
    pub(super) style: ReplyStyle,
    slots: Mutex<Slots>,
}

impl Replies {
    pub(super) fn new(outbox: Outbox, style: ReplyStyle) -> Self {
        Self {
            outbox,
            style,
            slots: Mutex::default(),
        }
    }

    /// Notes a request; the token is for its submission.
    pub(super) fn note(&self, pending: Pending) -> Token {
        let mut slots = self.slots.lock();
        let place = slots.free.pop().unwrap_or(slots.all.len());
        if place == slots.all.len() {
            slots.all.push(Some(pending));
        } else {
            slots.all[place] = Some(pending);
        }
        Token(u64::try_from(place).unwrap_or(u64::MAX))
    }

    fn take(&self, token: Token) -> Option<Pending> {
        let place = usize::try_from(token.0).ok()?;
        let mut slots = self.slots.lock();
        let pending = slots.all.get_mut(place)?.take()?;
        slots.free.push(place);
        Some(pending)
    }

    /// Answers a request with an error.
    pub(super) fn fail(&self, (cookie, asked): (u64, u64), bytes: usize, failed: &Failure) {
        tracing::debug!(cookie, error = %failed, "a request failed");
        let (head, body) = reply::failure(self.style, cookie, asked, failed);
        self.outbox.push(Frame {
            head,
            body: Body::Bytes(body),
            releases: Some(bytes),
        });
    }

    /// Answers a request that has nothing to give.
    pub(super) fn done(&self, (cookie, asked): (u64, u64), bytes: usize) {
        self.outbox.push(Frame {
            head: reply::done(self.style, cookie, asked),
            body: Body::Empty,
            releases: Some(bytes),
        });
    }

    /// Sends data of a read, or a hole where it is all zeroes and a hole may be told.
    pub(super) fn data(
        &self,
        request: (u64, u64),
        (offset, buffer): (u64, IoBuffer),
        (is_last, is_dense): (bool, bool),
        releases: Option<usize>,
    ) {
        if self.style != ReplyStyle::Simple && !is_dense && is_zero(&buffer) {
            let head = reply::hole(self.style, is_last, request, offset, buffer.len());
            self.outbox.give_back(buffer);
            return self.outbox.push(Frame {
                head,
                body: Body::Empty,
                releases,
            });
        }
        let head = reply::data(self.style, is_last, request, offset, buffer.len());
        self.outbox.push(Frame {
            head,
            body: Body::Buffer(buffer),
            releases,
        });
    }
}

impl BlockCompleter for Replies {
    fn complete(&self, completion: BlockCompletion) {
        let Some(pending) = self.take(completion.token) else {
            return;
        };
        let request = (pending.cookie, pending.offset);
        match completion.result {
            Err(error) => self.fail(request, pending.bytes, &Failure::from(&error)),
            Ok(BlockOutcome::Data(buffer)) if pending.is_read => {
                if buffer.len() == pending.length {
                    let place = (pending.offset, buffer);
                    let manner = (true, pending.is_dense);
                    self.data(request, place, manner, Some(pending.bytes));
                } else {
                    let text = "the device gave another number of bytes";
                    self.fail(request, pending.bytes, &Failure::new(error::EIO, text));
                }
            }
            Ok(outcome) => {
                if let BlockOutcome::Written(buffer) = outcome {
                    self.outbox.give_back(buffer);
                }
                self.done(request, pending.bytes);
            }
        }
    }
}

/// Says whether all is zero; ends at the first byte that is not.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// What a task of several steps needs.
#[derive(Clone)]
pub(super) struct Task {
    pub(super) replies: Arc<Replies>,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// What the outbox counts for it.
    pub(super) bytes: usize,
}

impl Task {
    fn request(&self) -> (u64, u64) {
        (self.cookie, self.offset)
    }

    pub(super) fn finish(self, result: Result<(), Failure>) {
        match result {
            Ok(()) => self.replies.done(self.request(), self.bytes),
            Err(failed) => self.replies.fail(self.request(), self.bytes, &failed),
        }
    }

    pub(super) fn fail(self, failed: &Failure) {
        self.replies.fail(self.request(), self.bytes, failed);
    }
}
