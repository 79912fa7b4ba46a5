//! Small structures of a store: edits and commits of the manifest, map entries.

use afterimage_blockdev::Random;
use afterimage_cache::bytes::put;
use afterimage_seed::entry::{ENTRY_BYTES, Entry, RANGE_BYTES, RangeEntry};
use afterimage_seed::manifest::{Edit, ManifestCommit};

use super::files::{mend_manifest_commit, some_file};
use super::{Target, Verdict};

/// Bytes of an edit before its fields: type and length.
const EDIT_HEADER_BYTES: usize = 5;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(100_000, "edit", make_edit, run_edit).mended_by(mend_edit),
        Target::new(60_000, "manifest-commit", make_commit, run_commit).mended_by(
            |bytes, random| {
                mend_manifest_commit(bytes, random);
            },
        ),
        Target::new(200_000, "map-entry", make_entry, run_entry),
    ]
}

/// Commits of a store's manifest.
fn commits(random: &mut Random) -> Vec<ManifestCommit> {
    let file = some_file("manifest", random);
    let mut found = Vec::new();
    for at in (0..file.len()).step_by(4096) {
        if let Ok((commit, _, _)) = ManifestCommit::decode(&file[at..]) {
            found.push(commit);
        }
    }
    found
}

/// An edit of a type by its number, with as few bytes as it can have, all zero.
fn blank_edit(random: &mut Random) -> Option<Vec<u8>> {
    let code = u8::try_from(random.below(48)).ok()?;
    (0..200u32).find_map(|len| {
        let mut bytes = vec![code];
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.resize(EDIT_HEADER_BYTES + usize::try_from(len).ok()?, 0);
        Edit::decode(&bytes).is_ok().then_some(bytes)
    })
}

fn make_edit(random: &mut Random) -> Vec<u8> {
    if let Some(blank) = blank_edit(random).filter(|_| random.chance(0.5)) {
        return blank;
    }
    let edits: Vec<Edit> = commits(random).into_iter().flat_map(|c| c.edits).collect();
    let mut bytes = Vec::new();
    edits[random.index(edits.len())].encode_into(&mut bytes);
    bytes
}

fn mend_edit(bytes: &mut Vec<u8>, random: &mut Random) {
    let len = u32::try_from(bytes.len().saturating_sub(EDIT_HEADER_BYTES));
    if let Ok(len) = len
        && bytes.len() >= EDIT_HEADER_BYTES
        && random.chance(0.8)
    {
        put(bytes, 1, &len.to_le_bytes());
    }
}

fn run_edit(bytes: &[u8]) -> Verdict {
    let Ok((edit, rest)) = Edit::decode(bytes) else {
        return Verdict::Refused;
    };
    let mut again = Vec::new();
    edit.encode_into(&mut again);
    assert_eq!(
        again.len(),
        bytes.len() - rest.len(),
        "the edit has its length again"
    );
    let (edit_again, _) = Edit::decode(&again).expect("our own edit");
    assert_eq!(edit_again, edit, "the edit comes back");
    Verdict::Accepted
}

fn make_commit(random: &mut Random) -> Vec<u8> {
    let commits = commits(random);
    let commit = commits[random.index(commits.len())].clone();
    let edits: Vec<Edit> = commits.into_iter().flat_map(|c| c.edits).collect();
    let count = random.index(8);
    let picked = (0..count)
        .map(|_| edits[random.index(edits.len())].clone())
        .collect();
    let commit = ManifestCommit {
        edits: picked,
        ..commit
    };
    commit.encode().expect("a short commit").0.to_vec()
}

fn run_commit(bytes: &[u8]) -> Verdict {
    let Ok((commit, hash, len)) = ManifestCommit::decode(bytes) else {
        return Verdict::Refused;
    };
    assert!(len <= bytes.len(), "a commit lies within its bytes");
    let (again, hash_again) = commit.encode().expect("a commit that was read");
    assert_eq!(again.len(), len, "the commit has its length again");
    let (commit_again, _, _) = ManifestCommit::decode(&again).expect("our own commit");
    assert_eq!(commit_again, commit);
    assert!(
        hash != hash_again || again[..] == bytes[..len],
        "two commits with one hash"
    );
    Verdict::Accepted
}

/// An entry and a range.
fn make_entry(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; ENTRY_BYTES + RANGE_BYTES];
    random.fill(&mut bytes);
    let kind = |random: &mut Random| u8::try_from(random.below(3)).expect("below 3");
    bytes[6] = (1 << kind(random)) | kind(random) << 4;
    bytes[7] = 1 + kind(random);
    // First cell and count of the range stay far from the end of a disk.
    bytes[ENTRY_BYTES + 5..ENTRY_BYTES + 8].fill(0);
    bytes[ENTRY_BYTES + 13..ENTRY_BYTES + 16].fill(0);
    bytes[ENTRY_BYTES + 8] |= 1;
    bytes[ENTRY_BYTES + 24] = 3 + kind(random);
    bytes[ENTRY_BYTES + 25..].fill(0);
    bytes
}

fn run_entry(bytes: &[u8]) -> Verdict {
    let entry = Entry::decode(bytes);
    if let Some(entry) = entry {
        assert_eq!(entry.encode(), bytes[..ENTRY_BYTES], "the entry comes back");
        let held = (0..4).filter_map(|within| entry.block_in_slot(within));
        assert_eq!(held.count(), entry.mask.count_ones() as usize);
    }
    let rest = bytes.get(ENTRY_BYTES..).unwrap_or(&[]);
    let range = RangeEntry::decode(rest);
    if let Some(range) = range {
        assert_eq!(range.encode(), rest[..RANGE_BYTES], "the range comes back");
        assert!(range.holds(range.first));
    }
    Verdict::of(entry.is_some() && range.is_some())
}
