//! `aft store`.

use afterimage_protocol::rest::server::CollectReport;

use super::{offline, scrub};
use crate::client::Client;
use crate::error::AftError;
use crate::offline::Order;
use crate::offline_args::StoreCommand;
use crate::output::{self, Output};

pub(super) async fn store(
    command: StoreCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        StoreCommand::Collect => collect(server, output).await,
        StoreCommand::Scrub { no_wait } => scrub::scrub(no_wait, server, output).await,
        StoreCommand::Check(store) => offline::run_check(&store.data_dir, output),
        StoreCommand::Verify(store) => offline::run_verify(&store.data_dir, output).await,
        StoreCommand::Dump { store, what } => offline::run_dump(&store.data_dir, what, output),
        StoreCommand::Rebuild {
            store,
            manifest,
            to,
            in_place: _,
        } => offline::run_rebuild(&store.data_dir, &Order { manifest, to }, output),
    }
}

async fn collect(server: &Client, output: &Output) -> Result<(), AftError> {
    let report: CollectReport = server
        .post("/v1/store/collect", &serde_json::Value::Null)
        .await?;
    output.answer(&report, || {
        let freed = match u64::try_from(report.freed_bytes) {
            Ok(bytes) => format!("{} were given back", output::bytes(bytes)),
            Err(_) => format!(
                "{} more are used, until the log's files are gone",
                output::bytes(report.freed_bytes.unsigned_abs())
            ),
        };
        format!(
            "{freed}: {} segments dropped, {} rewritten, {} moved from the log\n",
            report.dropped, report.rewritten, report.destaged
        )
    });
    Ok(())
}
