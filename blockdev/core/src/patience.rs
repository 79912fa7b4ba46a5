//! A thread that may wait for a few short reads of its own.
//!
//! At depth 1 most of a read's time goes into waking threads: one that takes the completion, and
//! one that the kernel disturbs for it. A thread that has nothing else to do had better wait
//! itself. Whoever calls [`with`] says that it is such a thread; engines then may, and need not,
//! perform a short read within `submit`.

use std::cell::Cell;

/// Reads for which a thread waits within one call of [`with`]: a map page, a directory, a slot.
const READS_MAX: u8 = 3;
/// Longest read that is waited for.
const READ_BYTES_MAX: usize = 128 << 10;

thread_local! {
    static LEFT: Cell<u8> = const { Cell::new(0) };
}

/// Runs `work` on a thread that may wait.
pub fn with<T>(work: impl FnOnce() -> T) -> T {
    struct Reset(u8);
    impl Drop for Reset {
        fn drop(&mut self) {
            LEFT.set(self.0);
        }
    }
    let _reset = Reset(LEFT.replace(READS_MAX));
    work()
}

/// Says whether this thread may wait for a read of so many bytes, and counts it if so.
pub(crate) fn spend(bytes: usize) -> bool {
    let left = LEFT.get();
    let may_wait = left > 0 && bytes <= READ_BYTES_MAX;
    if may_wait {
        LEFT.set(left - 1);
    }
    may_wait
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_short_and_ends() {
        assert!(!spend(1), "nobody said so");
        with(|| {
            assert!(!spend(READ_BYTES_MAX + 1));
            with(|| assert_eq!((0..9).filter(|_| spend(1)).count(), 3));
            assert!(spend(1), "the inner call had its own");
        });
        assert!(!spend(1));
    }
}
