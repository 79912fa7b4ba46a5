//! One request made of several.

use core::mem;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::buffer::IoBuffer;
use crate::device::{BlockCompleter, BlockCompletion, BlockErrorKind, BlockOutcome};

/// Called once with what came of all parts: the first error, if there was one.
pub(super) type Continuation<T> = Box<dyn FnOnce(Result<T, BlockErrorKind>) + Send>;

/// Waits for parts that give nothing back.
pub(super) struct Join {
    state: Mutex<JoinState>,
}

struct JoinState {
    remaining: usize,
    error: Option<BlockErrorKind>,
    then: Option<Continuation<()>>,
}

impl Join {
    /// Waits for `parts` parts; they must not be zero.
    pub(super) fn new(parts: usize, then: Continuation<()>) -> Arc<Self> {
        assert!(parts > 0, "a request has parts");
        let state = JoinState {
            remaining: parts,
            error: None,
            then: Some(then),
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// Takes the end of one part.
    pub(super) fn finish(&self, result: Result<(), BlockErrorKind>) {
        let (then, result) = {
            let mut state = self.state.lock();
            state.remaining -= 1;
            if let Err(kind) = result {
                state.error.get_or_insert(kind);
            }
            if state.remaining > 0 {
                return;
            }
            let result = state.error.take().map_or(Ok(()), Err);
            (state.then.take().expect("parts end once"), result)
        };
        then(result);
    }
}

impl BlockCompleter for Join {
    fn complete(&self, completion: BlockCompletion) {
        self.finish(completion.result.map(drop).map_err(|error| error.kind));
    }
}

/// Puts what parts read together in one buffer.
pub(super) struct Gather {
    buffer: Mutex<IoBuffer>,
    join: Arc<Join>,
}

struct Part {
    gather: Arc<Gather>,
    /// Where the part goes.
    at: usize,
    /// Bytes read before it.
    skip: usize,
    /// Its length.
    take: usize,
}

impl Gather {
    /// Waits for `parts` parts and for [`Self::end`], and then hands the buffer on.
    pub(super) fn new(buffer: IoBuffer, parts: usize, then: Continuation<IoBuffer>) -> Arc<Self> {
        Arc::new_cyclic(|gather: &std::sync::Weak<Self>| {
            let gather = gather.clone();
            let finish = move |result: Result<(), BlockErrorKind>| {
                let gather = gather.upgrade().expect("whoever ends last keeps it alive");
                let buffer = mem::replace(&mut *gather.buffer.lock(), IoBuffer::zeroed(0));
                then(result.map(|()| buffer));
            };
            let join = Join::new(parts + 1, Box::new(finish));
            Self {
                buffer: Mutex::new(buffer),
                join,
            }
        })
    }

    /// Says that all parts were started.
    pub(super) fn end(&self) {
        self.join.finish(Ok(()));
    }

    /// Completes one part: `take` bytes after the first `skip` of what was read go to `at`.
    pub(super) fn part(
        self: &Arc<Self>,
        at: usize,
        skip: usize,
        take: usize,
    ) -> Arc<dyn BlockCompleter> {
        Arc::new(Part {
            gather: Arc::clone(self),
            at,
            skip,
            take,
        })
    }
}

impl BlockCompleter for Part {
    fn complete(&self, completion: BlockCompletion) {
        let Self {
            gather,
            at,
            skip,
            take,
        } = self;
        let result = match completion.result {
            Ok(BlockOutcome::Data(data)) if data.len() >= skip + take => {
                let part = &data[*skip..skip + take];
                gather.buffer.lock()[*at..at + take].copy_from_slice(part);
                Ok(())
            }
            Ok(_) => Err(BlockErrorKind::Corrupt("a read gave too little".to_owned())),
            Err(error) => Err(error.kind),
        };
        gather.join.finish(result);
    }
}
