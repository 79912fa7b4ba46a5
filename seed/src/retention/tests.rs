//! What holds of policies, of thinning and of the clock, for any points and any readings.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{HistoryId, Monotonic, PointId, Timestamp};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::manifest::PointKind;

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400;
const START: u64 = 1_800_000_000;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn wall(seconds: u64) -> Timestamp {
    Timestamp((START + seconds) * SECOND)
}

fn ran(seconds: u64) -> Monotonic {
    Monotonic(seconds * SECOND)
}

fn candidates(count: usize) -> impl Strategy<Value = Vec<Candidate>> {
    let kind = prop_oneof![
        6 => Just(PointKind::Crash),
        1 => Just(PointKind::Application),
        1 => Just(PointKind::Bookmark),
        1 => Just(PointKind::ResyncIncomplete),
    ];
    let one = (0..400_000_u64, kind, 0..2_u8, 0..20_u8);
    vec(one, 0..count).prop_map(|drawn| {
        let numbered = (1..).zip(drawn);
        numbered
            .map(|(id, (time, kind, history, chance))| Candidate {
                id: PointId(id),
                history: HistoryId([history; 16]),
                time: wall(time),
                kind,
                is_named: chance == 0,
                is_locked: chance == 1,
            })
            .collect()
    })
}

fn policies() -> impl Strategy<Value = Policy> {
    let tiers = vec((1..4000_u64, 0..200_000_u64), 0..4);
    let keep = (0..300_000_u64, proptest::option::of(0..300_000_u64));
    (tiers, keep).prop_map(|(drawn, (application, named))| {
        let (mut interval, mut keep_for) = (0, 0);
        let mut tiers = Vec::new();
        for (longer, more) in drawn {
            interval += longer;
            keep_for = (keep_for + 1 + more).max(interval);
            tiers.push(Tier {
                interval: s(interval),
                keep_for: s(keep_for),
            });
        }
        Policy {
            tiers,
            keep_application: s(application),
            keep_named: named.map(s),
            ..Policy::default()
        }
    })
}

