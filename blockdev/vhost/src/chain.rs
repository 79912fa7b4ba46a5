//! A chain of descriptors: what a guest says where the parts of a request are.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::Memory;

/// Most descriptors of a chain that are looked at; more than any driver makes.
const DESCRIPTORS_MAX: usize = 1024;

/// A range of guest memory, not checked yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) bytes: u32,
}

/// Why a ring cannot be followed any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("the ring is not within the guest's memory")]
    Ring,
    #[error("more requests are announced than the ring has room for")]
    Index,
    #[error("a chain of descriptors does not end, or leaves its table")]
    Chain,
    #[error("a chain has more than {DESCRIPTORS_MAX} descriptors")]
    Long,
    #[error("a chain has a part to read behind one to write")]
    Order,
    #[error("a request has no place for its status within the guest's memory")]
    Status,
    #[error("a request was given again before it was answered")]
    Twice,
}

/// The parts of one request.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// The name under which it is answered.
    pub(crate) head: u16,
    /// What the guest gives.
    pub(crate) readable: Segments,
    /// What the guest takes.
    pub(crate) writable: Segments,
}

/// Ranges of guest memory that follow one another in a request.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    list: Vec<Segment>,
    bytes: u64,
}

impl Chain {
    /// Follows a chain to its end.
    pub(crate) fn follow(mut chain: DescriptorChain<&Memory>) -> Result<Self, Broken> {
        let mut found = Self {
            head: chain.head_index(),
            ..Self::default()
        };
        let mut last: Option<Descriptor> = None;
        for (count, descriptor) in chain.by_ref().enumerate() {
            if count == DESCRIPTORS_MAX {
                return Err(Broken::Long);
            }
            let segment = Segment {
                address: descriptor.addr(),
                bytes: descriptor.len(),
            };
            if descriptor.is_write_only() {
                found.writable.push(segment);
            } else if found.writable.list.is_empty() {
                found.readable.push(segment);
            } else {
                return Err(Broken::Order);
            }
            last = Some(descriptor);
        }
        // The iterator ends silently where a chain is wrong; only the last one has no successor.
        match last {
            Some(last) if !last.has_next() => Ok(found),
            _ => Err(Broken::Chain),
        }
    }
}

impl Segments {
    fn push(&mut self, segment: Segment) {
        if segment.bytes > 0 {
            self.bytes += u64::from(segment.bytes);
            self.list.push(segment);
        }
    }

    /// The length of all.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the last byte away.
    pub(crate) fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.list.last_mut()?;
        let before = last.bytes.checked_sub(1)?;
        let address = last.address.checked_add(u64::from(before))?;
        last.bytes = before;
        self.bytes -= 1;
        if before == 0 {
            self.list.pop();
        }
        Some(address)
    }

    /// Copies the first bytes, and takes them away. `None` when there are not so many within the
    /// guest's memory.
    pub(crate) fn take_front<const N: usize>(&mut self, memory: &Memory) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut at = 0;
        let mut used_up = 0;
        while at < N {
            let segment = self.list.get_mut(used_up)?;
            let step = u32::try_from(N - at).ok()?.min(segment.bytes);
            let end = at + usize::try_from(step).ok()?;
            memory
                .read_slice(bytes.get_mut(at..end)?, segment.address)
                .ok()?;
            segment.address = segment.address.checked_add(u64::from(step))?;
            segment.bytes -= step;
            if segment.bytes == 0 {
                used_up += 1;
            }
            at = end;
        }
        self.list.drain(..used_up);
        self.bytes -= u64::try_from(N).ok()?;
        Some(bytes)
    }

    /// Says whether all is in the guest's memory, before anything is claimed for it.
    pub(crate) fn is_within(&self, memory: &Memory) -> bool {
        self.list.iter().all(|segment| {
            let bytes = usize::try_from(segment.bytes);
            bytes.is_ok_and(|bytes| memory.check_range(segment.address, bytes))
        })
    }

    /// Copies all into `bytes`, which is as long; false when some is not in the guest's memory.
    #[must_use]
    pub(crate) fn read(&self, memory: &Memory, bytes: &mut [u8]) -> bool {
        let mut rest = bytes;
        for segment in &self.list {
            let Some((part, behind)) = usize::try_from(segment.bytes)
                .ok()
                .and_then(|length| rest.split_at_mut_checked(length))
            else {
                return false;
            };
            if memory.read_slice(part, segment.address).is_err() {
                return false;
            }
            rest = behind;
        }
        rest.is_empty()
    }

    /// Copies `bytes`, which is not longer, to the beginning; false when some of it is not in the
    /// guest's memory.
    #[must_use]
    pub(crate) fn write(&self, memory: &Memory, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for segment in &self.list {
            let length = usize::try_from(segment.bytes).map_or(rest.len(), |n| n.min(rest.len()));
            let (part, behind) = rest.split_at(length);
            if memory.write_slice(part, segment.address).is_err() {
                return false;
            }
            rest = behind;
        }
        rest.is_empty()
    }
}
