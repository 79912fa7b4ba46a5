//! The kernel's requests, understood. Both transports come here: over `/dev/fuse` a request is
//! one run of bytes, over a ring its first argument stands apart from the rest.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::wire::{IN_HEADER_BYTES, i32_at, opcode, u32_at, u64_at};

/// What every request begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) opcode: u32,
    /// Names the request to the kernel.
    pub(super) unique: u64,
    pub(super) inode: u64,
}

impl Header {
    /// Reads `fuse_in_header`.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..IN_HEADER_BYTES)?;
        Some(Self {
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            inode: u64_at(bytes, 16)?,
        })
    }

    /// Bytes of the request's first argument.
    pub(super) fn fixed_bytes(&self) -> usize {
        match self.opcode {
            opcode::FORGET
            | opcode::OPEN
            | opcode::GETXATTR
            | opcode::LISTXATTR
            | opcode::BATCH_FORGET => 8,
            opcode::GETATTR | opcode::FSYNC => 16,
            opcode::RELEASE | opcode::LSEEK => 24,
            opcode::FALLOCATE => 32,
            opcode::READ | opcode::WRITE | opcode::READDIR | opcode::READDIRPLUS => 40,
            opcode::SETATTR => 88,
            _ => 0,
        }
    }
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Request<'a> {
    Lookup {
        name: &'a OsStr,
    },
    Forget {
        count: u64,
    },
    /// Pairs of inode and count.
    BatchForget {
        pairs: &'a [u8],
    },
    GetAttr {
        handle: Option<u64>,
    },
    SetAttr {
        handle: Option<u64>,
        size_bytes: Option<u64>,
        /// Something is to be set that cannot be.
        is_more: bool,
    },
    Open {
        flags: i32,
    },
    Read {
        handle: u64,
        offset: u64,
        length: u32,
    },
    Write {
        handle: u64,
        offset: u64,
        flags: i32,
        /// Bytes of data, which are the rest of the message.
        length: usize,
    },
    Release {
        handle: u64,
    },
    Fsync {
        handle: u64,
    },
    Fallocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: i32,
    },
    Lseek {
        handle: u64,
        offset: u64,
        whence: i32,
    },
    GetXattr {
        name: &'a OsStr,
        room: u32,
    },
    ListXattr {
        room: u32,
    },
    OpenDir,
    ReadDir {
        from: u64,
        room: u32,
        /// With attributes.
        is_plus: bool,
    },
    StatFs,
    /// Nothing to be done: closing promises nothing, and directories hold nothing of their own.
    Nothing,
    /// Refused with an error number: names belong to the product.
    Refused {
        errno: i32,
    },
}

/// `FUSE_GETATTR_FH`.
const GETATTR_HANDLE: u32 = 1;
/// `FATTR_*` of `fuse_setattr_in`.
const SET_MODE_OR_OWNER: u32 = 0b111;
const SET_SIZE: u32 = 1 << 3;
const SET_HANDLE: u32 = 1 << 6;

impl<'a> Request<'a> {
    /// Understands a request from its first argument, of [`Header::fixed_bytes`], and the rest.
    /// None when it is too short or a name has no end.
    pub(super) fn parse(header: &Header, fixed: &'a [u8], rest: &'a [u8]) -> Option<Self> {
        Some(match header.opcode {
            opcode::READ => Self::Read {
                handle: u64_at(fixed, 0)?,
                offset: u64_at(fixed, 8)?,
                length: u32_at(fixed, 16)?,
            },
            opcode::WRITE => Self::parse_write(header, fixed, rest.len())?.0,
            opcode::FALLOCATE => Self::Fallocate {
                handle: u64_at(fixed, 0)?,
                offset: u64_at(fixed, 8)?,
                length: u64_at(fixed, 16)?,
                mode: i32_at(fixed, 24)?,
            },
            opcode::LSEEK => Self::Lseek {
                handle: u64_at(fixed, 0)?,
                offset: u64_at(fixed, 8)?,
                whence: i32_at(fixed, 16)?,
            },
            opcode::FSYNC => Self::Fsync {
                handle: u64_at(fixed, 0)?,
            },
            opcode::FLUSH | opcode::RELEASEDIR | opcode::FSYNCDIR | opcode::DESTROY => {
                Self::Nothing
            }
            opcode::OPENDIR => Self::OpenDir,
            opcode::STATFS => Self::StatFs,
            _ => return Self::parse_name(header, fixed, rest),
        })
    }

    /// Understands a write whose data has `data_bytes` bytes; gives how many of them it writes.
    pub(super) fn parse_write(
        header: &Header,
        fixed: &[u8],
        data_bytes: usize,
    ) -> Option<(Self, usize)> {
        let length = usize::try_from(u32_at(fixed, 16)?).ok()?;
        if header.opcode != opcode::WRITE || length > data_bytes {
            return None;
        }
        let request = Self::Write {
            handle: u64_at(fixed, 0)?,
            offset: u64_at(fixed, 8)?,
            flags: i32_at(fixed, 32)?,
            length,
        };
        Some((request, length))
    }

