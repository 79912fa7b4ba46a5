//! The command line of `aft nbd`.

use std::path::PathBuf;

use clap::Subcommand;

/// Disks over the network block device protocol.
#[derive(Subcommand, Clone, Debug)]
pub enum NbdCommand {
    /// List what NBD clients can open, and where
    ///
    /// Any state of a disk can be opened by its name, also one that is not listed:
    /// <machine>/<disk>@<when>. A branch can be written.
    List {
        /// Only those of this machine, or of this <machine>/<disk>
        place: Option<String>,
    },
    /// Write an admin's certificate and key as QEMU and libnbd read them
    ///
    /// The directory gets ca-cert.pem, client-cert.pem and client-key.pem, from the file that
    /// `aft cert issue-admin` wrote.
    Credentials {
        /// The file that `aft cert issue-admin` wrote
        identity: PathBuf,
        /// The directory; it is made if it does not exist
        directory: PathBuf,
    },
}
