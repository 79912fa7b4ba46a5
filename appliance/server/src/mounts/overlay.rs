//! A private, writable copy of a view.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use afterimage_blockdev::overlay::Overlay;
use afterimage_blockdev::{Backend, BlockDevice, DeviceOptions, RealDevice};
use afterimage_protocol::rest::ApiError;

use crate::appliance::api_error;

/// Requests that an overlay gives to the kernel at once.
const QUEUE_DEPTH: u32 = 64;

/// Lays a writable copy over a device. What is written goes to a file without a name in
/// `directory`: it goes with the copy, however this daemon ends.
pub(super) fn private_copy(
    base: Arc<dyn BlockDevice>,
    directory: &Path,
    id: u64,
    backend: Backend,
) -> Result<Arc<dyn BlockDevice>, ApiError> {
    let geometry = base.geometry();
    let path = directory.join(format!("{id}.over"));
    let over = nameless(&path, geometry.size_bytes.next_multiple_of(4096), backend)
        .map_err(|error| failed(&path, &error))?;
    let overlay = Overlay::new(base, over)
        .map_err(|error| api_error(error.class(), format!("cannot make a copy: {error}"), ""))?;
    Ok(overlay)
}

fn nameless(path: &Path, size_bytes: u64, backend: Backend) -> io::Result<Arc<RealDevice>> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let device = file.set_len(size_bytes).and_then(|()| {
        let queue_depth = QUEUE_DEPTH;
        RealDevice::open(
            path,
            DeviceOptions {
                backend,
                queue_depth,
                ..DeviceOptions::default()
            },
        )
    });
    std::fs::remove_file(path)?;
    device
}

fn failed(path: &Path, error: &io::Error) -> ApiError {
    api_error(
        afterimage_blockdev::ErrorClass::Operator,
        format!("cannot make a private copy in {}: {error}", path.display()),
        "make room there, or give the daemon another data directory",
    )
}

/// Makes the directory of copies, and removes what a dead daemon left between making a file and
/// removing its name.
pub(super) fn prepare(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "over")
        {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}
