//! A disk in front of a source: every write goes to the source and, once protected, in order into
//! the log.
//!
//! Invariants of a protected tap (design decision D8)
//! * Writes that overlap are serialised by a range lock over their whole blocks.
//! * The LSN is taken when the local write has completed and before its completion is delivered,
//!   so LSN order is a linear extension of happens-before.
//! * The log gets the bytes that the source got: a private copy, or what was read back under the
//!   range lock.
//! * A region is marked in the activity log, durably, before the first write in it is given to the
//!   source.
//! * Reads pass straight through.

pub mod admission;
mod capture;
mod passing;
pub mod ranges;
mod request;

use std::sync::{Arc, OnceLock};

use afterimage_blockdev::{BlockCompleter, BlockDevice, BlockOp, Geometry, Token};

pub use capture::{Capture, CaptureEvents};
use passing::{Passing, PassingCompleter};
use request::Request;

/// See the module's text.
pub struct Tap {
    source: Arc<dyn BlockDevice>,
    capture: OnceLock<Arc<Capture>>,
    passing: Arc<Passing>,
}

impl Tap {
    /// Puts a tap in front of a source; nothing is captured yet.
    #[must_use]
    pub fn new(source: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Self {
            source,
            capture: OnceLock::new(),
            passing: Arc::default(),
        })
    }

    /// The source.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn BlockDevice> {
        &self.source
    }

    /// Captures every write from now on, for good. When `settled` is called, every write that was
    /// not captured has completed.
    ///
    /// # Panics
    /// When it captures already.
    pub fn capture(&self, capture: Arc<Capture>, settled: Box<dyn FnOnce() + Send>) {
        assert!(
            self.capture.set(capture).is_ok(),
            "a tap begins to capture once"
        );
        self.passing.close(settled);
    }

    /// What captures, if anything does.
    #[must_use]
    pub fn captured_by(&self) -> Option<&Arc<Capture>> {
        self.capture.get()
    }
}

impl BlockDevice for Tap {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        if matches!(
            op,
            BlockOp::Read { .. } | BlockOp::Flush | BlockOp::Extents { .. }
        ) {
            return self.source.submit(token, op, to);
        }
        if let Some(capture) = self.capture.get() {
            return Request::start(capture, token, op, to);
        }
        // The count is taken before the second look, so that `capture` waits for this request or
        // this request sees that it is captured.
        if self.passing.enter() {
            let to = Arc::new(PassingCompleter {
                passing: Arc::clone(&self.passing),
                to,
            });
            return self.source.submit(token, op, to);
        }
        let capture = self.capture.get().expect("closed only once it captures");
        Request::start(capture, token, op, to);
    }
}

#[cfg(test)]
mod tests;
