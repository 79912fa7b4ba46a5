//! The network between agent and appliance, with a switch.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;

/// What the network does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Network {
    /// Passes everything on.
    Works = 0,
    /// Ends connections, and takes no new ones.
    Cut = 1,
    /// Keeps connections and passes nothing on.
    Silent = 2,
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<AtomicU8>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Stands in front of a port of this machine.
    pub(crate) fn before(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = listener.local_addr().expect("it has an address").port();
        let state = Arc::new(AtomicU8::new(0));
        let open = Arc::new(Mutex::new(Vec::new()));
        let (shared, connections) = (Arc::clone(&state), Arc::clone(&open));
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.load(Ordering::Acquire) != Network::Cut as u8 {
                    connect(stream, target, &shared, &connections);
                }
            }
        });
        Self { port, state, open }
    }

    pub(crate) fn set(&self, network: Network) {
        self.state.store(network as u8, Ordering::Release);
        // What was silent for a while is not taken up again: the connection is dead.
        if network == Network::Silent {
            return;
        }
        for stream in self.open.lock().drain(..) {
            let _closed = stream.shutdown(Shutdown::Both);
        }
    }
}

fn connect(
    stream: TcpStream,
    target: u16,
    state: &Arc<AtomicU8>,
    open: &Arc<Mutex<Vec<TcpStream>>>,
) {
    let Ok(onward) = TcpStream::connect(("127.0.0.1", target)) else {
        return;
    };
    for (from, to) in [(&stream, &onward), (&onward, &stream)] {
        let (Ok(from), Ok(to), Ok(known)) = (from.try_clone(), to.try_clone(), from.try_clone())
        else {
            return;
        };
        open.lock().push(known);
        let state = Arc::clone(state);
        std::thread::spawn(move || pass_on(from, to, &state));
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, state: &AtomicU8) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        while state.load(Ordering::Acquire) == Network::Silent as u8 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        if count == 0 || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _closed = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