fn without(points: &[Candidate], dropped: &[PointId]) -> Vec<Candidate> {
    let dropped: BTreeSet<_> = dropped.iter().collect();
    let kept = points.iter().filter(|point| !dropped.contains(&point.id));
    kept.copied().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn policies_of_the_generator_make_sense(policy in policies()) {
        prop_assert_eq!(policy.validate(), Ok(()));
    }

    #[test]
    fn a_locked_point_and_the_newest_good_one_stay(
        points in candidates(60), policy in policies(), now in 0..900_000_u64,
    ) {
        let kept = without(&points, &thin(&points, &policy, wall(now)));
        for point in points.iter().filter(|point| point.is_locked) {
            prop_assert!(kept.contains(point));
        }
        let good = |point: &&Candidate| point.kind != PointKind::ResyncIncomplete;
        let newest = points.iter().filter(good).map(|point| point.time).max();
        prop_assert_eq!(kept.iter().filter(good).map(|point| point.time).max(), newest);
        if policy.keep_named.is_none() {
            let bookmarks = |points: &[Candidate]| {
                let named = |p: &&Candidate| p.is_named || p.kind == PointKind::Bookmark;
                points.iter().filter(named).count()
            };
            prop_assert_eq!(bookmarks(&kept), bookmarks(&points));
        }
    }

    /// Each interval of a tier that had a point has one while the tier keeps it, and of those that
    /// the tiers alone decide the best.
    #[test]
    fn no_interval_is_emptied(
        points in candidates(60), policy in policies(), now in 0..900_000_u64,
    ) {
        let kept = without(&points, &thin(&points, &policy, wall(now)));
        let plain = |p: &&Candidate| !p.is_named && p.kind != PointKind::Bookmark;
        for tier in &policy.tiers {
            let interval = nanoseconds(tier.interval);
            let end = |slot: u64| (slot + 1) * interval;
            let keep = nanoseconds(tier.keep_for);
            let slots = |points: &[Candidate]| {
                let mut best = BTreeMap::new();
                for point in points.iter().filter(plain) {
                    let slot = point.time.0 / interval;
                    if wall(now).0.saturating_sub(end(slot)) < keep {
                        let is_quiesced = point.kind == PointKind::Application;
                        let found = best.entry((point.history, slot)).or_insert(false);
                        *found |= is_quiesced;
                    }
                }
                best
            };
            if policy.keep_named.is_none() {
                prop_assert_eq!(slots(&kept), slots(&points));
            } else {
                // A named point that is old enough stands in for others.
                let all = |points: &[Candidate]| -> BTreeSet<_> {
                    points
                        .iter()
                        .map(|point| (point.history, point.time.0 / interval))
                        .filter(|(_, slot)| wall(now).0.saturating_sub(end(*slot)) < keep)
                        .collect()
                };
                prop_assert_eq!(all(&kept), all(&points));
            }
        }
    }

    /// As `thin.rs` says; with nothing new and one time this is that thinning twice is thinning
    /// once.
    #[test]
    fn thinning_earlier_changes_nothing_later(
        points in candidates(60), policy in policies(), at in 0..900_000_u64,
        later in prop_oneof![Just(0), 0..900_000_u64], split in 0..60_usize, expired in 0..4_usize,
    ) {
        let (old, new) = points.split_at(split.min(points.len()));
        let mut once = without(old, &thin(old, &policy, wall(at)));
        once.extend_from_slice(new);
        let mut all = points.clone();
        // Locks may have ended meanwhile.
        let ended: Vec<_> = points.iter().filter(|p| p.is_locked).take(expired).collect();
        for point in once.iter_mut().chain(&mut all) {
            point.is_locked &= !ended.iter().any(|ended| ended.id == point.id);
        }
        let now = wall(at + later);
        let twice = without(&once, &thin(&once, &policy, now));
        prop_assert_eq!(twice, without(&all, &thin(&all, &policy, now)));
    }

    /// Whatever the wall clock does, a lock lasts its duration of real time, and longer only when
    /// the clock was set back or stopped being trusted.
    #[test]
    fn no_reading_opens_a_lock_early(
        duration in 1..3 * DAY,
        steps in vec((1..DAY, prop_oneof![3 => Just(0_i64), 1 => -400_000..900_000_i64]), 1..30),
    ) {
        let mut clock = LockClock::start(None, wall(0), ran(0));
        let lock = clock.lock_for(s(duration));
        let (mut real, mut shown) = (0, 0_i64);
        for (passed, jump) in steps {
            real += passed;
            shown += i64::try_from(passed).unwrap() + jump;
            let reading = i64::try_from(START).unwrap() + shown;
            let reading = Timestamp(u64::try_from(reading).unwrap() * SECOND);
            clock.observe(reading, ran(real));
            prop_assert!(clock.holds(lock) || real >= duration);
            prop_assert!(clock.elapsed() <= Elapsed(real * SECOND));
        }
    }
}

