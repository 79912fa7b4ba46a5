//! Types of the control port and of the local sockets, as JSON.

pub mod agent;
pub mod branch;
pub mod nbd;
pub mod policy;
pub mod scrub;
pub mod seed;
pub mod server;
pub mod space;
pub mod time;
pub mod token;
pub mod vhost;

use afterimage_blockdev::ErrorClass;
use serde::{Deserialize, Serialize};

/// Body of every answer that is not a success.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}{hint}", if hint.is_empty() { "" } else { "; " })]
pub struct ApiError {
    /// How to go on.
    pub class: ErrorClass,
    /// What and why.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}
