//! Names of things: identities that never collide, and counters that never mix.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// Says why a text is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a UUID")]
pub struct ParseIdError {
    /// The text that was given.
    pub text: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[derive(Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The identity of nothing: sixteen zero bytes.
            pub const NIL: Self = Self([0; 16]);

            /// Says whether this is [`Self::NIL`].
            pub fn is_nil(self) -> bool {
                self == Self::NIL
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_bytes(self.0).fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                uuid::Uuid::parse_str(text)
                    .map(|id| Self(id.into_bytes()))
                    .map_err(|_| ParseIdError { text: text.to_owned() })
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }
    };
}

uuid_id!(
    /// A protected machine.
    MachineId
);
uuid_id!(
    /// A disk of a machine.
    DiskId
);
uuid_id!(
    /// One line of writes of a machine.
    HistoryId
);
uuid_id!(
    /// Whoever makes change records: a mobility agent, or an appliance that writes to a branch.
    AgentId
);
uuid_id!(
    /// One data directory of an appliance, or one spool.
    StoreId
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        #[derive(Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter!(
    /// Log sequence number: one counter per machine and history, shared by its disks. 0 means
    /// "before the first record".
    Lsn(u64)
);
counter!(
    /// Fences the one writer of a history. 0 means "no writer yet".
    Epoch(u64)
);
counter!(
    /// Names a batch within a history. 0 means "not in a batch".
    BatchId(u32)
);
counter!(
    /// Names a recovery point within a store.
    PointId(u64)
);
counter!(
    /// Names a segment within a store. Log segments and seed segments share the numbers.
    SegmentId(u32)
);
counter!(
    /// Index of a slot within its segment, in the order of its directory.
    SlotIndex(u32)
);
counter!(
    /// Generation of a disk's key, scoped to the disk, so that it means the same on every
    /// appliance that holds the disk. 0 means "not encrypted".
    KeyId(u32)
);
counter!(
    /// Chosen by whoever submits an operation; comes back with its completion.
    Token(u64)
);

impl Lsn {
    /// Before the first record of a history.
    pub const ZERO: Self = Self(0);

    /// The LSN that follows.
    ///
    /// # Panics
    /// When the counter is exhausted, after 2^64 writes.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("LSN counter exhausted"))
    }
}
