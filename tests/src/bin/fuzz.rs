//! Feeds hostile bytes to parsers: `fuzz TARGET --seed N --count M`, `fuzz --list`.
//!
//! It ends at the first input of which a property does not hold, and says how to try it again.
//! When it dies without a word (the stack, or more memory than there is), `--trace` names each seed
//! before it is tried.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use afterimage_blockdev::allocation::{CountingAllocator, is_counting};
use afterimage_tests::fuzz::{self, Campaign, Target};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const USAGE: &str = "usage: fuzz TARGET [--seed N] [--count M] [--trace] [--write FILE]
       fuzz --list

  --seed N      first seed; one seed is one input (default 1)
  --count M     number of seeds (default 10000)
  --trace       prints each seed before it is tried
  --write FILE  writes the input of the first seed and tries nothing
  --list        prints each target, and how many inputs tools/check gives it";
/// An input that takes so long never ends.
const PATIENCE: Duration = Duration::from_secs(60);

fn value<'a>(arguments: &'a [String], name: &str) -> Result<Option<&'a str>, String> {
    let Some(place) = arguments.iter().position(|argument| argument == name) else {
        return Ok(None);
    };
    let value = arguments.get(place + 1);
    let value = value.ok_or_else(|| format!("{name} takes a value\n{USAGE}"))?;
    Ok(Some(value))
}

fn number(arguments: &[String], name: &str, otherwise: u64) -> Result<u64, String> {
    let wrong = |_| format!("{name} takes a number\n{USAGE}");
    let value = value(arguments, name)?;
    value.map_or(Ok(otherwise), |value| value.parse().map_err(wrong))
}

fn say_replay(name: &str) {
    let (seed, _) = fuzz::in_hand();
    eprintln!("replay with: fuzz {name} --seed {seed} --count 1");
}

/// Ends the program when one input takes too long.
fn watch(name: &'static str) {
    std::thread::spawn(move || {
        let mut last = (fuzz::in_hand().1, Instant::now());
        loop {
            std::thread::park_timeout(Duration::from_secs(1));
            let (_, tried) = fuzz::in_hand();
            if tried != last.0 {
                last = (tried, Instant::now());
            } else if last.1.elapsed() > PATIENCE {
                eprintln!("{name}: an input takes more than {} s", PATIENCE.as_secs());
                say_replay(name);
                std::process::exit(1);
            }
        }
    });
}

fn try_seeds(target: &Target, seed: u64, count: u64, is_traced: bool) -> Result<(), String> {
    let name = target.name;
    watch(name);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        say_replay(name);
    }));
    let begun = Instant::now();
    let mut campaign = Campaign::new(target);
    for seed in seed..seed.saturating_add(count) {
        if is_traced {
            println!("seed {seed}");
            std::io::stdout()
                .flush()
                .map_err(|error| error.to_string())?;
        }
        campaign.try_seed(seed);
    }
    let outcome = campaign.outcome();
    let seconds = begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)]
    let rate = outcome.executions as f64 / seconds.max(0.001);
    println!("{outcome}");
    println!("{rate:.0} executions/s from seed {seed} in {seconds:.1} s");
    println!("{} executions", outcome.executions);
    if !is_counting() {
        return Err("the memory that inputs claim was not counted".to_owned());
    }
    match outcome.missing().filter(|_| count >= target.round) {
        Some(missing) => Err(format!("{name}: {missing}")),
        None => Ok(()),
    }
}

fn run(arguments: &[String]) -> Result<(), String> {
    let targets = fuzz::targets();
    let name = arguments.first().map_or("", String::as_str);
    if name == "--list" {
        for target in &targets {
            println!("{} {}", target.name, target.round);
        }
        return Ok(());
    }
    let target = targets.iter().find(|target| target.name == name);
    let target = target.ok_or_else(|| USAGE.to_owned())?;
    let seed = number(arguments, "--seed", 1)?;
    let count = number(arguments, "--count", 10_000)?;
    if let Some(path) = value(arguments, "--write")? {
        let (bytes, _) = Campaign::new(target).input(seed);
        return std::fs::write(path, bytes).map_err(|error| format!("{path}: {error}"));
    }
    let is_traced = arguments.iter().any(|argument| argument == "--trace");
    try_seeds(target, seed, count, is_traced)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
