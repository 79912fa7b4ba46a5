//! `aft space` and `aft quota`.

use std::fmt::Write;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::space::{
    MachineSpace, PointSpace, PointSpaces, SetQuota, SpaceReport, SpaceRow,
};

use super::machine::named_or_only;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output, Table};
use crate::space_args::{QuotaCommand, SpaceCommand};

/// Points of one request.
const PAGE: usize = 1000;

pub(super) async fn space(
    command: SpaceCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        SpaceCommand::Show { machine: None } => {
            let report: SpaceReport = server.get("/v1/space").await?;
            output.answer(&report, || text(&report));
        }
        SpaceCommand::Show {
            machine: Some(name),
        } => {
            let report: SpaceReport = server.get("/v1/space").await?;
            let mut machines = report.machines.iter();
            let found = machines
                .find(|known| known.name == name || known.machine.to_string() == name)
                .ok_or_else(|| {
                    AftError::new(
                        ErrorClass::Refused,
                        format!("there is no machine {name:?}"),
                        "`aft machine list` shows them",
                    )
                })?;
            output.answer(found, || machine_text(found));
        }
        SpaceCommand::Points { machine, limit } => {
            let machine = named_or_only(machine, server).await?;
            let points = points(&machine, limit, server).await?;
            output.answer(&points, || points_text(&points));
        }
    }
    Ok(())
}

async fn points(
    machine: &str,
    limit: Option<usize>,
    server: &Client,
) -> Result<PointSpaces, AftError> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut all = PointSpaces {
        account_time: None,
        points: Vec::new(),
    };
    let mut after = 0;
    while all.points.len() < limit {
        let wanted = PAGE.min(limit - all.points.len());
        let path = format!(
            "/v1/machines/{}/space?after={after}&limit={wanted}",
            segment(machine)
        );
        let page: PointSpaces = server.get(&path).await?;
        all.account_time = page.account_time;
        let Some(last) = page.points.last() else {
            break;
        };
        after = last.id.0;
        let is_last = page.points.len() < wanted;
        all.points.extend(page.points);
        if is_last {
            break;
        }
    }
    Ok(all)
}

fn signed(bytes: i64) -> String {
    let text = output::bytes(bytes.unsigned_abs());
    if bytes < 0 { format!("-{text}") } else { text }
}

fn rows(text: &mut String, rows: &[SpaceRow], sum: u64) {
    let mut table = Table::new(&["BYTES", "WHAT"]);
    for row in rows.iter().filter(|row| row.bytes != 0) {
        table.row([signed(row.bytes), row.what.clone()]);
    }
    table.row([output::bytes(sum), "together".to_owned()]);
    text.push_str(&table.text());
}

fn text(report: &SpaceReport) -> String {
    let mut text = String::new();
    let as_of = report.account_time.map_or(
        "; who needs what is worked out by the next collection".to_owned(),
        |time| format!("; worked out at {}", output::time(time)),
    );
    let _always_ok = writeln!(
        text,
        "{} on disk, {} free{as_of}\n{}\n",
        output::bytes(report.disk_bytes),
        output::bytes(report.free_bytes),
        output::printable(&report.forecast.text),
    );
    rows(&mut text, &report.rows, report.disk_bytes);
    if !report.machines.is_empty() {
        text.push('\n');
        text.push_str(&disks(&report.machines));
    }
    for machine in &report.machines {
        if let Some(why) = &machine.waits {
            let name = &machine.name;
            let why = output::printable(why);
            let _always_ok = writeln!(text, "\n! ingest of machine {name} waits: {why}");
        }
        if let Some(forecast) = &machine.forecast {
            let said = output::printable(&forecast.text);
            let _always_ok = writeln!(text, "\nquota of {}: {said}", machine.name);
        }
    }
    text
}

fn disks(machines: &[MachineSpace]) -> String {
    let mut table = Table::new(&[
        "DISK", "NEEDS", "NEWEST", "HISTORY", "QUOTA", "A DAY", "DISTINCT", "HELD",
    ]);
    let quota = |bytes: Option<u64>| bytes.map_or("-".to_owned(), output::bytes);
    for machine in machines {
        for disk in &machine.disks {
            table.row([
                format!("{}/{}", machine.name, disk.name),
                output::bytes(disk.needed_bytes),
                output::bytes(disk.current_bytes),
                output::bytes(disk.history_bytes),
                quota(disk.quota_bytes),
                output::bytes(disk.written_per_day_bytes),
                output::bytes(disk.distinct_per_day_bytes),
                output::span(disk.held_s.saturating_mul(1000)),
            ]);
        }
    }
    table.text()
}

