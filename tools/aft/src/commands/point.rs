//! `aft point`.

use afterimage_protocol::rest::server::{CreatePoint, Point, Points};

use super::machine::named_or_only;
use super::points;
use crate::args::PointCommand;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output, Table};

/// Points asked for at once.
const PAGE: usize = 1000;

pub(super) async fn run(
    command: PointCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        PointCommand::Create { machine, name, at } => {
            let machine = named_or_only(machine, server).await?;
            let path = format!("/v1/machines/{}/points", segment(&machine));
            let point: Point = server.post(&path, &CreatePoint { name, at }).await?;
            output.answer(&point, || {
                format!(
                    "point {} ({}) at LSN {}, {}",
                    point.name,
                    point.kind,
                    point.lsn,
                    output::time(point.time)
                )
            });
        }
        PointCommand::List {
            machine,
            after,
            limit,
        } => {
            let machine = named_or_only(machine, server).await?;
            let points = list(&machine, after, limit, server).await?;
            output.answer(&points, || table(&points));
        }
        PointCommand::Delete(selection) => points::delete(selection, server, output).await?,
        PointCommand::Lock { selection, end } => {
            points::lock(selection, end, server, output).await?;
        }
    }
    Ok(())
}

pub(super) async fn list(
    machine: &str,
    after: u64,
    limit: Option<usize>,
    server: &Client,
) -> Result<Points, AftError> {
    let machine = segment(machine);
    let mut after = after;
    let mut all = Points {
        points: Vec::new(),
        total: 0,
    };
    loop {
        let missing = limit
            .map_or(PAGE, |limit| limit - all.points.len())
            .min(PAGE);
        if missing == 0 {
            return Ok(all);
        }
        let path = format!("/v1/machines/{machine}/points?after={after}&limit={missing}");
        let page: Points = server.get(&path).await?;
        all.total = page.total;
        let Some(last) = page.points.last().map(|point| point.id.0) else {
            return Ok(all);
        };
        all.points.extend(page.points);
        if last <= after {
            return Ok(all);
        }
        after = last;
    }
}

fn table(points: &Points) -> String {
    if points.points.is_empty() {
        return "There are no such points.\n".to_owned();
    }
    let mut table = Table::new(&[
        "NUMBER",
        "NAME",
        "KIND",
        "TIME",
        "LSN",
        "HISTORY",
        "LOCKED UNTIL",
    ]);
    for point in &points.points {
        table.row([
            point.id.to_string(),
            point.name.clone(),
            point.kind.clone(),
            output::time(point.time),
            point.lsn.to_string(),
            point.history.to_string(),
            point.locked_until.map_or_else(String::new, output::time),
        ]);
    }
    let mut text = table.text();
    let shown = u64::try_from(points.points.len()).unwrap_or(u64::MAX);
    if shown < points.total {
        text.push_str(&format!("\n{shown} of {} points\n", points.total));
    }
    text
}
