//! Which way requests go, and what decides it.

use std::fs;
use std::io;
use std::str::FromStr;
use std::sync::Once;

use serde::{Deserialize, Serialize};

/// The kernel's switch for FUSE over `io_uring`, for the whole machine.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Whether requests may go over `io_uring`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoUring {
    /// Never.
    Off,
    /// When the kernel's switch is on.
    #[default]
    Auto,
    /// The kernel's switch is turned on first, for the whole machine, and stays on.
    On,
}

impl FromStr for IoUring {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            _ => Err("give `auto`, `on` or `off`"),
        }
    }
}

/// How requests reach this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// By reading `/dev/fuse`.
    Classic,
    /// Over rings, one for each processor.
    IoUring,
}

impl IoUring {
    /// Says whether a ring is to be asked for; turns the kernel's switch on where it may.
    pub(super) fn is_wanted(self) -> bool {
        if self == Self::Off {
            return false;
        }
        let is_on = match fs::read_to_string(SWITCH) {
            Ok(text) => matches!(text.trim(), "Y" | "1"),
            Err(error) => {
                if self == Self::On {
                    fall_back(&format!("the kernel has no {SWITCH}: {error}"));
                }
                return false;
            }
        };
        is_on || (self == Self::On && turn_on())
    }
}

fn turn_on() -> bool {
    let result: io::Result<()> = fs::write(SWITCH, "Y");
    if let Err(error) = &result {
        fall_back(&format!("{SWITCH} cannot be set: {error}"));
    }
    result.is_ok()
}

/// Says once why requests go over `/dev/fuse` although a ring was wanted.
pub(super) fn fall_back(reason: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::warn!(reason, "FUSE goes over /dev/fuse, not over io_uring"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_configuration() {
        assert_eq!("on".parse(), Ok(IoUring::On));
        assert_eq!("auto".parse(), Ok(IoUring::Auto));
        assert_eq!("off".parse(), Ok(IoUring::Off));
        assert!("yes".parse::<IoUring>().is_err());
    }

    #[test]
    fn what_is_off_is_not_wanted() {
        assert!(!IoUring::Off.is_wanted());
    }
}
