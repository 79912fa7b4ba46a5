//! The scrub's order of events; what it reads is tested with real stores.

use std::sync::mpsc::channel;

use super::*;

fn result(damage: &[&str]) -> ScrubResult {
    ScrubResult {
        begun: Timestamp(1),
        ended: Timestamp(2),
        files: 3,
        slots: 4,
        bytes: 5,
        damage: damage.iter().map(|text| (*text).to_owned()).collect(),
    }
}

#[test]
fn what_was_found_is_kept_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    assert!(read_kept(&path).last.is_none(), "a new store");
    let kept = Kept {
        last: Some(result(&["a"])),
        damage: vec!["a".to_owned(), "b".to_owned()],
    };
    write_kept(&path, &kept).unwrap();
    let found = read_kept(&path);
    assert_eq!(found.last, kept.last);
    assert_eq!(found.damage, kept.damage);
    std::fs::write(&path, "{").unwrap();
    assert!(read_kept(&path).last.is_none(), "a torn one is none");
}

#[test]
fn a_place_is_known_whatever_the_number_of_points_that_it_hurts() {
    let known = ["log/1 at 4096: slot; may hurt 2 points, the first is a".to_owned()];
    assert!(is_known(
        &known,
        "log/1 at 4096: slot; may hurt 1 points, the first is b"
    ));
    assert!(!is_known(
        &known,
        "log/1 at 8192: slot; may hurt 2 points, the first is a"
    ));
}

#[test]
fn an_order_to_stop_ends_a_long_wait() {
    let shared = Arc::new(Shared::default());
    let (sender, receiver) = channel();
    let waiting = Arc::clone(&shared);
    let thread = std::thread::spawn(move || {
        sender.send(()).unwrap();
        waiting.rest_until(Instant::now() + Duration::from_secs(3600))
    });
    receiver.recv().unwrap();
    shared.state.lock().is_stopping = true;
    shared.changed.notify_all();
    assert!(!thread.join().unwrap());
}

#[test]
fn the_next_one_begins_when_it_is_due_or_wanted() {
    let shared = Shared::default();
    assert!(shared.next(Some(Instant::now())), "due");
    shared.state.lock().is_wanted = true;
    assert!(shared.next(None), "wanted");
    assert!(shared.state.lock().status.is_running);
    shared.state.lock().is_over = true;
    assert!(!shared.next(Some(Instant::now())), "over");
}
