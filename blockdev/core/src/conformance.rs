//! What every storage must do, whatever it is made of.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use crate::buffer::IoBuffer;
use crate::id::Token;
use crate::storage::{
    FileId, FileName, Storage, StorageCompleter, StorageCompletion, StorageErrorKind, StorageOp,
    StorageOutcome,
};
use crate::wait;

pub(crate) fn name(text: &str) -> FileName {
    FileName::new(text)
}

pub(crate) fn create(storage: &dyn Storage, text: &str) -> FileId {
    match wait::storage(storage, StorageOp::Create { name: name(text) }).unwrap() {
        StorageOutcome::Opened { file, length: 0 } => file,
        other => panic!("create gave {other:?}"),
    }
}

pub(crate) fn open(storage: &dyn Storage, text: &str) -> (FileId, u64) {
    match wait::storage(storage, StorageOp::Open { name: name(text) }).unwrap() {
        StorageOutcome::Opened { file, length } => (file, length),
        other => panic!("open gave {other:?}"),
    }
}

pub(crate) fn write(storage: &dyn Storage, file: FileId, offset: u64, bytes: &[u8]) {
    let buffer = IoBuffer::copy_of(bytes);
    match wait::storage(
        storage,
        StorageOp::Write {
            file,
            offset,
            buffer,
        },
    )
    .unwrap()
    {
        StorageOutcome::Written(buffer) => assert_eq!(buffer.len(), bytes.len()),
        other => panic!("write gave {other:?}"),
    }
}

pub(crate) fn read(storage: &dyn Storage, file: FileId, offset: u64, length: usize) -> Vec<u8> {
    let buffer = IoBuffer::zeroed(length);
    match wait::storage(
        storage,
        StorageOp::Read {
            file,
            offset,
            buffer,
        },
    )
    .unwrap()
    {
        StorageOutcome::Read(buffer) => buffer.to_vec(),
        other => panic!("read gave {other:?}"),
    }
}

pub(crate) fn kind(storage: &dyn Storage, op: StorageOp) -> StorageErrorKind {
    wait::storage(storage, op).unwrap_err().kind
}

pub(crate) fn list(storage: &dyn Storage, directory: &str) -> Vec<String> {
    let op = StorageOp::List {
        directory: directory.to_owned(),
    };
    match wait::storage(storage, op).unwrap() {
        StorageOutcome::Listed(mut names) => {
            names.sort();
            names.iter().map(|name| name.as_str().to_owned()).collect()
        }
        other => panic!("list gave {other:?}"),
    }
}

/// Runs all of it.
pub(crate) fn check(storage: &dyn Storage) {
    check_names(storage);
    check_bytes(storage);
    check_open_files(storage);
    check_misuse(storage);
    check_depth(storage);
}

fn check_names(storage: &dyn Storage) {
    let first = create(storage, "names/a");
    assert!(matches!(
        kind(
            storage,
            StorageOp::Create {
                name: name("names/a")
            }
        ),
        StorageErrorKind::Exists
    ));
    assert!(matches!(
        kind(
            storage,
            StorageOp::Open {
                name: name("names/none")
            }
        ),
        StorageErrorKind::NotFound
    ));
    write(storage, first, 0, &[1; 4096]);
    let second = create(storage, "names/b");
    write(storage, second, 0, &[2; 8192]);
    let rename = StorageOp::Rename {
        from: name("names/b"),
        to: name("names/a"),
    };
    wait::storage(storage, rename).unwrap();
    assert_eq!(list(storage, "names"), ["names/a"]);
    let (renamed, length) = open(storage, "names/a");
    assert_eq!(length, 8192);
    assert_eq!(read(storage, renamed, 0, 4096), [2; 4096]);
    assert_eq!(
        read(storage, first, 0, 4096),
        [1; 4096],
        "a replaced file stays readable"
    );
    let sync = StorageOp::SyncDirectory {
        directory: "names".to_owned(),
    };
    wait::storage(storage, sync).unwrap();
    assert!(list(storage, "nowhere").is_empty());
    assert!(list(storage, "").is_empty());
}

