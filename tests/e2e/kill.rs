//! `kill -9` of the server, of the agent and of both, at random instants under load.
//!
//! Each round: the writers stand still at a known LSN and a known state; they go on; the kill; all
//! runs again. Then the source holds every write that was answered, the newest state equals the
//! source, the state at the known LSN is the known one, and LSNs went up only.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::load::{Load, Model, Random};
use crate::shell::{self, Mount, fill_random, holds, sparse, text, wait_until};
use crate::site::{Daemon, MACHINE, Plan, Site};

const DISK_MIB: u64 = 512;
/// The writers stay in a part of the disk, so that a bounded pass is seen to be bounded.
const HOT_BLOCKS: u64 = 8192;
const WRITERS: u64 = 4;
/// Answers must come within this, also when nobody serves the device any more.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

fn rounds() -> u64 {
    let rounds = std::env::var("AFTERIMAGE_ROUNDS").ok();
    rounds.map_or(10, |rounds| {
        rounds.parse().expect("AFTERIMAGE_ROUNDS is a number")
    })
}

fn protected_site() -> (Site, PathBuf) {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, DISK_MIB);
    fill_random(&source, 256);
    site.protect(&source, "d");
    (site, source)
}

fn captured(site: &Site) -> u64 {
    site.aft(&["agent", "status"])["captured"]
        .as_u64()
        .expect("an LSN is a number")
}

fn campaign(seed: u64, victims: &[Daemon]) {
    let (mut site, source) = protected_site();
    let mut random = Random::new(seed);
    let mut model = Model::default();
    let mut read_bytes_most = 0;
    for round in 1..=rounds() {
        let (known_lsn, mut known) = (captured(&site), model.clone());
        let first = random.below(8) * HOT_BLOCKS;
        let load = Load::start(&site.device("d"), &model, first, HOT_BLOCKS, WRITERS);
        let delay_ms = 20 + random.below(700);
        std::thread::sleep(Duration::from_millis(delay_ms));
        let written = load.written();
        for victim in victims {
            site.kill(*victim);
        }
        let is_agent_dead = victims.contains(&Daemon::Agent);
        if is_agent_dead {
            let begun = Instant::now();
            wait_until(
                ANSWER_LIMIT.as_secs(),
                "every writer has its answer",
                || holds(load.has_ended(), || "a write hangs".to_owned()),
            );
            println!(
                "round {round}: writers had their errors after {:?}",
                begun.elapsed()
            );
        } else {
            // The source goes on without the server.
            wait_until(30, "writes go on without the server", || {
                holds(
                    load.written() > written + 100 && site.is_alive(Daemon::Agent),
                    || format!("{} writes, {written} at the kill", load.written()),
                )
            });
        }
        let (now, errors) = load.end(model);
        model = now;
        assert_eq!(errors.is_empty(), !is_agent_dead, "{errors:?}");
        // The agent must come up without its server too.
        for victim in victims.iter().rev() {
            site.start(*victim);
        }
        site.wait_connected();
        site.wait_caught_up();
        assert!(
            site.durable() >= known_lsn,
            "{} after {known_lsn}",
            site.durable()
        );
        let disk = site.local_disk("d");
        let read_bytes = disk["recheck_read_bytes"].as_u64().unwrap_or(0);
        if is_agent_dead {
            assert!(
                read_bytes <= 4 * HOT_BLOCKS * 4096,
                "{read_bytes} bytes were read again"
            );
            read_bytes_most = read_bytes_most.max(read_bytes);
        }
        model.check(&source);
        site.assert_replica_is("d", &source);
        let reference = format!("{MACHINE}/d@lsn:{known_lsn}");
        site.with_view(&reference, |view| known.check(view));
        println!(
            "round {round}: killed after {delay_ms} ms, {} writes, LSN {known_lsn} to {}, \
             {read_bytes} bytes read again",
            model.last(),
            site.durable()
        );
    }
    if read_bytes_most > 0 {
        println!(
            "at most {} MiB of {DISK_MIB} were read again",
            read_bytes_most >> 20
        );
    }
    let verified = site.aft(&["log", "verify"]);
    assert_eq!(
        verified["damage"].as_array().map(Vec::len),
        Some(0),
        "{verified}"
    );
}

#[test]
#[ignore = "needs root and release binaries: tools/check kill"]
fn a_killed_server_loses_nothing_and_the_source_goes_on() {
    campaign(1, &[Daemon::Server]);
}

#[test]
#[ignore = "needs root and release binaries: tools/check kill"]
fn a_killed_agent_loses_nothing_and_reads_only_what_was_marked() {
    campaign(2, &[Daemon::Agent]);
}

#[test]
#[ignore = "needs root and release binaries: tools/check kill"]
fn both_killed_lose_nothing() {
    campaign(3, &[Daemon::Server, Daemon::Agent]);
}

/// The file system above a dead agent gives honest errors, and every file that was synced is there
/// when it is mounted again, and in the replica.
#[test]
#[ignore = "needs root and release binaries: tools/check kill"]
fn synced_files_outlive_the_agent() {
    let mut site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 256);
    let device = site.attach(&source, "d");
    shell::run("mkfs.ext4", &["-q", "-F", text(&device)]);
    site.aft(&["disk", "protect", "d"]);
    site.wait_caught_up();
    let directory = site.path("mnt");
    let mut synced: Vec<(String, Vec<u8>)> = Vec::new();
    for round in 0..3u64 {
        let mount = Mount::new(&site.device("d"), &directory);
        let (place, begun) = (directory.clone(), Instant::now());
        let (told, heard) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            for number in 0u64.. {
                let name = format!("file-{round}-{number}");
                let bytes = name.repeat(100).into_bytes();
                let write = || {
                    let mut file = fs::File::create(place.join(&name))?;
                    std::io::Write::write_all(&mut file, &bytes)?;
                    file.sync_all()?;
                    fs::File::open(&place)?.sync_all()
                };
                match write() {
                    Ok(()) if told.send((name, bytes)).is_ok() => {}
                    Ok(()) => return,
                    Err(error) => {
                        println!("round {round}: the file system says {error}");
                        return;
                    }
                }
            }
        });
        wait_until(30, "some files are synced", || {
            holds(
                begun.elapsed() > Duration::from_millis(500 + 200 * round),
                String::new,
            )
        });
        site.kill(Daemon::Agent);
        writer.join().expect("the writer does not hang");
        synced.extend(heard);
        mount.end();
        site.start(Daemon::Agent);
        site.wait_connected();
        site.wait_caught_up();
        let check = |directory: &std::path::Path| {
            for (name, bytes) in &synced {
                let found = fs::read(directory.join(name));
                assert!(
                    found.is_ok_and(|found| found == *bytes),
                    "{name} is not as it was"
                );
            }
        };
        let mount = Mount::new(&site.device("d"), &directory);
        check(&mount.directory);
        mount.end();
        site.wait_caught_up();
        let shown = site.aft(&["mount", &format!("{MACHINE}/d@latest")]);
        check(&PathBuf::from(
            shown["directory"].as_str().expect("a directory is text"),
        ));
        site.umount(&shown);
        println!("round {round}: {} synced files are there", synced.len());
    }
    shell::run("fsck.ext4", &["-fn", text(&site.device("d"))]);
}
