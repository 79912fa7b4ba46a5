//! A socket, and one connection to it at a time.
//!
//! Invariants
//! * A device belongs to one guest: while a connection lasts, others are turned away at once.
//! * The socket is made for root alone. One that a dead server left behind is taken over; a live
//!   one, or what is no socket, never.
//! * When [`Server::end`] returns, everything that a guest asked for has been answered, no thread
//!   uses the device, and the socket's file is gone.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use afterimage_blockdev::BlockDevice;
use parking_lot::Mutex;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::backend::{Backend, wakes};
use crate::budget::Budget;
use crate::error::VhostError;
use crate::session::{Gone, Life, Session};
use crate::settings::Settings;
use crate::{Memory, SharedMemory};

/// Events of the thread that accepts.
const KNOCK: u64 = 0;
const STOP: u64 = 1;
const DONE: u64 = 2;

/// A served socket.
pub struct Server {
    path: PathBuf,
    stop: EventNotifier,
    status: Arc<Mutex<ServerStatus>>,
    thread: Option<JoinHandle<()>>,
}

/// What a server does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServerStatus {
    /// A guest is connected.
    pub is_connected: bool,
    /// Connections so far.
    pub connections: u64,
    /// Why the last connection was ended from this side, if one was.
    pub last_failure: Option<String>,
}

impl Server {
    /// Binds `path` and serves `device` there.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn start(
        path: &Path,
        device: Arc<dyn BlockDevice>,
        settings: Settings,
    ) -> Result<Self, VhostError> {
        settings.check()?;
        let listener = bind(path)?;
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (stopping, stop) = new_event_consumer_and_notifier(flags).map_err(VhostError::Start)?;
        let (done, is_done) = new_event_consumer_and_notifier(flags).map_err(VhostError::Start)?;
        let status = Arc::new(Mutex::new(ServerStatus::default()));
        let epoll = watch(&[
            (listener.as_raw_fd(), KNOCK),
            (stopping.as_raw_fd(), STOP),
            (done.as_raw_fd(), DONE),
        ])
        .map_err(VhostError::Start)?;
        let door = Door {
            listener: Listener::from(listener),
            epoll,
            _stopping: stopping,
            done,
            is_done,
            device,
            settings,
            status: Arc::clone(&status),
        };
        let thread = std::thread::Builder::new()
            .name("vhost-door".to_owned())
            .spawn(move || door.serve())
            .map_err(VhostError::Start)?;
        Ok(Self {
            path: path.to_owned(),
            stop,
            status,
            thread: Some(thread),
        })
    }

    /// Where it is served.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it does.
    #[must_use]
    pub fn status(&self) -> ServerStatus {
        self.status.lock().clone()
    }

    /// Ends the connection, if there is one, and the server. Waits for the device.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop.notify() {
            tracing::error!(%error, "a vhost-user server can not be stopped");
            return;
        }
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                tracing::error!("a vhost-user server has panicked");
            }
        }
        // Whoever has replaced it meanwhile found it dead, as it was.
        let _is_gone = std::fs::remove_file(&self.path);
    }
}

fn bind(path: &Path) -> Result<UnixListener, VhostError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(VhostError::Occupied {
                path: path.to_owned(),
            });
        }
        Ok(_) => {
            if UnixStream::connect(path).is_ok() {
                return Err(VhostError::Served {
                    path: path.to_owned(),
                });
            }
            let removed = std::fs::remove_file(path);
            removed.map_err(|error| VhostError::file("removing the dead", path, error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(VhostError::file("looking at", path, error)),
    }
    let wrong = |error| VhostError::file("making the socket", path, error);
    let listener = UnixListener::bind(path).map_err(wrong)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(wrong)?;
    Ok(listener)
}

fn watch(events: &[(RawFd, u64)]) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    for (descriptor, event) in events {
        let event = EpollEvent::new(EventSet::IN, *event);
        epoll.ctl(ControlOperation::Add, *descriptor, event)?;
    }
    Ok(epoll)
}

/// The thread that accepts.
struct Door {
    listener: Listener,
    epoll: Epoll,
    /// Watched as long as it is there.
    _stopping: EventConsumer,
    done: EventConsumer,
    is_done: EventNotifier,
    device: Arc<dyn BlockDevice>,
    settings: Settings,
    status: Arc<Mutex<ServerStatus>>,
}

