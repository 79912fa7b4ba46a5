//! What a server shows, and to whom.

use core::future::Future;
use core::pin::Pin;
use std::net::SocketAddr;
use std::sync::Arc;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockOp, BlockOutcome, ExtentKind,
    Token,
};

use crate::number::{option_reply, state};
use crate::option::OptionError;

/// An answer that may take its time.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send + 'a>>;

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Where from; `None` for a Unix socket.
    pub address: Option<SocketAddr>,
    /// Their certificate (DER), as TLS has verified it.
    pub certificate: Option<Vec<u8>>,
}

/// Why somebody does not get what they ask for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is none, or not for them: the two are not told apart.
    #[error("{0}")]
    Unknown(String),
    /// They may not ask at all.
    #[error("{0}")]
    NotAllowed(String),
    /// Later perhaps.
    #[error("{0}")]
    Unavailable(String),
}

impl From<Refusal> for OptionError {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::Unknown(_) => option_reply::ERR_UNKNOWN,
            Refusal::NotAllowed(_) => option_reply::ERR_POLICY,
            Refusal::Unavailable(_) => option_reply::ERR_SHUTDOWN,
        };
        Self::new(code, refusal.to_string())
    }
}

/// One line of a list of exports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: String,
}

/// What a server shows.
pub trait Exports: Send + Sync {
    /// Says whether a peer may ask anything. Called once, after TLS where there is TLS.
    fn admit<'a>(&'a self, peer: &'a Peer) -> Answer<'a, ()>;

    /// Lists what a peer may open; bounded.
    fn list<'a>(&'a self, peer: &'a Peer) -> Answer<'a, Vec<ListedExport>>;

    /// Opens an export, once it is known that the peer may.
    fn open<'a>(&'a self, peer: &'a Peer, name: &'a str) -> Answer<'a, Arc<Export>>;
}

/// An open disk.
pub struct Export {
    /// Its own name.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
    /// All connections that open this name see one disk, and a flush covers all of them.
    pub can_multi_conn: bool,
    /// Zeroes cost less than writing them.
    pub is_zeroing_fast: bool,
    /// Metadata contexts besides `base:allocation`.
    pub contexts: Arc<dyn Contexts>,
}

/// The further metadata contexts of an export.
pub trait Contexts: Send + Sync {
    /// Names of contexts that begin with `prefix`; bounded.
    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Vec<String>>;

    /// Opens a context; `None` when there is none of this name.
    fn open<'a>(&'a self, name: &'a str) -> Answer<'a, Option<Arc<dyn ExtentMap>>>;
}

/// No contexts.
#[derive(Clone, Copy, Debug)]
pub struct NoContexts;

impl Contexts for NoContexts {
    fn list<'a>(&'a self, _prefix: &'a str) -> Answer<'a, Vec<String>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn open<'a>(&'a self, _name: &'a str) -> Answer<'a, Option<Arc<dyn ExtentMap>>> {
        Box::pin(async { Ok(None) })
    }
}

/// A range of one state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapExtent {
    /// Number of bytes.
    pub length: u64,
    /// Numbers of [`state`].
    pub flags: u32,
}

/// Takes adjoining extents that cover what was asked, in order.
pub type MapDone = Box<dyn FnOnce(Result<Vec<MapExtent>, BlockError>) + Send>;

/// States of ranges of a disk.
pub trait ExtentMap: Send + Sync {
    /// Asks for a range within the disk; `done` is called once, on any thread.
    fn extents(&self, offset: u64, length: u64, done: MapDone);
}

/// `base:allocation` of any device.
pub struct AllocationMap(pub Arc<dyn BlockDevice>);

struct MapCompleter(parking_lot::Mutex<Option<MapDone>>);

impl BlockCompleter for MapCompleter {
    fn complete(&self, completion: BlockCompletion) {
        let Some(done) = self.0.lock().take() else {
            return;
        };
        done(completion.result.map(|outcome| {
            match outcome {
                BlockOutcome::Extents(extents) => extents
                    .iter()
                    .map(|extent| MapExtent {
                        length: extent.length,
                        flags: match extent.kind {
                            ExtentKind::Data => 0,
                            ExtentKind::Zero => state::HOLE | state::ZERO,
                        },
                    })
                    .collect(),
                _ => Vec::new(),
            }
        }));
    }
}

impl ExtentMap for AllocationMap {
    fn extents(&self, offset: u64, length: u64, done: MapDone) {
        let to = Arc::new(MapCompleter(parking_lot::Mutex::new(Some(done))));
        let op = BlockOp::Extents { offset, length };
        self.0.submit(Token(0), op, to);
    }
}
