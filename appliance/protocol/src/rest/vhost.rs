//! Disks of virtual machines.

use serde::{Deserialize, Serialize};

/// `POST /v1/vhost`: serves a disk as it was, or a branch, at a Unix socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeVhost {
    /// `<machine>/<disk>@<when>`, read-only, or `<machine>/<disk>@branch:<name>`, writable.
    pub reference: String,
    /// Where the socket is made, on the appliance's machine; an absolute path.
    pub socket: String,
    /// Rings that the guest may use.
    pub queues: u16,
}

/// `GET /v1/vhost`: one socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VhostSocket {
    /// Its path; `DELETE /v1/vhost/{socket}` ends it.
    pub socket: String,
    /// What was asked for.
    pub reference: String,
    /// The state that is served, or what the branch is.
    pub description: String,
    /// The guest may write.
    pub is_writable: bool,
    /// Size in bytes.
    pub size_bytes: u64,
    /// A guest is connected.
    pub is_connected: bool,
    /// Guests that have connected so far.
    pub connections: u64,
    /// Why the last connection was ended from this side, if one was.
    pub last_failure: Option<String>,
}
