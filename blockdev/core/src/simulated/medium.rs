//! The files of a simulated medium: what they hold now, and what is sure to survive.
//!
//! Always true:
//! * `durable` of an inode is what all syncs so far promised; the present content is `durable`
//!   with `changes` applied in order, but for doomed changes that a later sync dropped.
//! * The same holds for `durable_names`, `name_changes` and `names`.
//! * An inode exists as long as a name, a durable name, a name change or a user refers to it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use crate::buffer::IoBuffer;
use crate::convert::to_usize;
use crate::pages::{PAGE_BYTES, Page, Pages};
use crate::random::Random;
use crate::size::BLOCK_BYTES;
use crate::storage::{FileName, StorageErrorKind};

/// Bytes and length of a file.
#[derive(Clone, Default)]
pub(super) struct Content {
    pub(super) pages: Pages,
    pub(super) length: u64,
}

/// What one operation did to a file.
#[derive(Clone)]
pub(super) enum Edit {
    /// Whole pages, the first at an index.
    Write { index: u64, pages: Vec<Arc<Page>> },
    /// The length was set.
    SetLength { length: u64 },
}

impl Edit {
    pub(super) fn write(offset: u64, bytes: &[u8]) -> Self {
        let page_of = |part: &[u8]| {
            let mut page = [0; BLOCK_BYTES];
            page[..part.len()].copy_from_slice(part);
            Arc::new(page)
        };
        let pages = bytes.chunks(BLOCK_BYTES).map(page_of).collect();
        Self::Write {
            index: offset / PAGE_BYTES,
            pages,
        }
    }

    /// Length of a file that had `before`.
    pub(super) fn length_after(&self, before: u64) -> u64 {
        match self {
            Self::Write { pages, .. } if pages.is_empty() => before,
            Self::Write { index, pages } => before.max((index + pages.len() as u64) * PAGE_BYTES),
            Self::SetLength { length } => *length,
        }
    }
}

impl Content {
    pub(super) fn apply(&mut self, edit: &Edit) {
        match edit {
            Edit::Write { index, pages } => {
                for (index, page) in (*index..).zip(pages) {
                    self.pages.put(index, Arc::clone(page));
                }
            }
            Edit::SetLength { length } => self.pages.truncate(*length),
        }
        self.length = edit.length_after(self.length);
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(self.length)];
        self.pages.read(0, &mut bytes);
        bytes
    }
}

/// An edit that no sync has promised yet.
#[derive(Clone)]
pub(super) struct Change {
    pub(super) number: u64,
    pub(super) edit: Edit,
    /// A sync that covered it failed: its pages count as clean, and need not be on the medium.
    pub(super) is_doomed: bool,
}

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) live: Content,
    pub(super) durable: Content,
    pub(super) changes: Vec<Change>,
    /// Open files and waiting operations.
    pub(super) users: u64,
}

/// One step of a directory.
#[derive(Clone)]
pub(super) struct NameChange {
    pub(super) number: u64,
    pub(super) directory: String,
    /// What each name stands for afterwards.
    pub(super) entries: Vec<(FileName, Option<u64>)>,
}

pub(super) type Names = BTreeMap<FileName, u64>;

pub(super) fn apply_names(names: &mut Names, change: &NameChange) {
    for (name, inode) in &change.entries {
        match inode {
            Some(inode) => names.insert(name.clone(), *inode),
            None => names.remove(name),
        };
    }
}

#[derive(Clone, Default)]
pub(super) struct Medium {
    pub(super) inodes: BTreeMap<u64, Inode>,
    pub(super) names: Names,
    pub(super) durable_names: Names,
    pub(super) name_changes: Vec<NameChange>,
    /// Number of the next change; what is below at a sync's submission is covered by it.
    pub(super) next_number: u64,
    pub(super) next_inode: u64,
}

impl Medium {
    pub(super) fn inode(&mut self, id: u64) -> &mut Inode {
        self.inodes
            .get_mut(&id)
            .expect("an inode lives as long as it has users")
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number - 1
    }

    fn change_names(&mut self, directory: &str, entries: Vec<(FileName, Option<u64>)>) {
        let number = self.number();
        let change = NameChange {
            number,
            directory: directory.to_owned(),
            entries,
        };
        apply_names(&mut self.names, &change);
        self.name_changes.push(change);
        self.collect();
    }

