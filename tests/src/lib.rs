//! The rings of tests that need more than one crate, or more time than a unit test has.

pub mod crash_log;
pub mod fault_log;
pub mod flip_log;
pub mod frames;
pub mod log_rig;
pub mod report;
