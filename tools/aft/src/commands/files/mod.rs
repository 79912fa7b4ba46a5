//! `aft files`: the appliance mounts a private copy of a state, read-only and in a place of its
//! own; this program looks at it there, and ends the mount.
//!
//! Invariants
//! * Nothing on the way to a file is followed that could lead out of the file system: a symbolic
//!   link is shown and copied as what it is.
//! * The mount ends with the command, also after an interruption.
//! * A name is never taken for text: bytes that move a cursor are not written to a terminal, and
//!   scripts get them in hexadecimal digits where they are no UTF-8.

mod diff;
mod entry;
mod get;
mod ls;
mod shown;
mod walk;

use afterimage_blockdev::ErrorClass;

use crate::client::Client;
use crate::error::AftError;
use crate::files_args::FilesCommand;
use crate::output::Output;
use shown::Shown;

pub(super) async fn run(
    command: FilesCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    check_local(server)?;
    match command {
        FilesCommand::Ls {
            reference,
            path,
            long,
            recursive,
            place,
        } => {
            let shown = Shown::open(&[&reference], place, server).await?;
            let is_json = output.is_json();
            shown
                .with(server, move |roots, stop| {
                    let how = ls::How {
                        is_long: long,
                        is_recursive: recursive,
                        is_json,
                    };
                    ls::ls(&roots[0], &path, how, stop)
                })
                .await
        }
        FilesCommand::Get {
            reference,
            path,
            target,
            place,
        } => {
            let shown = Shown::open(&[&reference], place, server).await?;
            let got = shown
                .with(server, move |roots, _| get::get(&roots[0], &path, &target))
                .await?;
            if let Some(got) = got {
                output.answer(&got, || format!("{} is there", got.target));
            }
            Ok(())
        }
        FilesCommand::Diff {
            before,
            after,
            path,
            content,
            place,
        } => {
            let after = same_disk(&before, after);
            let shown = Shown::open(&[&before, &after], place, server).await?;
            let is_json = output.is_json();
            shown
                .with(server, move |roots, stop| {
                    let how = diff::How {
                        compares_all: content,
                        is_json,
                    };
                    diff::diff((&roots[0], &roots[1]), &path, how, stop)
                })
                .await
        }
    }
}

/// `@latest` means the disk of the other reference.
fn same_disk(before: &str, after: String) -> String {
    match before.split_once('@') {
        Some((disk, _)) if after.starts_with('@') => format!("{disk}{after}"),
        _ => after,
    }
}

/// Files are looked at where the appliance mounts them.
fn check_local(server: &Client) -> Result<(), AftError> {
    match server {
        Client::Local { .. } => Ok(()),
        Client::Remote { .. } => Err(AftError::new(
            ErrorClass::Refused,
            "single files are not looked at with --server",
            "run this at the appliance itself",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_without_a_disk_means_the_same_one() {
        let same = |after: &str| same_disk("web1/vm@monday", after.to_owned());
        assert_eq!(same("@latest"), "web1/vm@latest");
        assert_eq!(same("web2/vm@latest"), "web2/vm@latest");
    }
}
