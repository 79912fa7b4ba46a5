//! `aft mount`, `aft umount`, `aft mounts`.

use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::server::{CreateMount, Mount};

use crate::args::MountArgs;
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn mount(
    args: MountArgs,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let directory = args.directory.as_deref().map(absolute).transpose()?;
    let request = CreateMount {
        reference: args.reference,
        directory,
        device_only: args.device,
        is_branch: args.rw,
        allow_incomplete: args.allow_incomplete,
        options: args.how.options(),
    };
    let mount: Mount = server.post("/v1/mounts", &request).await?;
    output.answer(&mount, || describe(&mount));
    Ok(())
}

/// The daemon does not know where this shell stands.
pub(super) fn absolute(path: &Path) -> Result<String, AftError> {
    let wrong = |why: String| AftError::new(ErrorClass::Refused, why, "");
    let path = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| wrong(format!("{} is not UTF-8", path.display())))
}

fn describe(mount: &Mount) -> String {
    let place = match &mount.directory {
        Some(directory) => format!("{directory} ({})", mount.device),
        None => mount.device.clone(),
    };
    let what = if mount.is_branch { "a branch of " } else { "" };
    let mut text = format!(
        "{place}: {what}{} at LSN {}{} · device after {}, all after {}\n",
        mount.reference,
        mount.lsn,
        mount
            .filesystem
            .as_ref()
            .map_or(String::new(), |kind| format!(", {kind}")),
        output::span(mount.device_ms),
        output::span(mount.total_ms),
    );
    if mount.resolved_to_batch_begin {
        text.push_str("what was asked for lies inside a batch; this is the state before it\n");
    }
    if mount.is_branch {
        let name = mount.branch_name.as_deref().unwrap_or_default();
        text.push_str(&format!(
            "the branch is {}, history {}\n",
            output::printable(name),
            mount.history
        ));
    }
    for note in &mount.notes {
        text.push_str(&output::printable(note));
        text.push('\n');
    }
    text.push_str(&format!("end it with `aft umount {}`\n", mount.id));
    text
}

pub(super) async fn mounts(server: &Client, output: &Output) -> Result<(), AftError> {
    let mounts: Vec<Mount> = server.get("/v1/mounts").await?;
    output.answer(&mounts, || table(&mounts));
    Ok(())
}

fn table(mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        return "There are no mounts.\n".to_owned();
    }
    let mut table = Table::new(&[
        "NUMBER",
        "STATE",
        "LSN",
        "DEVICE",
        "DIRECTORY",
        "FILE SYSTEM",
        "KIND",
    ]);
    for mount in mounts {
        table.row([
            mount.id.to_string(),
            mount.reference.clone(),
            mount.lsn.to_string(),
            mount.device.clone(),
            mount.directory.clone().unwrap_or_else(|| "-".to_owned()),
            mount.filesystem.clone().unwrap_or_else(|| "-".to_owned()),
            if mount.is_branch {
                "branch"
            } else {
                "private copy"
            }
            .to_owned(),
        ]);
    }
    table.text()
}

pub(super) async fn umount(
    target: &str,
    drop_branch: bool,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let mounts: Vec<Mount> = server.get("/v1/mounts").await?;
    let path = absolute(Path::new(target))?;
    let found = mounts.iter().find(|mount| {
        target.parse() == Ok(mount.id)
            || mount.device == target
            || mount.directory.as_deref() == Some(path.as_str())
    });
    let mount = found.ok_or_else(|| {
        AftError::new(
            ErrorClass::Refused,
            format!("{target:?} is no number, directory or device of a mount"),
            "`aft mounts` lists them",
        )
    })?;
    let () = server
        .delete(&format!(
            "/v1/mounts/{}?drop_branch={drop_branch}",
            mount.id
        ))
        .await?;
    output.answer(&mount.id, || match (mount.is_branch, drop_branch) {
        (true, false) => format!(
            "mount {} has ended; its branch {} stays",
            mount.id,
            output::printable(mount.branch_name.as_deref().unwrap_or_default())
        ),
        (true, true) => format!("mount {} has ended; its branch is dropped", mount.id),
        (false, _) => format!("mount {} has ended", mount.id),
    });
    Ok(())
}
