//! Which seeds there are, and which disks they are used for.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::{
    BLOCK_BYTES, BatchId, DiskId, ErrorClass, HistoryId, KeyId, Lsn, MachineId,
};
use afterimage_bulk::archive::archive_state;
use afterimage_bulk::{ArchiveReader, BlockSource, BulkError, Secret};
use afterimage_cache::{DiskKey, Frame, RecordBody, RecordKind, TagKey};
use afterimage_protocol::message::{DiskDescription, DiskPhase, DiskReport};
use afterimage_protocol::receiver::StreamIdentity;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::seed::{Seed, SeedPlace};
use parking_lot::Mutex;

use crate::appliance::api_error;
use crate::engine::DiskOpened;

const KEY_CONTEXT: &str = "afterimage 2026-11 seed of a first copy v1";
const NAME_BYTES_MAX: usize = 128;

/// A seed that is whole.
pub(super) struct Ready {
    pub(super) reader: ArchiveReader,
    pub(super) taken_bytes: AtomicU64,
}

/// The batch of a source that a block may be taken for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Begun {
    pub(super) history: HistoryId,
    pub(super) batch: BatchId,
    pub(super) lsn: Lsn,
}

/// A disk that is being seeded.
#[derive(Clone)]
pub(super) struct Active {
    pub(super) ready: Arc<Ready>,
    pub(super) key: DiskKey,
    pub(super) tag_key: TagKey,
    pub(super) begun: Option<Begun>,
    name: Name,
}

/// Names of a machine and of its disk.
type Name = (String, String);

#[derive(Default)]
struct State {
    ready: HashMap<Name, Arc<Ready>>,
    /// Machines whose stream was opened: one entry for each, however often it connects.
    machines: HashMap<MachineId, (String, TagKey)>,
    active: HashMap<(MachineId, DiskId), Active>,
}

/// See the module's text.
#[derive(Default)]
pub struct Seeds {
    root: PathBuf,
    store_key: [u8; 32],
    state: Mutex<State>,
}

fn bulk_error(error: &BulkError) -> ApiError {
    api_error(error.class(), error.to_string(), error.hint())
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let is_legal = (1..=NAME_BYTES_MAX).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && !name
            .chars()
            .any(|c| c.is_control() || matches!(c, '/' | '@'));
    if is_legal {
        return Ok(());
    }
    Err(api_error(
        ErrorClass::Refused,
        format!("{name:?} cannot be a name"),
        "write the disk as <machine>/<disk>",
    ))
}

impl Seeds {
    /// Finds the seeds below a data directory.
    ///
    /// # Errors
    /// When the directory or the key of the store cannot be read.
    pub fn open(data_dir: &Path) -> Result<Self, ApiError> {
        let failed = |error: io::Error| {
            let message = format!("cannot read the seeds of {}: {error}", data_dir.display());
            api_error(ErrorClass::Operator, message, "")
        };
        let key = fs::read(data_dir.join("store.key")).map_err(failed)?;
        let seeds = Self {
            root: data_dir.join("seeds"),
            store_key: blake3::derive_key(KEY_CONTEXT, &key),
            state: Mutex::default(),
        };
        for name in seeds.names().map_err(failed)? {
            match seeds.ready(&name.0, &name.1) {
                Ok(_) => {}
                // It stays in the list, to be finished or dropped.
                Err(error) => {
                    tracing::warn!(machine = name.0, disk = name.1, %error, "a seed is not used");
                }
            }
        }
        Ok(seeds)
    }

    fn directory(&self, machine: &str, disk: &str) -> PathBuf {
        self.root.join(machine).join(disk)
    }

    fn key(&self, machine: &str, disk: &str) -> [u8; 32] {
        let name = format!("{machine}/{disk}");
        *blake3::keyed_hash(&self.store_key, name.as_bytes()).as_bytes()
    }

