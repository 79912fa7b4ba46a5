//! How merges and collections yield to ingest.
//!
//! Invariants
//! * While frames come, work on what is there already gets a small part of the engine's time; while
//!   none come, or room runs short, all that is left.
//! * What waits for its turn is woken by the clock, never by new work.

use std::time::Duration;

use afterimage_blockdev::Monotonic;

use super::{Engine, Output};

/// After the last frame so much time passes before ingest counts as idle.
const BUSY_FOR: Duration = Duration::from_millis(200);
/// Beside ingest one of so many parts of the engine's time goes to other work.
const YIELD_PARTS: u32 = 8;
/// What joining one entry of the map takes, about.
const ENTRY_TIME: Duration = Duration::from_nanos(300);
/// What checking and writing 4 KiB of a segment take, about.
const PAGE_TIME: Duration = Duration::from_micros(6);
const PAGE_BYTES: u64 = 4096;

/// When it is whose turn.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last_frame: Option<Monotonic>,
    next_turn: Monotonic,
}

impl Engine {
    /// Ingest needs the engine now.
    pub(super) fn note_ingest(&mut self) {
        self.pace.last_frame = Some(self.now);
    }

    /// Says whether work that yields may go on; otherwise it is woken when it may.
    pub(super) fn has_turn(&mut self, out: &mut Vec<Output>) -> bool {
        let is_busy = self
            .pace
            .last_frame
            .is_some_and(|at| self.now < at.after(BUSY_FOR));
        if !is_busy || self.lacks_room() || self.is_budget_short() {
            return true;
        }
        if self.now >= self.pace.next_turn {
            return true;
        }
        out.push(Output::WakeAt(self.pace.next_turn));
        false
    }

    /// Entries of the map were joined.
    pub(super) fn spent_on_entries(&mut self, entries: usize) {
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        self.spent(ENTRY_TIME.saturating_mul(entries));
    }

    /// Bytes of a segment were gone through.
    pub(super) fn spent_on_bytes(&mut self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.spent(PAGE_TIME.saturating_mul(pages));
    }

    fn spent(&mut self, time: Duration) {
        let from = self.pace.next_turn.max(self.now);
        self.pace.next_turn = from.after(time * (YIELD_PARTS - 1));
    }
}
