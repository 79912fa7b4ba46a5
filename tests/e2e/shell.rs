//! Commands of the system, and what they leave to be cleaned up.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at something that has no event to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs a command; panics with all it printed when it fails. Returns its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed: {}",
        all_of(&output)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Runs a command, whatever it says.
pub(crate) fn try_run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program} does not run: {error}"))
}

/// Everything that a command printed.
pub(crate) fn all_of(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

/// Looks until `what` holds; panics after `limit_s` seconds, with what `why` says.
pub(crate) fn wait_until(limit_s: u64, what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let begun = Instant::now();
    loop {
        match holds() {
            Ok(()) => return,
            Err(why) if begun.elapsed() > Duration::from_secs(limit_s) => {
                panic!("waited {limit_s} s until {what}: {why}")
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// `Ok` when true; otherwise the text.
pub(crate) fn holds(is_true: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if is_true { Ok(()) } else { Err(why()) }
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

/// A loop device of a test's own; gone with it.
pub(crate) struct Loop {
    pub(crate) device: PathBuf,
}

impl Loop {
    /// Attaches a file with direct I/O.
    pub(crate) fn attach(file: &Path, sector_bytes: u32) -> Self {
        let sector = sector_bytes.to_string();
        let device = run(
            "losetup",
            &[
                "--direct-io=on",
                "--sector-size",
                &sector,
                "--show",
                "-f",
                text(file),
            ],
        );
        Self {
            device: PathBuf::from(device),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It may be gone already.
        let _output = try_run("losetup", &["-d", text(&self.device)]);
    }
}

/// A mount of a test's own; gone with it.
pub(crate) struct Mount {
    pub(crate) directory: PathBuf,
}

impl Mount {
    pub(crate) fn new(device: &Path, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).expect("the directory can be made");
        run("mount", &[text(device), text(directory)]);
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Unmounts, and says so when that fails.
    pub(crate) fn end(self) {
        run("umount", &[text(&self.directory)]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mounted(&self.directory) {
            let _output = try_run("umount", &[text(&self.directory)]);
        }
    }
}

/// Mount points below a directory, deepest first.
pub(crate) fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|place| place.starts_with(directory))
        .collect();
    found.sort();
    found.reverse();
    found
}

/// Takes away what dead processes left below a directory: loop devices over its files, and mounts.
/// What is mounted at the directory itself stays.
pub(crate) fn clear_below(directory: &Path) {
    let output = try_run("losetup", &["-n", "-l", "-O", "NAME,BACK-FILE"]);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mut words = line.split_whitespace();
        let (Some(device), Some(file)) = (words.next(), words.next()) else {
            continue;
        };
        if Path::new(file).starts_with(directory) {
            let _output = try_run("umount", &["-q", "-A", device]);
            let _output = try_run("losetup", &["-d", device]);
        }
    }
    for mount in mounts_below(directory) {
        if mount != directory {
            let _output = try_run("umount", &["-l", text(&mount)]);
        }
    }
}

pub(crate) fn is_mounted(directory: &Path) -> bool {
    mounts_below(directory)
        .iter()
        .any(|place| place == directory)
}

/// Writes random bytes to a file, from its begin.
pub(crate) fn fill_random(path: &Path, mib: u64) {
    let count = format!("count={mib}");
    let to = format!("of={}", text(path));
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &to,
            "bs=1M",
            &count,
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
}

/// Makes a sparse file.
pub(crate) fn sparse(path: &Path, mib: u64) {
    let file = std::fs::File::create(path).expect("the image can be made");
    file.set_len(mib << 20).expect("the image has its length");
}

/// Compares two files or devices byte by byte.
pub(crate) fn assert_same(one: &Path, two: &Path) {
    let output = try_run("cmp", &[text(one), text(two)]);
    assert!(
        output.status.success(),
        "{} and {} differ: {}",
        one.display(),
        two.display(),
        all_of(&output)
    );
}

/// Writes blocks of `bs` with fio at a depth and reads every one back against its checksum.
pub(crate) fn fio_verify(device: &Path, bs: u32, depth: u32, mib: u32) {
    let arguments = [
        "--name=verify".to_owned(),
        format!("--filename={}", text(device)),
        "--rw=randwrite".to_owned(),
        format!("--bs={bs}"),
        format!("--size={mib}m"),
        "--direct=1".to_owned(),
        "--ioengine=io_uring".to_owned(),
        format!("--iodepth={depth}"),
        "--verify=crc32c".to_owned(),
        "--do_verify=1".to_owned(),
        "--verify_fatal=1".to_owned(),
        "--verify_state_save=0".to_owned(),
        format!("--randseed={}", 77 + depth),
        "--output-format=terse".to_owned(),
    ];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run("fio", &arguments);
}
