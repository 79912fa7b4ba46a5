//! Branches, handled on threads that may wait.

use std::path::Path as FilePath;
use std::sync::Arc;

use afterimage_blockdev::HistoryId;
use afterimage_protocol::rest::branch::{Branch, CreateBranch, Promote, Promotion, SetQuota};
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};

use super::access::Caller;
use super::answer::{Answer, Failure};
use super::mounts::blocking;
use crate::appliance::Appliance;

fn history(text: &str) -> Result<HistoryId, Failure> {
    text.parse().map_err(|_| {
        Failure::refused(
            format!("{text:?} is no history of a branch"),
            "`aft branch list --json` shows them",
        )
    })
}

pub(super) async fn list(State(appliance): State<Arc<Appliance>>) -> Answer<Vec<Branch>> {
    blocking(&appliance, |mounts| mounts.branches()).await
}

pub(super) async fn create(
    caller: Caller,
    State(appliance): State<Arc<Appliance>>,
    body: Result<Json<CreateBranch>, JsonRejection>,
) -> Answer<Branch> {
    let Json(request) = body?;
    let made = blocking(&appliance, move |mounts| mounts.create_branch(&request)).await?;
    let text = format!(
        "{} made branch {} of {}/{} at LSN {}",
        caller.name(),
        made.name,
        made.machine,
        made.disk,
        made.base
    );
    appliance.events.note("branch-created", text);
    Ok(made)
}

pub(super) async fn remove(
    caller: Caller,
    State(appliance): State<Arc<Appliance>>,
    Path(name): Path<String>,
) -> Answer<()> {
    let history = history(&name)?;
    let done = blocking(&appliance, move |mounts| mounts.drop_branch(history)).await?;
    let text = format!("{} dropped branch {history}", caller.name());
    appliance.events.note("branch-dropped", text);
    Ok(done)
}

pub(super) async fn set_quota(
    State(appliance): State<Arc<Appliance>>,
    Path(name): Path<String>,
    body: Result<Json<SetQuota>, JsonRejection>,
) -> Answer<()> {
    let Json(SetQuota { quota_bytes }) = body?;
    let history = history(&name)?;
    blocking(&appliance, move |mounts| {
        mounts.set_quota(history, quota_bytes)
    })
    .await
}

pub(super) async fn promote(
    caller: Caller,
    State(appliance): State<Arc<Appliance>>,
    Path(name): Path<String>,
    body: Result<Json<Promote>, JsonRejection>,
) -> Answer<Promotion> {
    let Json(Promote { target, is_forced }) = body?;
    let history = history(&name)?;
    let begun = blocking(&appliance, move |mounts| {
        mounts.promote(history, FilePath::new(&target), is_forced)
    });
    let begun = begun.await?;
    let (who, image, lsn) = (caller.name(), &begun.target, begun.lsn);
    let text = format!("{who} promotes branch {history} at LSN {lsn} to {image}");
    appliance.events.note("branch-promotion", text);
    Ok(begun)
}

pub(super) async fn stop_promotion(
    State(appliance): State<Arc<Appliance>>,
    Path(name): Path<String>,
) -> Answer<()> {
    let history = history(&name)?;
    blocking(&appliance, move |mounts| mounts.stop_promotion(history)).await
}
