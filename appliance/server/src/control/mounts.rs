//! Mounts, made on threads that may wait.

use std::sync::Arc;

use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::{CreateMount, Mount};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::Deserialize;

use super::answer::{Answer, Failure};
use crate::appliance::Appliance;
use crate::mounts::Mounts;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Removal {
    #[serde(default)]
    drop_branch: bool,
}

pub(super) async fn blocking<T: Send + 'static>(
    appliance: &Appliance,
    work: impl FnOnce(&Mounts) -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    let mounts = Arc::clone(&appliance.mounts);
    let done = tokio::task::spawn_blocking(move || work(&mounts)).await;
    Ok(Json(done.map_err(|_| Failure::internal())??))
}

pub(super) async fn list(State(appliance): State<Arc<Appliance>>) -> Json<Vec<Mount>> {
    Json(appliance.mounts.list())
}

pub(super) async fn create(
    State(appliance): State<Arc<Appliance>>,
    body: Result<Json<CreateMount>, JsonRejection>,
) -> Answer<Mount> {
    let Json(request) = body?;
    blocking(&appliance, move |mounts| mounts.create(&request)).await
}

pub(super) async fn remove(
    State(appliance): State<Arc<Appliance>>,
    Path(id): Path<String>,
    removal: Result<Query<Removal>, QueryRejection>,
) -> Answer<()> {
    let Query(Removal { drop_branch }) = removal?;
    let id = id.parse().map_err(|_| {
        Failure::refused(
            format!("{id:?} is no mount's number"),
            "`aft mounts` lists them",
        )
    })?;
    blocking(&appliance, move |mounts| mounts.remove(id, drop_branch)).await
}
