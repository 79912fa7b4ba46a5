//! What went wrong, why, and what to do; and the exit code that says it to scripts.

use std::process::ExitCode;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;

/// A failed command.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(transparent)]
pub struct AftError(#[from] pub ApiError);

impl AftError {
    /// Makes an error.
    #[must_use]
    pub fn new(class: ErrorClass, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self(ApiError {
            class,
            message: message.into(),
            hint: hint.into(),
        })
    }

    /// The documented exit code. 2 is the command line's, by clap.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.0.class {
            ErrorClass::Retry => 1,
            ErrorClass::Refused => 3,
            ErrorClass::Operator => 4,
            ErrorClass::Fenced => 5,
            ErrorClass::Corrupt => 6,
        })
    }
}
