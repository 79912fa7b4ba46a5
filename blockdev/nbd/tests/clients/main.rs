//! The server as clients see it that nobody here wrote, and as a hostile peer sees it.
//!
//! A program that is missing fails the test that needs it, and says which package has it.

#![allow(clippy::unwrap_used)]

mod differential;
mod hostile;
mod programs;
mod raw;
mod rig;
mod tls;
mod transport;
