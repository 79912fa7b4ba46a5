//! What all services of the daemon share.

use std::path::PathBuf;
use std::sync::Arc;

use afterimage_blockdev::{Clock, Entropy, ErrorClass, Timestamp};
use afterimage_protocol::rest::ApiError;

use crate::ca::{Authority, CaError};
use crate::catalogue::{Catalogue, CatalogueError};
use crate::config::Config;
use crate::engine::{EngineGone, EngineHandle};
use crate::events::EventLog;
use crate::ingest::{LiveStreams, Reports};
use crate::mounts::Mounts;
use crate::scrub::Scrub;
use crate::seeds::Seeds;
use crate::vhost::VhostSockets;

/// Name and version of this program.
pub const PROGRAM: &str = concat!("afterimaged ", env!("CARGO_PKG_VERSION"));

/// What all services of the daemon share.
pub struct Appliance {
    /// The configuration.
    pub config: Config,
    /// The data directory.
    pub data_dir: PathBuf,
    /// The engine.
    pub engine: EngineHandle,
    /// The catalogue.
    pub catalogue: Catalogue,
    /// The certificate authority.
    pub authority: Arc<Authority>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub entropy: Arc<dyn Entropy>,
    /// What happened.
    pub events: EventLog,
    /// What the agents said last.
    pub reports: Reports,
    /// The streams that agents have open.
    pub live: LiveStreams,
    /// The mounts.
    pub mounts: Arc<Mounts>,
    /// Checks of the whole store.
    pub scrub: Scrub,
    /// Seeds of first copies.
    pub seeds: Arc<Seeds>,
    /// Disks of virtual machines.
    pub vhost: VhostSockets,
    /// Port of the data service, as it is bound.
    pub data_port: u16,
    /// Port of the control service, as it is bound.
    pub control_port: u16,
    /// TCP port of disks, as it is bound, if there is one.
    pub nbd_port: Option<u16>,
}

impl Appliance {
    /// Appliance time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.wall()
    }
}

/// Makes an error answer.
pub(crate) fn api_error(
    class: ErrorClass,
    message: impl Into<String>,
    hint: impl Into<String>,
) -> ApiError {
    ApiError {
        class,
        message: message.into(),
        hint: hint.into(),
    }
}

impl From<EngineGone> for ApiError {
    fn from(error: EngineGone) -> Self {
        api_error(
            ErrorClass::Retry,
            error.to_string(),
            "look into the log of afterimaged",
        )
    }
}

impl From<CatalogueError> for ApiError {
    fn from(error: CatalogueError) -> Self {
        api_error(error.class(), error.to_string(), error.hint())
    }
}

impl From<CaError> for ApiError {
    fn from(error: CaError) -> Self {
        api_error(error.class(), error.to_string(), "")
    }
}
