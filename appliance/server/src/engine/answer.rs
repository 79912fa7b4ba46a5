//! From the engine's words to those of the protocol and of the control port.

use afterimage_blockdev::{ErrorClass, Lsn};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::{AddressableRange, CollectReport, Point};
use afterimage_protocol::{Refusal, RefusalCode};
use afterimage_seed::SeedError;
use afterimage_seed::engine::{DiskInfo, EngineInfo, MachineInfo, StreamEnd};
use afterimage_seed::manifest::PointRecord;

use super::command::{DiskSummary, EngineStatus, HistorySummary, MachineSummary};

pub(super) fn api_error(error: &SeedError) -> ApiError {
    let (message, hint) = (error.to_string(), error.hint().to_owned());
    ApiError {
        class: error.class(),
        message,
        hint,
    }
}

pub(super) fn refusal(error: &SeedError) -> Refusal {
    let code = match error {
        SeedError::Fenced { is_held: true, .. } => RefusalCode::HeldByOther,
        SeedError::Fenced { .. } => RefusalCode::StaleEpoch,
        SeedError::Refused { message, .. } if message.contains("shrank") => RefusalCode::Shrunk,
        SeedError::Refused { .. } | SeedError::Incomplete { .. } => RefusalCode::Name,
        SeedError::Damaged { .. } | SeedError::SegmentMissing { .. } => RefusalCode::Damaged,
        SeedError::Storage(error) if error.is_no_space() => RefusalCode::NoSpace,
        _ => RefusalCode::Log,
    };
    let hint = error.hint().to_owned();
    Refusal {
        code,
        class: error.class(),
        message: error.to_string(),
        hint,
    }
}

pub(super) fn stream_end(end: StreamEnd) -> Refusal {
    match end {
        StreamEnd::Fenced => Refusal {
            code: RefusalCode::StaleEpoch,
            class: ErrorClass::Fenced,
            message: "another writer has taken over this machine".to_owned(),
            hint: "stop this agent, or move the machine back with `aft machine move`".to_owned(),
        },
        StreamEnd::Gap(expected, found) => gap(expected, found),
        StreamEnd::Damaged => Refusal {
            code: RefusalCode::Damaged,
            class: ErrorClass::Refused,
            message: "a frame contradicts the stream it came on".to_owned(),
            hint: "update the agent to the appliance's version".to_owned(),
        },
    }
}

fn gap(expected: Lsn, found: Lsn) -> Refusal {
    Refusal {
        code: RefusalCode::Gap,
        class: ErrorClass::Retry,
        message: format!("the frame begins at LSN {found}, but {expected} is next"),
        hint: "the agent resumes from the last acknowledged LSN by itself".to_owned(),
    }
}

pub(super) fn paused(is_budget: bool) -> Refusal {
    let (message, hint) = if is_budget {
        (
            "the store has used its byte budget",
            "raise budget_bytes in the configuration of the appliance",
        )
    } else {
        (
            "the appliance's disk is full",
            "free room on the file system of the data directory; ingest resumes by itself",
        )
    };
    Refusal {
        code: RefusalCode::NoSpace,
        class: ErrorClass::Retry,
        message: message.to_owned(),
        hint: hint.to_owned(),
    }
}

/// A machine's ingest waits because of a quota.
pub(super) fn quota_reached(why: String) -> Refusal {
    Refusal {
        code: RefusalCode::NoSpace,
        class: ErrorClass::Retry,
        message: why,
        hint: "raise the quota with `aft quota set`, delete points, or wait until locks end; \
               ingest resumes by itself"
            .to_owned(),
    }
}

pub(super) fn gone(why: &str) -> Refusal {
    Refusal {
        code: RefusalCode::ShuttingDown,
        class: ErrorClass::Retry,
        message: why.to_owned(),
        hint: "the agent comes back by itself when the appliance is up".to_owned(),
    }
}

pub(super) fn point(record: PointRecord) -> Point {
    Point {
        id: record.id,
        kind: record.kind.name().to_owned(),
        history: record.history,
        lsn: record.lsn,
        time: record.time,
        name: record.name,
        locked_until: (record.locked_until.0 > 0).then_some(record.locked_until),
    }
}

pub(super) fn status(info: EngineInfo, free_bytes: u64) -> EngineStatus {
    EngineStatus {
        stored_bytes: info.stored_bytes,
        free_bytes,
        paused: info.paused.map(paused),
        machines: info
            .machines
            .into_iter()
            .map(|known| machine(known, &info.damage))
            .collect(),
        clock_ahead: info.clock.frozen_ahead,
    }
}

fn machine(info: MachineInfo, store_damage: &[String]) -> MachineSummary {
    MachineSummary {
        machine: info.machine,
        name: info.name,
        trunk: info.trunk,
        histories: info
            .histories
            .into_iter()
            .map(|history| HistorySummary {
                history: history.history,
                parent: history.parent,
                epoch: history.epoch,
                origin: history.origin,
                received: history.received,
                durable: history.durable,
                durable_time: history.durable_time,
                is_branch: history.is_branch,
                is_open: history.is_open,
            })
            .collect(),
        disks: info
            .disks
            .into_iter()
            .map(|known| disk(known, store_damage))
            .collect(),
        point_count: info.point_count,
        shortened_window: info.shortened_window,
    }
}

fn disk(info: DiskInfo, store_damage: &[String]) -> DiskSummary {
    let mut damage = info.damage;
    damage.extend_from_slice(store_damage);
    DiskSummary {
        disk: info.disk,
        name: info.name,
        size_bytes: info.size_bytes,
        has_copy: info.has_copy,
        addressable: info
            .reaches
            .into_iter()
            .map(|reach| AddressableRange {
                history: reach.history,
                first: reach.first,
                last: reach.last,
                first_time: reach.first_time,
                last_time: reach.last_time,
            })
            .collect(),
        damage,
    }
}

pub(super) fn collected(done: afterimage_seed::engine::Collected) -> CollectReport {
    CollectReport {
        destaged: done.destaged,
        rewritten: done.rewritten,
        dropped: done.dropped,
        freed_bytes: done.freed_bytes,
        written_bytes: done.written_bytes,
    }
}