#[test]
fn a_week_of_crash_points_thins_to_the_tiers() {
    let points: Vec<Candidate> = (0..40 * DAY / 300)
        .map(|number| Candidate {
            id: PointId(number + 1),
            history: HistoryId([1; 16]),
            time: wall(number * 300),
            kind: PointKind::Crash,
            is_named: false,
            is_locked: false,
        })
        .collect();
    let policy = Policy::default();
    let kept = without(&points, &thin(&points, &policy, wall(40 * DAY)));
    // 24 h of 5 minutes, 6 more days of hours, 23 more of days; and what a slot's end adds.
    assert!(
        (288 + 144 + 23..=288 + 144 + 23 + 4).contains(&kept.len()),
        "{}",
        kept.len()
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_the_place() {
    let tier = |interval, keep_for| Tier {
        interval: s(interval),
        keep_for: s(keep_for),
    };
    let with = |tiers: &[Tier]| Policy {
        tiers: tiers.to_vec(),
        ..Policy::default()
    };
    let locking = |duration, kinds: &[PointKind]| Policy {
        lock: Some(LockRule {
            duration: s(duration),
            kinds: kinds.to_vec(),
        }),
        ..Policy::default()
    };
    let endless = Policy {
        journal_window: Duration::MAX,
        ..Policy::default()
    };
    let twice = [PointKind::Crash, PointKind::Crash];
    for (policy, said) in [
        (endless, "the journal window is longer"),
        (with(&[tier(0, 5)]), "the interval of tier 1"),
        (with(&[tier(5, 4)]), "tier 1 keeps points for less"),
        (with(&[tier(5, 10), tier(5, 20)]), "tier 2 does not follow"),
        (with(&[tier(5, 10), tier(6, 10)]), "tier 2 does not follow"),
        (with(&[tier(5, 10); 17]), "there are 17 tiers"),
        (locking(0, &[PointKind::Crash]), "the lock is shorter"),
        (
            locking(11 * 365 * DAY, &[PointKind::Crash]),
            "the lock is shorter",
        ),
        (locking(5, &[]), "names no kind"),
        (locking(5, &twice), "names crash points twice"),
    ] {
        let error = policy.validate().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    assert_eq!(Policy::default().validate(), Ok(()));
}

#[test]
fn a_forward_jump_freezes_and_only_a_word_ends_that() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    let lock = clock.lock_for(s(DAY));
    // The tolerance: 5 minutes, or 1 %.
    assert!(!clock.observe(wall(1000 + 299), ran(1000)));
    assert!(!clock.observe(wall(60_000 + 599), ran(60_000)));
    assert!(clock.observe(wall(60_000 + 2 * DAY), ran(60_001)));
    assert!(clock.is_frozen() && clock.trusted().is_none());
    // It is said once.
    assert!(!clock.observe(wall(60_000 + 2 * DAY), ran(60_002)));
    // Also when the clock is right again, and after real time has passed.
    assert!(!clock.observe(wall(10 * DAY), ran(10 * DAY)));
    assert!(clock.is_frozen() && clock.holds(lock));
    clock.confirm();
    assert!(!clock.is_frozen() && !clock.holds(lock));
}

#[test]
fn a_confirmed_jump_adds_nothing_to_the_time_lived_through() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    let lock = clock.lock_for(s(DAY));
    clock.observe(wall(100 * DAY), ran(60));
    clock.confirm();
    assert!(clock.holds(lock), "the wall clock alone ended it");
    assert_eq!(clock.left(lock), s(DAY - 60));
    clock.observe(wall(100 * DAY + DAY), ran(60 + DAY));
    assert!(!clock.holds(lock));
}

#[test]
fn a_backward_jump_ends_nothing_early() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    let lock = clock.lock_for(s(1000));
    clock.observe(wall(0), ran(2000));
    assert!(clock.holds(lock), "the wall clock is behind");
    clock.observe(wall(2500), ran(2500));
    assert!(!clock.is_frozen(), "it only came back to where it belongs");
    assert!(!clock.holds(lock));
}

#[test]
fn small_steps_do_not_add_up() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    let mut ahead = 0;
    for minute in 1..=20 {
        ahead += 60;
        clock.observe(wall(minute * 60 + ahead), ran(minute * 60));
    }
    assert!(clock.is_frozen());
}

#[test]
fn a_long_agreement_allows_no_longer_jump() {
    let mut clock = LockClock::start(None, wall(1), ran(0));
    let mut now = 0;
    for _ in 0..100 {
        now += DAY / 2;
        assert!(!clock.observe(wall(now), ran(now)));
    }
    assert!(clock.observe(wall(now + 3600), ran(now + 1)));
}

#[test]
fn downtime_counts_while_it_is_plausible() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    clock.observe(wall(100), ran(100));
    let record = clock.record();
    for (now, elapsed, is_frozen) in [
        (100 + 3600, 3700, false),
        (100 + 3 * DAY, 100 + 3 * DAY, false),
        // Too long to believe.
        (101 + 3 * DAY, 100, true),
        // Set back.
        (50, 100, false),
    ] {
        let again = LockClock::start(Some(record), wall(now), ran(7));
        let found = (again.elapsed(), again.is_frozen());
        assert_eq!(found, (Elapsed(elapsed * SECOND), is_frozen), "{now}");
    }
}

#[test]
fn a_restart_does_not_thaw() {
    let mut clock = LockClock::start(None, wall(0), ran(0));
    clock.observe(wall(3600), ran(60));
    assert!(clock.is_frozen());
    let mut again = LockClock::start(Some(clock.record()), wall(3700), ran(0));
    assert!(again.is_frozen());
    assert_eq!(
        again.elapsed(),
        Elapsed(60 * SECOND),
        "the time is in doubt"
    );
    again.observe(wall(3700 + 50), ran(50));
    assert_eq!(again.elapsed(), Elapsed(110 * SECOND));
    again.confirm();
    again.observe(wall(3700 + 60), ran(60));
    assert!(!again.is_frozen());
}

#[test]
fn after_a_set_back_over_a_restart_the_line_stays() {
    let first = LockClock::start(None, wall(DAY), ran(0));
    let mut again = LockClock::start(Some(first.record()), wall(0), ran(0));
    assert!(!again.observe(wall(DAY + 200), ran(100)));
    assert!(again.observe(wall(DAY + 600), ran(200)));
}
