//! Who asks, and what they may ask for.

use std::convert::Infallible;

use afterimage_blockdev::{AgentId, ErrorClass};
use axum::extract::{FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::answer::Failure;

/// Who asks. Every connection has one; TLS and the catalogue have checked it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Caller {
    /// Root of this machine, through the local socket.
    Local,
    /// Somebody without a certificate.
    Anonymous,
    /// An agent.
    Agent(AgentId),
    /// An admin.
    Admin(String),
    /// Somebody whose certificate was revoked, or was never noted here.
    Revoked,
}

impl Caller {
    fn may_administer(&self) -> bool {
        matches!(self, Self::Local | Self::Admin(_))
    }

    /// How events name them.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Local => "root of this machine".to_owned(),
            Self::Anonymous | Self::Revoked => "somebody unknown".to_owned(),
            Self::Agent(agent) => format!("agent {agent}"),
            Self::Admin(name) => format!("admin {name}"),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(parts
            .extensions
            .get::<Self>()
            .cloned()
            .unwrap_or(Self::Anonymous))
    }
}

/// Lets only admins and the local socket through.
pub(super) async fn admins_only(caller: Caller, request: Request, next: Next) -> Response {
    if caller.may_administer() {
        return next.run(request).await;
    }
    let (status, message) = match caller {
        Caller::Agent(_) => (
            StatusCode::FORBIDDEN,
            "an agent's certificate does not allow this",
        ),
        Caller::Revoked => (StatusCode::FORBIDDEN, "the certificate was revoked"),
        _ => (
            StatusCode::UNAUTHORIZED,
            "this needs an admin's certificate",
        ),
    };
    let hint = "use the local socket as root, or a certificate of `aft cert issue-admin`";
    Failure::new(status, ErrorClass::Refused, message, hint).into_response()
}
