//! Disks of virtual machines, served on threads that may wait.

use std::sync::Arc;

use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::vhost::{ServeVhost, VhostSocket};
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};

use super::access::Caller;
use super::answer::{Answer, Failure};
use crate::appliance::Appliance;

async fn blocking<T: Send + 'static>(
    appliance: &Arc<Appliance>,
    work: impl FnOnce(&Appliance) -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    let appliance = Arc::clone(appliance);
    let done = tokio::task::spawn_blocking(move || work(&appliance)).await;
    Ok(Json(done.map_err(|_| Failure::internal())??))
}

pub(super) async fn list(State(appliance): State<Arc<Appliance>>) -> Json<Vec<VhostSocket>> {
    Json(appliance.vhost.list())
}

pub(super) async fn serve(
    caller: Caller,
    State(appliance): State<Arc<Appliance>>,
    body: Result<Json<ServeVhost>, JsonRejection>,
) -> Answer<VhostSocket> {
    let Json(request) = body?;
    let served = blocking(&appliance, move |appliance| {
        let (engine, mounts) = (&appliance.engine, &appliance.mounts);
        appliance.vhost.serve(engine, mounts, &request)
    })
    .await?;
    let (who, what, socket) = (caller.name(), &served.reference, &served.socket);
    let text = format!("{who} serves {what} to virtual machines at {socket}");
    appliance.events.note("vhost-served", text);
    Ok(served)
}

pub(super) async fn end(
    caller: Caller,
    State(appliance): State<Arc<Appliance>>,
    Path(socket): Path<String>,
) -> Answer<()> {
    let text = format!("{} ended the disk at {socket}", caller.name());
    let done = blocking(&appliance, move |appliance| appliance.vhost.end(&socket)).await?;
    appliance.events.note("vhost-ended", text);
    Ok(done)
}
