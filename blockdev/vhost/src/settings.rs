//! How a socket is served.

use crate::blk::ID_BYTES;
use crate::error::VhostError;

/// Most rings of one device; the framework's map of rings to threads has so many bits.
pub(crate) const QUEUES_MAX: u16 = 64;
/// Most entries of a ring.
pub(crate) const QUEUE_SIZE_MAX: u16 = 1024;

/// How a socket is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Rings that a guest may use, 1 to 64.
    pub queues: u16,
    /// Threads that take requests from the rings of a connection.
    pub threads: usize,
    /// Most entries of a ring, a power of two up to 1024.
    pub queue_size: u16,
    /// Bytes of requests in flight above which no further one is taken; one request for each
    /// thread may come on top.
    pub in_flight_bytes: usize,
    /// What the guest is told as the disk's serial number; cut after 20 bytes.
    pub serial: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queues: 4,
            threads: 2,
            queue_size: 256,
            in_flight_bytes: 32 << 20,
            serial: "afterimage".to_owned(),
        }
    }
}

impl Settings {
    /// Says whether all are within their ranges.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), VhostError> {
        let queues = usize::from(self.queues);
        let size = usize::from(self.queue_size);
        let within = |name, value, least, most| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(VhostError::Setting {
                name,
                value,
                least,
                most,
            })
        };
        within("queues", queues, 1, usize::from(QUEUES_MAX))?;
        within("threads", self.threads, 1, queues)?;
        within("queue size", size, 2, usize::from(QUEUE_SIZE_MAX))?;
        within("bytes in flight", self.in_flight_bytes, 1, usize::MAX)?;
        if !self.queue_size.is_power_of_two() {
            let below = 1 << size.ilog2();
            return within("queue size", size, below, below);
        }
        Ok(())
    }

    /// The serial number as the guest gets it: zero behind its end.
    pub(crate) fn serial_bytes(&self) -> [u8; ID_BYTES] {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        bytes
    }

    /// Which rings a thread serves, one bit each.
    pub(crate) fn rings_of_thread(&self, thread: usize) -> u64 {
        let queues = usize::from(self.queues);
        (thread..queues)
            .step_by(self.threads)
            .fold(0, |mask, queue| mask | 1 << queue)
    }
}
