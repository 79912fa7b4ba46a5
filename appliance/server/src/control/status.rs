//! How everything is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{DiskId, ErrorClass, MachineId, Timestamp};
use afterimage_protocol::message::{DiskPhase, DiskReport, SourceReport};
use afterimage_protocol::rest::server::{DiskStatus, Event, MachineStatus, ServerStatus, StageLag};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::answer::{Answer, Failure};
use super::space;
use crate::appliance::Appliance;
use crate::engine::{
    Command, DiskSummary, EngineStatus, HistorySummary, MachineSummary, SpaceFigures,
};
use crate::ingest::{Reported, StageDelay};

/// Most events of a page.
const EVENTS_MAX: usize = 1000;
const NS_PER_MS: u64 = 1_000_000;

pub(super) async fn status(State(appliance): State<Arc<Appliance>>) -> Answer<ServerStatus> {
    let engine = appliance.engine.ask(Command::Status).await?;
    let now = appliance.now();
    let figures = space::figures(&appliance).await?;
    let mut machines = all_machines(&appliance, &engine, now);
    add_space(&mut machines, &figures);
    let mut health = Health::default();
    if let Some(refusal) = &engine.paused {
        health.red(format!("ingest is paused: {refusal}"));
    }
    for (name, why) in figures.waiting() {
        health.red(format!("machine {name}: its ingest waits: {why}"));
    }
    if let Some(ahead) = engine.clock_ahead {
        health.red(format!(
            "the clock is {} s ahead of where it should be, so no lock ends and no point is \
             thinned; set it right, then say so with `aft policy confirm-clock`",
            ahead.as_secs()
        ));
    }
    let scrub = appliance.scrub.status();
    if let Some(first) = scrub.damage.first() {
        health.red(format!(
            "{} parts of the store are damaged: {first}; `aft store scrub` reads it again and \
             lists all",
            scrub.damage.len()
        ));
    }
    for (_, text) in figures.warnings(appliance.config.control.space_warning()) {
        health.yellow(text);
    }
    for machine in &machines {
        judge(
            &mut health,
            machine,
            appliance.config.control.rpo_warning_ms,
        );
    }
    Ok(Json(ServerStatus {
        health: health.word().to_owned(),
        causes: health.causes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        now,
        stored_bytes: engine.stored_bytes,
        free_bytes: engine.free_bytes,
        is_ingest_paused: engine.paused.is_some(),
        data_port: appliance.data_port,
        control_port: appliance.control_port,
        space: figures.forecast(),
        scrub,
        machines,
    }))
}

pub(super) async fn machines(
    State(appliance): State<Arc<Appliance>>,
) -> Answer<Vec<MachineStatus>> {
    let engine = appliance.engine.ask(Command::Status).await?;
    let figures = space::figures(&appliance).await?;
    let mut machines = all_machines(&appliance, &engine, appliance.now());
    add_space(&mut machines, &figures);
    Ok(Json(machines))
}

