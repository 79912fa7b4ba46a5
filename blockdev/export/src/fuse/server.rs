//! The kernel's requests, and where each goes: data straight to the device, names to the tree's
//! threads. No method here waits for anything but a free place among those threads.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use afterimage_blockdev::{ExtentKind, Token, patience};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::chain;
use super::names::Names;
use super::request::{self, UnderWay, ZeroKind};
use super::seek::Seek;
use super::workers::Workers;

/// Largest request in bytes; the kernel's own limit of pages per request by default.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// The block size that `statfs` tells; a loop device takes its discard granularity from it.
const STATFS_BLOCK_BYTES: u32 = 4096;

/// One mounted tree.
pub(super) struct Server {
    pub(super) names: Arc<Names>,
    pub(super) workers: Workers,
    pub(super) max_background: u16,
    pub(super) under_way: UnderWay,
    /// Another thread takes requests while one waits.
    pub(super) may_wait: bool,
}

impl Server {
    fn on_tree(&self, job: impl FnOnce(&Arc<Names>) + Send + 'static) {
        let names = Arc::clone(&self.names);
        self.workers.run(move || job(&names));
    }
}

fn token(request: &Request) -> Token {
    Token(request.unique().0)
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the kernel sends one request at a time: depth would be lost in silence.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the kernel has no FUSE_ASYNC_DIO",
                )
            })?;
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        for flag in wanted.iter() {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel lacks a FUSE capability");
            }
        }
        let nearest = |value: u32| io::Error::other(format!("the kernel wants {value}"));
        config.set_max_write(REQUEST_BYTES_MAX).map_err(nearest)?;
        if let Err(largest) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            config.set_max_readahead(largest).map_err(nearest)?;
        }
        let nearest = |value: u16| io::Error::other(format!("the kernel wants {value}"));
        config
            .set_max_background(self.max_background)
            .map_err(nearest)?;
        let threshold = (self.max_background - self.max_background / 4).max(1);
        config
            .set_congestion_threshold(threshold)
            .map_err(nearest)?;
        Ok(())
    }

    fn destroy(&mut self) {
        // First, since an open that is under way would come after the closing of all.
        self.workers.stop();
        self.names.release_all();
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.on_tree(move |names| names.lookup(parent, &name, reply));
    }

    fn forget(&self, _request: &Request, inode: INodeNo, count: u64) {
        self.on_tree(move |names| names.forget(inode, count));
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.on_tree(move |names| names.getattr(inode, handle, reply));
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let token = token(request);
        match size {
            Some(size) if mode.is_none() && uid.is_none() && gid.is_none() => {
                self.on_tree(move |names| names.resize(token, inode, handle, size, reply));
            }
            _ => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.on_tree(move |names| names.open(inode, flags, reply));
    }

    fn read(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.names.files.get(handle) {
            Some(file) => {
                let (entered, is_alone) = self.under_way.enter();
                let token = token(request);
                let read = || request::read(&file, token, offset, size, entered, reply);
                if is_alone && self.may_wait {
                    patience::with(read);
                } else {
                    read();
                }
            }
            None => reply.error(Errno::EBADF),
        }
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // The kernel leaves it to us to make a direct write on such a file durable.
        let fua = flags.0 & (libc::O_SYNC | libc::O_DSYNC) != 0;
        match self.names.files.get(handle) {
            Some(file) => {
                let (entered, _) = self.under_way.enter();
                request::write(file, token(request), offset, data, fua, entered, reply);
            }
            None => reply.error(Errno::EBADF),
        }
    }

    /// Closing promises nothing; `fsync` does.
    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.on_tree(move |names| {
            names.release(handle);
            reply.ok();
        });
    }

    fn fsync(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.names.files.get(handle) {
            Some(file) => request::flush(&file, token(request), reply),
            None => reply.error(Errno::EBADF),
        }
    }

    fn fallocate(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match (self.names.files.get(handle), ZeroKind::from_mode(mode)) {
            (None, _) => reply.error(Errno::EBADF),
            (_, None) => reply.error(Errno::EOPNOTSUPP),
            (Some(file), Some(kind)) => {
                request::zero(file, token(request), kind, offset, length, reply);
            }
        }
    }

    fn lseek(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let wanted = match whence {
            libc::SEEK_DATA => ExtentKind::Data,
            libc::SEEK_HOLE => ExtentKind::Zero,
            _ => return reply.error(Errno::EINVAL),
        };
        let Some(file) = self.names.files.get(handle) else {
            return reply.error(Errno::EBADF);
        };
        match u64::try_from(offset) {
            Ok(position) if position < file.size_reaching(position.saturating_add(1)) => {
                let device = Arc::clone(&file.device);
                let job = Seek::new(file, wanted, position, reply);
                chain::run(device, token(request), Box::new(job));
            }
            _ => reply.error(Errno::ENXIO),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.on_tree(move |names| names.readdir(inode, offset, reply));
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.on_tree(move |names| names.readdirplus(inode, offset, reply));
    }

    /// Directories hold nothing of their own.
    fn fsyncdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, STATFS_BLOCK_BYTES, 255, STATFS_BLOCK_BYTES);
    }

    fn getxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let name = name.to_owned();
        self.on_tree(move |names| names.getxattr(inode, &name, size, reply));
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.on_tree(move |names| names.listxattr(inode, size, reply));
    }

    // What follows is refused without a log line for each: names belong to the product.

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _inode_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _inode_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies with reads and writes.
        reply.error(Errno::EOPNOTSUPP);
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _parent: INodeNo,
        _name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }
}
