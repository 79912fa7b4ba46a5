//! `aft point lock` and `aft point delete`: many points at once.

use afterimage_blockdev::{ErrorClass, Timestamp};
use afterimage_protocol::rest::policy::{DeletePoints, LockPoints};
use afterimage_protocol::rest::server::{Points, ServerStatus};
use afterimage_protocol::rest::time::{format_rfc3339, parse_rfc3339};

use crate::args::parse_seconds;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::Output;
use crate::policy_args::{LockEnd, PointSelection};

/// Points of one request; each request is done as a whole or not at all.
const AT_ONCE: usize = 10_000;
const SECOND_NS: u64 = 1_000_000_000;

pub(super) async fn delete(
    selection: PointSelection,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let names = names(&selection, server).await?;
    let path = format!("/v1/machines/{}/deletions", segment(&selection.machine));
    for part in names.chunks(AT_ONCE) {
        let names = part.to_vec();
        let () = server.post(&path, &DeletePoints { names }).await?;
    }
    output.answer(&names, || match names.as_slice() {
        [name] => format!("point {name} is deleted"),
        names => format!("{} points are deleted", names.len()),
    });
    Ok(())
}

pub(super) async fn lock(
    selection: PointSelection,
    end: LockEnd,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let until = match (end.until, end.duration) {
        (Some(time), _) => parse_rfc3339(&time).ok_or_else(|| no_time(&time))?,
        (None, duration) => {
            let ahead = duration.unwrap_or_default().saturating_mul(SECOND_NS);
            Timestamp(now(server).await?.0.saturating_add(ahead))
        }
    };
    let names = names(&selection, server).await?;
    let path = format!("/v1/machines/{}/locks", segment(&selection.machine));
    for part in names.chunks(AT_ONCE) {
        let names = part.to_vec();
        let () = server.post(&path, &LockPoints { names, until }).await?;
    }
    let until = format_rfc3339(until);
    output.answer(&names, || match names.as_slice() {
        [name] => format!("point {name} is locked until {until}"),
        names => format!("{} points are locked until {until}", names.len()),
    });
    Ok(())
}

fn no_time(text: &str) -> AftError {
    AftError::new(
        ErrorClass::Refused,
        format!("{text:?} is no time"),
        "write it like 2026-07-31T12:00:00Z, or as an age like -7d",
    )
}

/// The appliance's time.
async fn now(server: &Client) -> Result<Timestamp, AftError> {
    let status: ServerStatus = server.get("/v1/status").await?;
    Ok(status.now)
}

async fn names(selection: &PointSelection, server: &Client) -> Result<Vec<String>, AftError> {
    let Some(before) = &selection.all_before else {
        return Ok(selection.names.clone());
    };
    let before = if let Some(age) = before.strip_prefix('-') {
        let age = parse_seconds(age).map_err(|_| no_time(before))?;
        let now = now(server).await?;
        Timestamp(now.0.saturating_sub(age.saturating_mul(SECOND_NS)))
    } else {
        parse_rfc3339(before).ok_or_else(|| no_time(before))?
    };
    let points = super::point::list(&selection.machine, 0, None, server).await?;
    Ok(chosen(points, before, selection.skip_locked))
}

fn chosen(points: Points, before: Timestamp, skip_locked: bool) -> Vec<String> {
    let old = points.points.into_iter().filter(|point| {
        let is_left_out = skip_locked && point.locked_until.is_some();
        point.time < before && !is_left_out
    });
    old.map(|point| point.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_blockdev::{HistoryId, Lsn, PointId};
    use afterimage_protocol::rest::server::Point;

    #[test]
    fn older_points_are_chosen_and_locked_ones_left_out() {
        let point = |id: u64, locked_until| Point {
            id: PointId(id),
            name: format!("p{id}"),
            kind: "crash".to_owned(),
            history: HistoryId([1; 16]),
            lsn: Lsn(id),
            time: Timestamp(id * 10),
            locked_until,
        };
        let points = Points {
            points: vec![
                point(1, None),
                point(2, Some(Timestamp(99))),
                point(3, None),
            ],
            total: 3,
        };
        let before = Timestamp(30);
        assert_eq!(chosen(points.clone(), before, false), ["p1", "p2"]);
        assert_eq!(chosen(points, before, true), ["p1"]);
    }
}
