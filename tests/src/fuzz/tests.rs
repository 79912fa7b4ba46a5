use std::panic::{AssertUnwindSafe, catch_unwind};

use afterimage_cache::bytes::{get_u32, put};

use super::*;

/// Few inputs of each; `tools/check fuzz` tries more.
#[test]
fn every_target_accepts_and_refuses() {
    for target in targets() {
        let count = target.round.min(600) / if target.name == "store" { 3 } else { 1 };
        let outcome = fuzz(&target, 1, count);
        assert_eq!(outcome.missing(), None, "{}", target.name);
        assert_eq!(outcome.executions, count);
    }
}

#[test]
fn names_are_told_apart() {
    let targets = targets();
    let mut names: Vec<_> = targets.iter().map(|target| target.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), targets.len());
}

#[test]
fn a_seed_is_the_same_input_whatever_came_before() {
    for target in targets() {
        let mut one = Campaign::new(&target);
        let mut other = Campaign::new(&target);
        let _earlier = other.input(3);
        assert_eq!(one.input(1000), other.input(1000), "{}", target.name);
    }
}

/// A count behind a hash; the planted bug is an index that nobody checks.
fn planted(is_mended: bool) -> Target {
    let make = |random: &mut Random| {
        let mut bytes = vec![0; 64];
        random.fill(&mut bytes[40..]);
        put(&mut bytes, 36, &3u32.to_le_bytes());
        mend_planted(&mut bytes, random);
        bytes
    };
    let run = |bytes: &[u8]| {
        let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
        if bytes.len() < 40 || bytes[..32] != hash(&bytes[32..]) {
            return Verdict::Refused;
        }
        let count = get_u32(bytes, 36).unwrap_or(0);
        let _last = bytes[40 + afterimage_cache::bytes::index(count)];
        Verdict::Accepted
    };
    let target = Target::new(2000, "planted", make, run);
    if is_mended {
        target.mended_by(mend_planted)
    } else {
        target
    }
}

fn mend_planted(bytes: &mut Vec<u8>, _: &mut Random) {
    if bytes.len() >= 40 {
        let hash = *blake3::hash(&bytes[32..]).as_bytes();
        put(bytes, 0, &hash);
    }
}

#[test]
fn a_bug_behind_a_hash_is_found_by_mending_only() {
    let tries = |is_mended| {
        let target = planted(is_mended);
        catch_unwind(AssertUnwindSafe(|| fuzz(&target, 1, 2000))).ok()
    };
    assert!(tries(true).is_none(), "the planted bug is not found");
    let outcome = tries(false).expect("without mending the hash stops everything");
    // A splice may happen to give a whole other input.
    assert!(outcome.accepted < outcome.refused / 10, "{outcome}");
}
