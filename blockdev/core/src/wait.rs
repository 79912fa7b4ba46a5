//! Blocking adapters, for tools and tests only: nothing on a data path waits.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockOp, BlockOutcome,
};
use crate::id::Token;
use crate::storage::{
    Storage, StorageCompleter, StorageCompletion, StorageError, StorageOp, StorageOutcome,
};

struct Forward<T>(Sender<T>);

impl StorageCompleter for Forward<StorageCompletion> {
    fn complete(&self, completion: StorageCompletion) {
        let _gone = self.0.send(completion);
    }
}

impl BlockCompleter for Forward<BlockCompletion> {
    fn complete(&self, completion: BlockCompletion) {
        let _gone = self.0.send(completion);
    }
}

/// Performs one storage operation and waits for it.
///
/// # Errors
/// What the operation says.
///
/// # Panics
/// When the storage drops the completion, which its contract forbids.
pub fn storage(storage: &dyn Storage, op: StorageOp) -> Result<StorageOutcome, StorageError> {
    let (sender, receiver) = channel();
    storage.submit(Token(0), op, Arc::new(Forward(sender)));
    receiver
        .recv()
        .expect("a storage completes every operation")
        .result
}

/// Performs one device request and waits for it.
///
/// # Errors
/// What the request says.
///
/// # Panics
/// When the device drops the completion, which its contract forbids.
pub fn device(device: &dyn BlockDevice, op: BlockOp) -> Result<BlockOutcome, BlockError> {
    let (sender, receiver) = channel();
    device.submit(Token(0), op, Arc::new(Forward(sender)));
    receiver
        .recv()
        .expect("a device completes every request")
        .result
}
