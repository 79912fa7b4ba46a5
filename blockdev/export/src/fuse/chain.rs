//! Work that takes several requests to a device, one after the other.
//!
//! Invariants:
//! * at most one request of a chain is in flight;
//! * a device that completes within `submit` does not deepen the stack.

use std::sync::Arc;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockOp, BlockOutcome, Token,
};
use parking_lot::Mutex;

/// What came of a request.
pub(super) type Outcome = Result<BlockOutcome, BlockError>;

/// The decisions of a chain.
pub(super) trait Job: Send {
    /// Takes what came of the last request (nothing at first), and gives the next one. `None`
    /// ends the chain; the job has then told its own user.
    fn step(&mut self, last: Option<Outcome>) -> Option<BlockOp>;
}

struct State {
    job: Option<Box<dyn Job>>,
    arrived: Option<Outcome>,
    is_submitting: bool,
}

struct Chain {
    device: Arc<dyn BlockDevice>,
    token: Token,
    state: Mutex<State>,
}

struct Link(Arc<Chain>);

impl BlockCompleter for Link {
    fn complete(&self, completion: BlockCompletion) {
        let is_submitting = {
            let mut state = self.0.state.lock();
            state.arrived = Some(completion.result);
            state.is_submitting
        };
        if !is_submitting {
            drive(&self.0);
        }
    }
}

/// Starts a chain; it goes on in whatever thread completes its requests.
pub(super) fn run(device: Arc<dyn BlockDevice>, token: Token, job: Box<dyn Job>) {
    let state = State {
        job: Some(job),
        arrived: None,
        is_submitting: false,
    };
    drive(&Arc::new(Chain {
        device,
        token,
        state: Mutex::new(state),
    }));
}

fn drive(chain: &Arc<Chain>) {
    loop {
        let (job, last) = {
            let mut state = chain.state.lock();
            (state.job.take(), state.arrived.take())
        };
        let Some(mut job) = job else { return };
        let Some(op) = job.step(last) else { return };
        {
            let mut state = chain.state.lock();
            state.job = Some(job);
            state.is_submitting = true;
        }
        chain
            .device
            .submit(chain.token, op, Arc::new(Link(Arc::clone(chain))));
        let mut state = chain.state.lock();
        state.is_submitting = false;
        if state.arrived.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use afterimage_blockdev::Geometry;

    use super::*;

    struct Instant;

    impl BlockDevice for Instant {
        fn geometry(&self) -> Geometry {
            Geometry {
                size_bytes: 0,
                logical_block_bytes: 512,
                is_read_only: false,
            }
        }

        fn submit(&self, token: Token, _op: BlockOp, to: Arc<dyn BlockCompleter>) {
            to.complete(BlockCompletion {
                token,
                result: Ok(BlockOutcome::Done),
            });
        }
    }

    struct Count(u32, Sender<u32>);

    impl Job for Count {
        fn step(&mut self, last: Option<Outcome>) -> Option<BlockOp> {
            if last.is_some() {
                self.0 += 1;
            }
            if self.0 < 1_000_000 {
                return Some(BlockOp::Flush);
            }
            self.1.send(self.0).expect("the test listens");
            None
        }
    }

    #[test]
    fn a_long_chain_over_an_instant_device_needs_no_stack() {
        let (sender, receiver) = channel();
        run(Arc::new(Instant), Token(1), Box::new(Count(0, sender)));
        assert_eq!(receiver.recv(), Ok(1_000_000));
    }
}