/// A guest that is connected.
struct Guest {
    life: Arc<Life>,
    thread: JoinHandle<()>,
}

impl Door {
    fn serve(mut self) {
        let mut guest: Option<Guest> = None;
        loop {
            let event = match self.next_event() {
                Ok(event) => event,
                Err(error) => {
                    tracing::error!(%error, "a vhost-user socket is not served any more");
                    break;
                }
            };
            match event {
                Some(KNOCK) if guest.is_some() => self.turn_away(),
                Some(KNOCK) => guest = self.let_in(),
                Some(DONE) => {
                    let _is_empty = self.done.consume();
                    self.see_off(guest.take());
                }
                Some(_) => break,
                None => {}
            }
        }
        if let Some(guest) = &guest {
            guest.life.end();
        }
        self.see_off(guest);
    }

    fn next_event(&self) -> io::Result<Option<u64>> {
        let mut events = [EpollEvent::default()];
        match self.epoll.wait(-1, &mut events) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(events.first().map(EpollEvent::data)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn turn_away(&self) {
        if let Err(error) = self.listener.accept() {
            tracing::warn!(%error, "a second guest could not be turned away");
        }
    }

    fn let_in(&mut self) -> Option<Guest> {
        match self.connect() {
            Ok(guest) => {
                let mut status = self.status.lock();
                status.is_connected = true;
                status.connections += 1;
                Some(guest)
            }
            Err(error) => {
                tracing::warn!(%error, "a guest could not connect");
                self.status.lock().last_failure = Some(error.to_string());
                None
            }
        }
    }

    fn connect(&mut self) -> io::Result<Guest> {
        let (wakes, wakers) = wakes(self.settings.threads)?;
        let memory = SharedMemory::new(Memory::new());
        let budget = Budget::new(self.settings.in_flight_bytes, wakers);
        let device = Arc::clone(&self.device);
        let (session, gone) = Session::new(device, memory.clone(), budget);
        let life = Arc::clone(&session.life);
        let backend = Backend::new(Arc::clone(&session), self.settings.clone(), wakes);
        let framework = |error| io::Error::other(format!("{error}"));
        let daemon = VhostUserDaemon::new("vhost-guest".to_owned(), Arc::clone(&backend), memory)
            .map_err(framework)?;
        let mut connection = Connection {
            _closing: Closing(session),
            daemon,
            backend,
            gone,
        };
        let handlers = connection.daemon.get_epoll_handlers();
        if let Err(error) = connection.backend.register(&handlers) {
            // The threads can not be told to end, and would be waited for.
            std::mem::forget(connection);
            return Err(error);
        }
        drop(handlers);
        connection
            .daemon
            .start(&mut self.listener)
            .map_err(framework)?;
        life.can_be_ended_by(connection.daemon.shutdown_handle());
        let is_done = self.is_done.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("vhost-wait".to_owned())
            .spawn(move || {
                connection.last();
                if let Err(error) = is_done.notify() {
                    tracing::error!(%error, "the end of a connection goes unnoticed");
                }
            })?;
        Ok(Guest { life, thread })
    }

    fn see_off(&self, guest: Option<Guest>) {
        let Some(guest) = guest else {
            return;
        };
        if guest.thread.join().is_err() {
            tracing::error!("a guest's connection has panicked");
        }
        let mut status = self.status.lock();
        status.is_connected = false;
        if let Some(reason) = guest.life.reason() {
            status.last_failure = Some(reason.to_string());
        }
    }
}

/// What a connection consists of. The framework waits for its threads when the daemon is dropped,
/// and they end with the session: so that is the first field, which is dropped first.
struct Connection {
    _closing: Closing,
    daemon: VhostUserDaemon<Arc<Backend>>,
    backend: Arc<Backend>,
    gone: Gone,
}

impl Connection {
    /// Waits until the guest has gone and everything that it asked for has been answered.
    fn last(self) {
        let Self {
            _closing: closing,
            mut daemon,
            backend,
            gone,
        } = self;
        if let Err(error) = daemon.wait() {
            tracing::debug!(%error, "a guest's connection has ended");
        }
        drop(closing);
        drop(daemon);
        backend.drain();
        drop(backend);
        gone.wait();
    }
}

/// Ends the threads of a session when it goes.
struct Closing(Arc<Session>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}
