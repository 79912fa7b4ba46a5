//! The sending side of a stream, without sockets.