pub(super) async fn disks(
    State(appliance): State<Arc<Appliance>>,
    Path(wanted): Path<String>,
) -> Answer<Vec<DiskStatus>> {
    let engine = appliance.engine.ask(Command::Status).await?;
    let identity: Option<MachineId> = wanted.parse().ok();
    let mut machines = all_machines(&appliance, &engine, appliance.now());
    add_space(&mut machines, &space::figures(&appliance).await?);
    let names: Vec<String> = machines
        .iter()
        .take(10)
        .map(|machine| machine.name.clone())
        .collect();
    let found = machines
        .into_iter()
        .find(|machine| machine.name == wanted || Some(machine.machine) == identity);
    match found {
        Some(machine) => Ok(Json(machine.disks)),
        None => Err(Failure::new(
            StatusCode::NOT_FOUND,
            ErrorClass::Refused,
            format!("there is no machine {wanted:?}"),
            format!(
                "known machines: {}",
                if names.is_empty() {
                    "none".to_owned()
                } else {
                    names.join(", ")
                }
            ),
        )),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventPage {
    after: Option<u64>,
    limit: Option<usize>,
}

pub(super) async fn events(
    State(appliance): State<Arc<Appliance>>,
    page: Result<Query<EventPage>, QueryRejection>,
) -> Answer<Vec<Event>> {
    let Query(EventPage { after, limit }) = page?;
    let after = after.unwrap_or(0);
    let limit = limit.unwrap_or(EVENTS_MAX).clamp(1, EVENTS_MAX);
    Ok(Json(
        appliance
            .catalogue
            .run(move |catalogue| catalogue.events(after, limit))
            .await?,
    ))
}

fn all_machines(
    appliance: &Appliance,
    engine: &EngineStatus,
    now: Timestamp,
) -> Vec<MachineStatus> {
    let machine = |machine: &MachineSummary| {
        let reported = appliance.reports.get(machine.machine);
        describe(machine, reported.as_ref(), now)
    };
    engine.machines.iter().map(machine).collect()
}

pub(super) fn describe(
    machine: &MachineSummary,
    reported: Option<&Reported>,
    now: Timestamp,
) -> MachineStatus {
    let trunk = machine
        .histories
        .iter()
        .find(|history| history.history == machine.trunk);
    // What was reported of another history says nothing of this one.
    let reported = reported.filter(|reported| reported.history == machine.trunk);
    let report = reported.and_then(|reported| reported.report.as_ref());
    let disks: Vec<DiskStatus> = machine
        .disks
        .iter()
        .map(|disk| {
            let found = report.and_then(|report| {
                report
                    .disks
                    .iter()
                    .find(|reported| reported.disk == disk.disk)
            });
            describe_disk(disk, found)
        })
        .collect();
    let is_bootable = !disks.is_empty() && disks.iter().all(|disk| !disk.addressable.is_empty());
    MachineStatus {
        machine: machine.machine,
        name: machine.name.clone(),
        history: machine.trunk,
        epoch: trunk.map(|trunk| trunk.epoch).unwrap_or_default(),
        origin: trunk
            .map(|trunk| trunk.origin)
            .filter(|origin| !origin.is_nil()),
        is_connected: reported.is_some_and(|reported| reported.is_connected),
        durable: trunk.map(|trunk| trunk.durable).unwrap_or_default(),
        point_count: machine.point_count,
        shortened_window_ms: machine.shortened_window.map(whole_ms),
        rpo_ms: trunk
            .filter(|_| is_bootable)
            .map(|trunk| rpo_ms(trunk, report, now)),
        lag: lag(reported),
        disks,
    }
}

fn describe_disk(disk: &DiskSummary, reported: Option<&DiskReport>) -> DiskStatus {
    DiskStatus {
        disk: disk.disk,
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
        phase: reported.map(|reported| reported.phase),
        reason: reported
            .map(|reported| reported.reason.clone())
            .unwrap_or_default(),
        done_bytes: reported.map_or(0, |reported| reported.done_bytes),
        total_bytes: reported.map_or(0, |reported| reported.total_bytes),
        has_copy: disk.has_copy,
        addressable: disk.addressable.clone(),
        damage: disk.damage.clone(),
        needed_bytes: None,
        written_per_day_bytes: None,
    }
}

/// Adds what disks take.
fn add_space(machines: &mut [MachineStatus], figures: &SpaceFigures) {
    let Some(_) = figures.info.at else { return };
    let known = figures.info.machines.iter();
    let known: HashMap<DiskId, _> = known
        .flat_map(|machine| &machine.disks)
        .map(|disk| (disk.disk, disk))
        .collect();
    for disk in machines.iter_mut().flat_map(|machine| &mut machine.disks) {
        if let Some(found) = known.get(&disk.disk) {
            let needed = found.account.needed().bytes;
            disk.needed_bytes = Some(needed.saturating_add(found.since_bytes));
            disk.written_per_day_bytes = Some(found.written_per_day);
        }
    }
}

/// Age of the newest state: when the source says that all it captured is here, the state of its
/// report; otherwise that of the newest durable record.
fn rpo_ms(trunk: &HistorySummary, report: Option<&SourceReport>, now: Timestamp) -> u64 {
    let reported = report
        .filter(|report| report.captured <= trunk.durable && report.oldest_unacknowledged.is_none())
        .map(|report| report.time);
    let newest = trunk.durable_time.max(reported.unwrap_or_default());
    ms_between(newest, now)
}

fn lag(reported: Option<&Reported>) -> StageLag {
    let connected = reported.filter(|reported| reported.is_connected);
    let report = connected.and_then(|reported| Some((reported, reported.report.as_ref()?)));
    let (capture_ms, link_ms) = match report {
        None => (None, None),
        Some((reported, report)) => {
            let oldest = report.oldest_unacknowledged.filter(|_| reported.is_behind);
            let capture_ms = oldest.map_or(0, |oldest| ms_between(oldest, report.time));
            (
                Some(capture_ms),
                Some(ms_between(report.time, reported.received)),
            )
        }
    };
    let here = connected.map(|reported| reported.delay.stages(Instant::now()));
    let StageDelay { cache_ms, apply_ms } = here.unwrap_or_default();
    StageLag {
        capture_ms,
        link_ms,
        cache_ms,
        apply_ms,
    }
}

fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn ms_between(from: Timestamp, to: Timestamp) -> u64 {
    to.0.saturating_sub(from.0) / NS_PER_MS
}

#[derive(Default)]
struct Health {
    is_red: bool,
    causes: Vec<String>,
}

impl Health {
    fn red(&mut self, cause: String) {
        self.is_red = true;
        self.causes.push(cause);
    }

    fn yellow(&mut self, cause: String) {
        self.causes.push(cause);
    }

    fn word(&self) -> &'static str {
        match (self.is_red, self.causes.is_empty()) {
            (true, _) => "red",
            (false, false) => "yellow",
            (false, true) => "green",
        }
    }
}

fn judge(health: &mut Health, machine: &MachineStatus, rpo_warning_ms: u64) {
    let name = &machine.name;
    if !machine.is_connected {
        health.yellow(format!(
            "machine {name}: its agent is not connected; look at `aft agent status` there"
        ));
    }
    if let Some(window_ms) = machine.shortened_window_ms {
        health.yellow(format!(
            "machine {name}: room runs short, so its journal window is {} s; add room, or keep \
             less with `aft policy set {name}`",
            window_ms as f64 / 1000.0
        ));
    }
    match machine.rpo_ms {
        Some(rpo_ms) if rpo_ms > rpo_warning_ms => health.yellow(format!(
            "machine {name}: its newest state is {} s old; `aft status` shows where it waits",
            rpo_ms / 1000
        )),
        _ => {}
    }
    for disk in &machine.disks {
        let name = format!("{name}/{}", disk.name);
        if let Some(damage) = disk.damage.first() {
            let more = disk.damage.len() - 1;
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            health.red(format!(
                "disk {name}: {damage}{more}; see `aft disk show {name}`"
            ));
        }
        match disk.phase {
            Some(DiskPhase::Initial) => {
                health.yellow(format!("disk {name}: its first copy is being made"));
            }
            Some(DiskPhase::Resync) => {
                health.yellow(format!(
                    "disk {name}: differences are being sent: {}",
                    disk.reason
                ));
            }
            Some(DiskPhase::ResyncNeeded) => {
                health.red(format!("disk {name}: a resync is needed: {}", disk.reason));
            }
            Some(DiskPhase::SourceError) => {
                health.red(format!(
                    "disk {name}: its source cannot be used as it is: {}",
                    disk.reason
                ));
            }
            Some(DiskPhase::Protected) | None => {}
        }
    }
}
