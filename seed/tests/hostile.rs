//! What an agent may send, and what becomes of it: a store that can still be opened, and data that
//! is never wrong.
//!
//! Each case was once accepted: names of 64 KiB went into the manifest until no reader took it;
//! cells beyond what an entry holds were cut off; a disk grew to any size.
#![allow(clippy::unwrap_used)]

mod rig;

use afterimage_blockdev::{AgentId, BatchId, DiskId, Epoch, FileName, HistoryId, Lsn, PointId};
use afterimage_cache::{FrameBuilder, MarkKind, RecordKind};
use afterimage_seed::engine::StreamEnd;
use afterimage_seed::manifest::{Edit, ManifestCommit};
use afterimage_seed::{EngineOptions, Request, Response};
use rig::{BLOCK, DISK, MACHINE, Medium, Rig, closed_store};

fn points(rig: &mut Rig) -> Vec<String> {
    let listed = rig.ask(Request::ListPoints {
        machine: "machine".to_owned(),
        after: PointId(0),
        limit: 10_000,
    });
    match listed {
        Ok(Response::Points(points, _)) => points.into_iter().map(|point| point.name).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn marks_with_huge_names_leave_a_manifest_that_can_be_read() {
    let medium = Medium::new();
    let options = || EngineOptions {
        manifest_bytes: 64 << 10,
        ..rig::options()
    };
    let mut rig = Rig::start_with(&medium, options());
    rig.open();
    for _ in 0..400 {
        let header = rig.header(RecordKind::Mark(MarkKind::Bookmark));
        rig.note(&header, &[0xff; 64 << 10]);
    }
    assert_eq!(rig.end(), None);
    let names = points(&mut rig);
    assert_eq!(names.len(), 400);
    assert!(names.iter().all(|name| name.len() <= 128));
    // A store that was not closed in order begins with what its manifest says.
    let mut again = Rig::start_with(&medium, options());
    assert!(again.is_ready, "{:?}", again.failure);
    assert_eq!(points(&mut again), names);
}

#[test]
fn a_legal_name_of_a_mark_is_kept_and_an_illegal_one_is_not() {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    for name in ["before-upgrade", "latest", "a/b", "", "lsn:5", "-x"] {
        let header = rig.header(RecordKind::Mark(MarkKind::Bookmark));
        rig.note(&header, name.as_bytes());
    }
    let names = points(&mut rig);
    assert_eq!(names.len(), 6);
    assert_eq!(names[0], "before-upgrade");
    assert!(names[1..].iter().all(|name| name.starts_with("bookmark-")));
}

#[test]
fn a_commit_in_the_name_of_a_mark_does_not_reach_the_manifest() {
    let forged = ManifestCommit {
        sequence: 1 << 40,
        previous: [0; 32],
        is_snapshot: false,
        ends_snapshot: false,
        edits: vec![Edit::PointDropped { point: PointId(1) }],
    };
    let (bytes, _) = forged.encode().unwrap();
    let mut note = b"a".repeat(4096);
    note.extend_from_slice(&bytes);
    note.extend_from_slice(&b"a".repeat(8192));
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    let header = rig.header(RecordKind::Mark(MarkKind::Bookmark));
    rig.note(&header, &note);
    let manifest = medium.content(&medium.only("manifest"));
    let stands = |magic: &[u8]| manifest.windows(magic.len()).any(|bytes| bytes == magic);
    assert!(
        !stands(&bytes[16..48]),
        "the forged header is in the manifest"
    );
    assert_eq!(points(&mut rig).len(), 1);
}

#[test]
fn records_of_a_disk_that_was_not_declared_end_the_stream() {
    let other = DiskId([0xee; 16]);
    for is_bulk in [false, true] {
        let medium = Medium::new();
        let mut rig = Rig::start(&medium);
        rig.open();
        let stream = rig.stream.unwrap();
        if is_bulk {
            let frame = rig.bulk_frame(other, 0, 1);
            rig.step(afterimage_seed::Input::Bulk(stream, 1, frame));
        } else {
            let frame = rig.data_frame(other, 0, 1);
            rig.send(frame);
        }
        assert_eq!(rig.end(), Some(StreamEnd::Damaged), "bulk: {is_bulk}");
        assert_eq!(rig.durable(), Lsn::ZERO);
    }
}

#[test]
fn a_cell_beyond_what_an_entry_holds_is_refused() {
    for (offset, is_legal) in [
        ((1 << 62) - BLOCK, true),
        (1 << 62, false),
        (1 << 63, false),
    ] {
        let medium = Medium::new();
        let mut rig = Rig::start(&medium);
        rig.open();
        let frame = rig.data_frame(DISK, offset, 1);
        rig.send(frame);
        assert_eq!(rig.end().is_none(), is_legal, "{offset}");
        let mut header = rig.header(RecordKind::Discard);
        header.disk = DISK;
        header.offset = offset;
        header.length = BLOCK;
        rig.note(&header, &[]);
        assert_eq!(rig.end().is_none(), is_legal, "{offset}");
    }
}

#[test]
fn a_disk_grows_to_possible_sizes_only() {
    let sizes = [
        (2 << 20, true),
        ((1 << 20) + 512, true),
        (1 << 62, true),
        (u64::MAX, false),
        ((1 << 62) + 512, false),
        ((2 << 20) + 1, false),
        (1 << 19, false),
        (0, false),
    ];
    for (size, is_legal) in sizes {
        let medium = Medium::new();
        let mut rig = Rig::start(&medium);
        rig.open();
        let mut header = rig.header(RecordKind::Grow);
        header.disk = DISK;
        header.length = size;
        rig.note(&header, &[]);
        assert_eq!(rig.end().is_none(), is_legal, "{size}");
        assert_eq!(rig.durable() == Lsn(1), is_legal, "{size}");
    }
}

#[test]
fn a_disk_is_declared_with_a_possible_size_only() {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    for size_bytes in [0, 513, (1 << 62) + 512, u64::MAX] {
        let stream = rig.stream.unwrap();
        let declared = rig.ask(Request::DeclareDisk {
            stream,
            disk: DiskId([5; 16]),
            name: "other".to_owned(),
            size_bytes,
            logical_block_bytes: 512,
        });
        assert!(declared.is_err(), "{size_bytes}");
    }
}

#[test]
fn a_batch_with_many_disks_keeps_those_that_are_known() {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    let mut note = Vec::new();
    for number in 0..4000_u32 {
        note.extend_from_slice(&[number.to_le_bytes(); 4].concat());
    }
    note.extend_from_slice(&DISK.0);
    for number in 1..40 {
        let mut header = rig.header(RecordKind::BatchBegin(afterimage_cache::BatchKind::Resync));
        header.batch = BatchId(number);
        rig.note(&header, &note);
    }
    rig.write(0, 1);
    assert_eq!(rig.end(), None);
    rig.stop();
    let manifest = medium.content(&medium.only("manifest"));
    assert!(manifest.len() < 200_000, "{}", manifest.len());
}

#[test]
fn a_history_is_not_forked_deeper_than_a_view_can_look() {
    let medium = Medium::new();
    let mut rig = Rig::start(&medium);
    rig.open();
    rig.write(0, 1);
    let mut parent = rig::HISTORY;
    let mut depth = 1;
    let refusal = loop {
        let mut id = [0x77; 16];
        id[..4].copy_from_slice(&u32::to_le_bytes(depth));
        let history = HistoryId(id);
        let opened = rig.ask(Request::OpenStream {
            machine: MACHINE,
            name: "machine".to_owned(),
            history,
            parent: Some((parent, Lsn(1))),
            origin: AgentId([4; 16]),
            epoch: Epoch(1),
        });
        match opened {
            Ok(_) => (parent, depth) = (history, depth + 1),
            Err(error) => break error,
        }
        assert!(depth < 300, "nothing is refused");
    };
    assert_eq!(depth, 200);
    assert!(!refusal.hint().is_empty());
    // The deepest one still shows what the oldest wrote.
    assert_eq!(rig.read(0), Ok(1));
    let reference = "machine/disk@latest".parse().unwrap();
    let forked = rig.ask(Request::Fork {
        reference,
        allow_incomplete: true,
    });
    assert!(forked.is_err());
}

#[test]
fn frames_that_make_sense_are_taken_as_before() {
    let medium = closed_store();
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready);
    assert_eq!(rig.read(0), Ok(7));
    assert_eq!(rig.read(1), Ok(8));
    assert_eq!(rig.read(2), Ok(0));
    assert_eq!(rig.damage(), Vec::<String>::new());
    assert!(rig.verify().damage.is_empty());
    let mut builder = FrameBuilder::new(rig.identity(), false);
    let header = rig.header(RecordKind::Mark(MarkKind::Heartbeat));
    builder.push_note(&header, &[]);
    assert!(!builder.is_empty());
}

/// Nothing depends on notes: what stands under their names neither stops a store nor misleads it.
#[test]
fn notes_of_any_content_and_number_cost_nothing() {
    let medium = closed_store();
    for name in [
        "state-4294967295.notes",
        "state-0000000900.notes",
        "state-0000000901.notes.new",
        "rest-4294967295-7.notes",
        "rest-0000000900-18446744073709551615.notes",
        "rest-0000000901-7.notes.new",
    ] {
        let name = FileName::new(format!("segments/{name}"));
        medium.put(&name, b"neither a manifest nor a run");
    }
    let mut rig = Rig::start(&medium);
    assert!(rig.is_ready, "{:?}", rig.failure);
    assert_eq!(rig.read(0), Ok(7));
    rig.open();
    rig.write(2, 9);
    rig.stop();
    let names = medium.names("segments");
    let notes: Vec<&str> = names
        .iter()
        .map(FileName::base)
        .filter(|name| name.contains("notes"))
        .collect();
    // A number that was there is not given out again, and older notes go when newer ones are there.
    assert_eq!(notes, ["state-0000000901.notes"]);
    let mut again = Rig::start(&medium);
    assert!(again.is_ready, "{:?}", again.failure);
    assert_eq!(again.read(0), Ok(7));
}
