//! Nested failovers as the appliance sees them: a history is left at its newest point, another one
//! forks off there and goes on, and the points of the parent are deleted, again and again.

use std::path::PathBuf;
use std::sync::Arc;

use afterimage_blockdev::{Entropy, Epoch, HistoryId, SystemEntropy};
use afterimage_protocol::message::ForkPoint;
use serde_json::json;

use super::machine::{Machine, block_bytes};
use super::pool::prepare;
use super::session::{Opening, Session};
use crate::error::BenchError;
use crate::http::LocalClient;

/// Records of a frame.
const FRAME_RECORDS: usize = 64;

/// Arguments of `failovers`.
#[derive(clap::Args, Debug)]
pub(crate) struct FailoverArgs {
    /// State directory of the agent
    #[arg(long)]
    agent: PathBuf,
    /// Local socket of the appliance
    #[arg(long)]
    socket: PathBuf,
    /// Size of the disk in bytes
    #[arg(long)]
    disk_bytes: u64,
    /// Histories, each a fork of the one before
    #[arg(long)]
    histories: u64,
    /// Random 4 KiB writes of each history
    #[arg(long)]
    writes: u64,
}

/// Writes all histories; the disk's newest state is that of the last one.
pub(crate) fn run(args: &FailoverArgs) -> Result<(), BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(BenchError::io("start threads"))?;
    let mut opening = Opening::new(1, args.disk_bytes);
    let mut client = LocalClient::connect(&args.socket)?;
    let mut machine = None;
    for number in 0..args.histories {
        let written = runtime.block_on(write_history(args, &opening, &mut machine))?;
        let points = format!("/v1/machines/{}", written.name);
        let body = json!({ "name": format!("failover-{number}"), "at": null });
        client.post(&format!("{points}/points"), &body)?;
        if let Some(before) = number.checked_sub(1) {
            let body = json!({ "names": [format!("failover-{before}")] });
            client.post(&format!("{points}/deletions"), &body)?;
        }
        opening.parent = Some(written.fork);
        opening.history = Some(HistoryId(SystemEntropy.identity()));
        opening.epoch = Epoch(opening.epoch.0 + 1);
    }
    println!("{}", json!({ "histories": args.histories }));
    Ok(())
}

struct Written {
    name: String,
    fork: ForkPoint,
}

/// Opens a history, writes to it until all is durable, and closes it.
async fn write_history(
    args: &FailoverArgs,
    opening: &Opening,
    machine: &mut Option<Machine>,
) -> Result<Written, BenchError> {
    let (session, stream) = Session::connect(&args.agent, opening).await?;
    let session = Arc::new(session);
    let task = tokio::spawn(Arc::clone(&session).run(stream));
    let keys = session.keys().await?;
    let machine = match machine {
        Some(machine) => {
            machine.fork(&session.identity, keys);
            machine
        }
        none => none.insert(Machine::new(&session.identity, keys, args.disk_bytes, 1)),
    };
    let bytes = args.writes * block_bytes();
    let prepared = prepare(std::slice::from_mut(machine), bytes, FRAME_RECORDS);
    session.send(prepared.frames.into_iter().flatten().collect());
    session.acknowledged().await?;
    session.close();
    let ended = task.await;
    ended.map_err(|error| BenchError::usage(error.to_string()))??;
    Ok(Written {
        name: session.identity.name.clone(),
        fork: ForkPoint {
            history: session.identity.history,
            lsn: machine.last(),
        },
    })
}
