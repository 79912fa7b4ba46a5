//! Runs crash campaigns: `crash log --seed N --count M`; `flip` damages bytes, `smash` sectors.

use std::process::ExitCode;
use std::time::Instant;

use afterimage_tests::report::Report;
use afterimage_tests::{crash_log, crash_store, flip_log};

const USAGE: &str = "usage: crash log|log-every|store|store-every|store-fault|store-flip|flip|smash
       [--seed N] [--count M]";

fn number(arguments: &[String], name: &str, otherwise: u64) -> Result<u64, String> {
    let Some(place) = arguments.iter().position(|argument| argument == name) else {
        return Ok(otherwise);
    };
    let value = arguments.get(place + 1);
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| format!("{name} takes a number\n{USAGE}"))
}

fn run(arguments: &[String]) -> Result<(), String> {
    let seed = number(arguments, "--seed", 1)?;
    let count = number(arguments, "--count", 2000)?;
    let begun = Instant::now();
    let (campaign, wanted): (fn(u64, u64) -> Report, _) =
        match arguments.first().map(String::as_str) {
            Some("log") => (crash_log::crash_campaign, crash_log::MUST_OCCUR),
            Some("log-every") => (crash_log::every_campaign, crash_log::EVERY_MUST_OCCUR),
            Some("store-every") => (crash_store::every_campaign, crash_log::EVERY_MUST_OCCUR),
            Some("store") => (crash_store::crash_campaign, crash_store::MUST_OCCUR),
            Some("store-fault") => (crash_store::fault_campaign, crash_store::FAULT_MUST_OCCUR),
            Some("store-flip") => (crash_store::flip_campaign, crash_store::FLIP_MUST_OCCUR),
            Some("flip") => (flip_log::flip_campaign, flip_log::MUST_OCCUR),
            Some("smash") => (flip_log::smash_campaign, flip_log::SMASH_MUST_OCCUR),
            _ => return Err(USAGE.to_owned()),
        };
    let report = Report::of(|| campaign(seed, count));
    let seconds = begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)]
    let rate = report.images as f64 / seconds.max(0.001);
    println!("{report}");
    println!("{rate:.0} images/s from seed {seed} in {seconds:.1} s");
    let missing = report.missing(wanted);
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("never happened: {}", missing.join(", ")))
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().cloned().unwrap_or_default();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        let seed = crash_store::seed_in_hand();
        if seed > 0 {
            eprintln!("replay with: crash {name} --seed {seed} --count 1");
        }
    }));
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
