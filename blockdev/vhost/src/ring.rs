//! One ring: requests out of it, to the device, and answers back into it.
//!
//! Invariants
//! * `in_flight` counts what was taken from the ring and is not answered in it yet; it rises under
//!   the lock of the framework's ring, so that who has seen the ring stopped sees all of it.
//! * One thread at a time writes answers (`is_flushing`). Answers that come meanwhile are left to
//!   it, so that many cost one notification.
//! * No lock is held while the device is called.

use std::sync::{Arc, OnceLock, Weak};

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockErrorKind, BlockOp, BlockOutcome, Token,
};
use parking_lot::{Condvar, Mutex};
use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace};

use crate::blk::{ID_BYTES, Status};
use crate::chain::{Broken, Chain};
use crate::pending::{Answer, Next, Pending, Slots};
use crate::request::{Parsed, Range, Request};
use crate::session::Session;
use crate::{Memory, Vring};

/// So many requests are taken before their answers are looked at.
const BATCH: usize = 8;

/// A ring. It completes its own requests: a token is the head of a chain.
pub(crate) struct Ring {
    /// For the device, which may complete after everybody else has gone.
    own: Weak<Self>,
    session: Arc<Session>,
    serial: [u8; ID_BYTES],
    size_max: u16,
    vring: OnceLock<Vring>,
    slots: Slots,
    state: Mutex<State>,
    is_idle: Condvar,
}

#[derive(Default)]
struct State {
    answers: Vec<Answer>,
    /// An empty list with room, to change places with the other.
    spare: Vec<Answer>,
    is_flushing: bool,
    in_flight: usize,
}

/// What a look into the ring gave.
enum Taken {
    Chains(Vec<Chain>),
    /// There is nothing; the guest will say when there is.
    Nothing,
    /// The ring does not run.
    Stopped,
}

