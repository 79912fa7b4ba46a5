use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::engine::{Action, Delivery, Request, Step};
use super::{Backend, DirectoryLock, RealOptions, RealStorage};
use crate::buffer::IoBuffer;
use crate::conformance::{self, create, kind, list, read, write};
use crate::device::BlockDevice;
use crate::id::Token;
use crate::storage::{Storage, StorageErrorKind, StorageOp, StorageOutcome};
use crate::wait;

mod device;

use self::device::{check_device, device};

const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Threads];

/// A directory on a real file system where there is one: a build directory, not a tmpfs.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn storage(root: &Path, backend: Backend, is_direct: bool, queue_depth: u32) -> Arc<RealStorage> {
    let options = RealOptions {
        backend,
        is_direct,
        queue_depth,
        ..RealOptions::default()
    };
    RealStorage::open(root, options).unwrap()
}

#[test]
fn both_backends_do_what_a_storage_does() {
    for backend in BACKENDS {
        for is_direct in [true, false] {
            for queue_depth in [1, 7, 1024] {
                let root = directory();
                let storage = storage(root.path(), backend, is_direct, queue_depth);
                assert_eq!(storage.backend(), backend);
                conformance::check(&*storage);
            }
        }
    }
}

#[test]
fn tmpfs_is_good_enough() {
    let Ok(root) = tempfile::tempdir_in("/dev/shm") else {
        return;
    };
    conformance::check(&*storage(root.path(), Backend::Auto, true, 64));
}

#[test]
fn files_survive_a_new_storage_and_the_lock_is_not_listed() {
    let root = directory();
    let path = root.path().join("made/on/the/way");
    {
        let storage = storage(&path, Backend::Auto, true, 16);
        let file = create(&*storage, "deep/er/file");
        write(&*storage, file, 0, &[9; 4096]);
        wait::storage(&*storage, StorageOp::Sync { file }).unwrap();
        let sync = StorageOp::SyncDirectory {
            directory: "deep/er".to_owned(),
        };
        wait::storage(&*storage, sync).unwrap();
    }
    let _lock = DirectoryLock::acquire(&path).unwrap().unwrap();
    fs::write(path.join("Not A Name"), "x").unwrap();
    std::os::unix::fs::symlink("/etc/hostname", path.join("link")).unwrap();
    let storage = storage(&path, Backend::Auto, true, 16);
    assert!(list(&*storage, "").is_empty());
    let link = StorageOp::Open {
        name: conformance::name("link"),
    };
    assert!(
        matches!(kind(&*storage, link), StorageErrorKind::Io(_)),
        "links are not followed"
    );
    let (file, length) = conformance::open(&*storage, "deep/er/file");
    assert_eq!(length, 4096);
    assert_eq!(read(&*storage, file, 0, 4096), [9; 4096]);
}

#[test]
fn a_file_that_is_no_multiple_of_a_block_ends_where_it_ends() {
    for backend in BACKENDS {
        for is_direct in [true, false] {
            let root = directory();
            fs::write(root.path().join("odd"), vec![3; 9000]).unwrap();
            let storage = storage(root.path(), backend, is_direct, 16);
            let (file, length) = conformance::open(&*storage, "odd");
            assert_eq!(length, 9000);
            assert_eq!(read(&*storage, file, 4096, 65536), vec![3; 9000 - 4096]);
            assert_eq!(read(&*storage, file, 8704, 512), vec![3; 9000 - 8704]);
        }
    }
}

#[test]
fn requests_outlive_the_thread_that_submitted_them() {
    struct Count(Sender<()>);
    impl crate::storage::StorageCompleter for Count {
        fn complete(&self, completion: crate::storage::StorageCompletion) {
            completion.result.unwrap();
            self.0.send(()).unwrap();
        }
    }
    let root = directory();
    let storage = storage(root.path(), Backend::IoUring, false, 1024);
    let file = create(&*storage, "file");
    let (sender, receiver) = channel();
    for _ in 0..4 {
        let storage = Arc::clone(&storage);
        let to = Arc::new(Count(sender.clone()));
        // Writes to the page cache of one file wait for one another in the kernel, so that many
        // are still queued when the thread ends.
        let submitter = std::thread::spawn(move || {
            for index in 0..64 {
                let buffer = IoBuffer::zeroed(256 * 1024);
                let offset = index * 256 * 1024;
                storage.submit(
                    Token(0),
                    StorageOp::Write {
                        file,
                        offset,
                        buffer,
                    },
                    to.clone(),
                );
                storage.submit(Token(0), StorageOp::Sync { file }, to.clone());
            }
        });
        submitter.join().unwrap();
    }
    for _ in 0..4 * 128 {
        receiver.recv().unwrap();
    }
}

