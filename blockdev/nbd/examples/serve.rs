//! Serves an image file, or memory, over a Unix socket until it is killed.
//!
//! `serve SOCKET FILE` or `serve SOCKET memory:BYTES`

use std::path::Path;
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, DeviceOptions, MemoryDevice, RealDevice};
use afterimage_nbd::server::Stopping;
use afterimage_nbd::{
    Answer, Export, Exports, ListedExport, NoContexts, Peer, Server, ServerSettings,
};
use tokio::net::UnixListener;
use tokio::sync::watch;

struct One(Arc<dyn BlockDevice>);

impl Exports for One {
    fn admit<'a>(&'a self, _peer: &'a Peer) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn list<'a>(&'a self, _peer: &'a Peer) -> Answer<'a, Vec<ListedExport>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn open<'a>(&'a self, _peer: &'a Peer, name: &'a str) -> Answer<'a, Arc<Export>> {
        Box::pin(async move {
            Ok(Arc::new(Export {
                name: name.to_owned(),
                description: String::new(),
                device: Arc::clone(&self.0),
                can_multi_conn: true,
                is_zeroing_fast: true,
                contexts: Arc::new(NoContexts),
            }))
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), Some(what)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve SOCKET FILE | serve SOCKET memory:BYTES".into());
    };
    let device: Arc<dyn BlockDevice> = match what.strip_prefix("memory:") {
        Some(bytes) => MemoryDevice::new(bytes.parse()?, 512),
        None => RealDevice::open(Path::new(&what), DeviceOptions::default())?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let _removed = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let server = Server::new(Arc::new(One(device)), ServerSettings::default(), None);
        let (_stop, stopping) = watch::channel(false);
        server.serve_unix(listener, Stopping(stopping)).await;
        Ok(())
    })
}
