//! What agent, appliance and `aft` say to each other. Never the on-disk types: a frame travels as
//! opaque bytes with a few fields beside it that the receiver checks against the frame itself.
//!
//! * [`message`] and [`wire`]: the data port (9443), TLS 1.3 with certificates on both sides.
//! * [`rest`]: the control port (8443) and the local sockets.
//! * [`sender`] and [`receiver`]: the state machines of a stream, without sockets.

pub mod head;
pub mod message;
pub mod receiver;
pub mod rest;
pub mod sender;
pub mod wire;

pub use message::{FromReceiver, FromSender, Refusal, RefusalCode};
pub use wire::{MESSAGE_BYTES_MAX, WireError};