#[test]
fn a_full_overflow_queue_refuses_instead_of_growing() {
    struct Count(Sender<bool>);
    impl crate::storage::StorageCompleter for Count {
        fn complete(&self, completion: crate::storage::StorageCompletion) {
            self.0.send(completion.result.is_ok()).unwrap();
        }
    }
    for backend in BACKENDS {
        let root = directory();
        let options = RealOptions {
            backend,
            queue_depth: 1,
            overflow_max: 1,
            threads: 1,
            ..Default::default()
        };
        let storage = RealStorage::open(root.path(), options).unwrap();
        let file = create(&*storage, "file");
        let (sender, receiver) = channel();
        for index in 0..200 {
            let buffer = IoBuffer::zeroed(1 << 20);
            let op = StorageOp::Write {
                file,
                offset: index << 20,
                buffer,
            };
            storage.submit(Token(0), op, Arc::new(Count(sender.clone())));
        }
        let done = (0..200).filter(|_| receiver.recv().unwrap()).count();
        assert!((1..200).contains(&done), "{done} of 200 were accepted");
        write(&*storage, file, 0, &[1; 4096]);
    }
}

#[test]
fn the_last_owner_may_be_a_completer() {
    struct Owner(Sender<()>, #[allow(dead_code)] Arc<RealStorage>);
    impl crate::storage::StorageCompleter for Owner {
        fn complete(&self, _: crate::storage::StorageCompletion) {}
    }
    impl Drop for Owner {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }
    for backend in BACKENDS {
        let root = directory();
        let (sender, receiver) = channel();
        let storage = storage(root.path(), backend, true, 16);
        let file = create(&*storage, "file");
        let to = Arc::new(Owner(sender, Arc::clone(&storage)));
        let buffer = IoBuffer::zeroed(1 << 20);
        storage.submit(
            Token(0),
            StorageOp::Write {
                file,
                offset: 0,
                buffer,
            },
            to,
        );
        drop(storage);
        receiver.recv().unwrap();
    }
}

#[test]
fn a_directory_has_one_holder() {
    let root = directory();
    let first = DirectoryLock::acquire(root.path()).unwrap();
    assert!(first.is_some());
    assert!(DirectoryLock::acquire(root.path()).unwrap().is_none());
    drop(first);
    assert!(DirectoryLock::acquire(root.path()).unwrap().is_some());
    assert!(DirectoryLock::acquire(root.path().join("missing")).is_err());
}

fn image(root: &Path, bytes: u64) -> std::path::PathBuf {
    let path = root.join("image");
    fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// A loop device, gone when dropped.
struct Loop(String);

impl Loop {
    fn attach(path: &Path, block_bytes: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args([
                "--find",
                "--show",
                "--sector-size",
                &block_bytes.to_string(),
            ])
            .arg(path)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !name.is_empty()).then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(detached.is_ok_and(|status| status.success()));
    }
}

/// A file system or disk on a medium that is promised to be larger than it is, so that what went
/// to the page cache cannot be written back.
fn on_a_lying_medium(bytes: &str, test: impl FnOnce(&Path, &Path) + std::panic::UnwindSafe) {
    let root = directory();
    let small = root.path().join("small");
    fs::create_dir(&small).unwrap();
    let is_done = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
    let size = format!("size={bytes}");
    if !is_done(
        Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&small),
    ) {
        eprintln!("no small medium to be had; not tested");
        return;
    }
    let path = image(&small, 64 << 20);
    let node = Loop::attach(&path, 4096);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match &node {
        Some(node) => test(Path::new(&node.0), root.path()),
        None => eprintln!("no loop device to be had; not tested"),
    }));
    drop(node);
    assert!(is_done(Command::new("umount").arg(&small)));
    result.unwrap();
}

#[test]
fn a_failed_sync_poisons_a_file_until_it_is_reopened() {
    for backend in BACKENDS {
        on_a_lying_medium("3m", move |node, root| {
            let mount = root.join("mount");
            fs::create_dir(&mount).unwrap();
            let is_done =
                |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
            let quiet = [
                "-q",
                "-O",
                "^has_journal",
                "-E",
                "lazy_itable_init=1,nodiscard",
            ];
            assert!(is_done(Command::new("mkfs.ext4").args(quiet).arg(node)));
            assert!(is_done(Command::new("mount").arg(node).arg(&mount)));
            let result = std::panic::catch_unwind(|| {
                let storage = storage(&mount.join("data"), backend, false, 16);
                let file = create(&*storage, "file");
                write(&*storage, file, 0, &vec![1; 8 << 20]);
                let failed = kind(&*storage, StorageOp::Sync { file });
                assert!(!matches!(failed, StorageErrorKind::Poisoned), "{failed:?}");
                for op in [
                    StorageOp::Sync { file },
                    StorageOp::SetLength { file, length: 0 },
                    StorageOp::Read {
                        file,
                        offset: 0,
                        buffer: IoBuffer::zeroed(4096),
                    },
                    StorageOp::Write {
                        file,
                        offset: 0,
                        buffer: IoBuffer::zeroed(4096),
                    },
                ] {
                    assert!(matches!(kind(&*storage, op), StorageErrorKind::Poisoned));
                }
                wait::storage(&*storage, StorageOp::Close { file }).unwrap();
                let (file, _) = conformance::open(&*storage, "file");
                read(&*storage, file, 0, 4096);
            });
            assert!(is_done(Command::new("umount").arg(&mount)));
            result.unwrap();
        });
    }
}

