//! The client: a [`BlockDevice`](afterimage_blockdev::BlockDevice) behind a socket.
//!
//! One thread sends and one receives; callers never wait. There is no reconnecting: when the
//! connection is lost every request fails, and whoever uses the device opens another one.

mod active;
mod device;
mod negotiation;
mod receive;

use std::io::{self, Read, Write};
use std::time::Duration;

pub use device::NbdDevice;
pub use negotiation::{Agreed, ClientNegotiation, ClientStep, Wish};

use crate::option::OptionError;
use crate::reply::BadReply;

/// How a client behaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientOptions {
    /// What is asked for.
    pub wish: Wish,
    /// Time without a byte of the server's part of the handshake.
    pub handshake_timeout: Duration,
    /// Requests on their way; what comes on top waits in a queue.
    pub requests_max: usize,
    /// Requests that wait in the queue; what comes on top fails with `EAGAIN`.
    pub overflow_max: usize,
}

impl ClientOptions {
    /// The usual options for an export.
    #[must_use]
    pub fn new(export: impl Into<String>) -> Self {
        Self {
            wish: Wish {
                export: export.into(),
                contexts: Vec::new(),
                allow_extended: true,
            },
            handshake_timeout: Duration::from_secs(10),
            requests_max: 128,
            overflow_max: 64 * 1024,
        }
    }
}

/// Why a client cannot use a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection broke, or nothing came in time.
    #[error("the connection to the NBD server broke: {0}")]
    Io(#[from] io::Error),
    /// The server does not speak what is needed.
    #[error("the NBD server is of no use: {0}")]
    Unusable(String),
    /// The server says no.
    #[error("the NBD server refuses {what}: {why}")]
    Refused {
        /// What was asked for.
        what: String,
        /// What it says.
        why: OptionError,
    },
    /// What came is no reply.
    #[error("{0}")]
    BadReply(#[from] BadReply),
}

/// Performs the handshake over a connected socket. Reads not one byte more than the handshake has.
///
/// # Errors
/// [`ClientError`].
pub fn negotiate(stream: &mut (impl Read + Write), wish: &Wish) -> Result<Agreed, ClientError> {
    let mut machine = ClientNegotiation::new(wish.clone());
    let mut buffer = [0; 4096];
    loop {
        let step = machine.step()?;
        let output = machine.take_output();
        if !output.is_empty() {
            stream.write_all(&output)?;
        }
        match step {
            ClientStep::Agreed(agreed) => return Ok(agreed),
            ClientStep::Need(count) => {
                let wanted = count.min(buffer.len());
                let part = buffer.get_mut(..wanted).unwrap_or_default();
                stream.read_exact(part)?;
                machine.feed(part);
            }
        }
    }
}
