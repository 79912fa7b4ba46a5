//! The transport that these tests run over: reading `/dev/fuse`.

use std::fs;
use std::sync::Arc;

use afterimage_export::{FuseMount, FuseOptions, IoUring, Transport, Tree};

use crate::shelf::{must_be_root, shelf};

pub(crate) const IO_URING: IoUring = IoUring::Off;

pub(crate) fn expected() -> Transport {
    Transport::Classic
}

/// The kernel's switch plays no part here.
pub(crate) struct Switch;

pub(crate) fn switch() -> Switch {
    Switch
}

#[test]
fn the_kernels_switch_decides_where_nothing_else_was_said() {
    must_be_root();
    let is_on = fs::read_to_string("/sys/module/fuse/parameters/enable_uring")
        .is_ok_and(|text| text.trim() == "Y");
    let (tree, _forgotten) = shelf(&[]);
    let tree: Arc<dyn Tree> = tree;
    let directory = tempfile::tempdir().unwrap();
    let mut mount = FuseMount::mount(tree, directory.path(), FuseOptions::default()).unwrap();
    let expected = if is_on {
        Transport::IoUring
    } else {
        Transport::Classic
    };
    assert_eq!(mount.transport(), expected);
    mount.unmount().unwrap();
}
