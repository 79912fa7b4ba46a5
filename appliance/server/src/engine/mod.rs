//! The engine thread: log, seed engine and storage on one side, commands of the rest of the
//! daemon on the other. Everything else in the daemon talks to it through [`EngineHandle`].

mod answer;
mod branches;
pub mod command;
mod dispatch;
mod files;
mod inbox;
mod policy;
mod space;
mod start;
mod thread;

use afterimage_blockdev::{Storage, StorageOp, StorageOutcome, wait};

pub use command::{
    BranchOpened, Command, DiskOpened, DiskSummary, EngineGone, EngineHandle, EngineStatus,
    HistorySummary, MachineSummary, OpenDisk, OpenRequest, PointListing, PointPage, PointsWanted,
    ReopenRequest, StreamEvents, StreamKey, StreamOpened, ViewOpened, ViewRequest,
};
pub use files::{Cut, FileCommand, StoreFiles};
pub use space::SpaceFigures;
pub use start::{EngineSettings, start};

/// All bytes and free bytes of the file system that has less of them free, that of the log or that
/// of the segments; zeroes when neither says.
fn room(storage: &dyn Storage) -> (u64, u64) {
    let room_of = |directory: &str| {
        let directory = directory.to_owned();
        match wait::storage(storage, StorageOp::Capacity { directory }) {
            Ok(StorageOutcome::Capacity(room)) => Some((room.total_bytes, room.free_bytes)),
            _ => None,
        }
    };
    let rooms = ["log", "segments"].into_iter().filter_map(room_of);
    rooms.min_by_key(|(_, free)| *free).unwrap_or((0, 0))
}
