//! One line of progress on standard error, drawn over where that is possible.

use std::io::Write;
use std::time::Duration;

use crate::output::Output;

/// Distance of two looks.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Where nothing can be drawn over, a line is written each so many looks.
const QUIET_LOOKS: u32 = 20;

/// See the module's text.
pub(super) struct LiveLine {
    is_lively: bool,
    looks: u32,
    last: String,
}

impl LiveLine {
    pub(super) fn new(output: &Output) -> Self {
        Self {
            is_lively: output.is_lively(),
            looks: 0,
            last: String::new(),
        }
    }

    /// Shows what is so now.
    pub(super) fn draw(&mut self, line: &str) {
        let mut to = std::io::stderr().lock();
        let written = if self.is_lively {
            write!(to, "\r\x1b[K{line}").and_then(|()| to.flush())
        } else if self.looks.is_multiple_of(QUIET_LOOKS) && line != self.last {
            writeln!(to, "{line}")
        } else {
            Ok(())
        };
        // Progress that nobody can see is no reason to stop.
        let _unseen = written;
        self.looks += 1;
        line.clone_into(&mut self.last);
    }

    /// Ends the line.
    pub(super) fn end(&self) {
        if self.is_lively && !self.last.is_empty() {
            eprintln!();
        }
    }
}
