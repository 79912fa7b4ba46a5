//! Tables and superblocks, made here byte by byte.

use super::table::crc32;
use super::*;

struct Bytes {
    bytes: Vec<u8>,
    block: u64,
}

impl Medium for Bytes {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn logical_block_bytes(&self) -> u64 {
        self.block
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError> {
        let start = usize::try_from(offset).unwrap();
        Ok(self.bytes[start..start + usize::try_from(length).unwrap()].to_vec())
    }
}

fn medium(size: usize) -> Bytes {
    Bytes {
        bytes: vec![0; size],
        block: 512,
    }
}

fn put(medium: &mut Bytes, offset: usize, bytes: &[u8]) {
    medium.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn kind(medium: &mut Bytes) -> FsKind {
    identify(medium).unwrap().kind
}

const MIB: usize = 1 << 20;

/// Bytes, and where they lie.
type Part = (usize, &'static [u8]);

#[test]
fn superblocks_and_where_they_lie() {
    let cases: [(FsKind, &[Part]); 13] = [
        (FsKind::Unknown, &[]),
        (FsKind::Xfs, &[(0, b"XFSB")]),
        (FsKind::Btrfs, &[(0x10040, b"_BHRfS_M")]),
        (FsKind::Ext2, &[(1080, &[0x53, 0xEF])]),
        (FsKind::Ext3, &[(1080, &[0x53, 0xEF]), (1024 + 92, &[4])]),
        (
            FsKind::Ext4,
            &[
                (1080, &[0x53, 0xEF]),
                (1024 + 92, &[4]),
                (1024 + 96, &[0x40]),
            ],
        ),
        (
            FsKind::Unknown,
            &[(1080, &[0x53, 0xEF]), (1024 + 96, &[0x8])],
        ),
        (FsKind::Swap, &[(4086, b"SWAPSPACE2")]),
        (FsKind::Swap, &[(65526, b"SWAPSPACE2")]),
        (
            FsKind::Lvm2Member,
            &[(512, b"LABELONE"), (536, b"LVM2 001")],
        ),
        (FsKind::Luks, &[(0, b"LUKS\xba\xbe")]),
        (
            FsKind::MdMember,
            &[(4096, &[0xFC, 0x4E, 0x2B, 0xA9, 1, 0, 0, 0]), (0, b"XFSB")],
        ),
        (
            FsKind::MdMember,
            &[(MIB - 8192, &[0xFC, 0x4E, 0x2B, 0xA9, 1, 0, 0, 0])],
        ),
    ];
    for (expected, parts) in cases {
        let mut medium = medium(MIB);
        for (offset, bytes) in parts {
            put(&mut medium, *offset, bytes);
        }
        assert_eq!(kind(&mut medium), expected, "{parts:?}");
    }
    let mut old = medium(MIB);
    put(&mut old, MIB - 65536, &[0xFC, 0x4E, 0x2B, 0xA9, 0, 0, 0, 0]);
    assert_eq!(kind(&mut old), FsKind::MdMember);
}

#[test]
fn a_tiny_or_empty_device_is_unknown_and_never_out_of_range() {
    for size in [0, 1, 511, 512, 1024, 1536, 4096, 65536] {
        assert_eq!(kind(&mut medium(size)), FsKind::Unknown, "{size}");
    }
}

#[test]
fn uuid_and_label_are_read() {
    let mut medium = medium(MIB);
    put(&mut medium, 0, b"XFSB");
    put(&mut medium, 32, &[7; 16]);
    put(&mut medium, 108, b"data\0\0junk");
    let found = identify(&mut medium).unwrap();
    assert_eq!(found.uuid, Some([7; 16]));
    assert_eq!(found.label, "data");
}

fn mbr_entry(kind: u8, start: u32, sectors: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    entry
}

fn record(medium: &mut Bytes, sector: u32, entries: &[[u8; 16]]) {
    let offset = sector as usize * 512;
    for (index, entry) in entries.iter().enumerate() {
        put(medium, offset + 446 + 16 * index, entry);
    }
    put(medium, offset + 510, &[0x55, 0xAA]);
}

#[test]
fn mbr_with_logical_partitions() {
    let mut medium = medium(MIB);
    record(
        &mut medium,
        0,
        &[mbr_entry(0x83, 8, 100), mbr_entry(0x05, 200, 1000)],
    );
    record(
        &mut medium,
        200,
        &[mbr_entry(0x83, 2, 50), mbr_entry(0x05, 300, 100)],
    );
    record(
        &mut medium,
        500,
        &[mbr_entry(0x82, 4, 60), mbr_entry(0, 0, 0)],
    );
    let found = identify(&mut medium).unwrap();
    assert_eq!(found.kind, FsKind::Mbr);
    let seen: Vec<_> = found
        .partitions
        .iter()
        .map(|p| {
            (
                p.number,
                p.start_bytes / 512,
                p.size_bytes / 512,
                p.kind.as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [(1, 8, 100, "83"), (5, 202, 50, "83"), (6, 504, 60, "82")]
    );
}

#[test]
fn mbr_entries_beyond_the_device_and_circles_do_no_harm() {
    let mut medium = medium(MIB);
    record(
        &mut medium,
        0,
        &[mbr_entry(0x83, 8, u32::MAX), mbr_entry(0x05, 200, 1000)],
    );
    record(
        &mut medium,
        200,
        &[mbr_entry(0x83, 2, 50), mbr_entry(0x05, 0, 100)],
    );
    let found = identify(&mut medium).unwrap();
    assert_eq!(found.partitions.len(), 1);
    // A boot sector of a file system has the same signature, but code where the entries are.
    let mut boot = Bytes {
        bytes: vec![0x33; MIB],
        block: 512,
    };
    put(&mut boot, 510, &[0x55, 0xAA]);
    assert_eq!(kind(&mut boot), FsKind::Unknown);
}

/// A GPT with one partition of `first..=last`; header at `at`, entries at `entries`.
fn put_gpt(medium: &mut Bytes, at: u64, entries_at: u64, first: u64, last: u64) {
    let block = medium.block;
    let mut entries = vec![0; 128 * 128];
    entries[..16].copy_from_slice(&[
        0xAF, 0x3D, 0xC6, 0x0F, 0x83, 0x84, 0x72, 0x47, 0x8E, 0x79, 0x3D, 0x69, 0xD8, 0x47, 0x7D,
        0xE4,
    ]);
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    entries[56..60].copy_from_slice(&[b'd', 0, b'b', 0]);
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    header[24..32].copy_from_slice(&at.to_le_bytes());
    header[72..80].copy_from_slice(&entries_at.to_le_bytes());
    header[80..84].copy_from_slice(&128_u32.to_le_bytes());
    header[84..88].copy_from_slice(&128_u32.to_le_bytes());
    header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    let sum = crc32(&header[..92]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    put(medium, usize::try_from(at * block).unwrap(), &header);
    put(
        medium,
        usize::try_from(entries_at * block).unwrap(),
        &entries,
    );
}

#[test]
fn crc32_of_the_check_text() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}

#[test]
fn gpt_is_read_and_beats_a_protective_mbr() {
    let mut medium = medium(MIB);
    record(&mut medium, 0, &[mbr_entry(0xEE, 1, 2047)]);
    put_gpt(&mut medium, 1, 2, 64, 127);
    let found = identify(&mut medium).unwrap();
    assert_eq!(found.kind, FsKind::Gpt);
    let partition = &found.partitions[0];
    assert_eq!(
        (
            partition.number,
            partition.start_bytes,
            partition.size_bytes
        ),
        (1, 32768, 32768)
    );
    assert_eq!(partition.kind, "0FC63DAF-8483-4772-8E79-3D69D8477DE4");
    assert_eq!(partition.name, "db");
    let mut slice = Slice::new(&mut medium, 32768, 32768);
    assert_eq!(identify(&mut slice).unwrap().kind, FsKind::Unknown);
}

#[test]
fn gpt_falls_back_to_its_copy_and_names_damage_when_none_is_whole() {
    let mut medium = medium(MIB);
    put_gpt(&mut medium, 1, 2, 64, 127);
    put_gpt(&mut medium, 2047, 2014, 64, 127);
    for damaged in [512 + 30, 1024 + 5, 512 + 12, 512 + 80] {
        let mut copy = Bytes {
            bytes: medium.bytes.clone(),
            block: 512,
        };
        copy.bytes[damaged] ^= 0x40;
        assert_eq!(
            identify(&mut copy).unwrap().partitions.len(),
            1,
            "{damaged}"
        );
        copy.bytes[2047 * 512 + 17] ^= 1;
        assert!(matches!(
            identify(&mut copy),
            Err(ExportError::BadPartitionTable { .. })
        ));
    }
}

#[test]
fn gpt_of_512_byte_blocks_on_a_device_of_4096() {
    let mut medium = medium(MIB);
    put_gpt(&mut medium, 1, 2, 64, 127);
    medium.block = 4096;
    assert_eq!(
        identify(&mut medium).unwrap().partitions[0].start_bytes,
        32768
    );
}

#[test]
fn a_fat_needs_a_boot_sector_that_makes_sense() {
    let mut medium = medium(MIB);
    let mut boot = [0; 512];
    boot[0] = 0xEB;
    boot[11..13].copy_from_slice(&512u16.to_le_bytes());
    boot[13] = 4;
    boot[14] = 1;
    boot[16] = 2;
    boot[21] = 0xF8;
    boot[43..54].copy_from_slice(b"EFI        ");
    boot[54..62].copy_from_slice(b"FAT16   ");
    boot[510..].copy_from_slice(&[0x55, 0xAA]);
    put(&mut medium, 0, &boot);
    let found = identify(&mut medium).unwrap();
    assert_eq!((found.kind, found.label.as_str()), (FsKind::Vfat, "EFI"));
    for (offset, byte) in [
        (0, 0),
        (12, 7),
        (13, 3),
        (14, 0),
        (16, 9),
        (21, 1),
        (510, 0),
    ] {
        let mut wrong = boot;
        wrong[offset] = byte;
        put(&mut medium, 0, &wrong);
        assert_ne!(kind(&mut medium), FsKind::Vfat, "{offset}");
    }
}
