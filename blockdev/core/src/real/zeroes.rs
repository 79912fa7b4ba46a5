//! Zeroes and holes of an image file or block device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::file::{allocate, seek};
use crate::buffer::IoBuffer;
use crate::convert::to_usize;
use crate::device::{Extent, ExtentKind};

/// Bytes of zeroes written at once where the medium knows no better way.
const STEP_BYTES: u64 = 1 << 20;
/// Most ranges in one answer; what follows counts as data.
const EXTENTS_MAX: usize = 64 * 1024;

const UNMAP: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Makes a range read as zero, giving the room up if that is allowed and possible. On a block
/// device the kernel refuses to unmap where that would not read as zero, and zeroes otherwise.
pub(super) fn zero(file: &File, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let ways: &[libc::c_int] = if may_unmap { &[UNMAP, ZERO] } else { &[ZERO] };
    for way in ways {
        match allocate(file, *way, offset, length) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            result => return result,
        }
    }
    write_zeroes(file, offset, length)
}

fn write_zeroes(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let zeroes = IoBuffer::zeroed(to_usize(length.min(STEP_BYTES)));
    let mut done = 0;
    while done < length {
        let step = to_usize((length - done).min(STEP_BYTES));
        file.write_all_at(&zeroes[..step], offset + done)?;
        done += step as u64;
    }
    Ok(())
}

/// Lists data and holes of a file between two offsets, in units of `unit` bytes.
pub(super) fn extents(file: &File, start: u64, end: u64, unit: u64) -> io::Result<Vec<Extent>> {
    let mut found = Vec::new();
    let mut at = start;
    while at < end {
        let data = seek(file, at, libc::SEEK_DATA)?.unwrap_or(end).min(end);
        // Data begins in the unit that holds its first byte, and ends with its last one's.
        let data = (data - data % unit).max(at);
        push(&mut found, at, data, ExtentKind::Zero);
        if data >= end {
            break;
        }
        let hole = if found.len() < EXTENTS_MAX {
            seek(file, data, libc::SEEK_HOLE)?.unwrap_or(end)
        } else {
            end
        };
        let hole = hole.max(data + 1).next_multiple_of(unit).min(end);
        push(&mut found, data, hole, ExtentKind::Data);
        at = hole;
    }
    Ok(found)
}

fn push(extents: &mut Vec<Extent>, start: u64, end: u64, kind: ExtentKind) {
    match extents.last_mut() {
        _ if start >= end => {}
        Some(last) if last.kind == kind => last.length += end - start,
        _ => extents.push(Extent {
            offset: start,
            length: end - start,
            kind,
        }),
    }
}
