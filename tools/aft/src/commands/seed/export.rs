//! `aft seed export`.

use std::path::Path;
use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use afterimage_bulk::archive::archive_state;
use afterimage_bulk::{
    ArchiveTarget, BlockSource, BulkError, FileSource, Options, Progress, RawTarget, Report,
    Secret, export_archive, export_raw, qcow2, resume_identity,
};

use super::view::View;
use super::{bulk_error, check_local, options, secret, split, watch};
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output};
use crate::seed_args::{ExportArgs, ExportFormat};

/// Between what was asked for and what it resolved to, in the identity of an unfinished export.
const MEANS: &str = " = ";

/// What the thread does.
struct Job {
    args: ExportArgs,
    secret: Option<Secret>,
    identity: String,
    options: Options,
    file: std::path::PathBuf,
}

pub(super) async fn export(
    args: ExportArgs,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    check_local(server)?;
    let secret = check_secret(&args)?;
    let reference = pinned(&args)?.unwrap_or_else(|| args.reference.clone());
    let view = View::open(&reference, args.allow_incomplete, server).await?;
    let mount = view.mount.clone();
    let disk = args.reference.split_once('@').map_or("", |(disk, _)| disk);
    let state = format!("{disk}@{}:lsn:{}", mount.history, mount.lsn);
    let job = Job {
        identity: format!("{}{MEANS}{state}", args.reference),
        secret,
        options: options(args.io),
        file: view.file.clone(),
        args: args.clone(),
    };
    let what = format!("writing {}", args.target.display());
    let progress = Arc::new(Progress::default());
    let result = watch::watch(&what, output, &progress, move |progress| job.run(progress)).await;
    let closed = view.close(server).await;
    let report = result?;
    closed?;
    let value = serde_json::json!({
        "state": state,
        "target": args.target,
        "size_bytes": report.size_bytes,
        "read_bytes": report.read_bytes,
        "written_bytes": report.written_bytes,
        "resumed_at": report.resumed_at,
        "resolved_to_batch_begin": mount.resolved_to_batch_begin,
    });
    output.answer(&value, || {
        describe(&args.target, &state, mount.resolved_to_batch_begin, report)
    });
    Ok(())
}

fn describe(target: &Path, state: &str, is_before_batch: bool, report: Report) -> String {
    let mut text = format!(
        "{}: {state}, {}",
        target.display(),
        output::bytes(report.size_bytes)
    );
    if report.resumed_at == report.size_bytes && report.size_bytes > 0 {
        text.push_str("; it was whole already\n");
    } else {
        text.push_str(&format!(
            ", {} written",
            output::bytes(report.written_bytes)
        ));
        if report.resumed_at > 0 {
            let from = output::bytes(report.resumed_at);
            text.push_str(&format!(", going on from {from}"));
        }
        text.push('\n');
    }
    if is_before_batch {
        text.push_str("what was asked for lies inside a batch; this is the state before it\n");
    }
    text
}

/// Plain content leaves the store: that an archive is readable by everybody must be said.
fn check_secret(args: &ExportArgs) -> Result<Option<Secret>, AftError> {
    split(&args.reference)?;
    let secret = secret::read(&args.secret)?;
    let is_archive = args.format == ExportFormat::Archive;
    let refused =
        |message: &str, hint: &str| Err(AftError::new(ErrorClass::Refused, message, hint));
    match (is_archive, &secret, args.plain) {
        (true, None, false) => refused(
            "an archive needs a secret",
            "give --passphrase-file or --key-file, or say --plain",
        ),
        (false, Some(_), _) => refused(
            "only an archive is encrypted",
            "use --format archive, or leave the secret out",
        ),
        _ => Ok(secret),
    }
}

/// The state that an unfinished export of the same reference had begun with: `latest` and ages mean
/// another one by now.
fn pinned(args: &ExportArgs) -> Result<Option<String>, AftError> {
    if args.force {
        return Ok(None);
    }
    let known = match args.format {
        ExportFormat::Raw => resume_identity(&args.target),
        ExportFormat::Archive => archive_state(&args.target).map(|state| {
            let unfinished = state.filter(|state| !state.is_finished);
            unfinished.map(|state| state.identity)
        }),
        ExportFormat::Qcow2 => Ok(None),
    };
    let known = known.map_err(|error| bulk_error(&error))?;
    let state = known.and_then(|identity| {
        let (asked, state) = identity.split_once(MEANS)?;
        (asked == args.reference).then(|| state.to_owned())
    });
    Ok(state)
}

impl Job {
    fn run(&self, progress: &Progress) -> Result<Report, BulkError> {
        let args = &self.args;
        let open = || -> Result<Arc<dyn BlockSource>, BulkError> {
            Ok(Arc::new(FileSource::open(&self.file)?))
        };
        match args.format {
            ExportFormat::Raw => {
                let target = RawTarget {
                    path: &args.target,
                    identity: &self.identity,
                    is_forced: args.force,
                };
                export_raw(&open()?, target, &self.options, progress)
            }
            ExportFormat::Archive => {
                let target = ArchiveTarget {
                    directory: &args.target,
                    identity: &self.identity,
                    secret: self.secret.as_ref(),
                    is_forced: args.force,
                };
                export_archive(&open()?, target, &self.options, progress)
            }
            ExportFormat::Qcow2 => {
                let size_bytes = open()?.size_bytes();
                let written = qcow2::export_qcow2(&self.file, &args.target, args.force, progress)?;
                Ok(Report {
                    size_bytes,
                    read_bytes: size_bytes,
                    written_bytes: written,
                    resumed_at: 0,
                })
            }
        }
    }
}