fn machine_text(machine: &MachineSpace) -> String {
    let mut text = String::new();
    rows(&mut text, &machine.rows, machine.needed_bytes);
    text.push('\n');
    text.push_str(&disks(core::slice::from_ref(machine)));
    let window = output::span(machine.window_s.saturating_mul(1000));
    let _always_ok = writeln!(text, "\njournal window  {window}");
    if let Some(bytes) = machine.quota_bytes {
        let _always_ok = writeln!(text, "quota           {}", output::bytes(bytes));
    }
    if let Some(forecast) = &machine.forecast {
        let _always_ok = writeln!(text, "{}", output::printable(&forecast.text));
    }
    if let Some(why) = &machine.waits {
        let _always_ok = writeln!(text, "! ingest waits: {}", output::printable(why));
    }
    text
}

fn points_text(points: &PointSpaces) -> String {
    let mut table = Table::new(&["POINT", "TIME", "ALONE", "SHARED", "LOCKED"]);
    let known = |bytes: Option<u64>| bytes.map_or("-".to_owned(), output::bytes);
    for point in &points.points {
        let PointSpace {
            unique_bytes,
            shared_bytes,
            ..
        } = point;
        table.row([
            point.name.clone(),
            output::time(point.time),
            known(*unique_bytes),
            known(*shared_bytes),
            if point.is_locked { "locked" } else { "" }.to_owned(),
        ]);
    }
    table.text()
}

pub(super) async fn quota(
    command: QuotaCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let (of, bytes) = match command {
        QuotaCommand::List => {
            let report: SpaceReport = server.get("/v1/space").await?;
            let quotas = quotas(&report);
            output.answer(&quotas, || quotas_text(&quotas));
            return Ok(());
        }
        QuotaCommand::Set { of, bytes } => (of, Some(bytes)),
        QuotaCommand::Clear { of } => (of, None),
    };
    let wanted = SetQuota {
        of: (of != "store").then(|| of.clone()),
        bytes,
    };
    let answer: serde_json::Value = server.post("/v1/quotas", &wanted).await?;
    output.answer(&answer, || match bytes {
        Some(bytes) => format!("{of} may take {}", output::bytes(bytes)),
        None => format!("{of} has no quota of its own any more"),
    });
    Ok(())
}

#[derive(serde::Serialize)]
struct Quota {
    of: String,
    quota_bytes: u64,
    used_bytes: u64,
}

fn quotas(report: &SpaceReport) -> Vec<Quota> {
    let mut found = Vec::new();
    let mut note = |of: String, quota: Option<u64>, used_bytes: u64| {
        found.extend(quota.map(|quota_bytes| Quota {
            of,
            quota_bytes,
            used_bytes,
        }));
    };
    note("store".to_owned(), report.quota_bytes, report.disk_bytes);
    for machine in &report.machines {
        let name = &machine.name;
        note(name.clone(), machine.quota_bytes, machine.needed_bytes);
        for disk in &machine.disks {
            let name = format!("{name}/{}", disk.name);
            note(name, disk.quota_bytes, disk.needed_bytes);
        }
    }
    found
}

fn quotas_text(quotas: &[Quota]) -> String {
    if quotas.is_empty() {
        return "Nothing has a quota. `aft quota set web1 50GiB` sets one.".to_owned();
    }
    let mut table = Table::new(&["OF", "QUOTA", "TAKES"]);
    for quota in quotas {
        table.row([
            quota.of.clone(),
            output::bytes(quota.quota_bytes),
            output::bytes(quota.used_bytes),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_nothing_are_left_out() {
        let row = |what: &str, bytes| SpaceRow {
            kind: "x".to_owned(),
            what: what.to_owned(),
            bytes,
        };
        let mut text = String::new();
        rows(
            &mut text,
            &[row("a", 2048), row("b", 0), row("c", -1024)],
            1024,
        );
        assert_eq!(
            text,
            "BYTES     WHAT\n2.0 KiB   a\n-1.0 KiB  c\n1.0 KiB   together\n"
        );
    }
}
