//! The state that a connection's reader and writer share, and what goes out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use afterimage_protocol::message::{FromReceiver, StreamId};
use afterimage_protocol::receiver::{Receiver, StreamIdentity};
use afterimage_protocol::{Refusal, wire};
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

use super::listener::Ingest;
use super::slot::EventSlot;
use crate::config::ms;
use crate::engine::StreamKey;

/// Messages that wait to be written, at which the reader reads no further.
const OUTBOX_MAX: usize = 64;

/// A stream that was asked for, or is open.
pub(super) struct LiveStream {
    pub(super) identity: StreamIdentity,
    /// Known once the engine has opened it.
    pub(super) key: Option<StreamKey>,
    pub(super) slot: Arc<EventSlot>,
}

pub(super) struct State {
    pub(super) receiver: Receiver,
    pub(super) streams: BTreeMap<StreamId, LiveStream>,
    pub(super) outbox: VecDeque<FromReceiver>,
    /// Nothing more is read; the writer ends when the outbox is empty.
    pub(super) is_closing: bool,
}

/// What reader and writer share. The lock is never held over a wait.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Something is to be written.
    pub(super) wake: Arc<Notify>,
    /// The outbox was emptied.
    room: Notify,
    memory: Arc<Semaphore>,
}

impl Shared {
    pub(super) fn new(receiver: Receiver, memory: Arc<Semaphore>) -> Self {
        let state = State {
            receiver,
            streams: BTreeMap::new(),
            outbox: VecDeque::new(),
            is_closing: false,
        };
        let (wake, room) = (Arc::new(Notify::new()), Notify::new());
        Self {
            state: Mutex::new(state),
            wake,
            room,
            memory,
        }
    }

    /// Queues a message.
    pub(super) fn send(&self, message: FromReceiver) {
        self.state.lock().outbox.push_back(message);
        self.wake.notify_one();
    }

    /// Lets the writer end once everything is written.
    pub(super) fn close(&self) {
        self.state.lock().is_closing = true;
        self.wake.notify_one();
        self.room.notify_one();
    }

    /// Refuses a stream, unless it is refused already. Gives its key when it was open.
    pub(super) fn refuse(&self, stream: StreamId, refusal: Refusal) -> Option<LiveStream> {
        let mut state = self.state.lock();
        let message = state.receiver.refuse(stream, refusal)?;
        state.outbox.push_back(message);
        self.free(&mut state);
        self.wake.notify_one();
        state.streams.remove(&stream)
    }

    /// Waits until the peer has read its answers.
    pub(super) async fn has_room(&self) {
        loop {
            {
                let state = self.state.lock();
                if state.outbox.len() < OUTBOX_MAX || state.is_closing {
                    return;
                }
            }
            self.room.notified().await;
        }
    }

    /// Gives memory back that is no longer outstanding.
    pub(super) fn free(&self, state: &mut State) {
        let freed = state.receiver.take_freed_bytes();
        self.memory.add_permits(usize::try_from(freed).unwrap_or(0));
    }

    /// Gives all memory back, at the end of the connection.
    pub(super) fn free_all(&self) {
        let mut state = self.state.lock();
        self.free(&mut state);
        let outstanding = state.receiver.outstanding_bytes();
        self.memory
            .add_permits(usize::try_from(outstanding).unwrap_or(0));
    }

    /// Turns what the slots were told into messages, and takes all that wait. Also gives the
    /// streams that are over by it.
    fn collect(&self, credit_bytes: u64) -> (VecDeque<FromReceiver>, Vec<LiveStream>, bool) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut over = Vec::new();
        for (id, stream) in &state.streams {
            let id = *id;
            if !state.receiver.is_open(id) {
                // What else has come waits until the peer was told that it is open.
                continue;
            }
            if let Some(refusal) = stream.slot.take_refusal() {
                state.outbox.extend(state.receiver.refuse(id, refusal));
                over.push(id);
                continue;
            }
            let pending = stream.slot.take();
            let receiver = &mut state.receiver;
            state.outbox.extend(receiver.bulk_durable(id, pending.bulk));
            if let Some(durable) = pending.durable {
                state
                    .outbox
                    .extend(receiver.durable(id, durable, credit_bytes));
            }
            for mark in pending.marks {
                let (request, kind, name) = (mark.request, mark.kind, mark.name);
                state
                    .outbox
                    .extend(receiver.place_mark(id, request, kind, name));
            }
            let paused = pending.paused;
            state
                .outbox
                .extend(paused.map(|refusal| FromReceiver::Paused { refusal }));
            if let Some(refusal) = pending.refused {
                state.outbox.extend(state.receiver.refuse(id, refusal));
                over.push(id);
            }
        }
        let over = over
            .into_iter()
            .filter_map(|id| state.streams.remove(&id))
            .collect();
        self.free(state);
        (std::mem::take(&mut state.outbox), over, state.is_closing)
    }
}

/// Writes until the connection closes or breaks.
pub(super) async fn write_all<W: AsyncWrite + Unpin>(
    shared: &Shared,
    ingest: &Ingest,
    mut to: W,
) -> std::io::Result<()> {
    let patience = ms(ingest.appliance.config.ingest.message_timeout_ms);
    loop {
        let (messages, over, is_closing) = shared.collect(ingest.credit_bytes());
        for stream in over {
            ingest.ended(&stream);
            // It may have been cut here, and then the engine does not know yet.
            ingest.close(stream.key).await;
        }
        if messages.is_empty() {
            if is_closing {
                return timeout(patience, to.shutdown()).await?;
            }
            shared.wake.notified().await;
            continue;
        }
        let mut bytes = Vec::new();
        for message in &messages {
            let encoded = wire::encode(message).map_err(std::io::Error::other)?;
            bytes.extend_from_slice(&encoded);
        }
        timeout(patience, async {
            to.write_all(&bytes).await?;
            to.flush().await
        })
        .await??;
        shared.room.notify_one();
    }
}
