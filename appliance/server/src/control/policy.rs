//! Retention: policies, locks, and deleting many points at once.

use std::sync::Arc;

use afterimage_protocol::rest::policy::{DeletePoints, LockPoints, MachinePolicy, SetPolicy};
use afterimage_protocol::rest::time::format_rfc3339;
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};

use super::access::Caller;
use super::answer::Answer;
use crate::appliance::Appliance;
use crate::engine::Command;

type Body<T> = Result<Json<T>, JsonRejection>;

/// Longest body: ten thousand names of the longest kind.
pub(super) const BODY_BYTES_MAX: usize = 2 << 20;

pub(super) async fn show(
    State(appliance): State<Arc<Appliance>>,
    Path(machine): Path<String>,
) -> Answer<MachinePolicy> {
    let policy = appliance
        .engine
        .ask(|reply| Command::GetPolicy { machine, reply })
        .await??;
    Ok(Json(policy))
}

pub(super) async fn set(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path(machine): Path<String>,
    body: Body<SetPolicy>,
) -> Answer<MachinePolicy> {
    let Json(wanted) = body?;
    let name = machine.clone();
    let policy = appliance
        .engine
        .ask(|reply| Command::SetPolicy {
            machine,
            wanted,
            reply,
        })
        .await??;
    let text = format!(
        "the policy of machine {name} was changed to version {} by {}",
        policy.version,
        caller.name()
    );
    appliance.events.note("policy-changed", text);
    Ok(Json(policy))
}

pub(super) async fn lock(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path(machine): Path<String>,
    body: Body<LockPoints>,
) -> Answer<()> {
    let Json(LockPoints { names, until }) = body?;
    let text = format!(
        "{} locked until {} on machine {machine} by {}",
        counted(&names),
        format_rfc3339(until),
        caller.name()
    );
    appliance
        .engine
        .ask(|reply| Command::LockPoints {
            machine,
            names,
            until,
            reply,
        })
        .await??;
    appliance.events.note("points-locked", text);
    Ok(Json(()))
}

pub(super) async fn delete(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path(machine): Path<String>,
    body: Body<DeletePoints>,
) -> Answer<()> {
    let Json(DeletePoints { names }) = body?;
    let text = format!(
        "{} deleted of machine {machine} by {}",
        counted(&names),
        caller.name()
    );
    appliance
        .engine
        .ask(|reply| Command::DeletePoints {
            machine,
            names,
            reply,
        })
        .await??;
    appliance.events.note("points-deleted", text);
    Ok(Json(()))
}

pub(super) async fn confirm_clock(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
) -> Answer<()> {
    appliance.engine.ask(Command::ConfirmClock).await??;
    let text = format!("the wall clock was confirmed by {}", caller.name());
    appliance.events.note("clock-confirmed", text);
    Ok(Json(()))
}

fn counted(names: &[String]) -> String {
    match names {
        [name] => format!("point {name} was"),
        names => format!("{} points were", names.len()),
    }
}