#[test]
fn a_full_medium_says_so_and_recovers() {
    let root = directory();
    let mount = root.path().join("small");
    fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&mount)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("no small medium to be had; not tested");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        for backend in BACKENDS {
            let storage = storage(&mount, backend, true, 16);
            let file = create(&*storage, "fill");
            let buffer = IoBuffer::zeroed(2 << 20);
            let full = kind(
                &*storage,
                StorageOp::Write {
                    file,
                    offset: 0,
                    buffer,
                },
            );
            assert!(matches!(full, StorageErrorKind::NoSpace), "{full:?}");
            wait::storage(&*storage, StorageOp::SetLength { file, length: 0 }).unwrap();
            write(&*storage, file, 0, &[1; 4096]);
            let StorageOutcome::Capacity(room) = wait::storage(
                &*storage,
                StorageOp::Capacity {
                    directory: String::new(),
                },
            )
            .unwrap() else {
                panic!("capacity gave something else")
            };
            assert_eq!(room.total_bytes, 1 << 20);
            wait::storage(
                &*storage,
                StorageOp::Remove {
                    name: conformance::name("fill"),
                },
            )
            .unwrap();
        }
    });
    let unmounted = Command::new("umount").arg(&mount).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    result.unwrap();
}

/// Direct I/O on such a file system takes units of 4096, so reads of 512 are widened.
#[test]
fn a_file_system_of_large_sectors_reads_small_ranges() {
    let root = directory();
    let path = image(root.path(), 64 << 20);
    let Some(node) = Loop::attach(&path, 4096) else {
        return;
    };
    let mount = root.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let is_done = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
    if !is_done(Command::new("mkfs.ext4").args(["-q", &node.0]))
        || !is_done(Command::new("mount").arg(&node.0).arg(&mount))
    {
        eprintln!("no file system of 4096-byte sectors to be had; not tested");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        for backend in BACKENDS {
            let inside = mount.join(format!("{backend:?}"));
            let storage = storage(&inside, backend, true, 16);
            conformance::check(&*storage);
        }
        let file = image(&mount, 1 << 20);
        let device = device(&file, Backend::Auto, true);
        assert_eq!(device.geometry().logical_block_bytes, 4096);
        check_device(&*device);
    });
    assert!(is_done(Command::new("umount").arg(&mount)));
    drop(node);
    result.unwrap();
}

struct Aligned(usize);

impl Delivery for Aligned {
    fn descriptor(&self) -> std::os::fd::RawFd {
        -1
    }

    fn alignment(&self) -> usize {
        self.0
    }

    fn deliver(self, _: Option<IoBuffer>, _: std::io::Result<()>) {}
}

fn request(action: Action, alignment: usize) -> Request<Aligned> {
    Request::new(action, 0, Some(IoBuffer::zeroed(8192)), Aligned(alignment))
}

#[test]
fn short_answers_are_continued_and_the_end_is_seen() {
    let mut read = request(Action::Read, 512);
    assert!(matches!(read.advance(4096), Step::Again));
    assert_eq!(read.done, 4096);
    assert!(matches!(read.advance(1000), Step::Finished(Ok(()))));
    assert_eq!(
        read.buffer.unwrap().len(),
        5096,
        "a direct read stops only at the end"
    );
    let mut read = request(Action::Read, 1);
    assert!(matches!(read.advance(5), Step::Again));
    assert!(matches!(read.advance(0), Step::Finished(Ok(()))));
    assert_eq!(read.buffer.unwrap().len(), 5);
    let mut write = request(Action::Write { is_durable: false }, 512);
    assert!(matches!(write.advance(700), Step::Again));
    assert_eq!(write.done, 512, "a direct write goes on at a unit");
    assert!(matches!(write.advance(8192 - 512), Step::Finished(Ok(()))));
    let mut write = request(Action::Write { is_durable: false }, 1);
    assert!(matches!(write.advance(0), Step::Finished(Err(_))));
}

#[test]
fn passing_errors_are_retried_and_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
        let mut read = request(Action::Read, 512);
        assert!(matches!(read.advance(-errno), Step::Again));
        assert!(matches!(read.advance(8192), Step::Finished(Ok(()))));
        let mut read = request(Action::Read, 512);
        let retries = (0..)
            .take_while(|_| matches!(read.advance(-errno), Step::Again))
            .count();
        assert!((10..100_000).contains(&retries));
    }
    let mut read = request(Action::Read, 512);
    let Step::Finished(Err(error)) = read.advance(-libc::EIO) else {
        panic!("not an error")
    };
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}
