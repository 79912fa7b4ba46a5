//! The connection to the appliance: a thin shell around the sender's state machine.

pub mod enrol;
pub mod http;
pub mod ladder;
pub mod run;
mod session;
pub mod tls;

pub use run::{LinkHost, run};
