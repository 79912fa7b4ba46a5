//! A request, read out of guest memory once and checked.

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use crate::Memory;
use crate::blk::{
    RANGE_BYTES, RANGE_SECTORS_MAX, RANGES_MAX, REQUEST_BYTES_MAX, SECTOR_BYTES, Status,
};
use crate::chain::{Broken, Chain, Segments};

/// Type, a reserved word, and the sector.
const HEADER_BYTES: usize = 16;

/// What is asked for. Offsets and lengths are in bytes, and not checked against the device.
#[derive(Debug)]
pub(crate) enum Request {
    /// Reads so many bytes into the data segments.
    Read {
        offset: u64,
        bytes: usize,
    },
    /// Writes the data segments.
    Write {
        offset: u64,
        bytes: usize,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    /// Writes the serial number into the data segments.
    Identify,
}

/// A range that a discard or a write-zeroes names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) may_unmap: bool,
}

/// A request with the places that belong to it.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) head: u16,
    /// What it is, or how it is refused.
    pub(crate) request: Result<Request, Status>,
    /// Where data comes from, or goes to.
    pub(crate) data: Segments,
    /// Where the status goes.
    pub(crate) status: GuestAddress,
}

impl Parsed {
    /// Reads a request.
    ///
    /// # Errors
    /// When it cannot even be refused.
    pub(crate) fn read(chain: Chain, memory: &Memory) -> Result<Self, Broken> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let status = writable.take_last_byte().ok_or(Broken::Status)?;
        if memory.read_obj::<u8>(status).is_err() {
            return Err(Broken::Status);
        }
        let request = parse(&mut readable, &writable, memory);
        let data = match request {
            Ok(Request::Write { .. }) => readable,
            _ => writable,
        };
        Ok(Self {
            head,
            request,
            data,
            status,
        })
    }
}

fn parse(readable: &mut Segments, writable: &Segments, memory: &Memory) -> Result<Request, Status> {
    let header: [u8; HEADER_BYTES] = readable.take_front(memory).ok_or(Status::Failed)?;
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let offset = sector.checked_mul(SECTOR_BYTES);
    match kind {
        blk::VIRTIO_BLK_T_IN => Ok(Request::Read {
            offset: offset.ok_or(Status::Failed)?,
            bytes: data_bytes(writable.bytes())?,
        }),
        blk::VIRTIO_BLK_T_OUT => Ok(Request::Write {
            offset: offset.ok_or(Status::Failed)?,
            bytes: data_bytes(readable.bytes())?,
        }),
        blk::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        blk::VIRTIO_BLK_T_GET_ID => Ok(Request::Identify),
        blk::VIRTIO_BLK_T_DISCARD => Ok(Request::Discard(ranges(readable, memory, false)?)),
        blk::VIRTIO_BLK_T_WRITE_ZEROES => Ok(Request::WriteZeroes(ranges(readable, memory, true)?)),
        _ => Err(Status::Unsupported),
    }
}

/// The length of data, where it is one that was offered.
fn data_bytes(bytes: u64) -> Result<usize, Status> {
    let is_legal = bytes > 0 && bytes <= REQUEST_BYTES_MAX && bytes.is_multiple_of(SECTOR_BYTES);
    let bytes = usize::try_from(bytes).map_err(|_| Status::Failed)?;
    if is_legal {
        Ok(bytes)
    } else {
        Err(Status::Failed)
    }
}

fn ranges(readable: &mut Segments, memory: &Memory, can_unmap: bool) -> Result<Vec<Range>, Status> {
    let whole = RANGE_BYTES as u64;
    let count = readable.bytes() / whole;
    if count == 0 || count > u64::from(RANGES_MAX) || !readable.bytes().is_multiple_of(whole) {
        return Err(Status::Failed);
    }
    (0..count)
        .map(|_| range(readable, memory, can_unmap))
        .collect()
}

fn range(readable: &mut Segments, memory: &Memory, can_unmap: bool) -> Result<Range, Status> {
    let bytes: [u8; RANGE_BYTES] = readable.take_front(memory).ok_or(Status::Failed)?;
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let may_unmap = flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let has_unknown = flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    // The specification wants this answer, and not an error.
    if has_unknown || (may_unmap && !can_unmap) {
        return Err(Status::Unsupported);
    }
    if sectors == 0 || sectors > RANGE_SECTORS_MAX {
        return Err(Status::Failed);
    }
    Ok(Range {
        offset: sector.checked_mul(SECTOR_BYTES).ok_or(Status::Failed)?,
        length: u64::from(sectors) * SECTOR_BYTES,
        may_unmap,
    })
}
