//! Does bulk work on a thread of its own, shows how far it is, and stops it in order.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::ErrorClass;
use afterimage_bulk::{BulkError, Progress};
use tokio::signal::unix::{SignalKind, signal};

use super::bulk_error;
use crate::error::AftError;
use crate::output::{self, Output};

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Where nothing can be drawn over, a line is written each so many looks.
const QUIET_LOOKS: u32 = 20;
/// What is done within this time needs no line.
const SHORT: Duration = Duration::from_secs(1);

/// Waits for the work. An interruption asks it to stop, and then waits for what is under way.
pub(super) async fn watch<T: Send + 'static>(
    what: &str,
    output: &Output,
    progress: &Arc<Progress>,
    work: impl FnOnce(&Progress) -> Result<T, BulkError> + Send + 'static,
) -> Result<T, AftError> {
    let system = |error: std::io::Error| AftError::new(ErrorClass::Operator, error.to_string(), "");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let shared = Arc::clone(progress);
    let mut job = tokio::task::spawn_blocking(move || work(&shared));
    let mut drawn = Drawn::new(what, output);
    let result = loop {
        tokio::select! {
            result = &mut job => break result,
            _ = interrupt.recv() => progress.stop(),
            _ = terminate.recv() => progress.stop(),
            () = tokio::time::sleep(LOOK_EVERY) => drawn.look(progress),
        }
    };
    drawn.end();
    match result {
        Ok(done) => done.map_err(|error| bulk_error(&error)),
        Err(error) => Err(AftError::new(
            ErrorClass::Operator,
            format!("the work failed: {error}"),
            "report it",
        )),
    }
}

/// A line on standard error.
struct Drawn {
    what: String,
    is_lively: bool,
    begun: Instant,
    /// Where an earlier run had stopped.
    start: Option<u64>,
    looks: u32,
    has_line: bool,
}

impl Drawn {
    fn new(what: &str, output: &Output) -> Self {
        Self {
            what: output::printable(what),
            is_lively: output.is_lively(),
            begun: Instant::now(),
            start: None,
            looks: 0,
            has_line: false,
        }
    }

    fn look(&mut self, progress: &Progress) {
        let position = progress.position_bytes();
        let start = *self.start.get_or_insert(position);
        let passed = self.begun.elapsed();
        self.looks += 1;
        if passed < SHORT {
            return;
        }
        let line = line(&self.what, progress, start, passed);
        // Whoever reads may have had enough.
        let mut to = std::io::stderr().lock();
        if self.is_lively {
            let _had_enough = write!(to, "\r\x1b[K{line}");
            let _had_enough = to.flush();
            self.has_line = true;
        } else if self.looks.is_multiple_of(QUIET_LOOKS) {
            let _had_enough = writeln!(to, "{line}");
        }
    }

    fn end(&self) {
        if self.has_line {
            eprintln!();
        }
    }
}

/// What is done, how fast it goes and how long it will take.
fn line(what: &str, progress: &Progress, start: u64, passed: Duration) -> String {
    let (total, position) = (progress.total_bytes(), progress.position_bytes());
    if total == 0 {
        return format!("{what} for {} s", passed.as_secs());
    }
    let ms = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = progress.moved_bytes().saturating_mul(1000) / ms;
    let mut text = format!(
        "{what}: {} of {} ({}), {}/s",
        output::bytes(position),
        output::bytes(total),
        output::percent(position, total),
        output::bytes(rate)
    );
    let done = position.saturating_sub(start);
    if done > 0 {
        let left = u128::from(total.saturating_sub(position)) * u128::from(ms) / u128::from(done);
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        text.push_str(&format!(", {} left", output::span(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_before_anything_is_known_has_no_rate() {
        let progress = Progress::default();
        let text = line("writing", &progress, 0, Duration::from_secs(3));
        assert_eq!(text, "writing for 3 s");
    }
}
