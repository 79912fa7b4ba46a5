//! Everything that is written can be read back, and no bytes make a reader panic.

use std::time::Duration;

use afterimage_blockdev::{
    AgentId, BatchId, CellIndex, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, PointId,
    SegmentId, SlotIndex, StoreId, Timestamp,
};
use afterimage_cache::SlotContext;
use afterimage_cache::key::WRAPPED_BYTES;
use afterimage_seed::entry::{Entry, EntryKind, RangeEntry};
use afterimage_seed::manifest::{
    BatchRecord, Edit, HistoryState, ManifestCommit, Noted, PointKind, PointRecord, QuotaOf,
};
use afterimage_seed::reference::{At, Reference, format_time, parse_time};
use afterimage_seed::retention::{
    ChurnRecord, ClockRecord, Elapsed, Lock, LockRule, Policy, Stored, Tier,
};
use afterimage_seed::run::{
    PAGE_BYTES, RunFooter, RunId, SectionContent, SectionName, TimeSample, decode_page, encode_run,
    place_of,
};
use afterimage_seed::segment::{FOOTERS_BYTES, SECTOR, SeedFooter, SeedSegmentBuilder};
use proptest::collection::vec;
use proptest::prelude::*;

const STORE: StoreId = StoreId([7; 16]);

fn id() -> impl Strategy<Value = [u8; 16]> {
    any::<[u8; 16]>()
}

fn point() -> impl Strategy<Value = PointRecord> {
    let kinds = prop_oneof![
        Just(PointKind::Crash),
        Just(PointKind::Application),
        Just(PointKind::Bookmark),
        Just(PointKind::ResyncIncomplete),
    ];
    let numbers = any::<[u64; 4]>();
    (numbers, id(), id(), kinds, ".{0,40}").prop_map(|(numbers, machine, history, kind, name)| {
        PointRecord {
            id: PointId(numbers[0]),
            machine: MachineId(machine),
            history: HistoryId(history),
            lsn: Lsn(numbers[1]),
            time: Timestamp(numbers[2]),
            kind,
            locked_until: Timestamp(numbers[3]),
            name,
        }
    })
}

