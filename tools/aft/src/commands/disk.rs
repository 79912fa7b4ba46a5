//! `aft disk`.

use std::fmt::Write;
use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::agent::{AttachDisk, ProtectDisk, TappedDisk};
use afterimage_protocol::rest::server::{AddressableRange, DiskStatus, MachineStatus};

use super::progress;
use crate::args::DiskCommand;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn run(
    command: DiskCommand,
    server: &Client,
    agent: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        DiskCommand::List { local: true, .. } => {
            let disks: Vec<TappedDisk> = agent.get("/v1/disks").await?;
            output.answer(&disks, || tapped(&disks));
            Ok(())
        }
        DiskCommand::List { machine, .. } => list(machine, server, output).await,
        DiskCommand::Show { disk } => show(&disk, server, output).await,
        DiskCommand::Attach { source, name } => attach(&source, name, agent, output).await,
        DiskCommand::Protect { name, wait } => protect(&name, wait, agent, output).await,
        DiskCommand::Grow { name } => {
            let path = format!("/v1/disks/{}/grow", segment(&name));
            let disk: TappedDisk = agent.post(&path, &ProtectDisk {}).await?;
            output.answer(&disk, || {
                format!(
                    "disk {name} has {} bytes, as many as its source",
                    disk.size_bytes
                )
            });
            Ok(())
        }
        DiskCommand::Detach { name } => {
            let path = format!("/v1/disks/{}/detach", segment(&name));
            let answer: serde_json::Value = agent.post(&path, &ProtectDisk {}).await?;
            output.answer(&answer, || format!("disk {name} is detached"));
            Ok(())
        }
    }
}

async fn list(machine: Option<String>, server: &Client, output: &Output) -> Result<(), AftError> {
    let mut machines: Vec<MachineStatus> = server.get("/v1/machines").await?;
    if let Some(wanted) = machine {
        let names: Vec<String> = machines
            .iter()
            .take(10)
            .map(|machine| machine.name.clone())
            .collect();
        machines.retain(|machine| machine.name == wanted || machine.machine.to_string() == wanted);
        if machines.is_empty() {
            return Err(AftError::new(
                ErrorClass::Refused,
                format!("there is no machine {wanted:?}"),
                format!("machines: {}", names.join(", ")),
            ));
        }
    }
    let disks: Vec<&DiskStatus> = machines.iter().flat_map(|machine| &machine.disks).collect();
    output.answer(&disks, || table(&machines));
    Ok(())
}

/// Older ranges of a disk that a list shows.
const OLDER_RANGES_MAX: usize = 3;

fn lsns(range: &AddressableRange) -> String {
    format!("{}..{}", range.first, range.last)
}

/// Disks of machines as a table. Times and LSNs of a row are those of one range, all of which can
/// be mounted; a disk has several when there is something between that cannot.
pub(super) fn table(machines: &[MachineStatus]) -> String {
    let mut table = Table::new(&[
        "DISK", "SIZE", "NEEDS", "A DAY", "STATE", "DONE", "FROM", "TO", "LSN", "WHY",
    ]);
    for machine in machines {
        for disk in &machine.disks {
            let mut ranges: Vec<&AddressableRange> = disk.addressable.iter().collect();
            ranges.sort_by_key(|range| std::cmp::Reverse((range.last_time, range.last)));
            let (newest, older) = match ranges.split_first() {
                Some((newest, older)) => (Some(*newest), older),
                None => (None, ranges.as_slice()),
            };
            let is_moving = matches!(disk.phase, Some(DiskPhase::Initial | DiskPhase::Resync));
            table.row([
                format!("{}/{}", machine.name, disk.name),
                output::bytes(disk.size_bytes),
                known(disk.needed_bytes),
                known(disk.written_per_day_bytes),
                phase(disk.phase).to_owned(),
                if is_moving {
                    output::percent(disk.done_bytes, disk.total_bytes)
                } else {
                    "-".to_owned()
                },
                newest.map_or("-".to_owned(), |range| output::time(range.first_time)),
                newest.map_or("-".to_owned(), |range| output::time(range.last_time)),
                newest.map_or("-".to_owned(), lsns),
                why(disk),
            ]);
            for range in older.iter().take(OLDER_RANGES_MAX) {
                let mut cells = [const { String::new() }; 10];
                cells[0] = "  and before".to_owned();
                cells[6] = output::time(range.first_time);
                cells[7] = output::time(range.last_time);
                cells[8] = lsns(range);
                table.row(cells);
            }
            if older.len() > OLDER_RANGES_MAX {
                let count = older.len() - OLDER_RANGES_MAX;
                table.row([format!("  and {count} more ranges: see `aft disk show`")]);
            }
        }
    }
    table.text()
}

