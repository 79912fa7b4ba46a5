//! Why a part of the benchmark could not run.

use afterimage_agent::AgentError;
use afterimage_blockdev::ErrorClass;
use afterimage_protocol::sender::SenderError;
use afterimage_protocol::{Refusal, WireError};

/// See the module's text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum BenchError {
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The identity of an agent cannot be used.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Bytes from the appliance are no message.
    #[error("the appliance sent no message: {0}")]
    Wire(#[from] WireError),
    /// The appliance broke the protocol.
    #[error(transparent)]
    Protocol(#[from] SenderError),
    /// The appliance refused the stream.
    #[error("the appliance refused machine {machine}: {refusal}")]
    Refused {
        /// Whose stream.
        machine: String,
        /// What it said.
        refusal: Refusal,
    },
    /// The control port answered something else than success.
    #[error("the appliance answered {status}: {body}")]
    Answer {
        /// The status line.
        status: String,
        /// What follows.
        body: String,
    },
    /// The command line or a command makes no sense.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
    },
}

impl BenchError {
    /// Names what was tried when the system refused.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// A command that makes no sense.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }
}

/// A stream that ended while the generator still used it.
pub(crate) fn ended(machine: &str) -> BenchError {
    BenchError::Refused {
        machine: machine.to_owned(),
        refusal: Refusal {
            code: afterimage_protocol::RefusalCode::ShuttingDown,
            class: ErrorClass::Retry,
            message: "the connection ended".to_owned(),
            hint: "look at the daemon's log".to_owned(),
        },
    }
}
