//! The appliance's disk fills up: ingest pauses and says why, points stay readable, and all goes
//! on by itself when there is room again.

use std::fs;

use crate::load::{Load, Model};
use crate::shell::{self, Loop, Mount, fill_random, holds, sparse, text, try_run, wait_until};
use crate::site::{Daemon, MACHINE, Plan, Site};

const STORE_MIB: u64 = 512;

#[test]
#[ignore = "needs root and release binaries: tools/check full"]
fn a_full_store_pauses_ingest_and_goes_on_when_there_is_room() {
    let base = tempfile::Builder::new()
        .prefix("afterimage-e2e.")
        .tempdir_in("/var/tmp");
    let base = base.expect("a directory can be made");
    let file = base.path().join("store.img");
    sparse(&file, STORE_MIB);
    shell::run("mkfs.ext4", &["-q", "-m", "0", text(&file)]);
    let device = Loop::attach(&file, 512);
    let store = Mount::new(&device.device, &base.path().join("store"));
    let plan = Plan {
        data: Some(store.directory.join("data")),
        pipeline: "captured_bytes_max = 8388608\nsealed_bytes_max = 4194304\n",
        ..Plan::default()
    };
    let mut site = Site::running(plan);
    let source = site.path("source.img");
    sparse(&source, 128);
    fill_random(&source, 32);
    site.protect(&source, "d");
    site.aft(&["point", "create", MACHINE, "--name", "before"]);
    let copy = site.path("before.img");
    shell::run("cp", &["--sparse=always", text(&source), text(&copy)]);
    let ballast = store.directory.join("ballast");
    // As much as there is, but for what a little later is filled by writes.
    let free = shell::run("stat", &["-f", "-c", "%a %S", text(&store.directory)]);
    let numbers: Vec<u64> = free
        .split(' ')
        .map(|n| n.parse().expect("a number"))
        .collect();
    let ballast_mib = ((numbers[0] * numbers[1]) >> 20).saturating_sub(48);
    fill_random(&ballast, ballast_mib);

    let load = Load::start(&site.device("d"), &Model::default(), 0, 16384, 4);
    wait_until(120, "ingest is paused", || {
        let status = site.aft(&["status"]);
        holds(status["is_ingest_paused"] == true, || {
            format!("{status}; {} writes", load.written())
        })
    });
    let status = site.aft(&["status"]);
    println!("paused: {}", status["causes"]);
    let is_said = |word: &str| status["causes"].to_string().contains(word);
    assert!(
        is_said("full") || is_said("space") || is_said("room"),
        "{status}"
    );
    assert_ne!(status["health"], "green", "{status}");
    // The source goes on, into the spool.
    let written = load.written();
    wait_until(30, "writes go on", || {
        holds(load.written() > written + 1000, || {
            load.written().to_string()
        })
    });
    let (mut model, errors) = load.end(Model::default());
    assert!(errors.is_empty(), "{errors:?}");
    site.with_view(&format!("{MACHINE}/d@before"), |view| {
        shell::assert_same(view, &copy)
    });
    assert_eq!(
        site.aft(&["status"])["is_ingest_paused"],
        true,
        "looking has not changed it"
    );
    assert!(site.is_alive(Daemon::Server));

    fs::remove_file(&ballast).expect("the ballast goes");
    site.wait_caught_up();
    assert_eq!(site.aft(&["status"])["is_ingest_paused"], false);
    model.check(&source);
    site.assert_replica_is("d", &source);
    site.with_view(&format!("{MACHINE}/d@before"), |view| {
        shell::assert_same(view, &copy)
    });
    drop(site);
    let _trim = try_run("sync", &[]);
    store.end();
}
