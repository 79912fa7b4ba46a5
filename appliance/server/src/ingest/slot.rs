//! Where the engine leaves what happened to a stream, until the connection's writer comes by.

use std::sync::Arc;

use afterimage_blockdev::{ErrorClass, Lsn};
use afterimage_protocol::message::MarkRequestKind;
use afterimage_protocol::{Refusal, RefusalCode};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::StreamEvents;

/// Marks that wait to be asked for, at most.
const MARKS_MAX: usize = 256;

/// A mark that is wanted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MarkWanted {
    pub(super) request: u64,
    pub(super) kind: MarkRequestKind,
    pub(super) name: String,
}

/// What has come together.
#[derive(Default, Debug)]
pub(super) struct Pending {
    pub(super) durable: Option<Lsn>,
    pub(super) bulk: Vec<u64>,
    pub(super) marks: Vec<MarkWanted>,
    pub(super) paused: Option<Refusal>,
    pub(super) refused: Option<Refusal>,
}

/// The slot of one stream. Numbers of bulk frames in it are bounded by the stream's credit.
pub(super) struct EventSlot {
    pending: Mutex<Pending>,
    wake: Arc<Notify>,
}

impl EventSlot {
    pub(super) fn new(wake: Arc<Notify>) -> Self {
        Self {
            pending: Mutex::default(),
            wake,
        }
    }

    /// Takes what has come together.
    pub(super) fn take(&self) -> Pending {
        std::mem::take(&mut self.pending.lock())
    }

    /// Takes a refusal, and leaves the rest.
    pub(super) fn take_refusal(&self) -> Option<Refusal> {
        self.pending.lock().refused.take()
    }

    fn change(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.pending.lock());
        self.wake.notify_one();
    }
}

impl StreamEvents for EventSlot {
    fn durable(&self, durable: Lsn, _queued_bytes: u64) {
        self.change(|pending| {
            pending.durable = pending.durable.max(Some(durable));
            pending.paused = None;
        });
    }

    fn bulk_durable(&self, number: u64) {
        self.change(|pending| pending.bulk.push(number));
    }

    fn place_mark(&self, request: u64, is_bookmark: bool, name: &str) {
        let kind = if is_bookmark {
            MarkRequestKind::Bookmark
        } else {
            MarkRequestKind::Crash
        };
        let mark = MarkWanted {
            request,
            kind,
            name: name.to_owned(),
        };
        self.change(|pending| {
            if pending.marks.len() < MARKS_MAX {
                pending.marks.push(mark);
            } else {
                pending.refused = Some(Refusal {
                    code: RefusalCode::Limit,
                    class: ErrorClass::Retry,
                    message: format!("{MARKS_MAX} marks wait for a peer that reads nothing"),
                    hint: "connect again".to_owned(),
                });
            }
        });
    }

    fn paused(&self, refusal: &Refusal) {
        self.change(|pending| pending.paused = Some(refusal.clone()));
    }

    fn refused(&self, refusal: &Refusal) {
        self.change(|pending| pending.refused = Some(refusal.clone()));
    }
}
