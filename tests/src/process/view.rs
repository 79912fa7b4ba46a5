//! Mounts of the appliance that end when they are dropped.

use std::path::{Path, PathBuf};

use afterimage_protocol::rest::server::Mount;

use super::api::Api;
use super::scene::Scene;

/// A state of a disk that is shown.
#[derive(Debug)]
pub struct View {
    /// The block device.
    pub device: PathBuf,
    /// What the appliance says of it.
    pub mount: Mount,
    api: Api,
    is_open: bool,
}

impl View {
    fn open(scene: &Scene, arguments: &[&str]) -> Self {
        let mount: Mount = scene.aft_json(&[&["mount"], arguments].concat());
        Self {
            device: PathBuf::from(&mount.device),
            mount,
            api: scene.server_api(),
            is_open: true,
        }
    }

    /// A private device.
    #[must_use]
    pub fn device(scene: &Scene, reference: &str) -> Self {
        Self::open(scene, &[reference, "--device"])
    }

    /// A branch, as a device.
    #[must_use]
    pub fn branch(scene: &Scene, reference: &str) -> Self {
        Self::open(scene, &[reference, "--device", "--rw"])
    }

    /// A mounted file system.
    #[must_use]
    pub fn files(scene: &Scene, reference: &str) -> Self {
        Self::open(scene, &[reference])
    }

    /// Where the file system is mounted.
    ///
    /// # Panics
    /// When it is a device only.
    #[must_use]
    pub fn path(&self) -> &Path {
        Path::new(self.mount.directory.as_deref().expect("a mounted view"))
    }

    /// Ends it.
    ///
    /// # Panics
    /// When it is in use.
    pub fn close(mut self) {
        self.is_open = false;
        let (status, body) = self.end().expect("an answer");
        assert!(status.starts_with('2'), "{status}: {body}");
    }

    fn end(&self) -> std::io::Result<(String, String)> {
        let path = format!("/v1/mounts/{}", self.mount.id);
        self.api.request("DELETE", &path, "")
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if self.is_open {
            // The appliance may be gone, with the view.
            let _gone = self.end();
        }
    }
}
