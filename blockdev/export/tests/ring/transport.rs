//! The transport that these tests run over: `io_uring`. The kernel's switch for it is one for
//! the whole machine, so that it is on only while a test needs it, and then as it was before.

use std::fs;
use std::sync::Mutex;

use afterimage_export::{IoUring, Transport};

pub(crate) const IO_URING: IoUring = IoUring::Auto;
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// How many hold the switch, and what it was before the first.
static HELD: Mutex<(usize, String)> = Mutex::new((0, String::new()));

/// A kernel before 6.14 has no rings: what is tested there is that nobody misses them.
pub(crate) fn expected() -> Transport {
    if fs::exists(SWITCH).unwrap() {
        Transport::IoUring
    } else {
        Transport::Classic
    }
}

/// Holds the kernel's switch on.
pub(crate) struct Switch;

pub(crate) fn switch() -> Switch {
    let mut held = HELD.lock().unwrap();
    if held.0 == 0 && expected() == Transport::IoUring {
        held.1 = fs::read_to_string(SWITCH).unwrap();
        fs::write(SWITCH, "Y").unwrap();
    }
    held.0 += 1;
    Switch
}

impl Drop for Switch {
    fn drop(&mut self) {
        let mut held = HELD.lock().unwrap();
        held.0 -= 1;
        if held.0 == 0 && expected() == Transport::IoUring {
            fs::write(SWITCH, held.1.trim()).unwrap();
        }
    }
}
