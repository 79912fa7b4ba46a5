//! `aft store scrub`.

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::scrub::{ScrubResult, ScrubStatus};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::live_line::LOOK_EVERY;
use super::pace::Pace;
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output};

const ROUTE: &str = "/v1/store/scrub";

/// Starts a scrub, or joins the one under way, and waits for its end. An interruption stops it.
pub(super) async fn scrub(no_wait: bool, server: &Client, output: &Output) -> Result<(), AftError> {
    let begun: ScrubStatus = server.post(ROUTE, &Value::Null).await?;
    if no_wait {
        output.answer(&begun, || "a scrub is under way\n".to_owned());
        return Ok(());
    }
    let system = |error: std::io::Error| AftError::new(ErrorClass::Operator, error.to_string(), "");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut pace = Pace::new("reading", output);
    let ended = loop {
        let status: ScrubStatus = server.get(ROUTE).await?;
        if status.passes > begun.passes || !status.is_running {
            break status;
        }
        pace.look(status.done_bytes, status.total_bytes);
        let is_interrupted = tokio::select! {
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
            () = tokio::time::sleep(LOOK_EVERY) => false,
        };
        if is_interrupted {
            pace.end();
            let _stopped: Value = server.delete(ROUTE).await?;
            let message = "interrupted; the scrub was stopped";
            return Err(AftError::new(ErrorClass::Retry, message, ""));
        }
    };
    pace.end();
    let last = ended.last.filter(|_| ended.passes > begun.passes);
    let Some(last) = last else {
        let message = "the scrub was stopped before its end";
        return Err(AftError::new(ErrorClass::Retry, message, ""));
    };
    output.answer(&last, || text(&last));
    match last.damage.len() {
        0 => Ok(()),
        count => Err(AftError::new(
            ErrorClass::Corrupt,
            format!("{count} parts of the store are damaged"),
            "the list above names the points that are hurt",
        )),
    }
}

fn text(last: &ScrubResult) -> String {
    let mut text = format!("{}\n", summary(last));
    for damage in &last.damage {
        text.push_str(&format!("! {}\n", output::printable(damage)));
    }
    text
}

/// One line about a scrub that has ended.
pub(super) fn summary(last: &ScrubResult) -> String {
    let damage = match last.damage.len() {
        0 => "no damage".to_owned(),
        count => format!("{count} damaged parts"),
    };
    format!(
        "last scrub: {}, {} in {} files, {damage}",
        output::time(last.ended),
        output::bytes(last.bytes),
        last.files
    )
}
