//! States that are mounted while a command looks at them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::server::{CreateMount, Mount, MountOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Client;
use crate::error::AftError;
use crate::files_args::FilesPlace;

/// Says whether somebody asked to stop.
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// # Errors
    /// When somebody asked to stop.
    pub(super) fn check(&self) -> Result<(), AftError> {
        if self.0.load(Ordering::Relaxed) {
            return Err(AftError::new(ErrorClass::Retry, "interrupted", ""));
        }
        Ok(())
    }
}

/// See the module's text.
pub(super) struct Shown {
    mounts: Vec<Mount>,
}

impl Shown {
    /// Mounts states, all of them or none.
    pub(super) async fn open(
        references: &[&str],
        place: FilesPlace,
        server: &Client,
    ) -> Result<Self, AftError> {
        let mut shown = Self { mounts: Vec::new() };
        for reference in references {
            let request = CreateMount {
                reference: (*reference).to_owned(),
                directory: None,
                device_only: false,
                is_branch: false,
                allow_incomplete: place.allow_incomplete,
                options: MountOptions {
                    partition: place.partition,
                    is_read_only: true,
                    ..MountOptions::default()
                },
            };
            match server.post("/v1/mounts", &request).await {
                Ok(mount) => shown.mounts.push(mount),
                Err(error) => {
                    shown.close(server).await?;
                    return Err(error);
                }
            }
        }
        Ok(shown)
    }

    /// Does blocking work below the roots, then ends the mounts, whatever came of it.
    pub(super) async fn with<T: Send + 'static>(
        self,
        server: &Client,
        work: impl FnOnce(&[PathBuf], &Stop) -> Result<T, AftError> + Send + 'static,
    ) -> Result<T, AftError> {
        let result = self.work(work).await;
        let closed = self.close(server).await;
        let done = result?;
        closed.map(|()| done)
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&[PathBuf], &Stop) -> Result<T, AftError> + Send + 'static,
    ) -> Result<T, AftError> {
        let failed = |why: String| AftError::new(ErrorClass::Operator, why, "");
        let roots: Vec<PathBuf> = self
            .mounts
            .iter()
            .filter_map(|mount| Some(PathBuf::from(mount.directory.as_ref()?)))
            .collect();
        if roots.len() != self.mounts.len() || roots.iter().any(|root| !root.is_dir()) {
            return Err(failed("what the appliance mounted is not here".to_owned()));
        }
        let mut interrupt =
            signal(SignalKind::interrupt()).map_err(|error| failed(error.to_string()))?;
        let mut terminate =
            signal(SignalKind::terminate()).map_err(|error| failed(error.to_string()))?;
        let is_stopping = Arc::new(AtomicBool::new(false));
        let stop = Stop(Arc::clone(&is_stopping));
        let mut job = tokio::task::spawn_blocking(move || work(&roots, &stop));
        loop {
            tokio::select! {
                done = &mut job => {
                    return done.unwrap_or_else(|error| Err(failed(error.to_string())));
                }
                _ = interrupt.recv() => is_stopping.store(true, Ordering::Relaxed),
                _ = terminate.recv() => is_stopping.store(true, Ordering::Relaxed),
            }
        }
    }

    async fn close(&self, server: &Client) -> Result<(), AftError> {
        let mut result = Ok(());
        for mount in &self.mounts {
            let path = format!("/v1/mounts/{}?drop_branch=false", mount.id);
            let ended: Result<(), AftError> = server.delete(&path).await;
            result = result.and(ended);
        }
        result
    }
}
