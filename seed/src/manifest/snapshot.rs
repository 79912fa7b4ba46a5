//! The whole state, cut into commits that a reader takes.

use afterimage_blockdev::IoBuffer;
use afterimage_cache::Damage;

use super::{Edit, ManifestCommit, SECTOR};

/// Edits in one commit of a snapshot.
const SNAPSHOT_EDITS: usize = 4096;
/// Bytes of edits from which on a commit takes no more of them. What is longer on its own goes
/// into a snapshot, which may have many parts.
pub(super) const COMMIT_BYTES: usize = 4 << 20;

/// Lays a state out as commits from a sequence on, each twice; gives back the next sequence and the
/// hash of the last commit as well.
pub(super) fn encode_snapshot(
    state: &[Edit],
    mut sequence: u64,
    mut previous: [u8; 32],
) -> Result<(IoBuffer, u64, [u8; 32]), Damage> {
    let mut bytes = IoBuffer::with_capacity(SECTOR);
    let parts = cut(state);
    let count = parts.len();
    for (place, part) in parts.into_iter().enumerate() {
        let commit = ManifestCommit {
            sequence,
            previous,
            is_snapshot: true,
            ends_snapshot: place + 1 == count,
            edits: part.to_vec(),
        };
        let (encoded, hash) = commit.encode_twice()?;
        bytes.extend_from_slice(&encoded);
        sequence = sequence.saturating_add(1);
        previous = hash;
    }
    Ok((bytes, sequence, previous))
}

/// Lays a state out as a manifest file, whose commits are numbered from `sequence` on. An idle
/// commit behind it proves it.
///
/// # Errors
/// [`Damage`] when no reader would take it.
pub fn encode_state(state: &[Edit], sequence: u64) -> Result<IoBuffer, Damage> {
    // What went before is in no file.
    let previous = match sequence {
        1 => [0; 32],
        _ => *blake3::hash(&sequence.to_le_bytes()).as_bytes(),
    };
    let (mut bytes, sequence, previous) = encode_snapshot(state, sequence, previous)?;
    let proof = ManifestCommit {
        sequence,
        previous,
        is_snapshot: false,
        ends_snapshot: false,
        edits: Vec::new(),
    };
    let (encoded, _) = proof.encode_twice()?;
    bytes.extend_from_slice(&encoded);
    Ok(bytes)
}

/// Bytes that edits take.
pub(super) fn bytes_of(edits: &[Edit]) -> usize {
    let mut bytes = Vec::new();
    edits
        .iter()
        .map(|edit| {
            bytes.clear();
            edit.encode_into(&mut bytes);
            bytes.len()
        })
        .sum()
}

/// Cuts the edits of a snapshot into parts, none of them too long; at least one.
fn cut(state: &[Edit]) -> Vec<&[Edit]> {
    let mut parts = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (place, edit) in state.iter().enumerate() {
        let more = bytes_of(core::slice::from_ref(edit));
        let is_over = place - from >= SNAPSHOT_EDITS || bytes + more > COMMIT_BYTES;
        if is_over && place > from {
            parts.push(&state[from..place]);
            (from, bytes) = (place, 0);
        }
        bytes += more;
    }
    parts.push(&state[from..]);
    parts
}
