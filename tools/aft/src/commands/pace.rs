//! What is done, how fast it goes and how long it will take, as a line on standard error.

use std::time::{Duration, Instant};

use super::live_line::LiveLine;
use crate::output::{self, Output};

/// What is done within this time needs no line.
const SHORT: Duration = Duration::from_secs(1);

/// Draws progress.
pub(super) struct Pace {
    what: String,
    begun: Instant,
    /// Bytes that were done before.
    start: Option<u64>,
    line: LiveLine,
}

impl Pace {
    pub(super) fn new(what: &str, output: &Output) -> Self {
        Self {
            what: output::printable(what),
            begun: Instant::now(),
            start: None,
            line: LiveLine::new(output),
        }
    }

    /// Shows how far it is.
    pub(super) fn look(&mut self, done: u64, total: u64) {
        let start = *self.start.get_or_insert(done);
        let passed = self.begun.elapsed();
        if passed >= SHORT {
            let line = line(&self.what, (start, done, total), passed);
            self.line.draw(&line);
        }
    }

    /// Ends the line.
    pub(super) fn end(&self) {
        self.line.end();
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
