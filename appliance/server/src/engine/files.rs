//! What the scrub asks of the engine: which files count, and that one of them stays.

use std::sync::Arc;

use afterimage_blockdev::{HistoryId, Lsn, Storage, StoreId};
use afterimage_seed::engine::StoreFile;
use afterimage_seed::{Request, Response};

use super::command::Reply;
use super::thread::{EngineThread, files_of};

/// A point: its name, and what it shows.
pub type Cut = (String, HistoryId, Lsn);

/// The files that count.
pub struct StoreFiles {
    /// The store.
    pub store: StoreId,
    /// Its files; the manifest comes first.
    pub files: Vec<StoreFile>,
    /// Where they are.
    pub storage: Arc<dyn Storage>,
}

/// What is asked about files.
pub enum FileCommand {
    /// Lists the files that count.
    List(Reply<StoreFiles>),
    /// Keeps files from being removed until the answer is dropped; `None` when this one does not
    /// count any more.
    Pin(StoreFile, Reply<Option<Arc<()>>>),
    /// Lists all points.
    Cuts(Reply<Vec<Cut>>),
    /// Bytes that were received and wait to be written.
    Queued(Reply<u64>),
}

impl EngineThread {
    pub(super) fn files(&mut self, command: FileCommand) {
        match command {
            FileCommand::List(reply) => self.with_files(move |thread, files| {
                let listed = StoreFiles {
                    store: thread.engine.store(),
                    files,
                    storage: Arc::clone(&thread.storage) as Arc<dyn Storage>,
                };
                let _gone = reply.send(listed);
            }),
            FileCommand::Pin(file, reply) => self.with_files(move |thread, files| {
                let is_named = files.contains(&file);
                let _gone = reply.send(is_named.then(|| thread.engine.pin_files()));
            }),
            FileCommand::Cuts(reply) => {
                let _gone = reply.send(self.engine.cuts());
            }
            FileCommand::Queued(reply) => {
                let _gone = reply.send(self.engine.queued_bytes());
            }
        }
    }

    fn with_files(&mut self, then: impl FnOnce(&mut Self, Vec<StoreFile>) + Send + 'static) {
        self.ask(
            Request::Files,
            Box::new(move |thread, result| {
                if let Ok(response @ Response::Files(_)) = result {
                    then(thread, files_of(response));
                }
            }),
        );
    }
}
