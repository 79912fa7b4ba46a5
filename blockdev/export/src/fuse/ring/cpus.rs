//! The processors of the machine. The kernel has one queue for each that there could be, and
//! puts a request into the queue of the processor that its caller runs on.

use std::io;

/// The processors, by number.
pub(super) struct Cpus {
    /// How many the kernel has queues for.
    pub(super) possible_count: u16,
    /// Those that run.
    pub(super) online: Vec<u16>,
}

impl Cpus {
    /// Asks the system.
    pub(super) fn read() -> io::Result<Self> {
        let list = |name: &str| {
            let path = format!("/sys/devices/system/cpu/{name}");
            let text = std::fs::read_to_string(&path)?;
            parse(&text).ok_or_else(|| io::Error::other(format!("{path} holds {text:?}")))
        };
        let possible_count = u16::try_from(list("possible")?.len())
            .map_err(|_| io::Error::other("there are too many processors"))?;
        let mut online = list("online")?;
        online.retain(|cpu| *cpu < possible_count);
        if online.is_empty() {
            return Err(io::Error::other("no processor has a queue"));
        }
        Ok(Self {
            possible_count,
            online,
        })
    }
}

/// Understands a list such as `0-3,8`.
fn parse(text: &str) -> Option<Vec<u16>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Keeps the calling thread on one processor.
pub(in crate::fuse) fn pin(cpu: u16) -> io::Result<()> {
    // SAFETY: a set of processors is plain numbers, for which zero is valid and empty; the calls
    // get its address and its true size.
    #[allow(unsafe_code)]
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if usize::from(cpu) >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        libc::CPU_SET(usize::from(cpu), &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(parse("0\n"), Some(vec![0]));
        assert_eq!(parse("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse(""), None);
        assert_eq!(parse("a-b"), None);
        assert_eq!(parse("0-70000"), None);
    }

    #[test]
    fn this_machine_has_processors() {
        let cpus = Cpus::read().expect("sysfs");
        assert!(usize::from(cpus.possible_count) >= cpus.online.len());
    }
}