    fn parse_name(header: &Header, fixed: &'a [u8], rest: &'a [u8]) -> Option<Self> {
        Some(match header.opcode {
            opcode::LOOKUP => Self::Lookup { name: name(rest)? },
            opcode::FORGET => Self::Forget {
                count: u64_at(fixed, 0)?,
            },
            opcode::BATCH_FORGET => Self::BatchForget {
                pairs: rest.get(..usize::try_from(u32_at(fixed, 0)?).ok()?.checked_mul(16)?)?,
            },
            opcode::GETATTR => {
                let what = u32_at(fixed, 0)?;
                let handle = u64_at(fixed, 8)?;
                Self::GetAttr {
                    handle: (what & GETATTR_HANDLE != 0).then_some(handle),
                }
            }
            opcode::SETATTR => {
                let what = u32_at(fixed, 0)?;
                let (handle, size_bytes) = (u64_at(fixed, 8)?, u64_at(fixed, 16)?);
                Self::SetAttr {
                    handle: (what & SET_HANDLE != 0).then_some(handle),
                    size_bytes: (what & SET_SIZE != 0).then_some(size_bytes),
                    is_more: what & SET_MODE_OR_OWNER != 0,
                }
            }
            opcode::OPEN => Self::Open {
                flags: i32_at(fixed, 0)?,
            },
            opcode::RELEASE => Self::Release {
                handle: u64_at(fixed, 0)?,
            },
            opcode::GETXATTR => Self::GetXattr {
                name: name(rest)?,
                room: u32_at(fixed, 0)?,
            },
            opcode::LISTXATTR => Self::ListXattr {
                room: u32_at(fixed, 0)?,
            },
            opcode::READDIR | opcode::READDIRPLUS => Self::ReadDir {
                from: u64_at(fixed, 8)?,
                room: u32_at(fixed, 16)?,
                is_plus: header.opcode == opcode::READDIRPLUS,
            },
            other => Self::Refused {
                errno: refusal(other),
            },
        })
    }
}

fn name(bytes: &[u8]) -> Option<&OsStr> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    bytes.get(..end).map(OsStr::from_bytes)
}

/// What the kernel is told of a request that is never served. `ENOSYS` makes it stop asking.
fn refusal(number: u32) -> i32 {
    match number {
        opcode::CREATE
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::SYMLINK
        | opcode::LINK
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2 => libc::EPERM,
        // The kernel then copies with reads and writes.
        opcode::COPY_FILE_RANGE | opcode::SETXATTR | opcode::REMOVEXATTR => libc::EOPNOTSUPP,
        opcode::IOCTL => libc::ENOTTY,
        _ => libc::ENOSYS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(opcode: u32) -> Header {
        let mut bytes = [0; IN_HEADER_BYTES];
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8] = 3;
        bytes[16] = 9;
        Header::parse(&bytes).unwrap()
    }

    #[test]
    fn headers_and_requests_have_the_kernels_layout() {
        let found = header(opcode::WRITE);
        assert_eq!((found.unique, found.inode), (3, 9));
        assert_eq!(found.fixed_bytes(), 40);
        let mut fixed = [0; 40];
        fixed[0] = 5;
        fixed[9] = 1;
        fixed[16] = 4;
        fixed[33] = 0x10;
        let wanted = Request::Write {
            handle: 5,
            offset: 256,
            flags: 0x1000,
            length: 4,
        };
        assert_eq!(Request::parse(&found, &fixed, b"data+"), Some(wanted));
        let lookup = header(opcode::LOOKUP);
        let wanted = Request::Lookup {
            name: OsStr::new("disk"),
        };
        assert_eq!(Request::parse(&lookup, &[], b"disk\0"), Some(wanted));
        let getattr = header(opcode::GETATTR);
        let parsed = Request::parse(&getattr, &[0; 16], &[]);
        assert_eq!(parsed, Some(Request::GetAttr { handle: None }));
    }

    #[test]
    fn what_is_too_short_or_has_no_end_is_no_request() {
        let write = header(opcode::WRITE);
        let mut fixed = [0; 40];
        fixed[16] = 4;
        assert_eq!(Request::parse(&write, &fixed, b"dat"), None);
        assert_eq!(Request::parse(&write, &fixed[..20], b"data"), None);
        assert_eq!(Request::parse(&header(opcode::LOOKUP), &[], b"disk"), None);
        let forget = header(opcode::BATCH_FORGET);
        assert_eq!(Request::parse(&forget, &[255; 8], &[0; 64]), None);
        assert_eq!(Header::parse(&[0; 39]), None);
        for number in 0..200 {
            let header = header(number);
            let is_parsed = Request::parse(&header, &[], &[]).is_some();
            assert!(!is_parsed || header.fixed_bytes() == 0, "opcode {number}");
        }
    }

    #[test]
    fn names_are_refused_and_the_unknown_is_not_implemented() {
        for (number, errno) in [
            (opcode::UNLINK, libc::EPERM),
            (opcode::IOCTL, libc::ENOTTY),
            (opcode::SETXATTR, libc::EOPNOTSUPP),
            (999, libc::ENOSYS),
        ] {
            let parsed = Request::parse(&header(number), &[], &[]);
            assert_eq!(parsed, Some(Request::Refused { errno }));
        }
    }
}
