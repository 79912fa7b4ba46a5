//! Notes: what the manifest and the map know and no other segment does, so that both can be made
//! anew from the files in `log/` and `segments/` alone.
//!
//! ```text
//! state-NNNNNNNNNN.notes       the manifest's state, laid out as a manifest file
//! rest-NNNNNNNNNN-NNN.notes    what of the map has no slot, laid out as a run
//! ```
//!
//! Invariants
//! * A file is whole and synced before it gets its name, and never changes.
//! * The newest state names the rest that belongs to it.

use afterimage_blockdev::FileName;

use crate::run::RunId;

/// Names a file of notes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NotesFile {
    /// The manifest's state, by its number.
    State(u32),
    /// What of the map has no slot: the run that it is laid out as, and the commit of the log up to
    /// which it holds all.
    Rest(RunId, u64),
}

impl NotesFile {
    /// Its name.
    #[must_use]
    pub fn name(self) -> FileName {
        match self {
            Self::State(number) => FileName::new(format!("segments/state-{number:010}.notes")),
            Self::Rest(RunId(run), through) => {
                FileName::new(format!("segments/rest-{run:010}-{through}.notes"))
            }
        }
    }

    /// Its name until it is whole.
    pub(crate) fn name_before(self) -> FileName {
        FileName::new(format!("{}.new", self.name().as_str()))
    }

    /// What a file name means, if anything.
    #[must_use]
    pub fn parse(name: &FileName) -> Option<Self> {
        let base = name.base().strip_suffix(".notes")?;
        let found = match base.split_once('-')? {
            ("state", number) => Self::State(number.parse().ok()?),
            ("rest", rest) => {
                let (run, through) = rest.split_once('-')?;
                Self::Rest(RunId(run.parse().ok()?), through.parse().ok()?)
            }
            _ => return None,
        };
        // Two names never mean one file.
        (found.name().base() == name.base()).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_one_file() {
        for file in [NotesFile::State(7), NotesFile::Rest(RunId(8), u64::MAX)] {
            assert_eq!(NotesFile::parse(&file.name()), Some(file));
            assert_eq!(NotesFile::parse(&file.name_before()), None);
        }
        for other in [
            "state-7.notes",
            "state-0000000007.seed",
            "rest-0000000008.notes",
            "rest-0000000008-01.notes",
            "state-0000000007",
        ] {
            let name = FileName::new(format!("segments/{other}"));
            assert_eq!(NotesFile::parse(&name), None, "{other}");
        }
    }
}
