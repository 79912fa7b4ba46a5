//! An edit of the manifest in words. Secrets are left out.

use afterimage_seed::manifest::Edit;
use afterimage_seed::retention::Policy;
use serde_json::{Value, json};

use crate::output;

/// The edit's name, and its fields in order.
pub(super) fn describe(edit: &Edit) -> (&'static str, Value) {
    describe_things(edit)
        .or_else(|| describe_files(edit))
        .or_else(|| describe_history(edit))
        .unwrap_or_else(|| describe_points(edit))
}

fn describe_things(edit: &Edit) -> Option<(&'static str, Value)> {
    Some(match edit {
        Edit::Store {
            store,
            created,
            next_segment,
            next_run,
            next_point,
        } => (
            "store",
            json!({"store": store, "created": output::time(*created),
                "next_segment": next_segment.0, "next_run": next_run.0,
                "next_point": next_point.0}),
        ),
        Edit::Machine {
            machine,
            holder,
            name,
            ..
        } => (
            "machine",
            json!({"machine": machine, "holder": holder, "name": name}),
        ),
        Edit::Disk {
            disk,
            machine,
            size_bytes,
            logical_block_bytes,
            key,
            name,
            ..
        } => (
            "disk",
            json!({"disk": disk, "machine": machine, "size_bytes": size_bytes,
                "logical_block_bytes": logical_block_bytes, "key": key.0, "name": name}),
        ),
        Edit::Policy {
            machine,
            version,
            policy,
        } => (
            "policy",
            json!({"machine": machine, "version": version, "policy": policy_text(policy)}),
        ),
        Edit::Clock(clock) => (
            "clock",
            json!({"wall": output::time(clock.wall), "elapsed_ns": clock.elapsed.0,
                "is_frozen": clock.is_frozen}),
        ),
        _ => return None,
    })
}

fn policy_text(policy: &Policy) -> String {
    format!("{policy:?}")
}

fn describe_files(edit: &Edit) -> Option<(&'static str, Value)> {
    Some(match edit {
        Edit::Segment {
            segment,
            generation,
            slot_count,
            bytes,
            root,
        } => (
            "segment",
            json!({"segment": segment.0, "generation": generation, "slots": slot_count,
                "bytes": bytes, "root": hex(root)}),
        ),
        Edit::SegmentDropped { segment } => ("segment dropped", json!({"segment": segment.0})),
        Edit::BaseThrough { segment } => ("base through", json!({"segment": segment.0})),
        Edit::LogReleased { log_sequence } => ("log released", json!({"commit": log_sequence})),
        Edit::Checkpoint { log_sequence } => ("checkpoint", json!({"commit": log_sequence})),
        Edit::Run { run, bytes } => ("run", json!({"run": run.0, "bytes": bytes})),
        Edit::RunDropped { run } => ("run dropped", json!({"run": run.0})),
        _ => return None,
    })
}

fn describe_history(edit: &Edit) -> Option<(&'static str, Value)> {
    Some(match edit {
        Edit::History {
            history,
            machine,
            parent,
            fork,
            is_branch,
        } => (
            "history",
            json!({"history": history, "machine": machine, "parent": parent,
                "fork": fork, "is_branch": is_branch}),
        ),
        Edit::HistoryDropped { history } => ("history dropped", json!({"history": history})),
        Edit::HistoryState(state) => (
            "history state",
            json!({"history": state.history, "epoch": state.epoch.0, "origin": state.origin,
                "last": state.last, "highest_bulk": state.highest_bulk,
                "time": output::time(state.time)}),
        ),
        Edit::Size {
            disk,
            history,
            lsn,
            size_bytes,
        } => (
            "size",
            json!({"disk": disk, "history": history, "lsn": lsn, "size_bytes": size_bytes}),
        ),
        Edit::Batch(batch) => (
            "batch",
            json!({"history": batch.history, "batch": batch.batch.0,
                "is_initial": batch.is_initial, "begin": batch.begin, "end": batch.end,
                "disks": batch.disks}),
        ),
        Edit::Lost {
            disk,
            history,
            first,
            last,
        } => (
            "lost",
            json!({"disk": disk, "history": history, "first": first, "last": last}),
        ),
        Edit::Floor { history, lsn } => ("floor", json!({"history": history, "lsn": lsn})),
        _ => return None,
    })
}

fn describe_points(edit: &Edit) -> (&'static str, Value) {
    match edit {
        Edit::Point(point) => (
            "point",
            json!({"point": point.id.0, "machine": point.machine, "history": point.history,
                "lsn": point.lsn, "time": output::time(point.time), "kind": point.kind.name(),
                "name": point.name}),
        ),
        Edit::PointDropped { point } => ("point dropped", json!({"point": point.0})),
        Edit::Noted(noted) => ("noted", json!({"what": format!("{noted:?}")})),
        Edit::PointLocked { point, lock } => (
            "point locked",
            json!({"point": point.0, "until": output::time(lock.until)}),
        ),
        other => ("edit", json!({"debug": format!("{other:?}")})),
    }
}

/// Fields in a line.
pub(super) fn line(fields: &Value) -> String {
    let Value::Object(fields) = fields else {
        return fields.to_string();
    };
    let one = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name}={}", output::printable(text)),
        other => format!("{name}={other}"),
    };
    fields.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// Bytes as digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
