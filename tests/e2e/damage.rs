//! A byte is flipped in a file of the store: it is found and named, what it hurts is not shown,
//! and everything else is.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use afterimage_blockdev::IoBuffer;

use crate::load::{BLOCK, Load, Model};
use crate::shell::{all_of, fill_random, holds, sparse, text, wait_until};
use crate::site::{Daemon, MACHINE, Plan, Site};

fn flip(file: &Path, offset: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .expect("the file opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)
        .expect("the byte is there");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, offset)
        .expect("the byte is written");
    file.sync_all().expect("the byte is on the disk");
}

/// The first place from `offset` on where payload stands: 64 bytes without a zero.
fn payload_at(file: &Path, offset: u64) -> u64 {
    let bytes = fs::read(file).expect("the file can be read");
    let from = usize::try_from(offset).expect("files of tests are short");
    let run = bytes[from..].windows(64).position(|run| !run.contains(&0));
    offset + run.expect("there is payload") as u64 + 32
}

fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("the directory is there");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect();
    files.sort();
    files
}

/// A site with 64 MiB of bulk, and then 80 MiB of writes in more than one log segment.
fn filled() -> (Site, PathBuf) {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 256);
    fill_random(&source, 64);
    site.protect(&source, "d");
    let load = Load::start(&site.device("d"), &Model::default(), 20000, 40000, 4);
    wait_until(120, "enough is written", || {
        holds(load.written() > 20000, || load.written().to_string())
    });
    let (_, errors) = load.end(Model::default());
    assert!(errors.is_empty(), "{errors:?}");
    site.wait_caught_up();
    (site, source)
}

/// Reads every block; counts those that cannot be read. What can be read must be right.
fn unreadable_blocks(view: &Path, source: &Path) -> u64 {
    use std::os::unix::fs::OpenOptionsExt;
    let open = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT);
        options.open(path).expect("it opens")
    };
    let (shown, right) = (open(view), open(source));
    let bytes = fs::metadata(source).expect("the source is there").len();
    let (mut one, mut two) = (IoBuffer::zeroed(BLOCK), IoBuffer::zeroed(BLOCK));
    let mut unreadable = 0;
    for block in 0..bytes / BLOCK as u64 {
        let place = block * BLOCK as u64;
        right
            .read_exact_at(&mut two, place)
            .expect("the source can be read");
        match shown.read_exact_at(&mut one, place) {
            Ok(()) => assert!(
                one[..] == two[..],
                "block {block} was served with wrong content"
            ),
            Err(_) => unreadable += 1,
        }
    }
    unreadable
}

fn flipped(site: &mut Site, source: &Path, file: &Path, offset: u64) {
    let offset = payload_at(file, offset);
    let name = file
        .file_name()
        .and_then(|name| name.to_str())
        .expect("a name");
    site.stop(Daemon::Server);
    flip(file, offset);
    site.start(Daemon::Server);
    site.wait_caught_up();
    let output = site.try_aft(&["log", "verify"]);
    assert_eq!(output.status.code(), Some(6), "{}", all_of(&output));
    assert!(
        all_of(&output).contains(name),
        "{name} is not named: {}",
        all_of(&output)
    );
    let unreadable = site.with_view(&format!("{MACHINE}/d@latest"), |view| {
        unreadable_blocks(view, source)
    });
    println!("{name} at {offset}: named; {unreadable} blocks cannot be read, all others are right");
    assert!(unreadable <= 64, "{unreadable} blocks are hurt by one byte");
    site.stop(Daemon::Server);
    flip(file, offset);
    site.start(Daemon::Server);
}

#[test]
#[ignore = "needs root and release binaries: tools/check damage"]
fn a_flipped_byte_is_named_and_never_served() {
    let (mut site, source) = filled();
    let log = files(&site.data.join("log"), "log");
    let seeds = files(&site.data.join("segments"), "seed");
    assert!(log.len() > 2, "{log:?}");
    // In the middle of a segment there are payloads; the middle of the log has later commits.
    for (file, share) in [
        (&log[0], 2),
        (&log[1], 3),
        (&log[log.len() / 2], 5),
        (&seeds[0], 2),
    ] {
        let bytes = fs::metadata(file).expect("the file is there").len();
        flipped(&mut site, &source, file, bytes / share);
    }
    let clean = site.aft(&["log", "verify"]);
    assert_eq!(clean["damage"].as_array().map(Vec::len), Some(0), "{clean}");
    site.assert_replica_is("d", &source);
}

#[test]
#[ignore = "needs root and release binaries: tools/check damage"]
fn a_flipped_byte_under_a_running_server_is_found() {
    let (mut site, source) = filled();
    let seeds = files(&site.data.join("segments"), "seed");
    let bytes = fs::metadata(&seeds[0]).expect("the file is there").len();
    flip(&seeds[0], bytes / 2);
    let output = site.try_aft(&["log", "verify"]);
    assert_eq!(output.status.code(), Some(6), "{}", all_of(&output));
    let unreadable = site.with_view(&format!("{MACHINE}/d@latest"), |view| {
        unreadable_blocks(view, &source)
    });
    assert!(
        (1..=64).contains(&unreadable),
        "{unreadable} blocks are hurt by one byte"
    );
    assert!(site.is_alive(Daemon::Server), "{}", text(&source));
}
