//! A local socket of one of the daemons.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

/// Longest wait for an answer.
const ANSWER_WAIT: Duration = Duration::from_secs(120);

/// A local socket.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// Names a socket; nothing is connected yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Asks; gives status and body.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        body: &str,
    ) -> std::io::Result<(String, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER_WAIT))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: local\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let cut = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
        let status = head.split(' ').nth(1).ok_or_else(cut)?;
        Ok((status.to_owned(), body.to_owned()))
    }

    /// What is at a path; `None` when nobody answers, or not with it.
    #[must_use]
    pub fn try_get<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        let (status, body) = self.request("GET", path, "").ok()?;
        (status == "200").then(|| serde_json::from_str(&body).ok())?
    }

    /// What is at a path.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        let (status, body) = self
            .request("GET", path, "")
            .unwrap_or_else(|error| panic!("{} {path}: {error}", self.socket.display()));
        assert_eq!(status, "200", "{path}: {body}");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"))
    }
}
