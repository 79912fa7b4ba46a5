//! Reads the secret of an archive from a file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_bulk::Secret;

use super::bulk_error;
use crate::error::AftError;
use crate::seed_args::SecretArgs;

const BYTES_MAX: u64 = 64 << 10;

/// The secret, if one was named.
pub(super) fn read(args: &SecretArgs) -> Result<Option<Secret>, AftError> {
    let secret = match (&args.passphrase_file, &args.key_file) {
        (None, None) => return Ok(None),
        (Some(path), _) => {
            let mut bytes = bytes_of(path)?;
            if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                bytes.truncate(end);
            }
            Secret::Passphrase(bytes)
        }
        (None, Some(path)) => Secret::Key(bytes_of(path)?),
    };
    secret.check().map_err(|error| bulk_error(&error))?;
    Ok(Some(secret))
}

fn bytes_of(path: &Path) -> Result<Vec<u8>, AftError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| {
        AftError::new(
            ErrorClass::Operator,
            format!("cannot read {}: {error}", path.display()),
            "",
        )
    })?;
    Ok(bytes)
}
