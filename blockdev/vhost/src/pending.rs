//! Requests that are with the device.

use parking_lot::Mutex;
use vm_memory::GuestAddress;

use crate::blk::Status;
use crate::chain::{Broken, Segments};

/// A request that is with the device.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Where what is read goes to.
    pub(crate) data: Segments,
    pub(crate) status_at: GuestAddress,
    pub(crate) status: Status,
    /// Bytes that the guest finds in its memory when all went well, the status included.
    pub(crate) written: u32,
    /// Bytes that count against the budget.
    pub(crate) charged: usize,
    /// Parts that are not back yet.
    pub(crate) left: usize,
    /// A flush follows the parts.
    pub(crate) then_flush: bool,
}

/// An answer on its way to the ring.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: u16,
    pub(crate) status: Status,
    pub(crate) status_at: GuestAddress,
    pub(crate) written: u32,
    pub(crate) charged: usize,
}

/// The requests of a ring, by the heads of their chains: the guest chooses a head, and may not
/// choose it again before it has the answer.
pub(crate) struct Slots(Box<[Mutex<Option<Pending>>]>);

/// What a part of a request leaves to do.
pub(crate) enum Next {
    /// Other parts are to come.
    Wait,
    /// A flush must follow.
    Flush,
    /// All is done.
    Answer(Answer),
}

impl Slots {
    pub(crate) fn new(count: u16) -> Self {
        Self((0..count).map(|_| Mutex::new(None)).collect())
    }

    /// Puts a request in.
    pub(crate) fn put(&self, head: u16, pending: Pending) -> Result<(), Broken> {
        let slot = self.0.get(usize::from(head)).ok_or(Broken::Chain)?;
        let mut slot = slot.lock();
        if slot.is_some() {
            return Err(Broken::Twice);
        }
        *slot = Some(pending);
        Ok(())
    }

    /// Says that a part is back; `take` looks at what it brought and says whether it is good.
    pub(crate) fn part(&self, head: u16, take: impl FnOnce(&Pending) -> Status) -> Next {
        let Some(slot) = self.0.get(usize::from(head)) else {
            return Next::Wait;
        };
        let mut slot = slot.lock();
        let Some(pending) = slot.as_mut() else {
            return Next::Wait;
        };
        let status = take(pending);
        if pending.status == Status::Ok {
            pending.status = status;
        }
        pending.left = pending.left.saturating_sub(1);
        if pending.left > 0 {
            return Next::Wait;
        }
        if pending.then_flush && pending.status == Status::Ok {
            pending.then_flush = false;
            pending.left = 1;
            return Next::Flush;
        }
        match slot.take() {
            Some(pending) => Next::Answer(pending.answer(head)),
            None => Next::Wait,
        }
    }
}

impl Pending {
    fn answer(&self, head: u16) -> Answer {
        Answer {
            head,
            status: self.status,
            status_at: self.status_at,
            written: if self.status == Status::Ok {
                self.written
            } else {
                0
            },
            charged: self.charged,
        }
    }
}
