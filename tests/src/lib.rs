//! The rings of tests that need more than one crate, or more time than a unit test has.

pub mod crash_log;
pub mod crash_store;
pub mod fault_log;
pub mod flip_log;
pub mod frames;
pub mod fuzz;
pub mod golden;
pub mod log_rig;
pub mod process;
pub mod report;
pub mod store_model;
pub mod store_rig;
pub mod store_writer;
