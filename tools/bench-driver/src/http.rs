//! One connection to a local socket, kept open: what is timed is the request, not a new process.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::error::BenchError;

/// Longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// See the module's text.
pub(crate) struct LocalClient {
    stream: BufReader<UnixStream>,
}

impl LocalClient {
    /// Connects.
    pub(crate) fn connect(socket: &Path) -> Result<Self, BenchError> {
        let stream = UnixStream::connect(socket)
            .map_err(BenchError::io(format!("connect to {}", socket.display())))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Posts JSON and waits for the whole answer.
    pub(crate) fn post(&mut self, path: &str, body: &Value) -> Result<Value, BenchError> {
        let body = body.to_string();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.map_err(BenchError::io("send a request"))?;
        let (status, body) = self
            .answer()
            .map_err(BenchError::io("read the appliance's answer"))?;
        let is_success = status
            .split(' ')
            .nth(1)
            .is_some_and(|code| code.starts_with('2'));
        if !is_success {
            return Err(BenchError::Answer { status, body });
        }
        serde_json::from_str(&body).map_err(|_| BenchError::Answer { status, body })
    }

    fn answer(&mut self) -> std::io::Result<(String, String)> {
        let malformed = || std::io::Error::other("the answer is malformed");
        let status = self.line()?;
        let mut length = None;
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse::<usize>().ok();
            }
        }
        let length = length
            .filter(|length| *length <= ANSWER_BYTES_MAX)
            .ok_or_else(malformed)?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok((status, String::from_utf8(body).map_err(|_| malformed())?))
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.stream.by_ref().take(64 << 10).read_line(&mut line)?;
        if !line.ends_with('\n') {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}
