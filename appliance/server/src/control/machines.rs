//! Points, moves and the check of the log.

use std::sync::Arc;

use afterimage_blockdev::{ErrorClass, MachineId, PointId};
use afterimage_protocol::rest::server::{CreatePoint, MoveMachine, Point, Points, VerifyReport};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::access::Caller;
use super::answer::{Answer, Failure};
use crate::appliance::Appliance;
use crate::engine::Command;
use crate::ingest;

type Body<T> = Result<Json<T>, JsonRejection>;

/// Most points of a page.
const PAGE_MAX: usize = 1000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    after: Option<u64>,
    limit: Option<usize>,
}

pub(super) async fn list_points(
    State(appliance): State<Arc<Appliance>>,
    Path(machine): Path<String>,
    page: Result<Query<Page>, QueryRejection>,
) -> Answer<Points> {
    let Query(Page { after, limit }) = page?;
    let after = PointId(after.unwrap_or(0));
    let limit = limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let page = appliance
        .engine
        .ask(|reply| Command::ListPoints {
            machine,
            after,
            limit,
            reply,
        })
        .await??;
    Ok(Json(Points {
        points: page.points,
        total: page.total,
    }))
}

pub(super) async fn create_point(
    State(appliance): State<Arc<Appliance>>,
    Path(machine): Path<String>,
    body: Body<CreatePoint>,
) -> Answer<Point> {
    let Json(CreatePoint { name, at }) = body?;
    let point = appliance
        .engine
        .ask(|reply| Command::CreatePoint {
            machine,
            name,
            at,
            reply,
        })
        .await??;
    Ok(Json(point))
}

pub(super) async fn delete_point(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path((machine, name)): Path<(String, String)>,
) -> Answer<()> {
    let text = format!(
        "point {name} of machine {machine} was deleted by {}",
        caller.name()
    );
    appliance
        .engine
        .ask(|reply| Command::DeletePoints {
            machine,
            names: vec![name],
            reply,
        })
        .await??;
    appliance.events.note("point-deleted", text);
    Ok(Json(()))
}

pub(super) async fn verify(State(appliance): State<Arc<Appliance>>) -> Answer<VerifyReport> {
    let report = appliance.engine.ask(Command::Verify).await??;
    if !report.damage.is_empty() {
        let text = format!(
            "{} damaged parts were found in the store",
            report.damage.len()
        );
        appliance.events.note("damage-found", text);
    }
    Ok(Json(report))
}

/// The grant changes first: should the appliance fail in between, the old agent's next stream is
/// refused, and a second try completes the move.
pub(super) async fn move_machine(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path(machine): Path<String>,
    body: Body<MoveMachine>,
) -> Answer<()> {
    let Json(MoveMachine { agent }) = body?;
    let (id, name, is_stored) = find(&appliance, &machine).await?;
    let now = appliance.now();
    let outcome = appliance
        .catalogue
        .run(move |catalogue| catalogue.move_machine(id, agent, now))
        .await?;
    let before = outcome.before;
    let cut = ingest::held_by_other(&name, before.unwrap_or_default(), agent);
    appliance.live.cut_machine(id, agent, &cut);
    if is_stored {
        appliance
            .engine
            .ask(|reply| Command::Fence {
                machine: id,
                origin: agent,
                reply,
            })
            .await??;
    }
    let before = before.map_or("nobody".to_owned(), |agent| format!("agent {agent}"));
    let by = caller.name();
    let text = format!("machine {name} was moved from {before} to agent {agent} by {by}");
    appliance.events.note("machine-moved", text);
    Ok(Json(()))
}

/// Finds a machine by name or identity, among those that have records and those that have only
/// enrolled. Also says whether the engine knows it.
async fn find(appliance: &Appliance, wanted: &str) -> Result<(MachineId, String, bool), Failure> {
    let status = appliance.engine.ask(Command::Status).await?;
    let identity = wanted.parse().ok();
    let stored = status
        .machines
        .iter()
        .find(|machine| machine.name == wanted || Some(machine.machine) == identity);
    if let Some(machine) = stored {
        return Ok((machine.machine, machine.name.clone(), true));
    }
    let enrolled = appliance
        .catalogue
        .run(|catalogue| catalogue.machines())
        .await?;
    let mut names = Vec::new();
    for (machine, name) in enrolled {
        if name == wanted || Some(machine) == identity {
            return Ok((machine, name, false));
        }
        names.push(name);
    }
    names.extend(status.machines.iter().map(|machine| machine.name.clone()));
    names.sort();
    names.dedup();
    names.truncate(10);
    let known = if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    };
    Err(Failure::new(
        StatusCode::NOT_FOUND,
        ErrorClass::Refused,
        format!("there is no machine {wanted:?}"),
        format!("known machines: {known}"),
    ))
}
