//! Partition tables: GPT (UEFI specification, chapter 5) and MBR with its logical partitions.

use super::Medium;
use super::filesystem::{u32_at, u64_at};
use crate::error::ExportError;

/// Partitions that are taken from a table, at most; the kernel makes 255 at most.
const PARTITIONS_MAX: u32 = 255;
/// Bytes of a GPT's entries, at most. Tables have 128 entries of 128 bytes.
const ENTRIES_BYTES_MAX: u64 = 1 << 20;
const GPT_HEADER_BYTES: u32 = 92;
const MBR_ENTRIES: usize = 446;
/// MBR type of the entry that covers a GPT.
const PROTECTIVE: u8 = 0xEE;
/// MBR types of an entry that holds logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];

/// A part of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Partition {
    /// Its number in the table, from 1; logical MBR partitions from 5.
    pub number: u32,
    /// First byte.
    pub start_bytes: u64,
    /// Number of bytes.
    pub size_bytes: u64,
    /// Its type: a GUID in upper case (GPT) or two hexadecimal digits (MBR).
    pub kind: String,
    /// Its name; empty for MBR.
    pub name: String,
}

/// Reads a GPT, from the copy at the end when the one at the start is damaged. None when no
/// header is found at either place.
pub(super) fn gpt(medium: &mut dyn Medium) -> Result<Option<Vec<Partition>>, ExportError> {
    let block = medium.logical_block_bytes();
    let blocks = medium.size_bytes() / block;
    if blocks < 3 {
        return Ok(None);
    }
    let mut damage = None;
    // A table made for 512-byte blocks is often seen through a device of 4096, and the reverse.
    let mut places = vec![(block, 1)];
    places.extend(
        [512, 4096]
            .into_iter()
            .filter(|other| *other != block)
            .map(|other| (other, 1)),
    );
    places.push((block, blocks - 1));
    for (block, header_block) in places {
        match gpt_at(medium, block, header_block)? {
            Header::Whole(partitions) => return Ok(Some(partitions)),
            Header::Damaged(reason) => damage = Some(reason),
            Header::Absent => {}
        }
    }
    match damage {
        Some(reason) => Err(ExportError::BadPartitionTable { reason }),
        None => Ok(None),
    }
}

enum Header {
    Absent,
    Damaged(&'static str),
    Whole(Vec<Partition>),
}

fn gpt_at(medium: &mut dyn Medium, block: u64, at: u64) -> Result<Header, ExportError> {
    let Some(offset) = at
        .checked_mul(block)
        .filter(|o| o + 512 <= medium.size_bytes())
    else {
        return Ok(Header::Absent);
    };
    let header = medium.read(offset, 512)?;
    if !header.starts_with(b"EFI PART") {
        return Ok(Header::Absent);
    }
    let (Some(header_bytes), Some(sum), Some(own), Some(entries_at), Some(count), Some(size)) = (
        u32_at(&header, 12),
        u32_at(&header, 16),
        u64_at(&header, 24),
        u64_at(&header, 72),
        u32_at(&header, 80),
        u32_at(&header, 84),
    ) else {
        return Ok(Header::Damaged("GPT header is cut off"));
    };
    let header_length = usize::try_from(header_bytes).unwrap_or(usize::MAX);
    if header_bytes < GPT_HEADER_BYTES || header_length > header.len() {
        return Ok(Header::Damaged("GPT header has an impossible size"));
    }
    let mut summed = header[..header_length].to_vec();
    summed[16..20].fill(0);
    if crc32(&summed) != sum {
        return Ok(Header::Damaged("GPT header has a wrong checksum"));
    }
    if own != at {
        return Ok(Header::Damaged("GPT header is not where it says"));
    }
    let length = u64::from(count) * u64::from(size);
    let start = entries_at.checked_mul(block);
    let end = start.and_then(|start| start.checked_add(length));
    let (Some(start), Some(end)) = (start, end) else {
        return Ok(Header::Damaged("GPT entries lie beyond the device"));
    };
    if size < 128 || length > ENTRIES_BYTES_MAX || end > medium.size_bytes() {
        return Ok(Header::Damaged("GPT entries have an impossible size"));
    }
    let entries = medium.read(start, length)?;
    if u32_at(&header, 88) != Some(crc32(&entries)) {
        return Ok(Header::Damaged("GPT entries have a wrong checksum"));
    }
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    Ok(Header::Whole(gpt_partitions(
        &entries,
        size,
        block,
        medium.size_bytes(),
    )))
}

/// Entries that are used and lie within the device.
fn gpt_partitions(entries: &[u8], size: usize, block: u64, device: u64) -> Vec<Partition> {
    let mut partitions = Vec::new();
    for (number, entry) in (1..=PARTITIONS_MAX).zip(entries.chunks_exact(size)) {
        if entry[..16] == [0; 16] {
            continue;
        }
        let (Some(first), Some(last)) = (u64_at(entry, 32), u64_at(entry, 40)) else {
            continue;
        };
        let start = first.checked_mul(block);
        let end = last.checked_add(1).and_then(|end| end.checked_mul(block));
        if let (Some(start_bytes), Some(end)) = (start, end)
            && start_bytes < end
            && end <= device
        {
            let units = entry[56..128]
                .chunks_exact(2)
                .map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
            partitions.push(Partition {
                number,
                start_bytes,
                size_bytes: end - start_bytes,
                kind: guid(&entry[..16]),
                name: String::from_utf16_lossy(&name),
            });
        }
    }
    partitions
}

/// A GUID as people write it; its first three fields are little-endian.
fn guid(bytes: &[u8]) -> String {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (position, index) in ORDER.into_iter().enumerate() {
        if matches!(position, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02X}", bytes[index]));
    }
    text
}

/// CRC-32 of IEEE 802.3, as GPT uses it.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ if sum & 1 == 1 { 0xEDB8_8320 } else { 0 }
        })
    }) ^ u32::MAX
}

