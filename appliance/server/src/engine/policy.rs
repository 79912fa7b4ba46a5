//! Policies, from and to the words of the control port.

use std::time::Duration;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::policy::{LockRule, MachinePolicy, Policy, SetPolicy, Tier};
use afterimage_seed::manifest::PointKind;
use afterimage_seed::{Request, Response, retention};

/// The engine's request for a change.
pub(super) fn request(machine: String, wanted: SetPolicy) -> Result<Request, ApiError> {
    let SetPolicy {
        policy,
        expected_version,
    } = wanted;
    let tiers = policy.tiers.iter().map(|tier| retention::Tier {
        interval: Duration::from_secs(tier.interval_s),
        keep_for: Duration::from_secs(tier.keep_for_s),
    });
    let policy = retention::Policy {
        journal_window: Duration::from_secs(policy.journal_window_s),
        tiers: tiers.collect(),
        keep_application: Duration::from_secs(policy.keep_application_s),
        keep_named: policy.keep_named_s.map(Duration::from_secs),
        lock: policy.lock.map(lock_rule).transpose()?,
    };
    Ok(Request::SetPolicy {
        machine,
        policy,
        expected: expected_version,
    })
}

fn lock_rule(rule: LockRule) -> Result<retention::LockRule, ApiError> {
    let kind = |name: &String| {
        PointKind::named(name).ok_or_else(|| ApiError {
            class: ErrorClass::Refused,
            message: format!("{name:?} is no kind of point"),
            hint: "the kinds are crash, application, bookmark and resync-incomplete".to_owned(),
        })
    };
    Ok(retention::LockRule {
        duration: Duration::from_secs(rule.duration_s),
        kinds: rule.kinds.iter().map(kind).collect::<Result<_, _>>()?,
    })
}

/// The policy in an answer.
pub(super) fn picked(response: Response) -> Option<MachinePolicy> {
    let Response::Policy(info) = response else {
        return None;
    };
    let policy = info.policy;
    let tiers = policy.tiers.iter().map(|tier| Tier {
        interval_s: tier.interval.as_secs(),
        keep_for_s: tier.keep_for.as_secs(),
    });
    Some(MachinePolicy {
        version: info.version,
        policy: Policy {
            journal_window_s: policy.journal_window.as_secs(),
            tiers: tiers.collect(),
            keep_application_s: policy.keep_application.as_secs(),
            keep_named_s: policy.keep_named.map(|keep| keep.as_secs()),
            lock: policy.lock.map(|rule| LockRule {
                duration_s: rule.duration.as_secs(),
                kinds: rule.kinds.iter().map(|k| k.name().to_owned()).collect(),
            }),
        },
    })
}
