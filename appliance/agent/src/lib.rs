//! The mobility agent: captures every write of a machine's disks and sends them, in order, to an
//! appliance, without ever making the machine wait for the link.

pub mod activity;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod error;
pub mod export;
pub mod link;
pub mod machine;
pub mod order;
pub mod pipeline;
pub mod replicate;
pub mod run;
pub mod state;
pub mod tap;
#[cfg(test)]
mod testing;

pub use error::AgentError;
