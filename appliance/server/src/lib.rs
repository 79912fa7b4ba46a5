//! The appliance: ingest, control, mounts, and the engine thread behind them.
//!
//! * [`daemon`]: start and stop; [`args`] and [`config`] say how.
//! * [`ca`], [`tls`], [`catalogue`]: who somebody is, and what they may do.
//! * [`ingest`]: the data port. [`control`]: the control port and the local socket.
//! * [`mounts`]: disks as they were, as files, devices and mounted file systems.
//! * [`nbd`]: the same, and branches, over the network block device protocol.
//! * [`vhost`]: the same, as disks of virtual machines.
//! * [`seeds`]: what was imported, so that a first copy sends only what differs.
//! * [`scrub`]: reads the whole store again and again.
//! * [`engine`]: the one thread that owns log and store. All others ask it.

pub mod appliance;
pub mod args;
pub mod ca;
pub mod catalogue;
pub mod config;
pub mod control;
pub mod daemon;
pub mod engine;
pub mod events;
pub mod failure;
pub mod ingest;
pub mod mounts;
pub mod nbd;
pub mod scrub;
pub mod seeds;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod vhost;
