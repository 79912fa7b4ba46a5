//! What the framework asks of a device.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::ring::Ring;
use crate::session::Session;
use crate::settings::Settings;
use crate::{SharedMemory, Vring, blk};

/// One connection's device.
pub(crate) struct Backend {
    session: Arc<Session>,
    settings: Settings,
    rings: Vec<Arc<Ring>>,
    /// One for each thread: there is room again, or the end has come.
    wakes: Vec<EventConsumer>,
}

/// Makes the two ends of the wake-up calls for so many threads.
pub(crate) fn wakes(threads: usize) -> io::Result<(Vec<EventConsumer>, Vec<EventNotifier>)> {
    let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
    let pairs: io::Result<Vec<_>> = (0..threads)
        .map(|_| new_event_consumer_and_notifier(flags))
        .collect();
    Ok(pairs?.into_iter().unzip())
}

impl Backend {
    pub(crate) fn new(
        session: Arc<Session>,
        settings: Settings,
        wakes: Vec<EventConsumer>,
    ) -> Arc<Self> {
        let serial = settings.serial_bytes();
        let ring = |_| Ring::new(Arc::clone(&session), serial, settings.queue_size);
        Arc::new(Self {
            rings: (0..settings.queues).map(ring).collect(),
            session,
            settings,
            wakes,
        })
    }

    /// The framework's events below this are its own.
    fn wake_event(&self) -> u64 {
        u64::from(self.settings.queues) + 1
    }

    /// Listens to the wake-up calls.
    pub(crate) fn register(
        &self,
        handlers: &[Arc<VringEpollHandler<Arc<Self>>>],
    ) -> io::Result<()> {
        for (handler, wake) in handlers.iter().zip(&self.wakes) {
            handler.register_listener(wake.as_raw_fd(), EventSet::IN, self.wake_event())?;
        }
        Ok(())
    }

    /// Waits until the device has answered everything.
    pub(crate) fn drain(&self) {
        for ring in &self.rings {
            ring.drain();
        }
    }

    /// The ring that a thread calls its `index`th.
    fn ring_of(&self, thread: usize, index: usize) -> Option<&Arc<Ring>> {
        let mask = self.settings.rings_of_thread(thread);
        let mut own = (0..self.rings.len()).filter(|queue| mask >> queue & 1 == 1);
        self.rings.get(own.nth(index)?)
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.rings.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.settings.queue_size)
    }

    fn features(&self) -> u64 {
        let transport = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        blk::features(&self.session.device.geometry()) | transport
    }

    fn acked_features(&self, features: u64) {
        self.session.set_write_through(!blk::has_flush(features));
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _is_enabled: bool) {
        // The framework has told its rings.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let geometry = self.session.device.geometry();
        blk::config(&geometry, self.settings.queues, offset, size)
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        // It was exchanged within what the session has.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.settings.threads)
            .map(|thread| self.settings.rings_of_thread(thread))
            .collect()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let index = usize::try_from(queue_index).ok();
        if let Some(ring) = index.and_then(|index| self.rings.get(index)) {
            ring.drain();
        }
        Ok(())
    }

    /// An error ends the thread, which is how threads end here.
    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        let is_wake = u64::from(event) == self.wake_event();
        if is_wake {
            if let Some(wake) = self.wakes.get(thread) {
                // Nothing to take is as good.
                let _is_empty = wake.consume();
            }
        }
        if self.session.life.is_closed() {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted));
        }
        let event = usize::from(event);
        for (index, vring) in vrings.iter().enumerate() {
            if is_wake || index == event {
                if let Some(ring) = self.ring_of(thread, index) {
                    ring.process(vring);
                }
            }
        }
        Ok(())
    }
}
