//! The appliance: ingest, control, mounts, and the engine thread behind them.

pub mod engine;
