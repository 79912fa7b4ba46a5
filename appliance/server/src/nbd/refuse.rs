//! What a client is told instead of an export.

use afterimage_blockdev::ErrorClass;
use afterimage_nbd::Refusal;
use afterimage_protocol::rest::ApiError;

use crate::engine::EngineGone;

pub(super) fn refusal(error: &ApiError) -> Refusal {
    match error.class {
        ErrorClass::Refused => Refusal::Unknown(error.to_string()),
        ErrorClass::Fenced => Refusal::NotAllowed(error.to_string()),
        ErrorClass::Retry | ErrorClass::Operator | ErrorClass::Corrupt => {
            Refusal::Unavailable(error.to_string())
        }
    }
}

pub(super) fn gone(error: EngineGone) -> Refusal {
    Refusal::Unavailable(error.to_string())
}
