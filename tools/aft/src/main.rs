//! `aft`: what a person or a script says to the appliance and to the agent of this machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    aft::main()
}
