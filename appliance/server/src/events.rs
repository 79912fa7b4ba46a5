//! Notes what happened, without ever holding up whoever it happened to.

use std::sync::Arc;

use afterimage_blockdev::{Clock, Timestamp};
use tokio::sync::mpsc;

use crate::catalogue::Catalogue;

/// Events that wait to be written, at most; more are only logged.
const WAITING_MAX: usize = 256;

struct Note {
    time: Timestamp,
    kind: &'static str,
    text: String,
}

/// A way to the catalogue's events.
#[derive(Clone)]
pub struct EventLog {
    notes: mpsc::Sender<Note>,
    clock: Arc<dyn Clock>,
}

impl EventLog {
    /// Starts the task that writes events; it ends when the last clone is gone.
    #[must_use]
    pub fn start(catalogue: Catalogue, clock: Arc<dyn Clock>) -> Self {
        let (notes, mut waiting) = mpsc::channel::<Note>(WAITING_MAX);
        tokio::spawn(async move {
            while let Some(Note { time, kind, text }) = waiting.recv().await {
                let written = catalogue
                    .run(move |catalogue| catalogue.add_event(time, kind, &text))
                    .await;
                if let Err(error) = written {
                    tracing::error!(%error, "an event is not kept");
                }
            }
        });
        Self { notes, clock }
    }

    /// Notes and logs an event of a class. When too many wait it is only logged.
    pub fn note(&self, kind: &'static str, text: String) {
        tracing::info!(kind, "{text}");
        let note = Note {
            time: self.clock.wall(),
            kind,
            text,
        };
        if self.notes.try_send(note).is_err() {
            tracing::warn!(kind, "too many events at once; this one is not kept");
        }
    }
}