    pub(super) fn create(&mut self, name: &FileName) -> Result<u64, StorageErrorKind> {
        if self.names.contains_key(name) {
            return Err(StorageErrorKind::Exists);
        }
        self.next_inode += 1;
        let id = self.next_inode;
        self.inodes.insert(id, Inode::default());
        self.change_names(name.directory(), vec![(name.clone(), Some(id))]);
        Ok(id)
    }

    pub(super) fn find(&self, name: &FileName) -> Result<u64, StorageErrorKind> {
        self.names
            .get(name)
            .copied()
            .ok_or(StorageErrorKind::NotFound)
    }

    pub(super) fn rename(
        &mut self,
        from: &FileName,
        to: &FileName,
    ) -> Result<(), StorageErrorKind> {
        let id = self.find(from)?;
        if from != to {
            self.change_names(
                from.directory(),
                vec![(from.clone(), None), (to.clone(), Some(id))],
            );
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &FileName) -> Result<(), StorageErrorKind> {
        self.find(name)?;
        self.change_names(name.directory(), vec![(name.clone(), None)]);
        Ok(())
    }

    pub(super) fn read(&mut self, id: u64, offset: u64, buffer: &mut IoBuffer) {
        let live = &self.inode(id).live;
        let left = live.length.saturating_sub(offset);
        buffer.set_len(to_usize(left.min(buffer.len() as u64)));
        live.pages.read(offset, buffer);
    }

    pub(super) fn edit(&mut self, id: u64, edit: Edit) {
        let number = self.number();
        let inode = self.inode(id);
        inode.live.apply(&edit);
        inode.changes.push(Change {
            number,
            edit,
            is_doomed: false,
        });
    }

    /// Makes what was changed before `number` durable, but for doomed changes that chance drops.
    pub(super) fn sync(&mut self, id: u64, number: u64, random: &mut Random) {
        let inode = self.inode(id);
        let later = inode
            .changes
            .iter()
            .position(|change| change.number >= number);
        let count = later.unwrap_or(inode.changes.len());
        for change in inode.changes.drain(..count) {
            if !change.is_doomed || random.chance(0.5) {
                inode.durable.apply(&change.edit);
            }
        }
    }

    /// Fails to make what was changed before `number` durable.
    pub(super) fn fail_sync(&mut self, id: u64, number: u64) {
        for change in &mut self.inode(id).changes {
            change.is_doomed |= change.number < number;
        }
    }

    pub(super) fn sync_directory(&mut self, directory: &str, number: u64) {
        let durable = &mut self.durable_names;
        self.name_changes.retain(|change| {
            let is_covered = change.directory == directory && change.number < number;
            if is_covered {
                apply_names(durable, change);
            }
            !is_covered
        });
        self.collect();
    }

    /// Bytes of all files that have a name or a user.
    pub(super) fn used_bytes(&self) -> u64 {
        let named: BTreeSet<_> = self.names.values().copied().collect();
        let is_used = |(id, inode): &(&u64, &Inode)| inode.users > 0 || named.contains(*id);
        let count: u64 = self
            .inodes
            .iter()
            .filter(is_used)
            .map(|(_, i)| i.live.pages.count())
            .sum();
        count * PAGE_BYTES
    }

    /// Says whether so many more bytes fit.
    pub(super) fn has_room(&self, bytes: u64, capacity_bytes: u64) -> bool {
        let count: u64 = self
            .inodes
            .values()
            .map(|inode| inode.live.pages.count())
            .sum();
        // Counting all inodes, forgotten names too, is quicker and mostly enough.
        count * PAGE_BYTES + bytes <= capacity_bytes || self.used_bytes() + bytes <= capacity_bytes
    }

    /// Ends one use of an inode.
    pub(super) fn release(&mut self, id: u64) {
        let inode = self.inode(id);
        inode.users -= 1;
        if inode.users == 0 {
            self.collect();
        }
    }

    /// Forgets inodes that nothing refers to.
    fn collect(&mut self) {
        let changed = self.name_changes.iter().flat_map(|change| &change.entries);
        let named: BTreeSet<u64> = self
            .names
            .values()
            .chain(self.durable_names.values())
            .copied()
            .chain(changed.filter_map(|(_, inode)| *inode))
            .collect();
        self.inodes
            .retain(|id, inode| inode.users > 0 || named.contains(id));
    }
}

/// The error of a failing medium.
pub(super) fn medium_error() -> StorageErrorKind {
    StorageErrorKind::Io(io::Error::from_raw_os_error(libc::EIO))
}
