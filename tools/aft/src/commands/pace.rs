//! A line on standard error: what is done, how fast it goes and how long it will take.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::output::{self, Output};

/// Distance of two looks.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Where nothing can be drawn over, a line is written each so many looks.
const QUIET_LOOKS: u32 = 20;
/// What is done within this time needs no line.
const SHORT: Duration = Duration::from_secs(1);

/// Draws progress.
pub(super) struct Pace {
    what: &'static str,
    is_lively: bool,
    begun: Instant,
    /// Bytes that were done before.
    start: Option<u64>,
    looks: u32,
    has_line: bool,
}

impl Pace {
    pub(super) fn new(what: &'static str, output: &Output) -> Self {
        Self {
            what,
            is_lively: output.is_lively(),
            begun: Instant::now(),
            start: None,
            looks: 0,
            has_line: false,
        }
    }

    /// Shows how far it is.
    pub(super) fn look(&mut self, done: u64, total: u64) {
        let start = *self.start.get_or_insert(done);
        let passed = self.begun.elapsed();
        self.looks += 1;
        if passed < SHORT {
            return;
        }
        let line = line(self.what, (start, done, total), passed);
        let mut to = std::io::stderr().lock();
        // Whoever reads may have had enough.
        if self.is_lively {
            let _had_enough = write!(to, "\r\x1b[K{line}");
            let _had_enough = to.flush();
            self.has_line = true;
        } else if self.looks.is_multiple_of(QUIET_LOOKS) {
            let _had_enough = writeln!(to, "{line}");
        }
    }

    /// Ends the line.
    pub(super) fn end(&self) {
        if self.has_line {
            eprintln!();
        }
    }
}

fn line(what: &str, (start, done, total): (u64, u64, u64), passed: Duration) -> String {
    if total == 0 {
        return format!("{what} for {} s", passed.as_secs());
    }
    let ms = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
    let here = done.saturating_sub(start);
    let rate = here.saturating_mul(1000) / ms;
    let mut text = format!(
        "{what}: {} of {} ({}), {}/s",
        output::bytes(done),
        output::bytes(total),
        output::percent(done, total),
        output::bytes(rate)
    );
    if here > 0 && total > done {
        let left = u128::from(total - done) * u128::from(ms) / u128::from(here);
        let left = output::span(u64::try_from(left).unwrap_or(u64::MAX));
        text.push_str(&format!(", {left} left"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_how_far_how_fast_and_how_long() {
        let passed = Duration::from_secs(2);
        assert_eq!(
            line("reading", (0, 64 << 20, 256 << 20), passed),
            "reading: 64.0 MiB of 256.0 MiB (25 %), 32.0 MiB/s, 6.0 s left"
        );
        assert_eq!(line("reading", (0, 0, 0), passed), "reading for 2 s");
        // What was done before this run says nothing of its speed.
        let resumed = line("reading", (64, 64, 128), passed);
        assert_eq!(resumed, "reading: 64 B of 128 B (50 %), 0 B/s");
    }
}