fn known(bytes: Option<u64>) -> String {
    bytes.map_or("-".to_owned(), output::bytes)
}

fn why(disk: &DiskStatus) -> String {
    match disk.damage.len() {
        0 => disk.reason.clone(),
        1 => disk.damage[0].clone(),
        count => format!("{} and {} more", disk.damage[0], count - 1),
    }
}

pub(super) fn phase(phase: Option<DiskPhase>) -> &'static str {
    match phase {
        None => "unknown",
        Some(DiskPhase::Initial) => "first copy",
        Some(DiskPhase::Resync) => "resync",
        Some(DiskPhase::Protected) => "protected",
        Some(DiskPhase::ResyncNeeded) => "resync needed",
        Some(DiskPhase::SourceError) => "source error",
    }
}

async fn show(disk: &str, server: &Client, output: &Output) -> Result<(), AftError> {
    let (machine, name) = disk.split_once('/').ok_or_else(|| {
        AftError::new(
            ErrorClass::Refused,
            format!("{disk:?} is no <machine>/<disk>"),
            "",
        )
    })?;
    let path = format!("/v1/machines/{}/disks", segment(machine));
    let disks: Vec<DiskStatus> = server.get(&path).await?;
    let names: Vec<String> = disks
        .iter()
        .take(10)
        .map(|disk| disk.name.clone())
        .collect();
    let found = disks
        .into_iter()
        .find(|found| found.name == name || found.disk.to_string() == name);
    let found = found.ok_or_else(|| {
        AftError::new(
            ErrorClass::Refused,
            format!("machine {machine} has no disk {name:?}"),
            format!("disks: {}", names.join(", ")),
        )
    })?;
    output.answer(&found, || describe(machine, &found));
    Ok(())
}

fn describe(machine: &str, disk: &DiskStatus) -> String {
    let mut text = String::new();
    let _always_ok = writeln!(
        text,
        "{machine}/{}\n  identity  {}\n  size      {}\n  state     {}{}\n  copy      {}",
        output::printable(&disk.name),
        disk.disk,
        output::bytes(disk.size_bytes),
        phase(disk.phase),
        if disk.reason.is_empty() {
            String::new()
        } else {
            format!(": {}", output::printable(&disk.reason))
        },
        if disk.has_copy {
            "whole"
        } else {
            "not whole yet"
        },
    );
    if disk.total_bytes > 0 && disk.done_bytes < disk.total_bytes {
        let _always_ok = writeln!(
            text,
            "  done      {} of {} ({})",
            output::bytes(disk.done_bytes),
            output::bytes(disk.total_bytes),
            output::percent(disk.done_bytes, disk.total_bytes)
        );
    }
    for damage in &disk.damage {
        let _always_ok = writeln!(text, "  damage    {}", output::printable(damage));
    }
    if disk.addressable.is_empty() {
        text.push_str("\nNothing can be mounted yet.\n");
        return text;
    }
    text.push_str("\nEvery LSN and time in these ranges can be mounted:\n\n");
    let mut table = Table::new(&["HISTORY", "FIRST LSN", "LAST LSN", "FROM", "TO"]);
    for range in &disk.addressable {
        table.row([
            range.history.to_string(),
            range.first.to_string(),
            range.last.to_string(),
            output::time(range.first_time),
            output::time(range.last_time),
        ]);
    }
    text.push_str(&table.text());
    text
}

/// Tapped disks as a table.
pub(super) fn tapped(disks: &[TappedDisk]) -> String {
    if disks.is_empty() {
        return "No disk is attached. `aft disk attach SOURCE` attaches one.\n".to_owned();
    }
    let mut table = Table::new(&[
        "DISK",
        "SIZE",
        "SOURCE",
        "USE THIS DEVICE",
        "STATE",
        "DONE",
        "WHY",
    ]);
    for disk in disks {
        let state = if disk.is_protected {
            phase(disk.phase)
        } else {
            "not protected"
        };
        let is_moving = matches!(disk.phase, Some(DiskPhase::Initial | DiskPhase::Resync));
        table.row([
            disk.name.clone(),
            output::bytes(disk.size_bytes),
            disk.source.clone(),
            disk.device.clone(),
            state.to_owned(),
            if is_moving {
                output::percent(disk.done_bytes, disk.total_bytes)
            } else {
                "-".to_owned()
            },
            disk.reason.clone(),
        ]);
    }
    table.text()
}

