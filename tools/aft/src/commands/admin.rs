//! `aft log`, `aft token`, `aft cert`, `aft events` and `aft man`.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::server::{
    AdminIdentity, CreateToken, Event, IssueAdmin, Token, VerifyReport,
};
use clap::CommandFactory;

use crate::args::{Args, CertCommand, LogCommand, TokenCommand};
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn log(
    command: LogCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let LogCommand::Verify = command;
    let report: VerifyReport = server
        .post("/v1/log/verify", &serde_json::Value::Null)
        .await?;
    output.answer(&report, || {
        let mut text = format!(
            "{} segments, {} slots and {} were read\n",
            report.segments,
            report.slots,
            output::bytes(report.bytes)
        );
        for damage in &report.damage {
            text.push_str(&format!("! {}\n", output::printable(damage)));
        }
        text
    });
    match report.damage.len() {
        0 => Ok(()),
        count => Err(AftError::new(
            ErrorClass::Corrupt,
            format!("{count} parts of the store are damaged"),
            "the list above names the points that are hurt",
        )),
    }
}

pub(super) async fn token(
    command: TokenCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let TokenCommand::Create { ttl } = command;
    let token: Token = server
        .post("/v1/tokens", &CreateToken { ttl_s: ttl })
        .await?;
    output.answer(&token, || {
        eprintln!(
            "one agent can enrol with this until {}:",
            output::time(token.expires)
        );
        token.token.clone()
    });
    Ok(())
}

pub(super) async fn cert(
    command: CertCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let CertCommand::IssueAdmin { name, out } = command;
    let request = IssueAdmin { name };
    let identity: AdminIdentity = server.post("/v1/certificates/admin", &request).await?;
    let pem = format!(
        "{}{}{}",
        identity.certificate_pem, identity.authority_pem, identity.key_pem
    );
    match out {
        None => output.answer(&identity, || pem),
        Some(path) => {
            write_secret(&path, pem.as_bytes()).map_err(|error| {
                AftError::new(
                    ErrorClass::Operator,
                    format!("cannot write {}: {error}", path.display()),
                    "name a file that does not exist, in a directory that does",
                )
            })?;
            output.answer(&identity.expires, || {
                format!(
                    "{} holds until {}; use it with `aft --server HOST:PORT --identity {}`",
                    path.display(),
                    output::time(identity.expires),
                    path.display()
                )
            });
        }
    }
    Ok(())
}

pub(super) fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) async fn events(
    after: u64,
    limit: usize,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let path = format!("/v1/events?after={after}&limit={limit}");
    let events: Vec<Event> = server.get(&path).await?;
    output.answer(&events, || {
        let mut table = Table::new(&["NUMBER", "TIME", "KIND", "WHAT"]);
        for event in &events {
            table.row([
                event.number.to_string(),
                output::time(event.time),
                event.kind.clone(),
                event.text.clone(),
            ]);
        }
        table.text()
    });
    Ok(())
}

/// The page of `aft` itself, and of every command below it.
pub(super) fn man(output: &Output) -> Result<(), AftError> {
    let mut page = Vec::new();
    let failed = |error: io::Error| AftError::new(ErrorClass::Operator, error.to_string(), "");
    let mut command = Args::command();
    command.build();
    clap_mangen::Man::new(command.clone())
        .render(&mut page)
        .map_err(failed)?;
    for sub in command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
    {
        clap_mangen::Man::new(sub.clone())
            .render(&mut page)
            .map_err(failed)?;
        for deeper in sub.get_subcommands().filter(|sub| sub.get_name() != "help") {
            clap_mangen::Man::new(deeper.clone())
                .render(&mut page)
                .map_err(failed)?;
        }
    }
    output.raw(&page);
    Ok(())
}
