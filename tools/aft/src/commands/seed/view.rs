//! A state of a disk as a file of the appliance's tree, held while it is read.

use std::path::{Path, PathBuf};

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::server::{CreateMount, Mount, MountOptions};

use crate::client::Client;
use crate::error::AftError;

/// See the module's text. It ends with [`View::close`].
pub(super) struct View {
    pub(super) mount: Mount,
    /// The file behind the device, which knows its holes.
    pub(super) file: PathBuf,
}

impl View {
    pub(super) async fn open(
        reference: &str,
        allow_incomplete: bool,
        server: &Client,
    ) -> Result<Self, AftError> {
        let request = CreateMount {
            reference: reference.to_owned(),
            directory: None,
            device_only: true,
            is_branch: false,
            allow_incomplete,
            options: MountOptions::default(),
        };
        let mount: Mount = server.post("/v1/mounts", &request).await?;
        match backing_file(&mount.device) {
            Ok(file) => Ok(Self { mount, file }),
            Err(error) => {
                end(&mount, server).await?;
                Err(error)
            }
        }
    }

    /// Ends the view. Nobody reads its file any more.
    pub(super) async fn close(self, server: &Client) -> Result<(), AftError> {
        end(&self.mount, server).await
    }
}

async fn end(mount: &Mount, server: &Client) -> Result<(), AftError> {
    let path = format!("/v1/mounts/{}?drop_branch=false", mount.id);
    server.delete(&path).await
}

/// The file that a loop device shows.
fn backing_file(device: &str) -> Result<PathBuf, AftError> {
    let wrong = |why: String| {
        AftError::new(
            ErrorClass::Operator,
            format!("cannot find the file behind {device}: {why}"),
            "run this on the appliance's machine, as root",
        )
    };
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    let path = Path::new("/sys/block").join(name).join("loop/backing_file");
    let text = std::fs::read_to_string(&path).map_err(|error| wrong(error.to_string()))?;
    let file = PathBuf::from(text.trim_end_matches('\n'));
    if file.is_file() {
        Ok(file)
    } else {
        Err(wrong(format!("{} is not here", file.display())))
    }
}
