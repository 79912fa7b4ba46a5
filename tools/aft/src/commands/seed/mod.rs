//! `aft seed`.

mod export;
mod import;
mod secret;
mod view;
mod watch;

use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use afterimage_bulk::{ArchiveReader, BulkError, IoChoice, Options, Progress};
use afterimage_protocol::rest::seed::Seed;

use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output, Table};
use crate::seed_args::{Io, SeedCommand};

pub(super) async fn run(
    command: SeedCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        SeedCommand::Export(args) => export::export(args, server, output).await,
        SeedCommand::Import(args) => import::import(args, server, output).await,
        SeedCommand::Verify { archive, secret } => {
            let secret = secret::read(&secret)?;
            let progress = Arc::new(Progress::default());
            let work = move |progress: &Progress| {
                let reader = ArchiveReader::open(&archive, secret.as_ref())?;
                let verified = reader.verify(progress)?;
                Ok((reader.identity().to_owned(), verified))
            };
            let what = "checking";
            let (identity, found) = watch::watch(what, output, &progress, work).await?;
            let value = serde_json::json!({
                "state": identity,
                "segments": found.segments,
                "slots": found.slots,
                "bytes": found.bytes,
            });
            output.answer(&value, || {
                format!(
                    "{}: {} segments, {} slots, {}; all of it is right",
                    output::printable(&identity),
                    found.segments,
                    found.slots,
                    output::bytes(found.bytes)
                )
            });
            Ok(())
        }
        SeedCommand::List => {
            let seeds: Vec<Seed> = server.get("/v1/seeds").await?;
            output.answer(&seeds, || table(&seeds));
            Ok(())
        }
        SeedCommand::Drop { disk } => {
            let (machine, name) = split(&disk)?;
            let path = format!("/v1/seeds/{}/{}", segment(machine), segment(name));
            let () = server.delete(&path).await?;
            output.answer(&disk, || format!("the seed of {disk} is dropped"));
            Ok(())
        }
    }
}

fn table(seeds: &[Seed]) -> String {
    if seeds.is_empty() {
        return "There are no seeds.\n".to_owned();
    }
    let mut table = Table::new(&["DISK", "SIZE", "STATE", "TAKEN", "FROM"]);
    for seed in seeds {
        let state = if seed.is_ready { "ready" } else { "unfinished" };
        table.row([
            format!("{}/{}", seed.machine, seed.disk),
            output::bytes(seed.size_bytes),
            state.to_owned(),
            output::bytes(seed.taken_bytes),
            seed.source.clone(),
        ]);
    }
    table.text()
}

/// Takes `<machine>/<disk>` apart.
fn split(disk: &str) -> Result<(&str, &str), AftError> {
    disk.split_once('/')
        .filter(|(machine, name)| !machine.is_empty() && !name.is_empty())
        .ok_or_else(|| {
            AftError::new(
                ErrorClass::Refused,
                format!("{disk:?} is no disk"),
                "write it as <machine>/<disk>",
            )
        })
}

/// Bulk work is done on this machine, where the appliance's files and devices are.
fn check_local(server: &Client) -> Result<(), AftError> {
    match server {
        Client::Local { .. } => Ok(()),
        Client::Remote { .. } => Err(AftError::new(
            ErrorClass::Refused,
            "bulk import and export do not work with --server",
            "run this at the appliance itself",
        )),
    }
}

fn options(io: Io) -> Options {
    let io = match io {
        Io::Auto => IoChoice::Auto,
        Io::Uring => IoChoice::Uring,
        Io::Threads => IoChoice::Threads,
    };
    Options {
        io,
        ..Options::default()
    }
}

fn bulk_error(error: &BulkError) -> AftError {
    AftError::new(error.class(), error.to_string(), error.hint())
}
