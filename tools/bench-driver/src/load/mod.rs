//! The load generator: many machines, each an enrolled agent with a connection of its own, whose
//! frames are sealed ahead of time and then sent as fast as the appliance takes them.
//!
//! Invariants
//! * Nothing is sealed while frames are sent: `prepare` ends before `replay` begins.
//! * Frames are what an agent would send: sealed with the keys that the appliance gave, LSNs and
//!   previous LSNs without a gap, times that never fall. The appliance cannot tell the difference,
//!   and any LSN of it mounts.
//! * A replay ends when every record of it is acknowledged, and so durable.
//!
//! Commands on standard input, each answered by one line of JSON: `prepare BYTES` seals so many
//! bytes of user data, over all machines; `replay` sends them; `quit` ends in order.

pub(crate) mod failovers;
mod machine;
mod pool;
mod session;

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::error::BenchError;
use machine::Machine;
use pool::{Prepared, prepare};
use session::{Opening, Session};

/// Arguments of `load`.
#[derive(clap::Args, Debug)]
pub(crate) struct LoadArgs {
    /// Directory of agents' state directories, one for each machine
    #[arg(long)]
    agents: PathBuf,
    /// Disks of each machine
    #[arg(long)]
    disks: usize,
    /// Size of each disk in bytes
    #[arg(long)]
    disk_bytes: u64,
    /// Records of a frame
    #[arg(long)]
    frame_records: usize,
}

/// Serves commands until `quit` or the end of input.
pub(crate) fn run(args: &LoadArgs) -> Result<(), BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(BenchError::io("start threads"))?;
    let mut load = runtime.block_on(Load::connect(args))?;
    println!("{}", json!({ "machines": load.sessions.len() }));
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(BenchError::io("read a command"))?;
        let answer = match line.split_once(' ') {
            Some(("prepare", bytes)) => {
                let bytes = bytes
                    .parse()
                    .map_err(|_| BenchError::usage("prepare BYTES"))?;
                load.prepare(bytes, args)
            }
            None if line == "replay" => runtime.block_on(load.replay())?,
            None if line == "quit" => break,
            _ => return Err(BenchError::usage(format!("{line:?} is no command"))),
        };
        println!("{answer}");
    }
    runtime.block_on(load.close())
}

struct Load {
    machines: Vec<Machine>,
    sessions: Vec<Arc<Session>>,
    tasks: JoinSet<Result<(), BenchError>>,
    prepared: Prepared,
}

impl Load {
    async fn connect(args: &LoadArgs) -> Result<Self, BenchError> {
        let mut directories = Vec::new();
        let at = || BenchError::io(format!("list {}", args.agents.display()));
        for entry in std::fs::read_dir(&args.agents).map_err(at())? {
            directories.push(entry.map_err(at())?.path());
        }
        directories.sort();
        let mut load = Self {
            machines: Vec::new(),
            sessions: Vec::new(),
            tasks: JoinSet::new(),
            prepared: Prepared::default(),
        };
        for (number, directory) in directories.iter().enumerate() {
            let seed = u64::try_from(number).unwrap_or(0);
            let opening = Opening::new(args.disks, args.disk_bytes);
            let (session, stream) = Session::connect(directory, &opening).await?;
            let session = Arc::new(session);
            load.tasks.spawn(Arc::clone(&session).run(stream));
            let keys = load.unless_broken(session.keys()).await?;
            load.machines
                .push(Machine::new(&session.identity, keys, args.disk_bytes, seed));
            load.sessions.push(session);
        }
        Ok(load)
    }

    /// Waits for something, or for the first session that ends before its time.
    async fn unless_broken<T>(
        &mut self,
        what: impl Future<Output = Result<T, BenchError>>,
    ) -> Result<T, BenchError> {
        tokio::select! {
            result = what => result,
            Some(ended) = self.tasks.join_next() => {
                match ended {
                    Ok(Err(error)) => Err(error),
                    Ok(Ok(())) => Err(crate::error::ended("?")),
                    Err(error) => Err(BenchError::usage(error.to_string())),
                }
            }
        }
    }

    fn prepare(&mut self, bytes: u64, args: &LoadArgs) -> Value {
        let began = Instant::now();
        self.prepared = prepare(&mut self.machines, bytes, args.frame_records);
        json!({
            "user_bytes": self.prepared.user_bytes,
            "frame_bytes": self.prepared.frame_bytes,
            "frames": self.prepared.frames.iter().map(Vec::len).sum::<usize>(),
            "elapsed_s": began.elapsed().as_secs_f64(),
        })
    }

    async fn replay(&mut self) -> Result<Value, BenchError> {
        let prepared = std::mem::take(&mut self.prepared);
        let (user_bytes, frame_bytes) = (prepared.user_bytes, prepared.frame_bytes);
        let sessions = self.sessions.clone();
        let began = Instant::now();
        for (session, frames) in sessions.iter().zip(prepared.frames) {
            session.send(frames);
        }
        let all = async {
            for session in &sessions {
                session.acknowledged().await?;
            }
            Ok(())
        };
        self.unless_broken(all).await?;
        let elapsed_s = began.elapsed().as_secs_f64();
        for session in &sessions {
            session.forget();
        }
        Ok(json!({
            "user_bytes": user_bytes,
            "frame_bytes": frame_bytes,
            "elapsed_s": elapsed_s,
        }))
    }

    async fn close(mut self) -> Result<(), BenchError> {
        for session in &self.sessions {
            session.close();
        }
        while let Some(ended) = self.tasks.join_next().await {
            ended.map_err(|error| BenchError::usage(error.to_string()))??;
        }
        Ok(())
    }
}
