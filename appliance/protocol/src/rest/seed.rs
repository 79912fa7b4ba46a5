//! Seeds: what was imported so that a first copy sends only what differs.

use serde::{Deserialize, Serialize};

/// `POST /v1/seeds`: prepares a place for a seed. Only on the local socket is it of any use.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSeed {
    /// Name of the machine, which need not be known yet.
    pub machine: String,
    /// Name of its disk, of which no whole copy is here.
    pub disk: String,
}

/// The answer to [`CreateSeed`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedPlace {
    /// Where a seed archive is to be written.
    pub directory: String,
    /// The key to encrypt it with, in hexadecimal digits.
    pub key: String,
}

impl core::fmt::Debug for SeedPlace {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "SeedPlace({:?}, ***)", self.directory)
    }
}

/// One seed; `GET /v1/seeds` lists them, `DELETE /v1/seeds/{machine}/{disk}` drops one.
/// `POST /v1/seeds/{machine}/{disk}/ready` says that its archive is whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seed {
    /// Name of the machine.
    pub machine: String,
    /// Name of the disk.
    pub disk: String,
    /// What it was made from.
    pub source: String,
    /// Bytes of the disk that it holds.
    pub size_bytes: u64,
    /// The archive is whole, and the next first copy uses it.
    pub is_ready: bool,
    /// Bytes that a source was found to have too, and that were taken from the seed.
    pub taken_bytes: u64,
}
