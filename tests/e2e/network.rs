//! The connection is cut, or hangs: the agent keeps what it captures, in memory and then in its
//! spool, and sends it when it can. Nothing is read again from the source.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::load::{Load, Model};
use crate::proxy::{Network, Proxy};
use crate::shell::{fill_random, holds, sparse, wait_until};
use crate::site::{Daemon, Plan, Site};

const MIB: u64 = 1 << 20;

/// A site whose agent reaches the data port through a switch, with a short buffer in memory.
fn site_with_switch() -> (Site, Proxy, PathBuf) {
    let mut site = Site::new(Plan {
        pipeline: "captured_bytes_max = 8388608\nsealed_bytes_max = 4194304\n",
        ..Plan::default()
    });
    site.start(Daemon::Server);
    site.enrol();
    let proxy = Proxy::before(site.data_port);
    let path = site.state.join("identity.json");
    let text = fs::read_to_string(&path).expect("the identity is there");
    let mut identity: Value = serde_json::from_str(&text).expect("it is JSON");
    identity["data_port"] = json!(proxy.port);
    fs::write(&path, identity.to_string()).expect("it is written");
    site.start(Daemon::Agent);
    site.wait_connected();
    let source = site.path("source.img");
    sparse(&source, 256);
    fill_random(&source, 64);
    site.protect(&source, "d");
    (site, proxy, source)
}

fn status(site: &Site, field: &str) -> u64 {
    site.aft(&["agent", "status"])[field]
        .as_u64()
        .expect("it is a number")
}

fn spools_and_catches_up(
    cut: impl FnOnce(&mut Site, &Proxy),
    heal: impl FnOnce(&mut Site, &Proxy),
) {
    let (mut site, proxy, source) = site_with_switch();
    let epoch = status(&site, "epoch");
    cut(&mut site, &proxy);
    let load = Load::start(&site.device("d"), &Model::default(), 0, 32768, 4);
    wait_until(120, "the spool holds 32 MiB", || {
        let spooled = status(&site, "spooled_bytes");
        let buffered = status(&site, "buffered_bytes");
        holds(spooled > 32 * MIB, || {
            format!("{spooled} in the spool, {buffered} in memory")
        })
    });
    println!("{} writes went on without the appliance", load.written());
    let (mut model, errors) = load.end(Model::default());
    assert!(errors.is_empty(), "{errors:?}");
    heal(&mut site, &proxy);
    site.wait_caught_up();
    model.check(&source);
    site.assert_replica_is("d", &source);
    assert_eq!(status(&site, "epoch"), epoch, "the writer is the same");
    assert_eq!(
        site.local_disk("d")["recheck_read_bytes"],
        0,
        "nothing was read again"
    );
    wait_until(30, "the spool is empty", || {
        let spooled = status(&site, "spooled_bytes");
        holds(spooled == 0, || format!("{spooled} in the spool"))
    });
}

#[test]
#[ignore = "needs root and release binaries: tools/check network"]
fn a_cut_connection_fills_the_spool_and_catches_up() {
    spools_and_catches_up(
        |_, proxy| proxy.set(Network::Cut),
        |_, proxy| proxy.set(Network::Works),
    );
}

#[test]
#[ignore = "needs root and release binaries: tools/check network"]
fn a_silent_network_fills_the_spool_and_catches_up() {
    spools_and_catches_up(
        |_, proxy| proxy.set(Network::Silent),
        |_, proxy| proxy.set(Network::Works),
    );
}

#[test]
#[ignore = "needs root and release binaries: tools/check network"]
fn a_stopped_appliance_fills_the_spool_and_catches_up() {
    spools_and_catches_up(
        |site, _| site.signal(Daemon::Server, "STOP"),
        |site, _| site.signal(Daemon::Server, "CONT"),
    );
}
