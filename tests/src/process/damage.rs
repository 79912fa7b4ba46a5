//! Damages a store at rest, one kind at a time, and puts it right again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a sector of the store's files.
const SECTOR: u64 = 4096;

/// A kind of damage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The key of the store is another one.
    WrongKey,
    /// The key of the store is not there.
    NoKey,
    /// There is no manifest.
    NoManifest,
    /// One of the two copies of the manifest's first commit.
    ManifestCopy,
    /// Both copies of the manifest's first commit.
    ManifestCommit,
    /// A file is not there.
    Missing(Room),
    /// A file ends too early.
    Short(Room),
    /// The first sector of a file.
    Header(Room),
    /// What a file is for: a slot, or a page of a map.
    Content(Room),
    /// The table of what is in a file.
    Directory(Room),
    /// The last sector of a file.
    Footer(Room),
}

/// A directory of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// The log.
    Log,
    /// Seed segments.
    Segments,
    /// Runs.
    Runs,
}

impl Room {
    fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Segments => "segments",
            Self::Runs => "runs",
        }
    }
}

impl Kind {
    /// All kinds.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut all = vec![
            Self::WrongKey,
            Self::NoKey,
            Self::NoManifest,
            Self::ManifestCopy,
            Self::ManifestCommit,
        ];
        for room in [Room::Log, Room::Segments, Room::Runs] {
            all.extend([
                Self::Missing(room),
                Self::Header(room),
                Self::Content(room),
                Self::Directory(room),
                Self::Footer(room),
            ]);
        }
        // A log segment that is not sealed has any length.
        all.extend([Self::Short(Room::Segments), Self::Short(Room::Runs)]);
        all
    }

    /// Says whether it can be seen without reading every byte.
    #[must_use]
    pub fn is_seen_by_check(self) -> bool {
        !matches!(self, Self::Content(_))
    }
}

/// A store that is damaged as long as this lives.
#[derive(Debug)]
pub struct Damaged {
    /// The file that must be named, below the data directory.
    pub named: String,
    path: PathBuf,
    before: Vec<u8>,
}

impl Damaged {
    /// Damages the store in a data directory that nobody uses.
    ///
    /// # Panics
    /// When it has no such file.
    #[must_use]
    pub fn new(data_dir: &Path, kind: Kind) -> Self {
        let (file, named) = target(data_dir, kind);
        let path = data_dir.join(&file);
        let before = fs::read(&path).expect("the file to damage");
        match kind {
            Kind::NoKey | Kind::NoManifest | Kind::Missing(_) => {
                fs::remove_file(&path).expect("a removal");
            }
            Kind::Short(_) => {
                let file = File::options().write(true).open(&path).expect("the file");
                let length = u64::try_from(before.len()).expect("a length");
                file.set_len(length - SECTOR).expect("a length");
            }
            Kind::ManifestCommit => {
                flip_commit(&path, 0);
            }
            _ => flip(&path, &[place(kind, &before)]),
        }
        Self {
            named,
            path,
            before,
        }
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).expect("the file as it was");
    }
}

/// Damages both copies of a manifest's commit.
///
/// # Panics
/// When it cannot be written.
pub fn flip_commit(path: &Path, offset: u64) {
    let bytes = fs::read(path).expect("a manifest");
    let at = usize::try_from(offset).expect("an offset");
    let length = commit_bytes(&bytes[at..]);
    flip(path, &[offset + 40, offset + length + 40]);
}

/// Bytes of the commit at the beginning, without its copy.
fn commit_bytes(manifest: &[u8]) -> u64 {
    let content = u32::from_le_bytes(manifest[12..16].try_into().expect("four bytes"));
    (128 + u64::from(content)).next_multiple_of(SECTOR)
}

/// The file to damage, and the one that must be named.
fn target(data_dir: &Path, kind: Kind) -> (String, String) {
    let same = |file: String| (file.clone(), file);
    let room = match kind {
        Kind::WrongKey | Kind::NoKey => return same("store.key".to_owned()),
        Kind::NoManifest => {
            let file = files(data_dir, "manifest").pop().expect("a manifest");
            return (file, "manifest".to_owned());
        }
        Kind::ManifestCopy | Kind::ManifestCommit => {
            return same(files(data_dir, "manifest").pop().expect("a manifest"));
        }
        Kind::Missing(room)
        | Kind::Short(room)
        | Kind::Header(room)
        | Kind::Content(room)
        | Kind::Directory(room)
        | Kind::Footer(room) => room,
    };
    let found = files(data_dir, room.name());
    if kind == Kind::Missing(Room::Log) {
        // Nothing names it: the one behind it tells that it is not there.
        return (found[1].clone(), found[2].clone());
    }
    same(found[0].clone())
}

/// Files of a directory, oldest first.
#[must_use]
pub fn files(data_dir: &Path, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(data_dir.join(directory)).expect("a directory");
    let name = |entry: fs::DirEntry| entry.file_name().into_string().expect("a name");
    let mut names: Vec<_> = entries
        .map(|entry| format!("{directory}/{}", name(entry.expect("an entry"))))
        .collect();
    names.sort();
    names
}

/// Where a byte of a part lies.
fn place(kind: Kind, bytes: &[u8]) -> u64 {
    let length = u64::try_from(bytes.len()).expect("a length");
    let u64_at = |at: u64| {
        let at = usize::try_from(at).expect("an offset");
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    match kind {
        Kind::Content(Room::Runs) => SECTOR + 100,
        Kind::Content(_) => SECTOR + 2000,
        // Where the footer says that the table begins.
        Kind::Directory(Room::Log) => u64_at(length - SECTOR + 160) + 2,
        Kind::Directory(Room::Segments) => u64_at(length - SECTOR + 48) + 2,
        Kind::Directory(_) => u64_at(length - SECTOR + 40) + 2,
        Kind::Footer(_) => length - SECTOR + 50,
        _ => 20,
    }
}

/// Flips bits of a file in place.
///
/// # Panics
/// When it cannot be written.
pub fn flip(path: &Path, offsets: &[u64]) {
    let hurt = File::options().read(true).write(true).open(path);
    let hurt = hurt.expect("the file");
    for offset in offsets {
        let mut byte = [0];
        hurt.read_exact_at(&mut byte, *offset).expect("a byte");
        let write = hurt.write_all_at(&[byte[0] ^ 0x10], *offset);
        write.expect("a flipped byte");
    }
    hurt.sync_all().expect("a sync");
}
