//! Cuts the data of a source into chunks, and reads several of them at once.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::BulkError;
use crate::io::{BulkFile, Way, blocking};
use crate::source::BlockSource;

/// Bytes of a chunk; chunks begin at its multiples.
pub(crate) const CHUNK: u64 = 1 << 20;
/// Extents are asked for in windows of this size, so that their number is bounded.
const WINDOW: u64 = 256 << 20;

/// The chunks of a disk that may hold anything but zeroes, in order.
pub(crate) struct Chunks {
    source: Arc<dyn BlockSource>,
    unit: u64,
    /// Everything below was asked for.
    asked: u64,
    ready: VecDeque<Range<u64>>,
    /// Holes are chunks too.
    with_holes: bool,
}

impl Chunks {
    /// From `start`, a multiple of `unit`, on. Chunks are widened to whole units.
    pub(crate) fn new(
        source: Arc<dyn BlockSource>,
        start: u64,
        unit: u64,
        with_holes: bool,
    ) -> Self {
        Self {
            source,
            unit,
            asked: start,
            ready: VecDeque::new(),
            with_holes,
        }
    }

    /// Everything below is done or in chunks that were given out.
    pub(crate) fn position(&self) -> u64 {
        self.ready.front().map_or(self.asked, |chunk| chunk.start)
    }

    /// The next chunk; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Range<u64>>, BulkError> {
        if self.ready.is_empty() && self.asked < self.source.size_bytes() {
            self.ask().await?;
        }
        Ok(self.ready.pop_front())
    }

    /// Looks at one window, which may be empty of data.
    pub(crate) async fn ask(&mut self) -> Result<(), BulkError> {
        let size = self.source.size_bytes();
        while self.ready.is_empty() && self.asked < size {
            let window = self.asked..((self.asked / WINDOW + 1) * WINDOW).min(size);
            self.asked = window.end;
            let data = if self.with_holes {
                vec![window]
            } else {
                let source = Arc::clone(&self.source);
                blocking(move || source.data(window)).await?
            };
            let mut cut_to = 0;
            for part in data {
                let start = (part.start / self.unit * self.unit).max(cut_to);
                let end = part.end.next_multiple_of(self.unit).min(size);
                cut_to = end.max(cut_to);
                self.cut(start..end);
            }
        }
        Ok(())
    }

    fn cut(&mut self, part: Range<u64>) {
        let mut at = part.start;
        while at < part.end {
            let end = ((at / CHUNK + 1) * CHUNK).min(part.end);
            match self.ready.back_mut() {
                // Small extents of one chunk are read at once, with the holes between them.
                Some(last) if last.start / CHUNK == at / CHUNK => last.end = end,
                _ => self.ready.push_back(at..end),
            }
            at = end;
        }
    }
}

/// Reads chunks of a source: by the ring where it is a file, on a thread where it is not.
#[derive(Clone)]
pub(crate) struct ChunkReader {
    source: Arc<dyn BlockSource>,
    file: Option<Rc<BulkFile>>,
}

impl ChunkReader {
    pub(crate) fn open(way: Way, source: &Arc<dyn BlockSource>) -> Result<Self, BulkError> {
        let file = if source.is_plain_file() {
            let path = source.path();
            let opened = std::fs::File::open(path).map_err(BulkError::io("open", path))?;
            Some(Rc::new(BulkFile::new(way, path, opened, false)))
        } else {
            None
        };
        Ok(Self {
            source: Arc::clone(source),
            file,
        })
    }

    /// Reads a whole chunk.
    pub(crate) async fn read(&self, chunk: &Range<u64>) -> Result<Buffer, BulkError> {
        let len = usize::try_from(chunk.end - chunk.start).unwrap_or(usize::MAX);
        let mut buffer = Buffer::zeroed(len);
        let start = chunk.start;
        if let Some(file) = &self.file {
            let (result, buffer) = file.read(buffer, start).await;
            let count = result?;
            if count < len {
                return Err(BulkError::Short {
                    path: self.source.path().to_owned(),
                    at: start + count as u64,
                });
            }
            return Ok(buffer);
        }
        let source = Arc::clone(&self.source);
        blocking(move || {
            source.read(start, buffer.bytes_mut())?;
            Ok(buffer)
        })
        .await
    }

    /// Gives the file back. Nobody reads any more.
    pub(crate) async fn close(self) {
        if let Some(file) = self.file.and_then(Rc::into_inner) {
            file.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::io::{IoChoice, run};

    struct Holes(PathBuf, Vec<Range<u64>>, u64);

    impl BlockSource for Holes {
        fn path(&self) -> &Path {
            &self.0
        }
        fn size_bytes(&self) -> u64 {
            self.2
        }
        fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError> {
            let clip = |part: &Range<u64>| part.start.max(range.start)..part.end.min(range.end);
            let mut parts: Vec<_> = self.1.iter().map(clip).collect();
            parts.retain(|part| part.start < part.end);
            Ok(parts)
        }
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), BulkError> {
            Ok(())
        }
    }

    fn chunks(data: Vec<Range<u64>>, size: u64, start: u64) -> Vec<Range<u64>> {
        let source: Arc<dyn BlockSource> = Arc::new(Holes(PathBuf::new(), data, size));
        run(IoChoice::Threads, |_| async move {
            let mut chunks = Chunks::new(source, start, 4096, false);
            let mut all = Vec::new();
            while let Some(chunk) = chunks.next().await? {
                all.push(chunk);
            }
            assert_eq!(chunks.position(), size);
            Ok(all)
        })
        .unwrap()
    }

    #[test]
    fn chunks_cover_the_data_once_and_in_order() {
        let far = 3 * WINDOW + 5000;
        let data = vec![100..200, 8000..8100, CHUNK - 10..CHUNK + 10, far..far + 1];
        let found = chunks(data, far + 512, 0);
        let last = far / 4096 * 4096..far + 512;
        assert_eq!(found, [0..CHUNK, CHUNK..CHUNK + 4096, last]);
        assert_eq!(chunks(vec![0..9, 9..3 * CHUNK], 3 * CHUNK, CHUNK).len(), 2);
        assert_eq!(chunks(vec![], 10 * WINDOW, 0), []);
    }
}