impl Ring {
    pub(crate) fn new(session: Arc<Session>, serial: [u8; ID_BYTES], size_max: u16) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: Weak::clone(own),
            session,
            serial,
            size_max,
            vring: OnceLock::new(),
            slots: Slots::new(size_max),
            state: Mutex::default(),
            is_idle: Condvar::new(),
        })
    }

    /// Takes all requests that are in the ring, as far as the budget goes.
    pub(crate) fn process(&self, vring: &Vring) {
        let vring = self.vring.get_or_init(|| vring.clone());
        while !self.session.life.is_over() && self.session.budget.has_room() {
            match self.take(vring) {
                Ok(Taken::Chains(chains)) => self.begin_all(chains),
                Ok(Taken::Nothing | Taken::Stopped) => return,
                Err(reason) => return self.session.life.fail(reason),
            }
        }
    }

    fn take(&self, vring: &Vring) -> Result<Taken, Broken> {
        let guard = self.session.memory.memory();
        let memory: &Memory = &guard;
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return Ok(Taken::Stopped);
        }
        let queue = state.get_queue_mut();
        if !queue.is_valid(memory) {
            return Err(Broken::Ring);
        }
        let mut chains = Vec::new();
        while chains.is_empty() {
            for chain in queue.iter(memory).map_err(|_| Broken::Index)?.take(BATCH) {
                chains.push(Chain::follow(chain)?);
            }
            // Asked for only when there is nothing, so that a busy guest need not tell.
            let is_more = !chains.is_empty()
                || queue
                    .enable_notification(memory)
                    .map_err(|_| Broken::Ring)?;
            if !is_more {
                return Ok(Taken::Nothing);
            }
        }
        let mut own = self.state.lock();
        own.in_flight += chains.len();
        if own.in_flight > usize::from(self.size_max) {
            own.in_flight -= chains.len();
            return Err(Broken::Twice);
        }
        Ok(Taken::Chains(chains))
    }

    fn begin_all(&self, chains: Vec<Chain>) {
        // What the device answers at once waits for the end of the batch.
        let is_first = !std::mem::replace(&mut self.state.lock().is_flushing, true);
        let mut chains = chains.into_iter();
        for chain in chains.by_ref() {
            if let Err(reason) = self.begin(chain) {
                self.session.life.fail(reason);
                // This one and those behind it are never answered.
                self.forget(1 + chains.len());
                break;
            }
        }
        if is_first {
            self.flush();
        }
    }

    fn forget(&self, count: usize) {
        let mut state = self.state.lock();
        state.in_flight -= count;
        if state.in_flight == 0 {
            self.is_idle.notify_all();
        }
    }

    fn begin(&self, chain: Chain) -> Result<(), Broken> {
        let guard = self.session.memory.memory();
        let memory: &Memory = &guard;
        let parsed = Parsed::read(chain, memory)?;
        let (head, status_at) = (parsed.head, parsed.status);
        let mut pending = Pending {
            data: parsed.data,
            status_at,
            status: Status::Ok,
            written: 1,
            charged: 0,
            left: 1,
            then_flush: false,
        };
        let ops = match parsed.request {
            Ok(request) => self.ops(request, &mut pending, memory),
            Err(status) => Err(status),
        };
        let ops = ops.unwrap_or_else(|status| {
            pending.status = status;
            Vec::new()
        });
        pending.left = ops.len().max(1);
        self.session.budget.take(pending.charged);
        let charged = pending.charged;
        self.slots
            .put(head, pending)
            .inspect_err(|_| self.session.budget.give_back(charged))?;
        if ops.is_empty() {
            self.part(head, |pending| pending.status);
        }
        for op in ops {
            self.submit(head, op);
        }
        Ok(())
    }

    /// What the device is asked for. Nothing when the request is answered already.
    fn ops(
        &self,
        request: Request,
        pending: &mut Pending,
        memory: &Memory,
    ) -> Result<Vec<BlockOp>, Status> {
        let is_write_through = self.session.is_write_through();
        if !pending.data.is_within(memory) {
            return Err(Status::Failed);
        }
        match request {
            Request::Read { offset, bytes } => {
                pending.charged = bytes;
                pending.written = u32::try_from(bytes + 1).map_err(|_| Status::Failed)?;
                let buffer = self.session.buffer(bytes);
                Ok(vec![BlockOp::Read { offset, buffer }])
            }
            Request::Write { offset, bytes } => {
                // Guest memory changes under us: the device gets a copy, which does not.
                let mut buffer = self.session.buffer(bytes);
                if !pending.data.read(memory, &mut buffer) {
                    return Err(Status::Failed);
                }
                pending.charged = bytes;
                let fua = is_write_through;
                Ok(vec![BlockOp::Write {
                    offset,
                    buffer,
                    fua,
                }])
            }
            Request::Flush => Ok(vec![BlockOp::Flush]),
            Request::Discard(ranges) => {
                pending.then_flush = is_write_through;
                Ok(ranges.into_iter().map(discard).collect())
            }
            Request::WriteZeroes(ranges) => {
                pending.then_flush = is_write_through;
                Ok(ranges.into_iter().map(write_zeroes).collect())
            }
            Request::Identify => {
                let room = usize::try_from(pending.data.bytes()).unwrap_or(ID_BYTES);
                let serial = self.serial.get(..room).unwrap_or(&self.serial);
                if !pending.data.write(memory, serial) {
                    return Err(Status::Failed);
                }
                pending.written = u32::try_from(serial.len() + 1).map_err(|_| Status::Failed)?;
                Ok(Vec::new())
            }
        }
    }

    fn submit(&self, head: u16, op: BlockOp) {
        if let Some(own) = self.own.upgrade() {
            self.session.device.submit(Token(u64::from(head)), op, own);
        }
    }

    /// Looks at what the device brought.
    fn take_back(&self, outcome: BlockOutcome, pending: &Pending) -> Status {
        match outcome {
            BlockOutcome::Data(buffer) => {
                let is_whole = buffer.len() as u64 == pending.data.bytes();
                let guard = self.session.memory.memory();
                let is_written = is_whole && pending.data.write(&guard, &buffer);
                self.session.give_back(buffer);
                if is_written {
                    Status::Ok
                } else {
                    Status::Failed
                }
            }
            BlockOutcome::Written(buffer) => {
                self.session.give_back(buffer);
                Status::Ok
            }
            BlockOutcome::Done | BlockOutcome::Extents(_) => Status::Ok,
        }
    }

    /// A part of a request is back. Gives true when a flush must follow.
    fn part(&self, head: u16, take: impl FnOnce(&Pending) -> Status) -> bool {
        match self.slots.part(head, take) {
            Next::Wait => false,
            Next::Flush => true,
            Next::Answer(answer) => {
                let mut state = self.state.lock();
                state.answers.push(answer);
                if !std::mem::replace(&mut state.is_flushing, true) {
                    drop(state);
                    self.flush();
                }
                false
            }
        }
    }

    /// Writes answers until there are none. The caller has set `is_flushing`.
    fn flush(&self) {
        let mut state = self.state.lock();
        while !state.answers.is_empty() {
            let spare = std::mem::take(&mut state.spare);
            let mut answers = std::mem::replace(&mut state.answers, spare);
            drop(state);
            if let Err(reason) = self.write(&answers) {
                self.session.life.fail(reason);
            }
            let charged = answers.iter().map(|answer| answer.charged).sum();
            self.session.budget.give_back(charged);
            state = self.state.lock();
            state.in_flight -= answers.len();
            answers.clear();
            state.spare = answers;
        }
        state.is_flushing = false;
        if state.in_flight == 0 {
            self.is_idle.notify_all();
        }
    }

    fn write(&self, answers: &[Answer]) -> Result<(), Broken> {
        let Some(vring) = self.vring.get() else {
            return Ok(());
        };
        let guard = self.session.memory.memory();
        let memory: &Memory = &guard;
        for answer in answers {
            memory
                .write_obj(answer.status.byte(), answer.status_at)
                .map_err(|_| Broken::Status)?;
        }
        let mut state = vring.get_mut();
        let queue = state.get_queue_mut();
        for answer in answers {
            queue
                .add_used(memory, answer.head, answer.written)
                .map_err(|_| Broken::Ring)?;
        }
        let is_wanted = queue.needs_notification(memory).map_err(|_| Broken::Ring)?;
        if is_wanted {
            if let Err(error) = state.signal_used_queue() {
                tracing::debug!(%error, "a guest is not notified");
            }
        }
        Ok(())
    }

    /// Waits until all that was taken has been answered.
    pub(crate) fn drain(&self) {
        let mut state = self.state.lock();
        while state.in_flight > 0 || state.is_flushing {
            self.is_idle.wait(&mut state);
        }
    }
}

fn discard(range: Range) -> BlockOp {
    BlockOp::Discard {
        offset: range.offset,
        length: range.length,
    }
}

fn write_zeroes(range: Range) -> BlockOp {
    BlockOp::WriteZeroes {
        offset: range.offset,
        length: range.length,
        may_unmap: range.may_unmap,
    }
}

impl BlockCompleter for Ring {
    fn complete(&self, completion: BlockCompletion) {
        let Ok(head) = u16::try_from(completion.token.0) else {
            return;
        };
        let needs_flush = match completion.result {
            Ok(outcome) => self.part(head, |pending| self.take_back(outcome, pending)),
            Err(error) => {
                tracing::debug!(%error, "a guest's request failed");
                let status = match error.kind {
                    BlockErrorKind::NotSupported => Status::Unsupported,
                    _ => Status::Failed,
                };
                self.part(head, |_| status)
            }
        };
        if needs_flush {
            self.submit(head, BlockOp::Flush);
        }
    }
}
