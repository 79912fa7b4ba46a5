//! Copies of whole disks, and of what differs: batches, bulk blocks, comparisons.
//!
//! Invariants
//! * One batch is open at a time. It names every disk that may differ from its replica, and ends
//!   only when each of them is known to be equal but for live records.
//! * A bulk block is read under its range lock, after the highest LSN given out was noted: so it
//!   ranks below every write that came later.
//! * What was tainted before a comparison began is cleared only when the batch's end is
//!   acknowledged; what was tainted meanwhile stays.

mod copy;
pub mod outbox;
mod plan;
pub mod ranges;
mod read;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_blockdev::{BatchId, DiskId, Lsn};

use crate::machine::Machine;
pub use outbox::Outbox;

/// How long the thread sleeps at most, when nobody wakes it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A batch whose begin has its place in the order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begun {
    /// The generation of the machine's epoch that it is of.
    pub generation: u64,
    /// Its name.
    pub batch: BatchId,
    /// LSN of the record that begins it.
    pub lsn: Lsn,
    /// The disks.
    pub disks: Vec<DiskId>,
}

/// Starts the thread that copies; it ends when the agent stops.
///
/// # Errors
/// When the system gives no thread.
pub fn start(machine: &Arc<Machine>) -> std::io::Result<JoinHandle<()>> {
    let machine = Arc::clone(machine);
    std::thread::Builder::new()
        .name("replicate".to_owned())
        .spawn(move || run(&machine))
}

fn run(machine: &Arc<Machine>) {
    let mut copier = copy::Copier::new(machine);
    while !machine.is_stopping() {
        let changes = machine.outbox().changes();
        match plan::next(machine) {
            Some(begun) => {
                if let Err(given_up) = copier.copy(begun) {
                    tracing::info!(reason = given_up.0, "a copy was given up for now");
                    machine
                        .outbox()
                        .wait(machine.outbox().changes(), LOOK_AGAIN);
                }
            }
            None => machine.outbox().wait(changes, LOOK_AGAIN),
        }
    }
}

/// Why a copy does not go on. What is missing is planned again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct GivenUp(&'static str);
