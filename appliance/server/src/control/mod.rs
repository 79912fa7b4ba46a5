//! The control service: the same routes on the local socket, where everybody is root, and on TLS,
//! where the certificate says what somebody may ask for.
//!
//! Invariants
//! * Without a certificate only enrolment is answered; an agent may also renew; the rest is for
//!   admins and the local socket.
//! * Every answer that is not a success has an `ApiError` as its body.

mod access;
mod answer;
mod branches;
mod enrol;
mod listener;
mod machines;
mod mounts;
mod nbd;
mod policy;
mod routes;
mod seeds;
mod space;
mod status;
mod store;
#[cfg(test)]
mod tests;
mod vhost;

pub use access::Caller;
pub use listener::{serve_local, serve_tls};
pub use routes::router;
pub use space::watch as watch_space;
