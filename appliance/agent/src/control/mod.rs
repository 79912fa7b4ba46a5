//! The agent's local socket: HTTP with JSON, for root only.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::agent::{AttachDisk, ProtectDisk};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path as UrlPath, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use crate::error::AgentError;
use crate::machine::Machine;

/// The socket's listener; the file goes with it.
pub struct ControlSocket {
    path: PathBuf,
    listener: UnixListener,
}

struct RemoveFile(PathBuf);

impl Drop for RemoveFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(%error, path = %self.0.display(), "the socket's file stays");
        }
    }
}

impl ControlSocket {
    /// Binds the socket; a file that a dead agent left is replaced.
    ///
    /// # Errors
    /// `Locked` when an agent answers there.
    pub fn bind(path: &Path) -> Result<Self, AgentError> {
        if UnixStream::connect(path).is_ok() {
            return Err(AgentError::Locked {
                path: path.to_owned(),
            });
        }
        let bind = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = bind().map_err(AgentError::file("listen on", path))?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    /// Serves requests until it is dropped.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, machine: Arc<Machine>) -> std::io::Result<()> {
        let _file = RemoveFile(self.path);
        axum::serve(self.listener, router(machine)).await
    }
}

/// The routes, over a machine.
pub fn router(machine: Arc<Machine>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/disks", get(list).post(attach))
        .route("/v1/disks/{name}", get(show))
        .route("/v1/disks/{name}/protect", post(protect))
        .route("/v1/disks/{name}/detach", post(detach))
        .route("/v1/disks/{name}/grow", post(grow))
        .with_state(machine)
}

type Shared = State<Arc<Machine>>;

async fn status(State(machine): Shared) -> Response {
    blocking(move || Ok(machine.status())).await
}

async fn list(State(machine): Shared) -> Response {
    blocking(move || Ok(machine.status().disks)).await
}

async fn show(State(machine): Shared, UrlPath(name): UrlPath<String>) -> Response {
    blocking(move || {
        let disk = machine
            .disk_named(&name)
            .ok_or(AgentError::NoSuchDisk { name })?;
        Ok(machine.show(&disk))
    })
    .await
}

async fn attach(State(machine): Shared, body: Bytes) -> Response {
    let request: AttachDisk = match parse(&body) {
        Ok(request) => request,
        Err(error) => return answer_error(StatusCode::BAD_REQUEST, &error),
    };
    blocking(move || machine.attach(&request).map(|disk| machine.show(&disk))).await
}

async fn protect(State(machine): Shared, UrlPath(name): UrlPath<String>, body: Bytes) -> Response {
    if !body.is_empty()
        && let Err(error) = parse::<ProtectDisk>(&body)
    {
        return answer_error(StatusCode::BAD_REQUEST, &error);
    }
    blocking(move || machine.protect(&name).map(|disk| machine.show(&disk))).await
}

async fn detach(State(machine): Shared, UrlPath(name): UrlPath<String>) -> Response {
    blocking(move || machine.detach(&name).map(|()| serde_json::json!({}))).await
}

async fn grow(State(machine): Shared, UrlPath(name): UrlPath<String>) -> Response {
    blocking(move || machine.grow(&name).map(|disk| machine.show(&disk))).await
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError {
        class: ErrorClass::Refused,
        message: format!("the request cannot be read: {error}"),
        hint: "send JSON as the documentation shows".to_owned(),
    })
}

/// Runs what may wait for disks or the appliance where it holds nobody up.
async fn blocking<T: Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => answer(StatusCode::OK, &value),
        Ok(Err(error)) => answer_error(status_of(&error), &error.to_api()),
        Err(_) => {
            let error = ApiError {
                class: ErrorClass::Operator,
                message: "the request failed within the agent".to_owned(),
                hint: "see the agent's log".to_owned(),
            };
            answer_error(StatusCode::INTERNAL_SERVER_ERROR, &error)
        }
    }
}

fn status_of(error: &AgentError) -> StatusCode {
    match (error, error.class()) {
        (AgentError::NoSuchDisk { .. }, _) => StatusCode::NOT_FOUND,
        (AgentError::NameTaken { .. } | AgentError::InUse { .. }, _) => StatusCode::CONFLICT,
        (_, ErrorClass::Refused) => StatusCode::BAD_REQUEST,
        (_, ErrorClass::Retry) => StatusCode::SERVICE_UNAVAILABLE,
        (_, ErrorClass::Operator | ErrorClass::Fenced) => StatusCode::CONFLICT,
        (_, ErrorClass::Corrupt) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn answer_error(status: StatusCode, error: &ApiError) -> Response {
    answer(status, error)
}

fn answer<T: Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