async fn attach(
    source: &Path,
    name: Option<String>,
    agent: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let absolute = std::path::absolute(source)
        .map_err(|error| AftError::new(ErrorClass::Refused, error.to_string(), ""))?;
    let name = name
        .or_else(|| {
            let stem = absolute.file_stem()?.to_str()?;
            (!stem.is_empty()).then(|| stem.to_owned())
        })
        .ok_or_else(|| {
            AftError::new(
                ErrorClass::Refused,
                "the disk needs a name",
                "give one with --name",
            )
        })?;
    let request = AttachDisk {
        source: absolute.display().to_string(),
        name,
    };
    let disk: TappedDisk = agent.post("/v1/disks", &request).await?;
    output.answer(&disk, || {
        format!(
            "disk {} is attached: use {} ({}) instead of {}\nprotect it with `aft disk protect {}`",
            disk.name, disk.device, disk.link, disk.source, disk.name
        )
    });
    Ok(())
}

async fn protect(name: &str, wait: bool, agent: &Client, output: &Output) -> Result<(), AftError> {
    let path = format!("/v1/disks/{}/protect", segment(name));
    let answer: serde_json::Value = agent.post(&path, &ProtectDisk {}).await?;
    if wait {
        let disk = progress::wait_for_copy(name, agent, output).await?;
        output.answer(&disk, || format!("disk {name} is protected"));
    } else {
        output.answer(&answer, || {
            format!("disk {name} is being copied; `aft agent status` shows how far it is")
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use afterimage_blockdev::{DiskId, HistoryId, Lsn, Timestamp};

    use super::*;

    fn range(number: u64) -> AddressableRange {
        AddressableRange {
            history: HistoryId([1; 16]),
            first: Lsn(number * 100),
            last: Lsn(number * 100 + 50),
            first_time: Timestamp(number * 60_000_000_000),
            last_time: Timestamp(number * 60_000_000_000 + 30_000_000_000),
        }
    }

    fn machine(ranges: u64) -> MachineStatus {
        let disk = DiskStatus {
            disk: DiskId([2; 16]),
            name: "vm".to_owned(),
            size_bytes: 1 << 30,
            phase: Some(DiskPhase::Protected),
            reason: String::new(),
            done_bytes: 0,
            total_bytes: 0,
            has_copy: true,
            addressable: (1..=ranges).map(range).collect(),
            damage: Vec::new(),
            needed_bytes: None,
            written_per_day_bytes: None,
        };
        MachineStatus {
            machine: afterimage_blockdev::MachineId([3; 16]),
            name: "web1".to_owned(),
            history: HistoryId([1; 16]),
            epoch: afterimage_blockdev::Epoch(1),
            origin: None,
            is_connected: true,
            durable: Lsn(999),
            point_count: 0,
            shortened_window_ms: None,
            rpo_ms: None,
            lag: afterimage_protocol::rest::server::StageLag::default(),
            disks: vec![disk],
        }
    }

    /// A row once began with the oldest range and ended with the newest, as if there were no gap.
    #[test]
    fn a_row_is_one_range() {
        let text = table(&[machine(6)]);
        let words: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let newest = &words[1];
        assert_eq!(newest[0], "web1/vm");
        let ends = ["1970-01-01T00:06:00Z", "1970-01-01T00:06:30Z", "600..650"];
        assert!(newest.ends_with(&ends), "{text}");
        let ends = ["1970-01-01T00:05:00Z", "1970-01-01T00:05:30Z", "500..550"];
        assert!(words[2].ends_with(&ends), "{text}");
        assert!(
            text.ends_with("  and 2 more ranges: see `aft disk show`\n"),
            "{text}"
        );
        assert_eq!(words.len(), 1 + 1 + OLDER_RANGES_MAX + 1);
        assert_eq!(table(&[machine(0)]).lines().count(), 2);
    }
}
