//! One ring without a connection, for tests: a guest's memory is given as an image.

use std::sync::Arc;

use afterimage_blockdev::BlockDevice;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::budget::Budget;
use crate::ring::Ring;
use crate::session::Session;
use crate::settings::Settings;
use crate::{Memory, SharedMemory, Vring};

/// What became of a ring.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All requests were answered; the image as the guest finds it.
    Served(Vec<u8>),
    /// The guest would be disconnected, for this reason.
    Ended(String),
}

/// Serves what is in a ring once. `image` is the guest's memory from address 0; its table of
/// descriptors, available ring and used ring are at the addresses given, for `queue_size` entries.
///
/// # Panics
/// When there is no memory for the image, or `queue_size` is no size of a ring.
#[must_use]
pub fn run_ring(
    image: &[u8],
    addresses: [u64; 3],
    queue_size: u16,
    device: Arc<dyn BlockDevice>,
) -> Outcome {
    let start = GuestAddress(0);
    let memory = Memory::from_ranges(&[(start, image.len().max(1))]).expect("memory for a guest");
    memory.write_slice(image, start).expect("the image fits");
    let memory = SharedMemory::new(memory);
    let vring = Vring::new(memory.clone(), queue_size).expect("a size of a ring");
    let [table, available, used] = addresses;
    if let Err(error) = vring.set_queue_info(table, available, used) {
        return Outcome::Ended(error.to_string());
    }
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let settings = Settings::default();
    let budget = Budget::new(settings.in_flight_bytes, Vec::new());
    let (session, _gone) = Session::new(device, memory.clone(), budget);
    let ring = Ring::new(Arc::clone(&session), settings.serial_bytes(), queue_size);
    ring.process(&vring);
    ring.drain();
    if let Some(reason) = session.life.reason() {
        return Outcome::Ended(reason.to_string());
    }
    let mut after = vec![0; image.len()];
    let guard = memory.memory();
    guard
        .read_slice(&mut after, start)
        .expect("the image is there");
    Outcome::Served(after)
}
