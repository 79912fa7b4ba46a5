//! Messages as bytes: a 4-byte little-endian length, then the message. Lengths are checked before
//! anything is allocated.

use serde::{Serialize, de::DeserializeOwned};

/// Longest message, in bytes: a frame of 16 MiB and its envelope.
pub const MESSAGE_BYTES_MAX: usize = (16 << 20) + 4096;
/// Bytes before each message.
pub const PREFIX_BYTES: usize = 4;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Longer than [`MESSAGE_BYTES_MAX`].
    #[error("message of {len} bytes is above the limit of {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// The length.
        len: usize,
    },
    /// Not decodable, or bytes left over.
    #[error("message is malformed")]
    Malformed,
}

/// Encodes a message with its length prefix.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, WireError> {
    let prefixed = postcard::to_extend(message, vec![0; PREFIX_BYTES]);
    let mut bytes = prefixed.map_err(|_| WireError::Malformed)?;
    let len = bytes.len() - PREFIX_BYTES;
    if len > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLong { len });
    }
    let prefix = u32::try_from(len).map_err(|_| WireError::TooLong { len })?;
    bytes[..PREFIX_BYTES].copy_from_slice(&prefix.to_le_bytes());
    Ok(bytes)
}

/// Encodes what comes before the last field of a message, a blob of `blob_len` bytes that is left
/// empty in `message`: these bytes and the blob are the encoded message.
///
/// # Errors
/// [`WireError::TooLong`].
pub(crate) fn encode_before_blob<M: Serialize>(
    message: &M,
    blob_len: usize,
) -> Result<Vec<u8>, WireError> {
    let mut bytes = encode(message)?;
    let empty_len = bytes.pop();
    debug_assert_eq!(empty_len, Some(0), "the last field is an empty blob");
    bytes = postcard::to_extend(&blob_len, bytes).map_err(|_| WireError::Malformed)?;
    let len = bytes.len() - PREFIX_BYTES + blob_len;
    if len > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLong { len });
    }
    let prefix = u32::try_from(len).map_err(|_| WireError::TooLong { len })?;
    bytes[..PREFIX_BYTES].copy_from_slice(&prefix.to_le_bytes());
    Ok(bytes)
}

/// Reads a length prefix.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn decode_prefix(prefix: [u8; PREFIX_BYTES]) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MESSAGE_BYTES_MAX {
        Err(WireError::TooLong { len })
    } else {
        Ok(len)
    }
}

/// Decodes the bytes after the prefix.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, WireError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Malformed),
    }
}

/// Bytes as one piece, not element by element.
pub(crate) mod blob {
    use core::fmt;
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Blob;
        impl Visitor<'_> for Blob {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        from.deserialize_byte_buf(Blob)
    }
}
