//! `aft status`.

use std::fmt::Write;

use afterimage_protocol::rest::scrub::ScrubStatus;
use afterimage_protocol::rest::server::{MachineStatus, ServerStatus};

use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn status(server: &Client, output: &Output) -> Result<(), AftError> {
    let status: ServerStatus = server.get("/v1/status").await?;
    output.answer(&status, || text(&status));
    Ok(())
}

fn text(status: &ServerStatus) -> String {
    let mut text = String::new();
    let ingest = if status.is_ingest_paused {
        "ingest is paused"
    } else {
        "ingest is open"
    };
    let _always_ok = writeln!(
        text,
        "{} · afterimaged {} · {} stored, {} free · {ingest} · {}\n",
        status.health,
        status.version,
        output::bytes(status.stored_bytes),
        output::bytes(status.free_bytes),
        output::time(status.now),
    );
    if !status.space.text.is_empty() {
        let _always_ok = writeln!(text, "space: {}\n", output::printable(&status.space.text));
    }
    if let Some(line) = scrub_line(&status.scrub) {
        let _always_ok = writeln!(text, "{line}\n");
    }
    for cause in &status.causes {
        let _always_ok = writeln!(text, "! {}", output::printable(cause));
    }
    if !status.causes.is_empty() {
        text.push('\n');
    }
    if status.machines.is_empty() {
        text.push_str("No machine is protected yet. `aft token create` lets an agent enrol.\n");
        return text;
    }
    text.push_str(&machines(&status.machines));
    text.push('\n');
    text.push_str(&super::disk::table(&status.machines));
    text
}

fn scrub_line(scrub: &ScrubStatus) -> Option<String> {
    let last = scrub.last.as_ref().map(super::scrub::summary);
    if !scrub.is_running {
        return last;
    }
    let waits = if scrub.is_waiting {
        ", waiting for ingest"
    } else {
        ""
    };
    let now = format!(
        "scrub: {} of {} ({}){waits}",
        output::bytes(scrub.done_bytes),
        output::bytes(scrub.total_bytes),
        output::percent(scrub.done_bytes, scrub.total_bytes)
    );
    Some(last.map_or_else(|| now.clone(), |last| format!("{now}; {last}")))
}

/// Machines as a table.
pub(super) fn machines(machines: &[MachineStatus]) -> String {
    let mut table = Table::new(&[
        "MACHINE",
        "AGENT",
        "RPO",
        "CAPTURE",
        "LINK",
        "CACHE",
        "APPLY",
        "DURABLE LSN",
        "POINTS",
        "EPOCH",
    ]);
    for machine in machines {
        table.row([
            machine.name.clone(),
            if machine.is_connected {
                "connected"
            } else {
                "away"
            }
            .to_owned(),
            output::maybe_span(machine.rpo_ms),
            output::maybe_span(machine.lag.capture_ms),
            output::maybe_span(machine.lag.link_ms),
            output::span(machine.lag.cache_ms),
            output::span(machine.lag.apply_ms),
            machine.durable.to_string(),
            machine.point_count.to_string(),
            machine.epoch.to_string(),
        ]);
    }
    table.text()
}
