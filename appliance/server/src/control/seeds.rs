//! Seeds of first copies.

use std::sync::Arc;

use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::seed::{CreateSeed, Seed, SeedPlace};
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};

use super::access::Caller;
use super::answer::{Answer, Failure};
use crate::appliance::Appliance;
use crate::engine::Command;
use crate::seeds::Seeds;

async fn blocking<T: Send + 'static>(
    appliance: &Appliance,
    work: impl FnOnce(&Seeds) -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    let seeds = Arc::clone(&appliance.seeds);
    let done = tokio::task::spawn_blocking(move || work(&seeds)).await;
    Ok(Json(done.map_err(|_| Failure::internal())??))
}

pub(super) async fn list(State(appliance): State<Arc<Appliance>>) -> Answer<Vec<Seed>> {
    blocking(&appliance, Seeds::list).await
}

pub(super) async fn create(
    State(appliance): State<Arc<Appliance>>,
    body: Result<Json<CreateSeed>, JsonRejection>,
) -> Answer<SeedPlace> {
    let Json(CreateSeed { machine, disk }) = body?;
    let status = appliance.engine.ask(Command::Status).await?;
    let known = status.machines.iter().find(|known| known.name == machine);
    let known = known.and_then(|known| known.disks.iter().find(|known| known.name == disk));
    if known.is_some_and(|known| known.has_copy) {
        return Err(Failure::refused(
            format!("a whole copy of {machine}/{disk} is here already"),
            "it needs no seed: only what differs is sent to it anyway",
        ));
    }
    blocking(&appliance, move |seeds| seeds.place(&machine, &disk)).await
}

pub(super) async fn ready(
    State(appliance): State<Arc<Appliance>>,
    Path((machine, disk)): Path<(String, String)>,
) -> Answer<Seed> {
    let text = format!("{machine}/{disk} has a seed");
    let seed = blocking(&appliance, move |seeds| seeds.ready(&machine, &disk)).await?;
    appliance.events.note("seed-ready", text);
    Ok(seed)
}

pub(super) async fn remove(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path((machine, disk)): Path<(String, String)>,
) -> Answer<()> {
    let text = format!(
        "the seed of {machine}/{disk} was dropped by {}",
        caller.name()
    );
    let done = blocking(&appliance, move |seeds| seeds.drop_seed(&machine, &disk)).await?;
    appliance.events.note("seed-dropped", text);
    Ok(done)
}
