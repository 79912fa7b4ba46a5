//! What takes room, how long it lasts, and quotas.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::PointId;
use afterimage_protocol::rest::space::{PointSpaces, SetQuota, SpaceReport};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path as UrlPath, Query, State};
use serde::Deserialize;
use tokio::sync::watch;

use super::access::Caller;
use super::answer::{Answer, Failure};
use crate::appliance::Appliance;
use crate::engine::{Command, EngineGone, SpaceFigures};

/// Most points of a page.
const PAGE_MAX: usize = 1000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    after: Option<u64>,
    limit: Option<usize>,
}

/// Parts of the data directory that may be file systems of their own.
const PARTS: &[&str] = &["log", "manifest", "runs", "segments"];

/// Bytes that file systems give to the files below a data directory; what is mounted there besides
/// parts of the store is left out.
fn disk_bytes(directory: &Path) -> std::io::Result<u64> {
    let device_of = |path: &Path| std::fs::metadata(path).map(|found| found.dev());
    let mut devices = vec![device_of(directory)?];
    let parts = PARTS.iter().map(|part| directory.join(part));
    devices.extend(parts.filter_map(|part| device_of(&part).ok()));
    let mut left: Vec<PathBuf> = vec![directory.to_owned()];
    let mut bytes = 0;
    while let Some(directory) = left.pop() {
        bytes += std::fs::metadata(&directory)?.blocks() * 512;
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            // A file may go while this looks at it.
            let Ok(found) = std::fs::symlink_metadata(&path) else {
                continue;
            };
            if !devices.contains(&found.dev()) {
                continue;
            }
            if found.is_dir() {
                left.push(path);
            } else {
                bytes += found.blocks() * 512;
            }
        }
    }
    Ok(bytes)
}

pub(super) async fn figures(appliance: &Appliance) -> Result<SpaceFigures, EngineGone> {
    appliance.engine.ask(Command::Space).await
}

pub(super) async fn show(State(appliance): State<Arc<Appliance>>) -> Answer<SpaceReport> {
    let figures = figures(&appliance).await?;
    let directory = appliance.data_dir.clone();
    let looked = tokio::task::spawn_blocking(move || disk_bytes(&directory)).await;
    let looked = looked.map_err(|_| Failure::internal())?;
    let bytes = looked.map_err(|error| {
        Failure::refused(format!("the data directory cannot be read: {error}"), "")
    })?;
    Ok(Json(figures.report(bytes)))
}

pub(super) async fn points(
    State(appliance): State<Arc<Appliance>>,
    UrlPath(machine): UrlPath<String>,
    page: Result<Query<Page>, QueryRejection>,
) -> Answer<PointSpaces> {
    let Query(Page { after, limit }) = page?;
    let found = appliance.engine.ask(|reply| Command::PointSpace {
        machine,
        after: PointId(after.unwrap_or(0)),
        limit: limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX),
        reply,
    });
    Ok(Json(found.await??))
}

pub(super) async fn set_quota(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    body: Result<Json<SetQuota>, JsonRejection>,
) -> Answer<()> {
    let Json(SetQuota { of, bytes }) = body?;
    let name = of.clone().unwrap_or_else(|| "the store".to_owned());
    if bytes == Some(0) {
        let hint = "`aft quota clear` takes a quota away";
        return Err(Failure::refused(
            "a quota of nothing would keep nothing",
            hint,
        ));
    }
    let asked = appliance
        .engine
        .ask(|reply| Command::SetQuota { of, bytes, reply });
    asked.await??;
    let what = bytes.map_or("taken away".to_owned(), |bytes| {
        format!("set to {bytes} bytes")
    });
    let text = format!("the quota of {name} was {what} by {}", caller.name());
    appliance.events.note("quota-changed", text);
    Ok(Json(()))
}

/// Notes it when room begins to run short, until the daemon stops.
pub async fn watch(appliance: Arc<Appliance>, mut stopping: watch::Receiver<bool>) {
    let mut known: Vec<String> = Vec::new();
    let warning = appliance.config.control.space_warning();
    let look_every = Duration::from_millis(appliance.config.store.retention_interval_ms);
    loop {
        let Ok(figures) = figures(&appliance).await else {
            return;
        };
        let warnings = figures.warnings(warning);
        for (name, text) in &warnings {
            if !known.contains(name) {
                appliance.events.note("space-short", text.clone());
            }
        }
        known = warnings.into_iter().map(|(name, _)| name).collect();
        tokio::select! {
            () = tokio::time::sleep(look_every) => {}
            _ = stopping.changed() => return,
        }
    }
}
