//! What of a disk is mounted: the file system on it, or the one of a partition.

use afterimage_blockdev::{BlockDevice, ErrorClass};
use afterimage_export::probe::{self, Partition};
use afterimage_export::{Found, FsKind};
use afterimage_protocol::rest::ApiError;

use super::directory::export_error;
use crate::appliance::api_error;

/// What is on a disk or partition, and where.
pub(super) struct Chosen {
    /// `None` for the whole disk.
    pub(super) partition: Option<Partition>,
    pub(super) kind: FsKind,
    pub(super) notes: Vec<String>,
}

/// A partition, and what it holds.
pub(super) struct Held {
    pub(super) partition: Partition,
    pub(super) kind: FsKind,
    label: String,
}

impl Held {
    fn describe(&self) -> String {
        let Self {
            partition,
            kind,
            label,
        } = self;
        let names = [&partition.name, label];
        let name = names.into_iter().find(|name| !name.is_empty());
        let name = name.map_or(String::new(), |name| format!(", {name:?}"));
        let mib = partition.size_bytes >> 20;
        format!(
            "partition {} holds {kind} ({mib} MiB{name})",
            partition.number
        )
    }

    /// Says whether a machine may take it up by itself as soon as it is a device.
    pub(super) fn is_member(&self) -> bool {
        matches!(self.kind, FsKind::Lvm2Member | FsKind::MdMember)
    }

    /// What to do with it; empty when it is clear.
    pub(super) fn advice(&self) -> String {
        match self.kind.advice() {
            "" => String::new(),
            advice => {
                let device = format!("--device --partition {}", self.partition.number);
                format!(
                    "partition {}: {}",
                    self.partition.number,
                    advice.replace("--device", &device)
                )
            }
        }
    }
}

/// Looks at all partitions of a table. One that cannot be read counts as unknown.
pub(super) fn held(device: &dyn BlockDevice, found: &Found) -> Vec<Held> {
    let look = |partition: &Partition| {
        let inside = probe::partition(device, partition).ok();
        Held {
            partition: partition.clone(),
            kind: inside.as_ref().map_or(FsKind::Unknown, |found| found.kind),
            label: inside.map(|found| found.label).unwrap_or_default(),
        }
    };
    found.partitions.iter().map(look).collect()
}

/// The lines that describe partitions.
pub(super) fn describe(all: &[Held]) -> Vec<String> {
    all.iter().map(Held::describe).collect()
}

/// The partition of a number.
pub(super) fn numbered(all: Vec<Held>, number: u32, kind: FsKind) -> Result<Held, ApiError> {
    let described = list(&all);
    let found = all.into_iter().find(|held| held.partition.number == number);
    found.ok_or_else(|| {
        api_error(
            ErrorClass::Refused,
            format!("the disk has {kind} and no partition {number}: {described}"),
            "name one of those with --partition",
        )
    })
}

fn list(all: &[Held]) -> String {
    match describe(all) {
        none if none.is_empty() => "there is none".to_owned(),
        all => all.join(", "),
    }
}

/// Chooses what to mount.
pub(super) fn choose(device: &dyn BlockDevice, wanted: Option<u32>) -> Result<Chosen, ApiError> {
    let found = probe::device(device).map_err(|error| export_error(&error))?;
    if !found.kind.is_partition_table() {
        if let Some(number) = wanted {
            return Err(api_error(
                ErrorClass::Refused,
                format!("the disk holds {} and no partition {number}", found.kind),
                "leave --partition out",
            ));
        }
        return Ok(Chosen {
            partition: None,
            kind: found.kind,
            notes: Vec::new(),
        });
    }
    let mut all = held(device, &found);
    let mut notes = describe(&all);
    let chosen = match wanted {
        Some(number) => {
            let held = numbered(all, number, found.kind)?;
            if !held.kind.is_filesystem() {
                return Err(api_error(
                    ErrorClass::Refused,
                    format!("partition {number} holds {}", held.kind),
                    held.advice(),
                ));
            }
            held
        }
        None => only(&mut all, &found)?,
    };
    notes.push(format!("partition {} is mounted", chosen.partition.number));
    Ok(Chosen {
        kind: chosen.kind,
        partition: Some(chosen.partition),
        notes,
    })
}

/// The one partition with a file system.
fn only(all: &mut Vec<Held>, found: &Found) -> Result<Held, ApiError> {
    let described = list(all);
    let mut advice: Vec<String> = all.iter().map(Held::advice).collect();
    let count = all.iter().filter(|held| held.kind.is_filesystem()).count();
    if count == 1
        && let Some(place) = all.iter().position(|held| held.kind.is_filesystem())
    {
        return Ok(all.swap_remove(place));
    }
    if count > 1 {
        advice = vec!["name the one that you want with --partition".to_owned()];
    }
    advice.retain(|line| !line.is_empty());
    Err(api_error(
        ErrorClass::Refused,
        format!(
            "the disk has {}, and {count} of its partitions can be mounted: {described}",
            found.kind
        ),
        advice.join("; "),
    ))
}
