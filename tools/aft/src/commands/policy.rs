//! `aft policy`.

use std::io::Read;
use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::policy::{LockRule, MachinePolicy, Policy, SetPolicy, Tier};

use super::machine::named_or_only;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::{Output, printable};
use crate::policy_args::{PolicyChange, PolicyCommand};

/// Longest policy file.
const FILE_BYTES_MAX: u64 = 1 << 20;

pub(super) async fn run(
    command: PolicyCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        PolicyCommand::Show { machine } => {
            let machine = named_or_only(machine, server).await?;
            let known: MachinePolicy = server.get(&path(&machine)).await?;
            output.answer(&known, || text(&known));
        }
        PolicyCommand::Apply { machine, file } => {
            let wanted = read(&file)?;
            apply(&machine, wanted, server, output).await?;
        }
        PolicyCommand::Set(change) => {
            let known: MachinePolicy = server.get(&path(&change.machine)).await?;
            let wanted = SetPolicy {
                policy: changed(known.policy, &change),
                expected_version: Some(known.version),
            };
            apply(&change.machine, wanted, server, output).await?;
        }
        PolicyCommand::ConfirmClock => {
            let () = server.post("/v1/clock/confirm", &()).await?;
            output.answer(&(), || "the clock is trusted again".to_owned());
        }
    }
    Ok(())
}

fn path(machine: &str) -> String {
    format!("/v1/machines/{}/policy", segment(machine))
}

async fn apply(
    machine: &str,
    wanted: SetPolicy,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    let known: MachinePolicy = server.post(&path(machine), &wanted).await?;
    output.answer(&known, || text(&known));
    Ok(())
}

/// What `policy show` printed; or the policy in it alone, which takes the place of any version.
fn read(file: &Path) -> Result<SetPolicy, AftError> {
    let wrong = |why: String| {
        AftError::new(
            ErrorClass::Refused,
            format!("{} is no policy: {why}", file.display()),
            "begin with what `aft --json policy show` prints",
        )
    };
    let mut content = Vec::new();
    let input: Box<dyn Read> = if file == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(file).map_err(|error| wrong(error.to_string()))?)
    };
    input
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut content)
        .map_err(|error| wrong(error.to_string()))?;
    if let Ok(known) = serde_json::from_slice::<MachinePolicy>(&content) {
        return Ok(SetPolicy {
            policy: known.policy,
            expected_version: Some(known.version),
        });
    }
    let policy = serde_json::from_slice(&content).map_err(|error| wrong(error.to_string()))?;
    Ok(SetPolicy {
        policy,
        expected_version: None,
    })
}

fn changed(mut policy: Policy, change: &PolicyChange) -> Policy {
    if let Some(window) = change.window {
        policy.journal_window_s = window;
    }
    if !change.tier.is_empty() {
        let tiers = change.tier.iter().map(|(interval_s, keep_for_s)| Tier {
            interval_s: *interval_s,
            keep_for_s: *keep_for_s,
        });
        policy.tiers = tiers.collect();
    }
    if let Some(keep) = change.keep_application {
        policy.keep_application_s = keep;
    }
    if let Some(keep) = change.keep_named {
        policy.keep_named_s = keep.0;
    }
    if let Some(lock) = change.lock {
        let mut kinds = change.lock_kind.clone();
        if kinds.is_empty() {
            kinds = ["crash", "application", "bookmark"]
                .map(str::to_owned)
                .to_vec();
        }
        policy.lock = lock.0.map(|duration_s| LockRule { duration_s, kinds });
    }
    policy
}

fn text(known: &MachinePolicy) -> String {
    let policy = &known.policy;
    let mut text = format!("version           {}\n", known.version);
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<18}{value}\n"));
    line("journal window", span(policy.journal_window_s));
    for tier in &policy.tiers {
        let (interval, keep_for) = (span(tier.interval_s), span(tier.keep_for_s));
        line("a point each", format!("{interval}, kept for {keep_for}"));
    }
    let keep = policy.keep_application_s;
    let by_tiers = || "as the tiers say".to_owned();
    line(
        "application points",
        if keep == 0 {
            by_tiers()
        } else {
            format!("at least {}", span(keep))
        },
    );
    let named = policy.keep_named_s.map(|keep| match keep {
        0 => by_tiers(),
        keep => format!("{}, then as the tiers say", span(keep)),
    });
    line(
        "named points",
        named.unwrap_or_else(|| "until they are deleted".to_owned()),
    );
    let lock = policy.lock.as_ref().map(|lock| {
        let kinds = printable(&lock.kinds.join(", "));
        format!("for {} ({kinds})", span(lock.duration_s))
    });
    line("new points locked", lock.unwrap_or_else(|| "no".to_owned()));
    text
}

/// A time span in its largest whole unit.
fn span(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "m")];
    let whole = |(length, _): &(u64, &str)| seconds > 0 && seconds.is_multiple_of(*length);
    let (length, unit) = units.into_iter().find(whole).unwrap_or((1, "s"));
    format!("{}{unit}", seconds / length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> MachinePolicy {
        MachinePolicy {
            version: 3,
            policy: Policy {
                journal_window_s: 86_400,
                tiers: vec![Tier {
                    interval_s: 300,
                    keep_for_s: 90,
                }],
                keep_application_s: 0,
                keep_named_s: None,
                lock: None,
            },
        }
    }

    #[test]
    fn what_is_shown_can_be_applied() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("policy.json");
        std::fs::write(&file, serde_json::to_vec(&known()).unwrap()).unwrap();
        let wanted = read(&file).unwrap();
        assert_eq!(wanted.policy, known().policy);
        assert_eq!(wanted.expected_version, Some(3));
        std::fs::write(&file, serde_json::to_vec(&known().policy).unwrap()).unwrap();
        assert_eq!(read(&file).unwrap().expected_version, None);
        std::fs::write(&file, "{\"journal_window_s\": 1, \"other\": 2}").unwrap();
        assert!(read(&file).is_err());
    }

    #[test]
    fn only_what_is_named_changes() {
        let change = PolicyChange {
            machine: "web".to_owned(),
            window: Some(0),
            tier: Vec::new(),
            keep_application: None,
            keep_named: None,
            lock: Some(crate::policy_args::Keep(Some(60))),
            lock_kind: Vec::new(),
        };
        let policy = changed(known().policy, &change);
        assert_eq!(policy.journal_window_s, 0);
        assert_eq!(policy.tiers, known().policy.tiers);
        assert_eq!(policy.lock.unwrap().kinds.len(), 3);
    }

    #[test]
    fn spans_are_shown_in_their_largest_unit() {
        for (seconds, shown) in [(0, "0s"), (90, "90s"), (300, "5m"), (172_800, "2d")] {
            assert_eq!(span(seconds), shown);
        }
        assert!(text(&known()).contains("a point each      5m, kept for 90s"));
    }
}
