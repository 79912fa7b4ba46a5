//! Work on a thread of its own: shows how far it is, and lets an interruption stop it in order.

use afterimage_blockdev::ErrorClass;
use tokio::signal::unix::{SignalKind, signal};

use super::live_line::LOOK_EVERY;
use super::pace::Pace;
use crate::error::AftError;
use crate::output::Output;

/// Waits for `work`. An interruption calls `stop`, and then waits for what is under way.
/// `done_and_total` says how far it is, in bytes.
pub(super) async fn watch<T: Send + 'static>(
    what: &str,
    output: &Output,
    stop: impl Fn(),
    done_and_total: impl Fn() -> (u64, u64),
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AftError> {
    let system = |error: std::io::Error| AftError::new(ErrorClass::Operator, error.to_string(), "");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut job = tokio::task::spawn_blocking(work);
    let mut pace = Pace::new(what, output);
    let ended = loop {
        tokio::select! {
            ended = &mut job => break ended,
            _ = interrupt.recv() => stop(),
            _ = terminate.recv() => stop(),
            () = tokio::time::sleep(LOOK_EVERY) => {
                let (done, total) = done_and_total();
                pace.look(done, total);
            }
        }
    };
    pace.end();
    ended.map_err(|error| {
        AftError::new(
            ErrorClass::Operator,
            format!("the work failed: {error}"),
            "report it",
        )
    })
}