fn check_bytes(storage: &dyn Storage) {
    let file = create(storage, "bytes");
    let pattern: Vec<u8> = (0..12_288_u32).map(|i| (i % 251) as u8).collect();
    write(storage, file, 4096, &pattern);
    assert_eq!(read(storage, file, 0, 4096), [0; 4096]);
    assert_eq!(read(storage, file, 4608, 1024), pattern[512..1536]);
    assert_eq!(
        read(storage, file, 8192, 65536),
        pattern[4096..],
        "short at the end"
    );
    assert!(read(storage, file, 1 << 20, 4096).is_empty());
    wait::storage(storage, StorageOp::SetLength { file, length: 8192 }).unwrap();
    wait::storage(
        storage,
        StorageOp::SetLength {
            file,
            length: 16384,
        },
    )
    .unwrap();
    let back = read(storage, file, 0, 32768);
    assert_eq!(back.len(), 16384);
    assert_eq!(back[4096..8192], pattern[..4096]);
    assert!(
        back[8192..].iter().all(|byte| *byte == 0),
        "cut bytes do not come back"
    );
    wait::storage(storage, StorageOp::Sync { file }).unwrap();
    let StorageOutcome::Capacity(room) = wait::storage(
        storage,
        StorageOp::Capacity {
            directory: String::new(),
        },
    )
    .unwrap() else {
        panic!("capacity gave something else")
    };
    assert!(room.free_bytes <= room.total_bytes && room.total_bytes > 0);
}

fn check_open_files(storage: &dyn Storage) {
    let file = create(storage, "open");
    write(storage, file, 0, &[7; 4096]);
    wait::storage(storage, StorageOp::Remove { name: name("open") }).unwrap();
    assert_eq!(
        read(storage, file, 0, 4096),
        [7; 4096],
        "a removed file stays readable"
    );
    wait::storage(storage, StorageOp::Close { file }).unwrap();
    let buffer = IoBuffer::zeroed(4096);
    assert!(matches!(
        kind(
            storage,
            StorageOp::Read {
                file,
                offset: 0,
                buffer
            }
        ),
        StorageErrorKind::NotOpen
    ));
    assert!(matches!(
        kind(storage, StorageOp::Close { file }),
        StorageErrorKind::NotOpen
    ));
    assert!(matches!(
        kind(storage, StorageOp::Remove { name: name("open") }),
        StorageErrorKind::NotFound
    ));
}

fn check_misuse(storage: &dyn Storage) {
    let file = create(storage, "misuse");
    let ops = [
        StorageOp::Write {
            file,
            offset: 512,
            buffer: IoBuffer::zeroed(4096),
        },
        StorageOp::Write {
            file,
            offset: 0,
            buffer: IoBuffer::zeroed(512),
        },
        StorageOp::Write {
            file,
            offset: u64::MAX - 4095,
            buffer: IoBuffer::zeroed(4096),
        },
        StorageOp::Read {
            file,
            offset: 1,
            buffer: IoBuffer::zeroed(512),
        },
        StorageOp::SetLength { file, length: 1 },
        StorageOp::Rename {
            from: name("misuse"),
            to: name("elsewhere/misuse"),
        },
        StorageOp::List {
            directory: "../..".to_owned(),
        },
        StorageOp::SyncDirectory {
            directory: "/etc".to_owned(),
        },
    ];
    for op in ops {
        let text = format!("{op:?}");
        assert!(
            matches!(kind(storage, op), StorageErrorKind::Io(_)),
            "{text}"
        );
    }
    assert_eq!(open(storage, "misuse").1, 0);
}

struct Collect(Sender<StorageCompletion>);

impl StorageCompleter for Collect {
    fn complete(&self, completion: StorageCompletion) {
        self.0.send(completion).unwrap();
    }
}

/// Many writes and reads at once, each completed exactly once with its own token.
fn check_depth(storage: &dyn Storage) {
    const COUNT: u64 = 300;
    let file = create(storage, "depth");
    let (sender, receiver) = channel();
    let to: Arc<dyn StorageCompleter> = Arc::new(Collect(sender));
    for index in 0..COUNT {
        let byte = u8::try_from(index % 251).unwrap();
        let buffer = IoBuffer::copy_of(&[byte; 4096]);
        let op = StorageOp::Write {
            file,
            offset: index * 4096,
            buffer,
        };
        storage.submit(Token(index), op, Arc::clone(&to));
    }
    let mut seen: Vec<u64> = (0..COUNT)
        .map(|_| receiver.recv().unwrap().token.0)
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..COUNT).collect::<Vec<_>>());
    for index in 0..COUNT {
        let buffer = IoBuffer::zeroed(4096);
        let op = StorageOp::Read {
            file,
            offset: index * 4096,
            buffer,
        };
        storage.submit(Token(index), op, Arc::clone(&to));
    }
    for _ in 0..COUNT {
        let completion = receiver.recv().unwrap();
        let StorageOutcome::Read(buffer) = completion.result.unwrap() else {
            panic!("read gave something else")
        };
        let byte = u8::try_from(completion.token.0 % 251).unwrap();
        assert_eq!(buffer[..], [byte; 4096]);
    }
    assert!(receiver.try_recv().is_err());
}
