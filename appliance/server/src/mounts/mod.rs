//! Disks as they were, as files, devices and mounted file systems of this machine.
//!
//! Invariants
//! * What is shown through a mount is a private copy: a view is never written, and a branch is
//!   nobody's but its own.
//! * Each mount holds, in this order, a device, a file of the tree over it, a loop device over that
//!   and a mounted file system; they go in the reverse order, and whatever fails on the way up is
//!   taken down again.
//! * At most `mounts.mounts_max` mounts exist, those being made included.

mod branches;
mod build;
mod choose;
mod directory;
mod forks;
mod lend;
mod manager;
mod nodes;
mod overlay;
mod promotion;
mod status_cache;
#[cfg(test)]
mod tests;
mod tree;
mod views;

pub use lend::LentBranch;
pub use manager::{MountPlaces, Mounts};
pub(crate) use views::INCOMPLETE as INCOMPLETE_KIND;
