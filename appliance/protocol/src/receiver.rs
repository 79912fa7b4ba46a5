//! The receiving side of a stream, without sockets.
