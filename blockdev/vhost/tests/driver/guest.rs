//! A guest without a virtual machine: the driver of the `virtio-driver` crate, which shares no
//! code with the server.
//!
//! The driver wants addresses of buffers, and looks into none of them: it says where they are, and
//! hands the server a file. So the data is read and written through that file, and the addresses
//! are those of a reservation that nobody touches.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

/// What a guest asks of its disk; the data is that of a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    Read {
        offset: u64,
        bytes: usize,
    },
    Write {
        offset: u64,
        bytes: usize,
    },
    Zeroes {
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    },
    Discard {
        offset: u64,
        bytes: u64,
    },
    Flush,
}

/// A guest with one disk.
pub(crate) struct Guest {
    // Before the transport, whose memory they are in.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: File,
    addresses: Vec<u8>,
    slot_bytes: usize,
}

impl Guest {
    /// Connects, with so many queues of `queue_size` entries and slots of memory.
    pub(crate) fn connect(
        socket: &Path,
        queues: usize,
        queue_size: u16,
        slots: usize,
        slot_bytes: usize,
    ) -> io::Result<Self> {
        let wanted = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let all = VirtioBlkFeatureFlags::all().bits() | wanted.bits();
        let socket = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(socket, all)?);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, queue_size)?;
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let whole = slots * slot_bytes;
        let memory = tempfile::tempfile()?;
        memory.set_len(whole as u64)?;
        let addresses = vec![0; whole];
        let address = addresses.as_ptr() as usize;
        transport.map_mem_region(address, whole, memory.as_raw_fd(), 0)?;
        Ok(Self {
            queues,
            transport,
            memory,
            addresses,
            slot_bytes,
        })
    }

    /// What the disk says of itself.
    pub(crate) fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// The features agreed upon.
    pub(crate) fn features(&self) -> u64 {
        self.transport.get_features()
    }

    fn place(&self, slot: usize) -> u64 {
        (slot * self.slot_bytes) as u64
    }

    /// Puts bytes into a slot.
    pub(crate) fn fill(&self, slot: usize, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, self.place(slot))
    }

    /// Bytes of a slot.
    pub(crate) fn look(&self, slot: usize, bytes: usize) -> io::Result<Vec<u8>> {
        let mut found = vec![0; bytes];
        self.memory.read_exact_at(&mut found, self.place(slot))?;
        Ok(found)
    }

    /// Puts a request into a queue; the disk is told by [`Self::kick`].
    pub(crate) fn ask(&mut self, queue: usize, slot: usize, ask: Ask) -> io::Result<()> {
        let start = slot * self.slot_bytes;
        let on = &mut self.queues[queue];
        match ask {
            Ask::Read { offset, bytes } => {
                on.read(offset, &mut self.addresses[start..start + bytes], slot)
            }
            Ask::Write { offset, bytes } => {
                on.write(offset, &self.addresses[start..start + bytes], slot)
            }
            Ask::Zeroes {
                offset,
                bytes,
                may_unmap,
            } => on.write_zeroes(offset, bytes, may_unmap, slot),
            Ask::Discard { offset, bytes } => on.discard(offset, bytes, slot),
            Ask::Flush => on.flush(slot),
        }
    }

    /// Tells the disk, if it wants to be told.
    pub(crate) fn kick(&mut self, queue: usize) -> io::Result<()> {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify()?;
        }
        Ok(())
    }

    /// Answers of a queue, at least one: slots, and 0 or a negative error number.
    pub(crate) fn answers(&mut self, queue: usize) -> io::Result<Vec<(usize, i32)>> {
        loop {
            let found = self.queues[queue].completions();
            let found: Vec<_> = found.map(|done| (done.context, done.ret)).collect();
            if !found.is_empty() {
                return Ok(found);
            }
            self.transport.get_completion_fd(queue).read()?;
        }
    }

    /// Asks for one thing and waits for its answer.
    pub(crate) fn one(&mut self, queue: usize, ask: Ask) -> io::Result<i32> {
        self.ask(queue, 0, ask)?;
        self.kick(queue)?;
        let answers = self.answers(queue)?;
        assert_eq!(answers.len(), 1, "one answer to one request");
        Ok(answers[0].1)
    }
}
