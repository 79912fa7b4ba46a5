//! What a power cut leaves.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fault::{Counters, count};
use super::medium::{Change, Content, Edit, Inode, Medium, NameChange, Names, apply_names};
use crate::convert::to_usize;
use crate::pages::Page;
use crate::random::Random;
use crate::size::BLOCK_BYTES;
use crate::storage::FileName;

/// Smallest piece of a write that survives or not on its own, in bytes.
const SECTOR_BYTES: usize = 512;

/// What becomes of one write that no sync covered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Lost,
    /// Each sector on its own.
    TornSectors,
    /// Each page on its own.
    TornPages,
    /// The pages are there, with the content of the last later overwrite, whatever became of that.
    Late,
}

/// Makes the medium that comes up after a power cut of `medium`.
pub(super) fn cut(medium: &Medium, random: &mut Random, counters: &mut Counters) -> Medium {
    let names = surviving_names(medium, random, counters);
    let mut inodes = BTreeMap::new();
    for (id, inode) in &medium.inodes {
        // Chance is drawn for each, so that one file's fate does not hang on another's name.
        let mut random = random.fork();
        if names.values().any(|named| named == id) {
            let durable = surviving_content(inode, &mut random, counters);
            let live = durable.clone();
            inodes.insert(
                *id,
                Inode {
                    live,
                    durable,
                    changes: Vec::new(),
                    users: 0,
                },
            );
        }
    }
    let durable_names = names.clone();
    Medium {
        inodes,
        names,
        durable_names,
        name_changes: Vec::new(),
        next_number: medium.next_number,
        next_inode: medium.next_inode,
    }
}

/// Name changes survive directory by directory: none, all, the first few, or any that do not
/// build on a lost one.
fn surviving_names(medium: &Medium, random: &mut Random, counters: &mut Counters) -> Names {
    let mut names = medium.durable_names.clone();
    let mut directories: BTreeMap<&str, Vec<&NameChange>> = BTreeMap::new();
    for change in &medium.name_changes {
        directories
            .entry(&change.directory)
            .or_default()
            .push(change);
    }
    for changes in directories.values() {
        let first_lost = match random.below(4) {
            0 => 0,
            1 => changes.len(),
            _ => random.index(changes.len() + 1),
        };
        let is_journaled = random.chance(0.75);
        let mut lost: Vec<&NameChange> = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let is_kept = if is_journaled {
                index < first_lost
            } else {
                random.chance(0.5) && !lost.iter().any(|lost| share_names(lost, change))
            };
            if is_kept {
                apply_names(&mut names, change);
                count(counters, "name-kept");
            } else {
                lost.push(change);
                count(counters, "name-lost");
            }
        }
    }
    names
}

pub(super) fn share_names(a: &NameChange, b: &NameChange) -> bool {
    let name_of = |(name, _): &(FileName, Option<u64>)| name.clone();
    a.entries
        .iter()
        .map(name_of)
        .any(|name| b.entries.iter().any(|(other, _)| *other == name))
}

fn surviving_content(inode: &Inode, random: &mut Random, counters: &mut Counters) -> Content {
    let mut content = inode.durable.clone();
    if inode.changes.is_empty() {
        return content;
    }
    let fates = choose_fates(&inode.changes, random, counters);
    let is_length_kept = random.chance(0.5);
    for (index, change) in inode.changes.iter().enumerate() {
        let before = content.length;
        match &change.edit {
            Edit::SetLength { .. } if fates[index] == Fate::Lost => {}
            Edit::SetLength { .. } => content.apply(&change.edit),
            Edit::Write { .. } => {
                let later = &inode.changes[index + 1..];
                write_part(&mut content, &change.edit, fates[index], later, random);
                if fates[index] == Fate::Lost {
                    continue;
                }
                content.length = change.edit.length_after(before);
                if content.length > before && !is_length_kept {
                    content.length = before;
                    count(counters, "length-lost");
                }
            }
        }
    }
    content.pages.truncate(content.length);
    content
}

fn choose_fates(changes: &[Change], random: &mut Random, counters: &mut Counters) -> Vec<Fate> {
    let mood = random.below(6);
    let mut fates = Vec::with_capacity(changes.len());
    for (index, change) in changes.iter().enumerate() {
        let fate = match (mood, random.below(6)) {
            (0, _) | (2.., 0 | 1) => Fate::Lost,
            (1, _) | (_, 2) => Fate::Kept,
            (_, 3) => Fate::TornSectors,
            (_, 4) => Fate::TornPages,
            _ if changes[index + 1..]
                .iter()
                .any(|later| overlap(&change.edit, &later.edit)) =>
            {
                Fate::Late
            }
            _ => Fate::Kept,
        };
        count(counters, event_of(fate));
        if fate != Fate::Lost && fates.last() == Some(&Fate::Lost) {
            count(counters, "write-reordered");
        }
        fates.push(fate);
    }
    fates
}

fn event_of(fate: Fate) -> &'static str {
    match fate {
        Fate::Kept => "write-kept",
        Fate::Lost => "write-lost",
        Fate::TornSectors => "write-torn-512",
        Fate::TornPages => "write-torn-4096",
        Fate::Late => "write-late",
    }
}

/// The page that a write puts at an index, if it does.
fn page_at(edit: &Edit, wanted: u64) -> Option<&Arc<Page>> {
    let Edit::Write { index, pages } = edit else {
        return None;
    };
    pages.get(to_usize(wanted.checked_sub(*index)?))
}

fn overlap(a: &Edit, b: &Edit) -> bool {
    let Edit::Write { index, pages } = a else {
        return false;
    };
    (*index..)
        .zip(pages)
        .any(|(index, _)| page_at(b, index).is_some())
}

fn write_part(
    content: &mut Content,
    edit: &Edit,
    fate: Fate,
    later: &[Change],
    random: &mut Random,
) {
    let Edit::Write { index, pages } = edit else {
        return;
    };
    for (index, page) in (*index..).zip(pages) {
        match fate {
            Fate::Lost => {}
            Fate::Kept => content.pages.put(index, Arc::clone(page)),
            Fate::TornPages => {
                if random.chance(0.5) {
                    content.pages.put(index, Arc::clone(page));
                }
            }
            Fate::TornSectors => tear(content, index, page, random),
            Fate::Late => {
                let last = later
                    .iter()
                    .rev()
                    .find_map(|change| page_at(&change.edit, index));
                content.pages.put(index, Arc::clone(last.unwrap_or(page)));
            }
        }
    }
}

fn tear(content: &mut Content, index: u64, page: &Page, random: &mut Random) {
    let kept = random.next_u64();
    for (sector, bytes) in page.chunks(SECTOR_BYTES).enumerate() {
        if (kept >> sector) & 1 == 1 {
            let offset = index * BLOCK_BYTES as u64 + (sector * SECTOR_BYTES) as u64;
            content.pages.write(offset, bytes);
        }
    }
}
