//! Errors as answers.

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::appliance::api_error;
use crate::catalogue::CatalogueError;
use crate::engine::EngineGone;

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    error: ApiError,
}

/// What a handler gives back.
pub(super) type Answer<T> = Result<Json<T>, Failure>;

impl Failure {
    pub(super) fn new(
        status: StatusCode,
        class: ErrorClass,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            status,
            error: api_error(class, message, hint),
        }
    }

    pub(super) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::from(api_error(ErrorClass::Refused, message, hint))
    }

    /// A worker thread panicked.
    pub(super) fn internal() -> Self {
        let hint = "look into the log of afterimaged, and report it";
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(
            status,
            ErrorClass::Operator,
            "the request failed inside the appliance",
            hint,
        )
    }
}

/// The status that each class of errors has.
pub(super) fn status_of(class: ErrorClass) -> StatusCode {
    match class {
        ErrorClass::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorClass::Retry => StatusCode::SERVICE_UNAVAILABLE,
        ErrorClass::Fenced => StatusCode::LOCKED,
        ErrorClass::Operator | ErrorClass::Corrupt => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self {
            status: status_of(error.class),
            error,
        }
    }
}

impl From<EngineGone> for Failure {
    fn from(error: EngineGone) -> Self {
        Self::from(ApiError::from(error))
    }
}

impl From<CatalogueError> for Failure {
    fn from(error: CatalogueError) -> Self {
        Self::from(ApiError::from(error))
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        let message = format!("the request's body is wrong: {}", rejection.body_text());
        Self::new(rejection.status(), ErrorClass::Refused, message, "")
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        let message = format!(
            "the request's parameters are wrong: {}",
            rejection.body_text()
        );
        Self::new(rejection.status(), ErrorClass::Refused, message, "")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}
