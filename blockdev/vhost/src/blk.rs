//! The words of virtio-blk: features, the configuration space, limits.
//!
//! Specification: OASIS virtio 1.2, section 5.2.

use afterimage_blockdev::Geometry;
use virtio_bindings::{virtio_blk as blk, virtio_config, virtio_ring};

/// Length of a serial number.
pub(crate) const ID_BYTES: usize = 20;
/// Unit of all addresses of virtio-blk, whatever the logical block is.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Most bytes of one segment of data.
pub(crate) const SEGMENT_BYTES_MAX: u32 = 256 << 10;
/// Most segments of data of one request, so that it fits a ring of 128.
pub(crate) const SEGMENTS_MAX: u32 = 126;
/// Most bytes of one request, as they follow from the two.
pub(crate) const REQUEST_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64;
/// Most ranges of one discard or write-zeroes.
pub(crate) const RANGES_MAX: u32 = 32;
/// Most sectors of such a range: 1 GiB.
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Length of such a range in memory.
pub(crate) const RANGE_BYTES: usize = 16;
/// The configuration space, as far as its fields mean anything here.
const CONFIG_BYTES: usize = 60;

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Status {
    Ok,
    Failed,
    Unsupported,
}

impl Status {
    /// The byte that the guest finds.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Unsupported => 2,
        }
    }
}

/// The features of a device, but for those of the transport.
pub(crate) fn features(geometry: &Geometry) -> u64 {
    let mut bits = vec![
        virtio_config::VIRTIO_F_VERSION_1,
        virtio_ring::VIRTIO_RING_F_EVENT_IDX,
        virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
        blk::VIRTIO_BLK_F_SIZE_MAX,
        blk::VIRTIO_BLK_F_SEG_MAX,
        blk::VIRTIO_BLK_F_BLK_SIZE,
        blk::VIRTIO_BLK_F_TOPOLOGY,
        blk::VIRTIO_BLK_F_FLUSH,
        blk::VIRTIO_BLK_F_MQ,
    ];
    if geometry.is_read_only {
        bits.push(blk::VIRTIO_BLK_F_RO);
    } else {
        bits.extend([blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.iter().fold(0, |all, bit| all | 1_u64 << bit)
}

/// Says whether the guest knows of the volatile cache, and flushes.
pub(crate) fn has_flush(features: u64) -> bool {
    features & 1 << blk::VIRTIO_BLK_F_FLUSH != 0
}

/// The part of the configuration space that is asked for; zero where there is nothing.
pub(crate) fn config(geometry: &Geometry, queues: u16, offset: u32, bytes: u32) -> Vec<u8> {
    let whole = whole_config(geometry, queues);
    let (offset, bytes) = (u64::from(offset), u64::from(bytes));
    (offset..offset + bytes)
        .map(|at| {
            let byte = usize::try_from(at).ok().and_then(|at| whole.get(at));
            byte.copied().unwrap_or(0)
        })
        .collect()
}

fn whole_config(geometry: &Geometry, queues: u16) -> Vec<u8> {
    let block = geometry.logical_block_bytes;
    let sectors_per_block = block / 512;
    // Blocks of the store are 4096 bytes: what is smaller costs a read before the write.
    let exponent: u8 = if block == 512 { 3 } else { 0 };
    let blocks_of_best: u16 = if block == 512 { 8 } else { 1 };
    let mut bytes = Vec::with_capacity(CONFIG_BYTES);
    bytes.extend((geometry.size_bytes / SECTOR_BYTES).to_le_bytes());
    bytes.extend(SEGMENT_BYTES_MAX.to_le_bytes());
    bytes.extend(SEGMENTS_MAX.to_le_bytes());
    // Cylinders, heads and sectors are not offered.
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend([exponent, 0]);
    bytes.extend(blocks_of_best.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    // The cache can not be turned off by the guest.
    bytes.extend([0, 0]);
    bytes.extend(queues.to_le_bytes());
    if geometry.is_read_only {
        bytes.resize(CONFIG_BYTES, 0);
        return bytes;
    }
    bytes.extend(RANGE_SECTORS_MAX.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    bytes.extend(sectors_per_block.to_le_bytes());
    bytes.extend(RANGE_SECTORS_MAX.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    // Zeroes may be holes.
    bytes.extend([1, 0, 0, 0]);
    bytes
}
