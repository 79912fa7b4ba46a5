//! Each thing that a power cut may leave, for cuts that find few changes without a sync.
//!
//! A set of changes is a number: bit `n` says whether the `n`-th change survives. Changes are those
//! of the files, in the order of their inodes and in each in the order made; then those of names.

use std::collections::BTreeMap;

use super::cut::share_names;
use super::medium::{Content, Inode, Medium, NameChange, apply_names};

/// The number of changes that no sync covers.
pub(super) fn changes(medium: &Medium) -> usize {
    let of_files = medium.inodes.values().map(|inode| inode.changes.len());
    of_files.sum::<usize>() + medium.name_changes.len()
}

/// The medium that comes up when just these changes survive, each whole. A change of names that
/// builds on a lost one is lost as well.
pub(super) fn keep(medium: &Medium, kept: u64) -> Medium {
    let mut number = 0;
    let mut is_kept = || {
        number += 1;
        (kept >> (number - 1)) & 1 == 1
    };
    let mut contents = BTreeMap::new();
    for (id, inode) in &medium.inodes {
        let mut content = inode.durable.clone();
        for change in &inode.changes {
            if is_kept() {
                content.apply(&change.edit);
            }
        }
        content.pages.truncate(content.length);
        contents.insert(*id, content);
    }
    let mut names = medium.durable_names.clone();
    let mut lost: Vec<&NameChange> = Vec::new();
    for change in &medium.name_changes {
        if is_kept() && !lost.iter().any(|lost| share_names(lost, change)) {
            apply_names(&mut names, change);
        } else {
            lost.push(change);
        }
    }
    contents.retain(|id, _| names.values().any(|named| named == id));
    let inode = |content: Content| Inode {
        live: content.clone(),
        durable: content,
        changes: Vec::new(),
        users: 0,
    };
    Medium {
        inodes: contents
            .into_iter()
            .map(|(id, content)| (id, inode(content)))
            .collect(),
        durable_names: names.clone(),
        names,
        name_changes: Vec::new(),
        next_number: medium.next_number,
        next_inode: medium.next_inode,
    }
}
