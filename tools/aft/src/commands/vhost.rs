//! `aft vhost`.

use std::path::{Path, PathBuf};

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::vhost::{ServeVhost, VhostSocket};

use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output, Table, printable};
use crate::vhost_args::VhostCommand;

pub(super) async fn run(
    command: VhostCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        VhostCommand::Serve {
            reference,
            path,
            queues,
        } => {
            let request = ServeVhost {
                reference,
                socket: whole(&path)?,
                queues,
            };
            let served: VhostSocket = server.post("/v1/vhost", &request).await?;
            output.answer(&served, || {
                let (what, socket) = (printable(&served.reference), printable(&served.socket));
                format!("{what} ({}) is served at {socket}\n", served.description)
            });
        }
        VhostCommand::List => {
            let all: Vec<VhostSocket> = server.get("/v1/vhost").await?;
            output.answer(&all, || table(&all));
        }
        VhostCommand::End { path } => {
            let socket = whole(&path)?;
            let path = format!("/v1/vhost/{}", segment(&socket));
            let () = server.delete(&path).await?;
            output.answer(&socket, || format!("{} has ended\n", printable(&socket)));
        }
    }
    Ok(())
}

/// The appliance does not know the caller's directory.
fn whole(path: &Path) -> Result<String, AftError> {
    let wrong = |why: String| {
        let text = format!("{}: {why}", path.display());
        AftError::new(ErrorClass::Refused, text, "give an absolute path")
    };
    let path: PathBuf = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| wrong("the path is not UTF-8".to_owned()))
}

fn table(all: &[VhostSocket]) -> String {
    if all.is_empty() {
        return "No disk is served to virtual machines.\n".to_owned();
    }
    let heading = ["SOCKET", "WHAT", "SIZE", "ACCESS", "GUEST", "LAST FAILURE"];
    let mut table = Table::new(&heading);
    for one in all {
        let access = if one.is_writable { "write" } else { "read" };
        let guest = if one.is_connected {
            "connected"
        } else {
            "none"
        };
        table.row([
            printable(&one.socket),
            printable(&one.reference),
            output::bytes(one.size_bytes),
            access.to_owned(),
            guest.to_owned(),
            one.last_failure.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}
