//! `aft seed import`.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use afterimage_bulk::{
    ArchiveReader, ArchiveTarget, BlockSource, BulkError, FileSource, Options, Progress, Report,
    Secret, archive, export_archive, qcow2,
};
use afterimage_protocol::rest::seed::{CreateSeed, Seed, SeedPlace};

use super::{check_local, options, secret, split, watch};
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{self, Output};
use crate::seed_args::ImportArgs;

/// What the thread does.
struct Job {
    args: ImportArgs,
    secret: Option<Secret>,
    options: Options,
    directory: PathBuf,
    key: Secret,
}

pub(super) async fn import(
    args: ImportArgs,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    check_local(server)?;
    let (machine, disk) = split(&args.disk)?;
    let secret = secret::read(&args.secret)?;
    check_source(&args.source, secret.is_some())?;
    let request = CreateSeed {
        machine: machine.to_owned(),
        disk: disk.to_owned(),
    };
    let place: SeedPlace = server.post("/v1/seeds", &request).await?;
    let job = Job {
        secret,
        options: options(args.io),
        directory: PathBuf::from(&place.directory),
        key: Secret::Key(key_of(&place)?),
        args: args.clone(),
    };
    let progress = Arc::new(Progress::default());
    let what = format!("importing {}", args.source.display());
    let work = move |progress: &Progress| job.run(progress);
    let report = watch::watch(&what, output, &progress, work).await?;
    let path = format!("/v1/seeds/{}/{}/ready", segment(machine), segment(disk));
    let seed: Seed = server.post(&path, &()).await?;
    output.answer(&seed, || {
        format!(
            "{} is the seed of {}: {}, {} stored\nits first copy sends only what differs; protect \
             it with `aft disk protect {disk}` at {machine}",
            args.source.display(),
            args.disk,
            output::bytes(seed.size_bytes),
            output::bytes(report.written_bytes)
        )
    });
    Ok(())
}

/// What is wrong is said before a place is made for it.
fn check_source(source: &Path, has_secret: bool) -> Result<(), AftError> {
    let missing = |error: std::io::Error| {
        AftError::new(
            ErrorClass::Operator,
            format!("cannot look at {}: {error}", source.display()),
            "",
        )
    };
    let is_directory = fs::metadata(source).map_err(missing)?.is_dir();
    if is_directory && !archive::is_archive(source) {
        return Err(AftError::new(
            ErrorClass::Refused,
            format!("{} is no seed archive", source.display()),
            "name an image, a block device or the directory of an archive",
        ));
    }
    if !is_directory && has_secret {
        return Err(AftError::new(
            ErrorClass::Refused,
            "only an archive is encrypted",
            "leave the secret out",
        ));
    }
    Ok(())
}

fn key_of(place: &SeedPlace) -> Result<Vec<u8>, AftError> {
    let digits = place.key.as_bytes().as_chunks::<2>().0;
    let byte = |pair: &[u8; 2]| {
        let text = std::str::from_utf8(pair).ok()?;
        u8::from_str_radix(text, 16).ok()
    };
    let key: Option<Vec<u8>> = digits.iter().map(byte).collect();
    key.ok_or_else(|| {
        AftError::new(
            ErrorClass::Operator,
            "the appliance gave no key",
            "aft and the daemon may be of different releases",
        )
    })
}

/// Tells two versions of a source apart, as far as that can be seen from outside.
fn identity(source: &Path) -> Result<String, BulkError> {
    let failed = |error| BulkError::Io {
        operation: "look at",
        path: source.to_owned(),
        source: error,
    };
    let path = fs::canonicalize(source).map_err(failed)?;
    let metadata = fs::metadata(&path).map_err(failed)?;
    let (at, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
    let size = metadata.size();
    Ok(format!(
        "{} ({size} bytes, {at}.{nanoseconds})",
        path.display()
    ))
}

/// An unpacked image that goes when it is dropped.
struct Unpacked {
    directory: PathBuf,
}

impl Unpacked {
    fn new(parent: &Path) -> Result<Self, BulkError> {
        let directory = parent.join(format!("aft-import-{}", std::process::id()));
        let made = DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(|source| BulkError::Io {
            operation: "make",
            path: directory.clone(),
            source,
        })?;
        Ok(Self { directory })
    }

    fn image(&self) -> PathBuf {
        self.directory.join("disk.raw")
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("aft: {} stays: {error}", self.directory.display());
        }
    }
}

impl Job {
    fn run(&self, progress: &Progress) -> Result<Report, BulkError> {
        let source = &self.args.source;
        let identity = identity(source)?;
        if archive::is_archive(source) {
            let reader = ArchiveReader::open(source, self.secret.as_ref())?;
            return self.keep(Arc::new(reader), &identity, progress);
        }
        let is_file = fs::metadata(source).is_ok_and(|metadata| metadata.is_file());
        if is_file && qcow2::is_qcow2(source)? {
            let unpacked = Unpacked::new(&self.args.temporary)?;
            qcow2::unpack_qcow2(source, &unpacked.image(), progress)?;
            let opened = FileSource::open(&unpacked.image())?;
            return self.keep(Arc::new(opened), &identity, progress);
        }
        self.keep(Arc::new(FileSource::open(source)?), &identity, progress)
    }

    fn keep(
        &self,
        source: Arc<dyn BlockSource>,
        identity: &str,
        progress: &Progress,
    ) -> Result<Report, BulkError> {
        let target = ArchiveTarget {
            directory: &self.directory,
            identity,
            secret: Some(&self.key),
            is_forced: self.args.force,
        };
        export_archive(&source, target, &self.options, progress)
    }
}
