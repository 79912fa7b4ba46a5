//! What `aft --help` and the help of every command say, word for word. When a change is meant, run
//! the test with `AFT_UPDATE_HELP=1`, and look at what changed in `help.txt`.

use std::path::Path;

use aft::args::Args;
use clap::{Command, CommandFactory};

fn collect(command: &mut Command, name: &str, text: &mut String) {
    text.push_str(&format!(
        "=== {name} --help\n{}\n",
        command.render_long_help()
    ));
    for sub in command
        .get_subcommands_mut()
        .filter(|sub| sub.get_name() != "help")
    {
        let name = format!("{name} {}", sub.get_name());
        collect(sub, &name, text);
    }
}

#[test]
fn help_is_as_it_was() {
    let mut command = Args::command().term_width(100);
    command.build();
    let mut text = String::new();
    collect(&mut command, "aft", &mut text);
    let text: String = text
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    if std::env::var_os("AFT_UPDATE_HELP").is_some() {
        std::fs::write(&path, &text).expect("the snapshot can be written");
    }
    let expected = std::fs::read_to_string(&path).expect("the snapshot is there");
    assert!(
        text == expected,
        "the help has changed; AFT_UPDATE_HELP=1 takes it over"
    );
}
