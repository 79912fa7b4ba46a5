//! The check of a frame from a peer, before anybody believes it.

use afterimage_blockdev::ErrorClass;
use afterimage_cache::Frame;
use afterimage_protocol::receiver::StreamIdentity;
use afterimage_protocol::{Refusal, RefusalCode};

/// Checks all that a frame says of itself, its hashes included.
pub(super) fn accept(
    bytes: Vec<u8>,
    identity: StreamIdentity,
    is_bulk: bool,
) -> Result<Frame, Refusal> {
    let frame = Frame::accept(bytes).map_err(|damage| damaged(damage.to_string()))?;
    let found = frame.header.identity;
    let is_ours = found.machine == identity.machine
        && found.history == identity.history
        && found.origin == identity.origin
        && found.epoch <= identity.epoch
        && frame.header.is_bulk == is_bulk;
    if is_ours {
        Ok(frame)
    } else {
        Err(damaged(
            "a frame of another stream, or of another kind than its envelope".to_owned(),
        ))
    }
}

pub(super) fn damaged(message: String) -> Refusal {
    Refusal {
        code: RefusalCode::Damaged,
        class: ErrorClass::Corrupt,
        message,
        hint: "the bytes were damaged on their way or in the memory of the source; send them \
               again, and check its memory if that does not help"
            .to_owned(),
    }
}
