//! Disks as they were, and branches, as disks of virtual machines.
//!
//! Invariants
//! * A socket serves one state or branch for as long as it is there; `@latest` is the newest state
//!   of the moment at which it was made.
//! * All sockets end before the mounts and the engine do, when what guests asked for has been
//!   answered.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, ErrorClass};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::branch::BRANCH_MARK;
use afterimage_protocol::rest::vhost::{ServeVhost, VhostSocket};
use afterimage_vhost::{Server, Settings, VhostError};
use parking_lot::Mutex;

use crate::appliance::api_error;
use crate::engine::{Command, EngineHandle, ViewRequest};
use crate::mounts::Mounts;

/// Most sockets at once.
const SOCKETS_MAX: usize = 64;

/// The sockets of this daemon.
#[derive(Default)]
pub struct VhostSockets {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    served: BTreeMap<PathBuf, Served>,
    is_stopped: bool,
}

struct Served {
    server: Server,
    reference: String,
    description: String,
    device: Arc<dyn BlockDevice>,
}

/// What a guest gets.
struct Source {
    device: Arc<dyn BlockDevice>,
    description: String,
    serial: String,
}

fn source(engine: &EngineHandle, mounts: &Mounts, reference: &str) -> Result<Source, ApiError> {
    if reference.contains(BRANCH_MARK) {
        let lent = mounts.lend_branch(reference)?;
        let history = lent.history().to_string();
        return Ok(Source {
            description: format!("branch {history}"),
            serial: history.replace('-', ""),
            device: Arc::new(lent),
        });
    }
    let request = ViewRequest {
        reference: reference.to_owned(),
        allow_incomplete: false,
    };
    let view = engine.ask_blocking(|reply| Command::OpenView(request, reply))??;
    Ok(Source {
        description: format!("history {} at LSN {}", view.history, view.lsn),
        serial: view.disk.to_string().replace('-', ""),
        device: view.device,
    })
}

fn failed(error: &VhostError) -> ApiError {
    let class = match error {
        VhostError::File { .. } | VhostError::Start(_) => ErrorClass::Operator,
        _ => ErrorClass::Refused,
    };
    api_error(class, error.to_string(), "")
}

impl VhostSockets {
    /// Serves a state or a branch. Waits.
    ///
    /// # Errors
    /// When it does not exist, or the socket cannot be made.
    pub fn serve(
        &self,
        engine: &EngineHandle,
        mounts: &Mounts,
        request: &ServeVhost,
    ) -> Result<VhostSocket, ApiError> {
        let path = Path::new(&request.socket);
        if !path.is_absolute() {
            let why = format!("{:?} is no absolute path", request.socket);
            return Err(api_error(ErrorClass::Refused, why, "give one"));
        }
        let source = source(engine, mounts, &request.reference)?;
        let settings = Settings {
            queues: request.queues,
            threads: usize::from(request.queues.clamp(1, 2)),
            serial: source.serial,
            ..Settings::default()
        };
        let mut table = self.table.lock();
        if table.is_stopped {
            let text = "the appliance goes down";
            return Err(api_error(ErrorClass::Retry, text, "try again later"));
        }
        if table.served.len() >= SOCKETS_MAX {
            let text = format!("{SOCKETS_MAX} sockets are served already");
            let hint = "end one with `aft vhost end`";
            return Err(api_error(ErrorClass::Refused, text, hint));
        }
        let device = Arc::clone(&source.device);
        let server =
            Server::start(path, source.device, settings).map_err(|error| failed(&error))?;
        let served = Served {
            server,
            reference: request.reference.clone(),
            description: source.description,
            device,
        };
        let shown = served.show();
        table.served.insert(path.to_owned(), served);
        Ok(shown)
    }

    /// Lists the sockets, by their paths.
    #[must_use]
    pub fn list(&self) -> Vec<VhostSocket> {
        self.table
            .lock()
            .served
            .values()
            .map(Served::show)
            .collect()
    }

    /// Ends a socket. Waits until the guest's requests have been answered.
    ///
    /// # Errors
    /// When there is none.
    pub fn end(&self, socket: &str) -> Result<(), ApiError> {
        let removed = self.table.lock().served.remove(Path::new(socket));
        let Some(served) = removed else {
            let text = format!("no disk is served at {socket:?}");
            return Err(api_error(
                ErrorClass::Refused,
                text,
                "`aft vhost list` shows where",
            ));
        };
        served.server.end();
        Ok(())
    }

    /// Ends all sockets, and makes no new ones. Waits.
    pub fn stop(&self) {
        let served = {
            let mut table = self.table.lock();
            table.is_stopped = true;
            std::mem::take(&mut table.served)
        };
        drop(served);
    }
}

impl Served {
    fn show(&self) -> VhostSocket {
        let geometry = self.device.geometry();
        let status = self.server.status();
        VhostSocket {
            socket: self.server.path().display().to_string(),
            reference: self.reference.clone(),
            description: self.description.clone(),
            is_writable: !geometry.is_read_only,
            size_bytes: geometry.size_bytes,
            is_connected: status.is_connected,
            connections: status.connections,
            last_failure: status.last_failure,
        }
    }
}
