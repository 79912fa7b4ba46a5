//! Figures of space, in the words of the control port.

use std::time::Duration;

use afterimage_protocol::rest::space::{
    DiskSpace, MachineSpace, PointSpace, PointSpaces, SpaceForecast, SpaceReport, SpaceRow,
};
use afterimage_seed::engine::{self, Files, Forecast, Limit, SpaceInfo, Use};
use afterimage_seed::retention::Stored;
use afterimage_seed::{Request, Response};

const DAY_S: u64 = 86_400;
const HOUR_S: u64 = 3600;
/// What lasts for less is as good as full.
const SOON: Duration = Duration::from_secs(2);
/// A forecast is believed for so many times as long as churn was measured.
const BELIEVED_TIMES: u32 = 200;

/// What the engine says of space.
#[derive(Clone, Debug)]
pub struct SpaceFigures {
    /// By the engine.
    pub info: SpaceInfo,
    /// Bytes free on the medium.
    pub free_bytes: u64,
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn row(kind: &str, what: impl Into<String>, bytes: u64) -> SpaceRow {
    SpaceRow {
        kind: kind.to_owned(),
        what: what.into(),
        bytes: signed(bytes),
    }
}

/// A number of bytes with a binary unit.
fn in_words(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, name)) = units.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// A time to come, such as `19 more days`.
fn more(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / HOUR_S, "hour"),
        _ => (seconds / DAY_S, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} more {unit}{plural}")
}

fn name_of(used: Use) -> (&'static str, String) {
    match used {
        Use::Window => ("window", "the journal window alone".to_owned()),
        Use::Locked => ("locked", "locked points alone".to_owned()),
        Use::Named => ("named", "named points alone".to_owned()),
        Use::Fork => ("fork", "what branches began with".to_owned()),
        Use::View => ("view", "open views alone".to_owned()),
        Use::Other => ("other", "points older than the tiers".to_owned()),
        Use::Application => ("application", "application-consistent points".to_owned()),
        Use::Tier(tier) => ("tier", format!("points of tier {} alone", tier + 1)),
    }
}

/// Rows of what disks need; they add up to it.
fn rows_of<'a>(disks: impl Iterator<Item = &'a engine::DiskSpace> + Clone) -> Vec<SpaceRow> {
    let sum = |of: fn(&engine::DiskSpace) -> u64| disks.clone().map(of).sum::<u64>();
    let mut rows = vec![row(
        "current",
        "the newest state",
        sum(|disk| disk.account.current.bytes),
    )];
    let mut alone: std::collections::BTreeMap<Use, Stored> = std::collections::BTreeMap::new();
    for (used, stored) in disks.clone().flat_map(|disk| disk.account.alone()) {
        alone.entry(used).or_default().bytes += stored.bytes;
    }
    for (used, stored) in alone {
        let (kind, what) = name_of(used);
        rows.push(row(kind, what, stored.bytes));
    }
    let shared = sum(|disk| disk.account.shared.bytes);
    rows.push(row("shared", "history needed by several of these", shared));
    rows
}

fn file_rows(files: &Files) -> [SpaceRow; 4] {
    [
        row("log-room", "room in the log's files", files.log_room_bytes),
        row("map", "the map", files.map_bytes),
        row("manifest", "the manifest", files.manifest_bytes),
        row("reserve", "the reserve for it", files.reserve_bytes),
    ]
}

fn forecast(known: &Forecast, then: &str) -> SpaceForecast {
    let sum = |limit: u64| {
        format!(
            "all that is asked for takes {} of {}",
            in_words(known.full_bytes),
            in_words(limit)
        )
    };
    let text = match (known.limit_bytes, known.lasts) {
        _ if known.measured.is_zero() => "no churn was measured yet".to_owned(),
        (None, _) => format!("all that is asked for takes {}", in_words(known.full_bytes)),
        (Some(limit), None) => format!("at this churn {}: it fits", sum(limit)),
        (Some(limit), Some(time)) if time < SOON => format!(
            "at this churn no more history can be kept: {then}; {}",
            sum(limit)
        ),
        (Some(limit), Some(time)) => format!(
            "at this churn you can keep {}; then {then}; {}",
            more(time),
            sum(limit)
        ),
    };
    SpaceForecast {
        text,
        lasts_s: known.lasts.map(|time| time.as_secs()),
        used_bytes: known.used_bytes,
        full_bytes: known.full_bytes,
        limit_bytes: known.limit_bytes,
        measured_s: known.measured.as_secs(),
    }
}

fn disk(known: &engine::DiskSpace) -> DiskSpace {
    let current = known.account.current.bytes;
    let needed = known
        .account
        .needed()
        .bytes
        .saturating_add(known.since_bytes);
    DiskSpace {
        disk: known.disk,
        name: known.name.clone(),
        quota_bytes: known.quota_bytes,
        needed_bytes: needed,
        current_bytes: current,
        history_bytes: needed.saturating_sub(current),
        written_per_day_bytes: known.written_per_day,
        distinct_per_day_bytes: known.distinct_per_day,
        held_s: known.held.as_secs(),
    }
}

fn machine(known: &engine::MachineSpace) -> MachineSpace {
    let disks: Vec<DiskSpace> = known.disks.iter().map(disk).collect();
    let mut rows = rows_of(known.disks.iter());
    let since = known.disks.iter().map(|disk| disk.since_bytes).sum();
    rows.push(row("since", "written since it was worked out", since));
    let then = format!("{} is thinned, for its quota's sake", known.name);
    let is_limited = known.quota_bytes.is_some();
    MachineSpace {
        machine: known.machine,
        name: known.name.clone(),
        quota_bytes: known.quota_bytes,
        needed_bytes: disks.iter().map(|disk| disk.needed_bytes).sum(),
        rows,
        disks,
        forecast: is_limited.then(|| forecast(&known.forecast, &then)),
        window_s: known.window.as_secs(),
        waits: known.held.clone(),
    }
}

