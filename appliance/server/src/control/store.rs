//! The store as a whole.

use std::sync::Arc;

use afterimage_protocol::rest::scrub::ScrubStatus;
use afterimage_protocol::rest::server::CollectReport;
use axum::Json;
use axum::extract::State;

use super::answer::Answer;
use crate::appliance::Appliance;
use crate::engine::Command;

/// Gives back the space of what nobody needs; answered when that is done.
pub(super) async fn collect(State(appliance): State<Arc<Appliance>>) -> Answer<CollectReport> {
    let report = appliance.engine.ask(Command::Collect).await??;
    let text = format!(
        "{} bytes were given back: {} segments dropped, {} rewritten, {} moved from the log",
        report.freed_bytes, report.dropped, report.rewritten, report.destaged
    );
    appliance.events.note("collected", text);
    Ok(Json(report))
}

/// Begins to check the whole store, or joins what is under way; says what was known before.
pub(super) async fn scrub(State(appliance): State<Arc<Appliance>>) -> Answer<ScrubStatus> {
    Ok(Json(appliance.scrub.begin()))
}

/// How far the check of the whole store is.
pub(super) async fn scrub_status(State(appliance): State<Arc<Appliance>>) -> Answer<ScrubStatus> {
    Ok(Json(appliance.scrub.status()))
}

/// Stops the check that is under way.
pub(super) async fn stop_scrub(State(appliance): State<Arc<Appliance>>) -> Answer<()> {
    appliance.scrub.cancel();
    Ok(Json(()))
}
