//! A storage and a device in memory: exact, and complete before `submit` returns. What they hold
//! is gone with the process, so a sync has nothing to do.

mod device;
mod storage;

pub use device::MemoryDevice;
pub use storage::MemoryStorage;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{self, create, kind, write};
    use crate::storage::{StorageErrorKind, StorageOp};
    use crate::{IoBuffer, wait};

    #[test]
    fn memory_does_what_a_storage_does() {
        conformance::check(&*MemoryStorage::new());
    }

    #[test]
    fn room_ends_and_comes_back() {
        let storage = MemoryStorage::with_capacity(8192);
        let file = create(&*storage, "a");
        write(&*storage, file, 0, &[1; 8192]);
        let other = create(&*storage, "b");
        let buffer = IoBuffer::zeroed(4096);
        let op = StorageOp::Write {
            file: other,
            offset: 0,
            buffer,
        };
        assert!(matches!(kind(&*storage, op), StorageErrorKind::NoSpace));
        wait::storage(
            &*storage,
            StorageOp::Remove {
                name: conformance::name("a"),
            },
        )
        .unwrap();
        wait::storage(&*storage, StorageOp::Close { file }).unwrap();
        write(&*storage, other, 0, &[1; 8192]);
    }
}