    fn names(&self) -> io::Result<Vec<Name>> {
        let list = |path: &Path| -> io::Result<Vec<String>> {
            match fs::read_dir(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                entries => entries?
                    .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                    .collect(),
            }
        };
        let mut names = Vec::new();
        for machine in list(&self.root)? {
            for disk in list(&self.root.join(&machine))? {
                names.push((machine.clone(), disk));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Prepares a place.
    ///
    /// # Errors
    /// When a name is none, or the directory cannot be made.
    pub fn place(&self, machine: &str, disk: &str) -> Result<SeedPlace, ApiError> {
        check_name(machine)?;
        check_name(disk)?;
        let directory = self.directory(machine, disk);
        fs::create_dir_all(&directory).map_err(|error| {
            let message = format!("cannot make {}: {error}", directory.display());
            api_error(ErrorClass::Operator, message, "")
        })?;
        let key = self.key(machine, disk);
        Ok(SeedPlace {
            directory: directory.display().to_string(),
            key: key.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// Takes a whole archive up.
    ///
    /// # Errors
    /// When it is not whole, or does not verify.
    pub fn ready(&self, machine: &str, disk: &str) -> Result<Seed, ApiError> {
        check_name(machine)?;
        check_name(disk)?;
        let secret = Secret::Key(self.key(machine, disk).to_vec());
        let reader = ArchiveReader::open(&self.directory(machine, disk), Some(&secret));
        let reader = reader.map_err(|error| bulk_error(&error))?;
        let ready = Arc::new(Ready {
            reader,
            taken_bytes: AtomicU64::new(0),
        });
        let name = (machine.to_owned(), disk.to_owned());
        let seed = describe(&name, &ready);
        self.state.lock().ready.insert(name, ready);
        Ok(seed)
    }

    /// Lists the seeds, whole or not.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Seed>, ApiError> {
        let failed = |error: io::Error| {
            let message = format!("cannot list {}: {error}", self.root.display());
            api_error(ErrorClass::Operator, message, "")
        };
        let names = self.names().map_err(failed)?;
        let list = names.into_iter().map(|name| {
            let ready = self.state.lock().ready.get(&name).cloned();
            match ready {
                Some(ready) => describe(&name, &ready),
                None => unfinished(&self.directory(&name.0, &name.1), name),
            }
        });
        Ok(list.collect())
    }

    /// Drops a seed.
    ///
    /// # Errors
    /// When there is none, or it cannot be removed.
    pub fn drop_seed(&self, machine: &str, disk: &str) -> Result<(), ApiError> {
        check_name(machine)?;
        check_name(disk)?;
        let name = (machine.to_owned(), disk.to_owned());
        {
            let mut state = self.state.lock();
            state.ready.remove(&name);
            state.active.retain(|_, active| active.name != name);
        }
        let directory = self.directory(machine, disk);
        match fs::remove_dir_all(&directory) {
            Ok(()) => {
                // Only an empty one goes, which is what is meant.
                let _others = fs::remove_dir(self.root.join(machine));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(api_error(
                ErrorClass::Refused,
                format!("there is no seed of {machine}/{disk}"),
                "`aft seed list` lists them",
            )),
            Err(error) => Err(api_error(
                ErrorClass::Operator,
                format!("cannot remove {}: {error}", directory.display()),
                "",
            )),
        }
    }

    /// A stream was opened.
    pub(crate) fn opened(&self, machine: MachineId, name: &str, tag_key: [u8; 32]) {
        let known = (name.to_owned(), TagKey(tag_key));
        self.state.lock().machines.insert(machine, known);
    }

    /// A disk was declared. Gives the blocks that its source should compare before it sends them,
    /// if there is a seed.
    pub(crate) fn declared(
        &self,
        machine: MachineId,
        description: &DiskDescription,
        opened: &DiskOpened,
    ) -> Option<Vec<(u64, u64)>> {
        let mut state = self.state.lock();
        let (machine_name, tag_key) = state.machines.get(&machine)?.clone();
        let name = (machine_name, description.name.clone());
        let ready = Arc::clone(state.ready.get(&name)?);
        if opened.has_copy {
            return None;
        }
        let begun = state
            .active
            .get(&(machine, description.disk))
            .and_then(|active| active.begun);
        let active = Active {
            key: DiskKey {
                id: KeyId(opened.key),
                secret: opened.secret,
            },
            tag_key,
            begun,
            name,
            ready,
        };
        let size = active.ready.reader.size_bytes().min(description.size_bytes);
        state.active.insert((machine, description.disk), active);
        Some(vec![(0, size / BLOCK_BYTES as u64)])
    }

    /// A frame was received: it may begin a batch.
    pub(crate) fn received(&self, identity: StreamIdentity, frame: &Frame) {
        let mut state = self.state.lock();
        let machine = identity.machine;
        if !state.active.keys().any(|(known, _)| *known == machine) {
            return;
        }
        for (_, record) in frame.view().records().map_while(Result::ok) {
            let header = record.header;
            let (RecordKind::BatchBegin(_), RecordBody::Note(note)) = (header.kind, record.body)
            else {
                continue;
            };
            for id in note.as_chunks::<16>().0 {
                let Some(active) = state.active.get_mut(&(machine, DiskId(*id))) else {
                    continue;
                };
                let is_newer = active.begun.is_none_or(|begun| {
                    begun.history != identity.history || begun.lsn < header.lsn
                });
                if is_newer {
                    active.begun = Some(Begun {
                        history: identity.history,
                        batch: header.batch,
                        lsn: header.lsn,
                    });
                }
            }
        }
    }

    /// Says whether a disk is being seeded.
    pub(crate) fn is_active(&self, machine: MachineId, disk: DiskId) -> bool {
        self.state.lock().active.contains_key(&(machine, disk))
    }

    /// What is known of a disk that is being seeded.
    pub(super) fn active(&self, machine: MachineId, disk: DiskId) -> Option<Active> {
        self.state.lock().active.get(&(machine, disk)).cloned()
    }

    /// Gives the seeds that served, and how many bytes were taken from each: their disks have a
    /// whole copy now.
    pub(crate) fn served(&self, machine: MachineId, disks: &[DiskReport]) -> Vec<(Name, u64)> {
        let mut state = self.state.lock();
        if state.active.is_empty() {
            return Vec::new();
        }
        let done = disks
            .iter()
            .filter(|disk| disk.phase == DiskPhase::Protected);
        done.filter_map(|disk| state.active.remove(&(machine, disk.disk)))
            .map(|active| {
                let taken = active.ready.taken_bytes.load(Ordering::Relaxed);
                (active.name, taken)
            })
            .collect()
    }
}

fn describe(name: &Name, ready: &Ready) -> Seed {
    Seed {
        machine: name.0.clone(),
        disk: name.1.clone(),
        source: ready.reader.identity().to_owned(),
        size_bytes: ready.reader.size_bytes(),
        is_ready: true,
        taken_bytes: ready.taken_bytes.load(Ordering::Relaxed),
    }
}

fn unfinished(directory: &Path, name: Name) -> Seed {
    // What cannot be read is shown as what it is: nothing yet.
    let source = archive_state(directory).ok().flatten();
    Seed {
        machine: name.0,
        disk: name.1,
        source: source.map_or(String::new(), |state| state.identity),
        size_bytes: 0,
        is_ready: false,
        taken_bytes: 0,
    }
}
