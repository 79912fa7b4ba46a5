//! Where the engine, and whoever cuts a stream, leave what happened to it, until the connection's
//! writer comes by.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use afterimage_blockdev::{ErrorClass, Lsn};
use afterimage_protocol::message::MarkRequestKind;
use afterimage_protocol::{Refusal, RefusalCode};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::delay::Delay;
use crate::engine::StreamEvents;

/// Numbers of bulk from here on are not the source's own.
const SEEDED_FROM: u64 = 1 << 63;
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
pub(crate) struct EventSlot {
    /// How long its frames take.
    pub(super) delay: Arc<Delay>,
    pending: Mutex<Pending>,
    /// Bulk that was taken from a seed: the source did not send it, and is not told of it.
    seeded: Mutex<BTreeMap<u64, oneshot::Sender<()>>>,
    wake: Arc<Notify>,
}

impl EventSlot {
    pub(super) fn new(wake: Arc<Notify>) -> Self {
        Self {
            delay: Arc::new(Delay::new(Instant::now())),
            pending: Mutex::default(),
            seeded: Mutex::default(),
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

    /// Gives a number for bulk from a seed, and what tells that it is durable.
    pub(crate) fn expect_seeded(&self) -> (u64, oneshot::Receiver<()>) {
        let (sender, durable) = oneshot::channel();
        let mut seeded = self.seeded.lock();
        let last = seeded
            .last_key_value()
            .map_or(SEEDED_FROM, |(last, _)| *last);
        // Numbers that are durable may come again: nobody waits for them any more.
        let number = last.wrapping_add(1).max(SEEDED_FROM);
        seeded.insert(number, sender);
        (number, durable)
    }

    fn change(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.pending.lock());
        self.wake.notify_one();
    }
}

impl StreamEvents for EventSlot {
    fn durable(&self, durable: Lsn, synced: Instant, _queued_bytes: u64) {
        self.delay.durable(durable, synced, Instant::now());
        self.change(|pending| {
            pending.durable = pending.durable.max(Some(durable));
            pending.paused = None;
        });
    }

    fn bulk_durable(&self, number: u64) {
        if number >= SEEDED_FROM {
            if let Some(waiting) = self.seeded.lock().remove(&number) {
                let _gone = waiting.send(());
            }
            return;
        }
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
        // The first reason is the one that counts.
        self.change(|pending| {
            pending.refused.get_or_insert_with(|| refusal.clone());
        });
    }
}