fn batch() -> impl Strategy<Value = BatchRecord> {
    (id(), any::<(u32, bool, u64, u64)>(), vec(id(), 0..5)).prop_map(
        |(history, (batch, is_initial, begin, end), disks)| BatchRecord {
            history: HistoryId(history),
            batch: BatchId(batch),
            is_initial,
            begin: Lsn(begin),
            end: Lsn(end),
            disks: disks.into_iter().map(DiskId).collect(),
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    let kinds = [PointKind::Crash, PointKind::Application];
    let span = || (0..1u64 << 60).prop_map(Duration::from_nanos);
    let lock = proptest::option::of((1..300_000_000u64, 1..3usize));
    let steps = vec((1..1u64 << 50, 0..1u64 << 50), 0..16);
    let keep = (span(), span(), proptest::option::of(span()));
    (steps, keep, lock).prop_map(move |(steps, (window, application, named), lock)| {
        let mut last = Tier {
            interval: Duration::from_secs(1),
            keep_for: Duration::ZERO,
        };
        let tiers = steps.into_iter().map(|(longer, more)| {
            last.interval += Duration::from_nanos(longer);
            last.keep_for += Duration::from_nanos(more + 1);
            last.keep_for = last.keep_for.max(last.interval);
            last
        });
        Policy {
            journal_window: window,
            tiers: tiers.collect(),
            keep_application: application,
            keep_named: named,
            lock: lock.map(|(seconds, count)| LockRule {
                duration: Duration::from_secs(seconds),
                kinds: kinds[..count].to_vec(),
            }),
        }
    })
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (id(), any::<(u64, u32, u32, u64)>()).prop_map(|(store, (time, segment, run, point))| {
            Edit::Store {
                store: StoreId(store),
                created: Timestamp(time),
                next_segment: SegmentId(segment),
                next_run: RunId(run),
                next_point: PointId(point),
            }
        }),
        (id(), any::<[u8; 32]>(), id(), ".{0,20}").prop_map(|(machine, tag_key, holder, name)| {
            let (machine, holder) = (MachineId(machine), AgentId(holder));
            Edit::Machine {
                machine,
                tag_key,
                holder,
                name,
            }
        }),
        (id(), id(), any::<(u64, u32, u32, u8)>(), ".{0,20}").prop_map(
            |(disk, machine, (size, block, key, wrapped), name)| Edit::Disk {
                disk: DiskId(disk),
                machine: MachineId(machine),
                size_bytes: size,
                logical_block_bytes: block,
                key: KeyId(key),
                wrapped: [wrapped; WRAPPED_BYTES],
                name,
            }
        ),
        (id(), id(), id(), any::<(u64, bool)>()).prop_map(
            |(history, machine, parent, (fork, is_branch))| Edit::History {
                history: HistoryId(history),
                machine: MachineId(machine),
                parent: HistoryId(parent),
                fork: Lsn(fork),
                is_branch,
            }
        ),
        id().prop_map(|history| Edit::HistoryDropped {
            history: HistoryId(history)
        }),
        (id(), id(), any::<(u64, u64)>()).prop_map(|(disk, history, (lsn, size))| Edit::Size {
            disk: DiskId(disk),
            history: HistoryId(history),
            lsn: Lsn(lsn),
            size_bytes: size,
        }),
        any::<(u32, u32, u32, u64, [u8; 32])>().prop_map(
            |(segment, generation, count, bytes, root)| {
                Edit::Segment {
                    segment: SegmentId(segment),
                    generation,
                    slot_count: count,
                    bytes,
                    root,
                }
            }
        ),
        any::<(u32, u64)>().prop_map(|(run, bytes)| Edit::Run {
            run: RunId(run),
            bytes
        }),
        any::<u32>().prop_map(|run| Edit::RunDropped { run: RunId(run) }),
        any::<u64>().prop_map(|log_sequence| Edit::Checkpoint { log_sequence }),
        (id(), id(), any::<[u64; 4]>()).prop_map(|(history, origin, numbers)| {
            Edit::HistoryState(HistoryState {
                history: HistoryId(history),
                epoch: Epoch(numbers[0]),
                origin: AgentId(origin),
                last: Lsn(numbers[1]),
                highest_bulk: Lsn(numbers[2]),
                time: Timestamp(numbers[3]),
            })
        }),
        batch().prop_map(Edit::Batch),
        point().prop_map(Edit::Point),
        any::<u64>().prop_map(|point| Edit::PointDropped {
            point: PointId(point)
        }),
        (id(), id(), any::<(u64, u64)>()).prop_map(|(disk, history, (first, last))| Edit::Lost {
            disk: DiskId(disk),
            history: HistoryId(history),
            first: Lsn(first),
            last: Lsn(last),
        }),
        any::<u32>().prop_map(|segment| Edit::SegmentDropped {
            segment: SegmentId(segment)
        }),
        any::<u32>().prop_map(|segment| Edit::BaseThrough {
            segment: SegmentId(segment)
        }),
        (id(), any::<u64>(), policy()).prop_map(|(machine, version, policy)| Edit::Policy {
            machine: MachineId(machine),
            version,
            policy,
        }),
        any::<[u64; 3]>().prop_map(|[point, until, elapsed]| Edit::PointLocked {
            point: PointId(point),
            lock: Lock {
                until: Timestamp(until),
                elapsed_until: Elapsed(elapsed),
            },
        }),
        any::<(u64, u64, bool)>().prop_map(|(wall, elapsed, is_frozen)| {
            Edit::Clock(ClockRecord {
                wall: Timestamp(wall),
                elapsed: Elapsed(elapsed),
                is_frozen,
            })
        }),
        (id(), any::<u64>()).prop_map(|(history, lsn)| Edit::Floor {
            history: HistoryId(history),
            lsn: Lsn(lsn),
        }),
        noted().prop_map(Edit::Noted),
        (0..3, id(), any::<u64>()).prop_map(|(kind, id, bytes)| Edit::Quota {
            of: match kind {
                0 => QuotaOf::Store,
                1 => QuotaOf::Machine(MachineId(id)),
                _ => QuotaOf::Disk(DiskId(id)),
            },
            bytes,
        }),
        (id(), any::<[u64; 10]>()).prop_map(|(disk, fields)| Edit::Churn {
            disk: DiskId(disk),
            churn: churn(fields),
        }),
    ]
}

fn noted() -> impl Strategy<Value = Noted> {
    prop_oneof![
        any::<(u32, u64, u32, u64)>().prop_map(|(number, sequence, rest, rest_through)| {
            Noted::Notes {
                number,
                sequence,
                rest: RunId(rest),
                rest_through,
            }
        }),
        (id(), any::<u64>()).prop_map(|(history, lsn)| Noted::Known {
            history: HistoryId(history),
            lsn: Lsn(lsn),
        }),
        any::<(u32, u64, u32)>().prop_map(|(segment, last_sequence, needed)| Noted::Moving {
            segment: SegmentId(segment),
            last_sequence,
            needed,
        }),
    ]
}

fn churn([measured_ns, bytes, slots, rest @ ..]: [u64; 10]) -> ChurnRecord {
    let stored = |bytes, blocks| Stored { bytes, blocks };
    ChurnRecord {
        measured_ns,
        bytes,
        slots,
        data: stored(rest[0], rest[1]),
        bulk: stored(rest[2], rest[3]),
        distinct: [rest[4], rest[5], rest[6]],
    }
}

fn commit() -> impl Strategy<Value = ManifestCommit> {
    (any::<(u64, [u8; 32], bool, bool)>(), vec(edit(), 0..12)).prop_map(
        |((sequence, previous, is_snapshot, ends_snapshot), edits)| ManifestCommit {
            sequence,
            previous,
            is_snapshot,
            ends_snapshot,
            edits,
        },
    )
}

fn entry() -> impl Strategy<Value = Entry> {
    let kinds = prop_oneof![
        Just(EntryKind::Bulk),
        Just(EntryKind::Data),
        Just(EntryKind::Zero),
        Just(EntryKind::Discard),
        Just(EntryKind::Unknown),
    ];
    (
        0..1u64 << 48,
        any::<u64>(),
        1..16u8,
        0..4u8,
        kinds,
        any::<(u32, u32)>(),
    )
        .prop_map(|(cell, lsn, mask, first, kind, (segment, slot))| Entry {
            cell: CellIndex(cell),
            lsn: Lsn(lsn),
            mask,
            first,
            kind,
            segment: SegmentId(segment),
            slot: SlotIndex(slot),
        })
}

fn range() -> impl Strategy<Value = RangeEntry> {
    (0..1u64 << 47, 1..1u64 << 47, any::<u64>()).prop_map(|(first, count, lsn)| RangeEntry {
        first: CellIndex(first),
        count,
        lsn: Lsn(lsn),
        kind: EntryKind::Discard,
    })
}

fn section() -> impl Strategy<Value = SectionContent> {
    let samples = vec(any::<(u64, u64)>(), 0..6);
    (
        id(),
        id(),
        any::<bool>(),
        vec(entry(), 0..400),
        vec(range(), 0..6),
        samples,
    )
        .prop_map(
            |(history, disk, is_base_part, mut entries, ranges, samples)| {
                entries.sort_unstable_by_key(Entry::key);
                let sample = |(time, lsn)| TimeSample {
                    time: Timestamp(time),
                    lsn: Lsn(lsn),
                };
                SectionContent {
                    name: SectionName {
                        history: HistoryId(history),
                        disk: DiskId(disk),
                        is_base_part,
                    },
                    low: entries
                        .iter()
                        .map(|entry| entry.lsn)
                        .min()
                        .unwrap_or_default(),
                    high: entries
                        .iter()
                        .map(|entry| entry.lsn)
                        .max()
                        .unwrap_or_default(),
                    entries,
                    ranges,
                    timeline: samples.into_iter().map(sample).collect(),
                }
            },
        )
}

fn flip(bytes: &mut [u8], flips: &[(usize, u8)]) {
    for (place, with) in flips {
        if !bytes.is_empty() {
            let place = place % bytes.len();
            bytes[place] ^= with;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn edits_come_back(edit in edit()) {
        let mut bytes = Vec::new();
        edit.encode_into(&mut bytes);
        bytes.extend_from_slice(b"rest");
        let (found, rest) = Edit::decode(&bytes).unwrap();
        prop_assert_eq!(found, edit);
        prop_assert_eq!(rest, b"rest");
    }

    #[test]
    fn commits_come_back_and_notice_every_flip(
        commit in commit(),
        place in any::<usize>(),
        with in 1..=u8::MAX,
    ) {
        let (bytes, hash) = commit.encode().unwrap();
        let (found, found_hash, len) = ManifestCommit::decode(&bytes).unwrap();
        prop_assert_eq!(&found, &commit);
        prop_assert_eq!((found_hash, len), (hash, bytes.len()));
        let mut bad = bytes.to_vec();
        flip(&mut bad, &[(place, with)]);
        prop_assert!(ManifestCommit::decode(&bad).is_err());
        let (twice, _) = commit.encode_twice().unwrap();
        prop_assert_eq!(&twice[..len], &twice[len..]);
    }

    #[test]
    fn runs_come_back(sections in vec(section(), 0..4)) {
        let run = RunId(3);
        let (bytes, written) = encode_run(STORE, run, &sections);
        let at = bytes.len() - PAGE_BYTES;
        let footer = RunFooter::decode(&bytes[at..], STORE, run).unwrap();
        let tail = usize::try_from(footer.tail_offset).unwrap();
        let tables = footer.decode_tail(&bytes[tail..]).unwrap();
        prop_assert_eq!(format!("{written:?}"), format!("{tables:?}"));
        let is_kept = |section: &&SectionContent| {
            let is_empty = section.entries.is_empty() && section.ranges.is_empty();
            !is_empty || !section.timeline.is_empty()
        };
        let sections: Vec<_> = sections.iter().filter(is_kept).collect();
        prop_assert_eq!(tables.len(), sections.len());
        for (table, section) in tables.iter().zip(sections) {
            prop_assert_eq!(table.name, section.name);
            prop_assert_eq!((table.low, table.high), (section.low, section.high));
            prop_assert_eq!(&table.ranges, &section.ranges);
            prop_assert_eq!(&table.timeline, &section.timeline);
            for is_copy in [false, true] {
                let mut entries = Vec::new();
                for place in 0..u32::try_from(table.fences.len()).unwrap() {
                    let number = table.first_page + place;
                    let place = place_of(number, table.file_pages);
                    let offset = if is_copy { place.copy } else { place.offset };
                    let at = usize::try_from(offset).unwrap();
                    entries.extend(decode_page(&bytes[at..], run, number).unwrap());
                }
                prop_assert_eq!(&entries, &section.entries);
            }
            // Every entry lies in a page that its cell leads to.
            for (place, entry) in section.entries.iter().enumerate() {
                let end = CellIndex(entry.cell.0 + 1);
                let within = place / afterimage_seed::run::PAGE_ENTRIES;
                let page = table.first_page + u32::try_from(within).unwrap();
                let reads = table.reads(entry.cell, end);
                prop_assert!(reads.iter().any(|(at, count)| (*at..at + count).contains(&page)));
            }
        }
    }

    #[test]
    fn no_bytes_make_a_run_reader_panic(
        sections in vec(section(), 0..3),
        flips in vec(any::<(usize, u8)>(), 1..6),
    ) {
        let run = RunId(3);
        let mut bytes = encode_run(STORE, run, &sections).0.to_vec();
        let footer = RunFooter::decode(&bytes[bytes.len() - PAGE_BYTES..], STORE, run).unwrap();
        flip(&mut bytes, &flips);
        let _may_fail = RunFooter::decode(&bytes[bytes.len() - PAGE_BYTES..], STORE, run);
        let tail = usize::try_from(footer.tail_offset).unwrap();
        let _may_fail = footer.decode_tail(&bytes[tail..]);
        let _may_fail = decode_page(&bytes, run, 0);
    }

    #[test]
    fn seed_segments_come_back(
        slots in vec((0..1u64 << 40, 1..16u8, any::<u64>(), 88..2000usize), 0..40),
        spoilt in prop_oneof![Just(None), any::<usize>().prop_map(Some)],
        notes in any::<u32>(),
    ) {
        let segment = SegmentId(5 | 1 << 31);
        let mut builder = SeedSegmentBuilder::new(STORE, segment);
        builder.need_notes(notes);
        let mut expected = Vec::new();
        let mut offset = SECTOR;
        for (cell, mask, lsn, len) in slots {
            let len = len.next_multiple_of(8);
            let (disk, history) = (DiskId([1; 16]), HistoryId([lsn.to_le_bytes()[0] % 3; 16]));
            let context = SlotContext::uniform(disk, history, CellIndex(cell), mask, Lsn(lsn));
            builder.push(&context, &[mask; 32], &vec![mask; len]);
            expected.push((offset as u64, context));
            offset += len;
        }
        let (at, bytes, _root) = builder.finish();
        prop_assert_eq!(at, 0);
        let mut bytes = bytes.to_vec();
        // One damaged byte behind the slots costs nothing.
        let slots_end = offset.next_multiple_of(SECTOR);
        if let Some(place) = spoilt {
            let place = slots_end + place % (bytes.len() - slots_end);
            bytes[place] ^= 0x5a;
        }
        let tail = bytes.len() - FOOTERS_BYTES;
        let footer = SeedFooter::find(&bytes[tail..], STORE, segment).unwrap();
        let at = usize::try_from(footer.directory_offset).unwrap();
        let (offsets, entries) = footer.find_directory(&bytes[at..]).unwrap();
        prop_assert_eq!(footer.needs_notes, notes);
        prop_assert_eq!(entries.len(), expected.len());
        for ((slot, entry), (offset, context)) in (0u32..).zip(&entries).zip(&expected) {
            prop_assert_eq!(offsets.get(slot), Some(*offset));
            prop_assert_eq!(&entry.context, context);
        }
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in vec(any::<u8>(), 0..9000)) {
        let _may_fail = Edit::decode(&bytes);
        let _may_fail = ManifestCommit::decode(&bytes);
        let _may_fail = Entry::decode(&bytes);
        let _may_fail = RangeEntry::decode(&bytes);
        let _may_fail = RunFooter::decode(&bytes, STORE, RunId(1));
        let _may_fail = decode_page(&bytes, RunId(1), 0);
        let _may_fail = SeedFooter::find(&bytes, STORE, SegmentId(1));
    }

    #[test]
    fn entries_come_back(entry in entry(), range in range()) {
        prop_assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        prop_assert_eq!(RangeEntry::decode(&range.encode()), Some(range));
    }

    #[test]
    fn times_come_back(time in any::<u64>()) {
        let millis = time / 1_000_000 * 1_000_000;
        prop_assert_eq!(parse_time(&format_time(Timestamp(time))), Some(Timestamp(millis)));
    }

    #[test]
    fn texts_never_panic(text in ".{0,60}") {
        let _may_fail = text.parse::<Reference>();
        let _may_fail = text.parse::<At>();
        let _may_fail = parse_time(&text);
    }

    #[test]
    fn texts_like_times_never_panic(
        text in concat!(
            "[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}",
            "(\\.[0-9]{0,12})?([Zz]|[+-][0-9+]{0,20}:[0-9]{0,20})?"
        ),
    ) {
        let _may_fail = parse_time(&text);
    }

    #[test]
    fn references_mean_what_they_say(
        machine in "[a-z][a-z0-9-]{0,12}",
        disk in "[a-z][a-z0-9-]{0,12}",
        lsn in any::<u64>(),
        history in id(),
        seconds in 0..1u64 << 40,
    ) {
        let parse = |at: &str| format!("{machine}/{disk}@{at}").parse::<Reference>().unwrap();
        let reference = parse(&format!("lsn:{lsn}"));
        prop_assert_eq!((&reference.machine, &reference.disk), (&machine, &disk));
        prop_assert_eq!(reference.at, At::Lsn(None, Lsn(lsn)));
        let history = HistoryId(history);
        let at = parse(&format!("{history}:lsn:{lsn}")).at;
        prop_assert_eq!(at, At::Lsn(Some(history), Lsn(lsn)));
        let ago = std::time::Duration::from_secs(seconds);
        prop_assert_eq!(parse(&format!("-{seconds}s")).at, At::Ago(ago));
        prop_assert_eq!(parse("latest").at, At::Latest);
        prop_assert_eq!(parse("before-upgrade").at, At::Name("before-upgrade".to_owned()));
    }
}

#[test]
fn times_that_cannot_be_are_no_times() {
    for text in [
        "2026-02-29T10:00:00Z",
        "2026-13-01T10:00:00Z",
        "2026-04-31T10:00:00Z",
        "2026-11-21T24:00:00Z",
        "2026-11-21T10:00:00",
        "2026-11-21T10:00:00+9999999999999999:00",
        "2026-11-21T10:00:00+1:00",
        "1969-12-31T23:59:59Z",
    ] {
        assert_eq!(parse_time(text), None, "{text}");
    }
    let leap = parse_time("2024-02-29T12:00:00.5+02:00").unwrap();
    assert_eq!(format_time(leap), "2024-02-29T10:00:00.500Z");
}
