//! What can go wrong in the agent, for people and for programs.

use std::path::PathBuf;

use afterimage_blockdev::{BlockError, ErrorClass, StorageError};
use afterimage_cache::CacheError;
use afterimage_export::ExportError;
use afterimage_protocol::rest::ApiError;

/// An error of the agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The agent needs to be root.
    #[error("the agent must run as root")]
    NotRoot,
    /// A file of the agent's own could not be read or written.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb.
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file of the agent's own does not hold what it should.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The configuration cannot be used.
    #[error("configuration {}: {what}", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Another agent uses the state directory.
    #[error("another agent uses {}", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// There is no enrolment yet.
    #[error("{} holds no enrolment", path.display())]
    NotEnrolled {
        /// The state directory.
        path: PathBuf,
    },
    /// There is an enrolment already.
    #[error("{} is enrolled with {server} already", path.display())]
    AlreadyEnrolled {
        /// The state directory.
        path: PathBuf,
        /// With whom.
        server: String,
    },
    /// A name breaks the rules.
    #[error("{name:?} is not a name: 1 to 64 letters, digits, '-', '_' or '.', no leading '.'")]
    Name {
        /// The name.
        name: String,
    },
    /// A name is taken.
    #[error("a disk named {name} is attached already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No such disk.
    #[error("no disk named {name} is attached")]
    NoSuchDisk {
        /// The name.
        name: String,
    },
    /// A source cannot be tapped.
    #[error("cannot use {} as a source: {what}", path.display())]
    Source {
        /// The image file or block device.
        path: PathBuf,
        /// Why not.
        what: String,
        /// How to go on.
        class: ErrorClass,
    },
    /// A disk became smaller.
    #[error("{name} shrank from {known_bytes} to {found_bytes} bytes")]
    Shrunk {
        /// The disk's name.
        name: String,
        /// The size that is known.
        known_bytes: u64,
        /// The size found.
        found_bytes: u64,
    },
    /// A source grew, and the disk cannot follow yet.
    #[error("{name} cannot grow yet: {reason}")]
    GrowsLater {
        /// The disk's name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A device is in use.
    #[error("{device} is in use: {user}")]
    InUse {
        /// The device.
        device: String,
        /// By whom.
        user: String,
    },
    /// The appliance must be connected for this.
    #[error("the appliance is not connected: {reason}")]
    NotConnected {
        /// Why not.
        reason: String,
    },
    /// TLS could not be set up.
    #[error("TLS: {what}")]
    Tls {
        /// What is wrong.
        what: String,
    },
    /// The appliance cannot be reached.
    #[error("cannot reach {server}: {what}")]
    Unreachable {
        /// Its address.
        server: String,
        /// Why not.
        what: String,
    },
    /// The appliance said no.
    #[error("{0}")]
    Appliance(ApiError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] BlockError),
    /// A file of the spool failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The spool failed.
    #[error(transparent)]
    Spool(#[from] CacheError),
    /// FUSE, loop or mounting failed.
    #[error(transparent)]
    Export(#[from] ExportError),
}

impl AgentError {
    /// Makes a closure that wraps an I/O error of a file.
    pub fn file(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }

    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unreachable { .. } | Self::NotConnected { .. } | Self::GrowsLater { .. } => {
                ErrorClass::Retry
            }
            Self::Damaged { .. } => ErrorClass::Corrupt,
            Self::Name { .. } | Self::NameTaken { .. } | Self::NoSuchDisk { .. } => {
                ErrorClass::Refused
            }
            Self::Source { class, .. } => *class,
            Self::Appliance(error) => error.class,
            Self::Device(error) => error.class(),
            Self::Storage(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::Export(error) => error.class(),
            _ => ErrorClass::Operator,
        }
    }

    /// What a person can do.
    #[must_use]
    pub fn hint(&self) -> String {
        let hint = match self {
            Self::NotRoot => "run it with sudo, or as a system service",
            Self::Locked { .. } => "stop that agent first, or use another --state-dir",
            Self::NotEnrolled { .. } => "run `afterimage-agent enrol` first",
            Self::AlreadyEnrolled { .. } => "use another --state-dir for another appliance",
            Self::NameTaken { .. } => "choose another name, or detach that disk first",
            Self::NoSuchDisk { .. } => "list the disks to see the names",
            Self::Shrunk { .. } => {
                "make the source as large as it was (what was cut off is in the replica), or \
                 attach it under a new name"
            }
            Self::GrowsLater { .. } => "wait: it grows by itself",
            Self::InUse { .. } => "unmount it and close what uses it, then try again",
            Self::NotConnected { .. } => {
                "it connects by itself when it can; `aft agent status` shows how it is"
            }
            Self::Unreachable { .. } => "check the address, the network and that afterimaged runs",
            Self::Damaged { .. } => "restore the file, or remove it and recheck the whole disk",
            Self::Appliance(error) => return error.hint.clone(),
            Self::Export(error) => return error.hint().to_owned(),
            _ => "",
        };
        hint.to_owned()
    }

    /// As a body of the control socket.
    #[must_use]
    pub fn to_api(&self) -> ApiError {
        match self {
            Self::Appliance(error) => error.clone(),
            _ => ApiError {
                class: self.class(),
                message: self.to_string(),
                hint: self.hint(),
            },
        }
    }
}
