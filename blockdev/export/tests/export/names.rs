//! Names, attributes, directories, and mounting the tree itself.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_export::{ExportError, FuseMount, NodeId, Tree, is_mount_point};

use crate::memory::Memory;
use crate::shelf::{MANY_COUNT, mounted, must_be_root, options, run, shelf};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

#[test]
fn names_attributes_and_long_directories() {
    let disk = Memory::new(MIB, 512);
    let sealed = Memory::read_only(2 * MIB);
    let mounted = mounted(&[("disk.img", &disk), ("sealed.img", &sealed)]);
    let metadata = fs::metadata(mounted.file("disk.img")).unwrap();
    assert_eq!(
        (metadata.len(), metadata.mode() & 0o7777, metadata.mtime()),
        (MIB, 0o600, 1_700_000_000)
    );
    let metadata = fs::metadata(mounted.file("sealed.img")).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o7777), (2 * MIB, 0o400));
    assert!(!mounted.file("nothing.img").exists());

    let mut names: Vec<_> = fs::read_dir(mounted.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["disk.img", "many", "sealed.img"]);
    // With metadata, so that the kernel lists with attributes.
    let mut listed: Vec<_> = fs::read_dir(mounted.file("many"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name(), entry.metadata().unwrap().len())
        })
        .collect();
    listed.sort();
    assert_eq!(listed.len() as u64, MANY_COUNT);
    for (index, (name, length)) in (0..).zip(listed) {
        assert_eq!(
            (name.to_str().unwrap(), length),
            (&*format!("point-{index:04}.img"), index * 512)
        );
    }

    let path = mounted.file("disk.img");
    let path = path.to_str().unwrap();
    let script = "import os,sys\np=sys.argv[1]\nprint(sorted(os.listxattr(p)))\n\
        print(os.getxattr(p,'user.afterimage.lsn'), os.getxattr(p,'user.afterimage.name'))\n\
        try: os.getxattr(p,'user.other')\nexcept OSError as e: print(e.errno)\n";
    let seen = run("python3", &["-c", script, path]);
    assert_eq!(
        seen,
        "['user.afterimage.lsn', 'user.afterimage.name']\nb'42' b'disk.img'\n61\n"
    );
    assert!(fs::write(mounted.file("new.img"), b"x").is_err());
    assert!(fs::remove_file(mounted.file("disk.img")).is_err());
}

#[test]
fn a_sealed_file_is_not_opened_for_writing() {
    let sealed = Memory::read_only(MIB);
    let mounted = mounted(&[("sealed.img", &sealed)]);
    let error = OpenOptions::new()
        .write(true)
        .open(mounted.file("sealed.img"))
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    drop(File::open(mounted.file("sealed.img")).unwrap());
}

#[test]
fn a_name_that_the_kernel_drops_is_forgotten() {
    let disk = Memory::new(MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    fs::metadata(mounted.file("disk.img")).unwrap();
    mounted
        .mount
        .invalidate_name(NodeId::ROOT, "disk.img".as_ref())
        .unwrap();
    // The kernel lets go of the inode with its last name.
    assert_eq!(mounted.forgotten.recv_timeout(SOON), Ok(NodeId(10)));
    fs::metadata(mounted.file("disk.img")).unwrap();
}

#[test]
fn unmounting_waits_for_users_and_closes_every_device() {
    let disk = Memory::new(MIB, 512);
    let mut mounted = mounted(&[("disk.img", &disk)]);
    let file = File::open(mounted.file("disk.img")).unwrap();
    assert_eq!(*mounted.shelf.open_count.lock().unwrap(), 1);
    let error = mounted.mount.unmount().unwrap_err();
    assert!(matches!(error, ExportError::Busy { .. }), "{error}");
    assert!(mounted.mount.is_served());
    drop(file);
    mounted.mount.unmount().unwrap();
    assert!(!mounted.mount.is_served());
    assert!(!is_mount_point(mounted.path()).unwrap());
    assert_eq!(*mounted.shelf.open_count.lock().unwrap(), 0);
    assert_eq!(Arc::strong_count(&mounted.shelf), 1);
}

#[test]
fn wrong_directories_are_named() {
    must_be_root();
    let disk = Memory::new(MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let try_at = |path: &std::path::Path| {
        let (tree, _) = shelf(&[]);
        let tree: Arc<dyn Tree> = tree;
        FuseMount::mount(tree, path, options()).err().unwrap()
    };
    assert!(matches!(
        try_at(mounted.path()),
        ExportError::AlreadyMounted { .. }
    ));
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        try_at(&directory.path().join("missing")),
        ExportError::NotADirectory { .. }
    ));
    fs::write(directory.path().join("file"), b"").unwrap();
    assert!(matches!(
        try_at(directory.path()),
        ExportError::NotEmpty { .. }
    ));
    assert!(matches!(
        try_at(&directory.path().join("file")),
        ExportError::NotADirectory { .. }
    ));
}

#[test]
fn a_mount_that_is_dropped_is_gone() {
    let disk = Memory::new(MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let path = mounted.path().to_owned();
    assert!(is_mount_point(&path).unwrap());
    drop(mounted.mount);
    assert!(!is_mount_point(&path).unwrap());
}