impl SpaceFigures {
    fn thins_first(&self) -> Option<String> {
        let first = self.info.thins_first?;
        let mut machines = self.info.machines.iter();
        let found = machines.find(|machine| machine.machine == first);
        found.map(|machine| machine.name.clone())
    }

    /// The forecast of the whole store.
    #[must_use]
    pub fn forecast(&self) -> SpaceForecast {
        let then = self.thins_first().map_or_else(
            || "history is thinned".to_owned(),
            |name| format!("{name} is thinned first"),
        );
        forecast(&self.info.forecast, &then)
    }

    /// The report, with what the file system gives to all files.
    #[must_use]
    pub fn report(&self, disk_bytes: u64) -> SpaceReport {
        let info = &self.info;
        let disks = info.machines.iter().flat_map(|machine| &machine.disks);
        let mut rows = rows_of(disks);
        let dead = "dead, not collected yet";
        rows.push(row("dead", dead, info.reclaimable_bytes));
        let accounted: i64 = rows.iter().map(|row| row.bytes).sum();
        let files = &info.files;
        let segments = files.log_bytes + files.seed_bytes - files.log_room_bytes;
        // What rounding left over is with what came since.
        rows.push(SpaceRow {
            bytes: signed(segments) - accounted,
            ..row("since", "written since it was worked out", 0)
        });
        rows.extend(file_rows(files));
        rows.push(SpaceRow {
            bytes: signed(disk_bytes) - signed(files.all_bytes()),
            ..row("other-files", "other files, and those about to go", 0)
        });
        let limited_by = info.limit.map(|limit| match limit {
            Limit::Medium => "medium",
            Limit::Budget => "budget",
            Limit::Quota => "quota",
        });
        SpaceReport {
            account_time: info.at,
            disk_bytes,
            rows,
            free_bytes: self.free_bytes,
            quota_bytes: info.quota_bytes,
            limited_by: limited_by.map(str::to_owned),
            forecast: self.forecast(),
            thins_first: self.thins_first(),
            machines: info.machines.iter().map(machine).collect(),
        }
    }

    /// Who must be thinned within a time: a name for it, and what to do, for people.
    #[must_use]
    pub fn warnings(&self, within: Duration) -> Vec<(String, String)> {
        let is_short = |known: &Forecast| {
            let believed = known.measured.saturating_mul(BELIEVED_TIMES);
            known.lasts.is_some_and(|time| time < within.min(believed))
        };
        let mut found = Vec::new();
        if is_short(&self.info.forecast) {
            let text = format!(
                "room runs short: {}; add room, or keep less with `aft policy set`",
                self.forecast().text
            );
            found.push((String::new(), text));
        }
        let machines = self.info.machines.iter();
        // Of one that waits already more is said.
        for known in machines.filter(|known| known.quota_bytes.is_some() && known.held.is_none()) {
            if is_short(&known.forecast) {
                let then = format!("{} is thinned, for its quota's sake", known.name);
                let name = &known.name;
                let text = format!(
                    "machine {name}: its quota runs short: {}; raise it with `aft quota set \
                     {name}`, or keep less with `aft policy set {name}`",
                    forecast(&known.forecast, &then).text
                );
                found.push((name.clone(), text));
            }
        }
        found
    }

    /// Machines whose ingest waits, and why.
    pub fn waiting(&self) -> impl Iterator<Item = (&str, &str)> {
        let machines = self.info.machines.iter();
        machines.filter_map(|known| Some((known.name.as_str(), known.held.as_deref()?)))
    }
}

/// A page of points in an answer.
pub(super) fn points(response: Response) -> Option<PointSpaces> {
    let Response::PointSpace(points, account_time) = response else {
        return None;
    };
    let points = points.into_iter().map(|(point, known)| PointSpace {
        id: point.id,
        time: point.time,
        is_locked: point.locked_until.0 > 0,
        unique_bytes: known.map(|known| known.unique.bytes),
        shared_bytes: known.map(|k| k.shown.bytes.saturating_sub(k.unique.bytes)),
        name: point.name,
    });
    Some(PointSpaces {
        account_time,
        points: points.collect(),
    })
}

impl super::thread::EngineThread {
    pub(super) fn space(&mut self, reply: super::command::Reply<SpaceFigures>) {
        self.ask(
            Request::Space,
            Box::new(move |thread, result| {
                if let Ok(Response::Space(info)) = result {
                    let (_, free_bytes) = super::room(&*thread.storage);
                    let info = *info;
                    let _gone = reply.send(SpaceFigures { info, free_bytes });
                }
            }),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_is_left_is_said_in_words() {
        let known = Forecast {
            limit_bytes: Some(10 << 30),
            used_bytes: 1 << 30,
            full_bytes: 20 << 30,
            lasts: Some(Duration::from_secs(19 * DAY_S + 5)),
            measured: Duration::from_secs(60),
        };
        assert_eq!(
            forecast(&known, "web1 is thinned first").text,
            "at this churn you can keep 19 more days; then web1 is thinned first; all that is \
             asked for takes 20.0 GiB of 10.0 GiB"
        );
        assert_eq!(more(Duration::from_secs(3 * HOUR_S)), "3 more hours");
        assert_eq!(more(Duration::from_secs(1)), "1 more second");
        assert_eq!(more(Duration::from_secs(119 * 60)), "119 more minutes");
        assert_eq!(in_words(1536 << 20), "1.5 GiB");
    }
}
