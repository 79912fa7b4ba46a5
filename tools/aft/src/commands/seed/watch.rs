//! Watches bulk work.

use std::sync::Arc;

use afterimage_bulk::{BulkError, Progress};

use super::bulk_error;
use crate::commands::job;
use crate::error::AftError;
use crate::output::Output;

/// Waits for the work. An interruption asks it to stop, and then waits for what is under way.
pub(super) async fn watch<T: Send + 'static>(
    what: &str,
    output: &Output,
    progress: &Arc<Progress>,
    work: impl FnOnce(&Progress) -> Result<T, BulkError> + Send + 'static,
) -> Result<T, AftError> {
    let shared = Arc::clone(progress);
    let done_and_total = || (progress.position_bytes(), progress.total_bytes());
    let stop = || progress.stop();
    let done = job::watch(what, output, stop, done_and_total, move || work(&shared)).await?;
    done.map_err(|error| bulk_error(&error))
}