struct MbrEntry {
    kind: u8,
    start: u64,
    sectors: u64,
}

/// The entries of a boot record; none when it is no partition table, a boot sector of a file
/// system for instance.
fn mbr_entries(record: &[u8]) -> Option<Vec<MbrEntry>> {
    if record.get(510..512)? != [0x55, 0xAA] {
        return None;
    }
    let table = record.get(MBR_ENTRIES..MBR_ENTRIES + 64)?;
    let mut entries = Vec::with_capacity(4);
    for entry in table.chunks_exact(16) {
        if !matches!(entry[0], 0 | 0x80) {
            return None;
        }
        let (start, sectors) = (u32_at(entry, 8)?, u32_at(entry, 12)?);
        entries.push(MbrEntry {
            kind: entry[4],
            start: u64::from(start),
            sectors: u64::from(sectors),
        });
    }
    Some(entries)
}

fn mbr_partition(
    medium: &dyn Medium,
    number: u32,
    kind: u8,
    start: u64,
    sectors: u64,
) -> Option<Partition> {
    let block = medium.logical_block_bytes();
    let (start_bytes, size_bytes) = (start.checked_mul(block)?, sectors.checked_mul(block)?);
    let is_within = start > 0
        && sectors > 0
        && start_bytes
            .checked_add(size_bytes)
            .is_some_and(|end| end <= medium.size_bytes());
    is_within.then(|| Partition {
        number,
        start_bytes,
        size_bytes,
        kind: format!("{kind:02x}"),
        name: String::new(),
    })
}

/// Reads an MBR and its logical partitions. None when there is no table, or an empty one.
pub(super) fn mbr(medium: &mut dyn Medium) -> Result<Option<Vec<Partition>>, ExportError> {
    if medium.size_bytes() < 512 {
        return Ok(None);
    }
    let Some(entries) = mbr_entries(&medium.read(0, 512)?) else {
        return Ok(None);
    };
    let mut partitions = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries) {
        if EXTENDED.contains(&entry.kind) {
            extended = extended.or(Some(entry.start));
        } else if entry.kind != 0 && entry.kind != PROTECTIVE {
            partitions.extend(mbr_partition(
                medium,
                number,
                entry.kind,
                entry.start,
                entry.sectors,
            ));
        }
    }
    if let Some(base) = extended.filter(|base| *base > 0) {
        partitions.extend(logical(medium, base)?);
    }
    Ok((!partitions.is_empty()).then_some(partitions))
}

/// Follows the chain of boot records of an extended partition; a circle ends at the limit.
fn logical(medium: &mut dyn Medium, base: u64) -> Result<Vec<Partition>, ExportError> {
    let block = medium.logical_block_bytes();
    let mut partitions = Vec::new();
    let mut record = base;
    for number in 5..=PARTITIONS_MAX {
        let offset = record.checked_mul(block);
        let Some(offset) = offset.filter(|o| o.saturating_add(512) <= medium.size_bytes()) else {
            break;
        };
        let Some(entries) = mbr_entries(&medium.read(offset, 512)?) else {
            break;
        };
        let [own, next, ..] = entries.as_slice() else {
            break;
        };
        if own.kind != 0 {
            let start = record.saturating_add(own.start);
            partitions.extend(mbr_partition(medium, number, own.kind, start, own.sectors));
        }
        let following = base.saturating_add(next.start);
        if !EXTENDED.contains(&next.kind) || next.start == 0 || following <= record {
            break;
        }
        record = following;
    }
    Ok(partitions)
}
