//! The engine thread: log, seed engine and storage on one side, commands of the rest of the
//! daemon on the other. Everything else in the daemon talks to it through [`EngineHandle`].

pub mod command;

pub use command::{
    BranchOpened, Command, DiskOpened, DiskSummary, EngineGone, EngineHandle, EngineStatus,
    HistorySummary, MachineSummary, OpenDisk, OpenRequest, PointPage, StreamEvents, StreamKey,
    StreamOpened, ViewOpened, ViewRequest,
};
