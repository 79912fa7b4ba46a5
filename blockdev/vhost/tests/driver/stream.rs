//! A random stream of commands, compared with a byte array.
//!
//! No request overlaps one that is in flight, but for reads with reads: so what a read must find
//! is known when it is asked for, in whatever order the disk works.

use afterimage_blockdev::Random;

use crate::guest::{Ask, Guest};

const SECTOR: usize = 512;
/// Most bytes of one request.
pub(crate) const SLOT_BYTES: usize = 64 << 10;

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    ask: Ask,
    start: usize,
    end: usize,
}

/// A stream of commands on a disk of which everything is known.
pub(crate) struct Stream {
    pub(crate) bytes: Vec<u8>,
    random: Random,
    flights: Vec<Option<Flight>>,
    queues: usize,
}

impl Stream {
    /// On a disk that holds `bytes`; `depth` requests in flight on each queue.
    pub(crate) fn new(seed: u64, bytes: Vec<u8>, queues: usize, depth: usize) -> Self {
        Self {
            bytes,
            random: Random::new(seed),
            flights: vec![None; queues * depth],
            queues,
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.random.below(limit as u64)).expect("a small number")
    }

    fn is_free(&self, start: usize, end: usize, is_read: bool) -> bool {
        self.flights.iter().flatten().all(|other| {
            let is_apart = other.end <= start || end <= other.start;
            is_apart || (is_read && matches!(other.ask, Ask::Read { .. }))
        })
    }

    fn choose(&mut self) -> Option<Flight> {
        let sectors = 1 + self.below(SLOT_BYTES / SECTOR);
        let start = self.below(self.bytes.len() / SECTOR - sectors) * SECTOR;
        let end = start + sectors * SECTOR;
        let (offset, bytes) = (start as u64, end - start);
        let may_unmap = self.below(2) == 0;
        let ask = match self.below(16) {
            0 => Ask::Flush,
            1 => Ask::Discard {
                offset,
                bytes: bytes as u64,
            },
            2 => Ask::Zeroes {
                offset,
                bytes: bytes as u64,
                may_unmap,
            },
            3..=8 => Ask::Write { offset, bytes },
            _ => Ask::Read { offset, bytes },
        };
        let is_read = matches!(ask, Ask::Read { .. });
        let (start, end) = if matches!(ask, Ask::Flush) {
            (0, 0)
        } else {
            (start, end)
        };
        self.is_free(start, end, is_read)
            .then_some(Flight { ask, start, end })
    }

    fn begin(&mut self, guest: &mut Guest, slot: usize) {
        let Some(flight) = self.choose() else {
            return;
        };
        let range = flight.start..flight.end;
        match flight.ask {
            Ask::Write { .. } => {
                let mut bytes = vec![0; range.len()];
                self.random.fill(&mut bytes);
                guest.fill(slot, &bytes).expect("guest memory");
                self.bytes[range].copy_from_slice(&bytes);
            }
            Ask::Discard { .. } | Ask::Zeroes { .. } => self.bytes[range].fill(0),
            Ask::Read { .. } | Ask::Flush => {}
        }
        let queue = slot % self.queues;
        guest
            .ask(queue, slot, flight.ask)
            .expect("room in the ring");
        self.flights[slot] = Some(flight);
    }

    fn end(&mut self, guest: &Guest, slot: usize, answer: i32) {
        let flight = self.flights[slot].take().expect("an answer to a request");
        assert_eq!(answer, 0, "{:?}", flight.ask);
        if let Ask::Read { bytes, .. } = flight.ask {
            let found = guest.look(slot, bytes).expect("guest memory");
            let wanted = &self.bytes[flight.start..flight.end];
            assert!(found == wanted, "wrong bytes: {:?}", flight.ask);
        }
    }

    /// Runs about so many commands, and waits for all of them.
    pub(crate) fn run(&mut self, guest: &mut Guest, commands: usize) {
        let mut begun = 0;
        loop {
            if begun < commands {
                for slot in 0..self.flights.len() {
                    if self.flights[slot].is_none() {
                        self.begin(guest, slot);
                        begun += 1;
                    }
                }
                for queue in 0..self.queues {
                    guest.kick(queue).expect("the disk is told");
                }
            }
            let busy: Vec<usize> = (0..self.queues)
                .filter(|queue| {
                    let mut own = self.flights.iter().skip(*queue).step_by(self.queues);
                    own.any(Option::is_some)
                })
                .collect();
            if busy.is_empty() && begun >= commands {
                return;
            }
            for queue in busy {
                for (slot, answer) in guest.answers(queue).expect("answers") {
                    self.end(guest, slot, answer);
                }
            }
        }
    }
}
