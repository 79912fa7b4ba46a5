//! The command line of `aft vhost`.

use std::path::PathBuf;

use clap::Subcommand;

/// Disks of virtual machines.
#[derive(Subcommand, Clone, Debug)]
pub enum VhostCommand {
    /// Serve a disk as it was, or a branch, as a vhost-user-blk socket
    ///
    /// <machine>/<disk>@<when> is read-only; <machine>/<disk>@branch:<name> can be written. QEMU
    /// and Cloud Hypervisor connect to the socket; the guest's memory must be shared.
    Serve {
        /// What is served
        reference: String,
        /// Where the socket is made, on the appliance's machine
        #[arg(long)]
        path: PathBuf,
        /// Rings that the guest may use, 1 to 64
        #[arg(long, default_value_t = 4)]
        queues: u16,
    },
    /// List the sockets
    List,
    /// End a socket; the guest's disk is gone
    End {
        /// The socket's path
        path: PathBuf,
    },
}
