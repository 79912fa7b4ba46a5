//! Disks over the network block device protocol.

use serde::{Deserialize, Serialize};

/// `GET /v1/nbd`: where disks are served, and under which names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NbdExports {
    /// The Unix socket on the appliance's machine, if there is one.
    pub socket: Option<String>,
    /// The TCP port, if there is one.
    pub port: Option<u16>,
    /// The exports.
    pub exports: Vec<NbdExport>,
}

/// One export.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NbdExport {
    /// Its name.
    pub name: String,
    /// What it is, for people.
    pub description: String,
}
