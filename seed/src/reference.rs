//! What people write to name a state of a disk:
//! `<machine>/<disk>@<name | time | -90s | [history:]lsn:N | latest>`.

use core::str::FromStr;
use std::time::Duration;

use afterimage_blockdev::{HistoryId, Lsn, Timestamp};

use crate::error::SeedError;

/// The part after the `@`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum At {
    /// The newest state.
    Latest,
    /// An LSN, of the trunk unless a history is given.
    Lsn(Option<HistoryId>, Lsn),
    /// The last LSN at or before a time.
    Time(Timestamp),
    /// So long before now.
    Ago(Duration),
    /// A recovery point.
    Name(String),
}

/// A state of a disk, by names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reference {
    /// The machine's name or identity.
    pub machine: String,
    /// The disk's name or identity.
    pub disk: String,
    /// When.
    pub at: At,
}

fn refused(text: &str, why: &str) -> SeedError {
    SeedError::refused(
        format!("{text:?} names no state of a disk: {why}"),
        "write machine/disk@name, @2026-11-21T10:00:00Z, @-90s, @lsn:1234 or @latest",
    )
}

impl FromStr for Reference {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let (place, at) = text.split_once('@').unwrap_or((text, "latest"));
        let (machine, disk) = place
            .split_once('/')
            .ok_or_else(|| refused(text, "there is no machine/disk"))?;
        if machine.is_empty() || disk.is_empty() || disk.contains('/') {
            return Err(refused(text, "machine or disk is empty"));
        }
        Ok(Self {
            machine: machine.to_owned(),
            disk: disk.to_owned(),
            at: at.parse()?,
        })
    }
}

impl FromStr for At {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        if text.is_empty() {
            return Err(refused("@", "nothing follows the @"));
        }
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(lsn) = text
            .strip_prefix("lsn:")
            .or_else(|| text.strip_prefix("lsn-"))
        {
            return parse_lsn(text, lsn).map(|lsn| Self::Lsn(None, lsn));
        }
        if let Some((history, lsn)) = text.split_once(":lsn:") {
            let history = history
                .parse()
                .map_err(|_| refused(text, "the history is no UUID"))?;
            return parse_lsn(text, lsn).map(|lsn| Self::Lsn(Some(history), lsn));
        }
        if let Some(ago) = text.strip_prefix('-') {
            return parse_duration(ago)
                .map(Self::Ago)
                .ok_or_else(|| refused(text, "the age is not like 90s, 15m, 2h or 3d"));
        }
        if let Some(time) = parse_time(text) {
            return Ok(Self::Time(time));
        }
        Ok(Self::Name(text.to_owned()))
    }
}

fn parse_lsn(text: &str, lsn: &str) -> Result<Lsn, SeedError> {
    lsn.parse()
        .map(Lsn)
        .map_err(|_| refused(text, "the LSN is no number"))
}

fn parse_duration(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit_at);
    let number: f64 = number.parse().ok()?;
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * seconds).ok()
}

/// Reads an RFC 3339 time, such as `2026-11-21T10:00:00.5Z` or with an offset.
#[must_use]
pub fn parse_time(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = text.get(from..to)?;
        part.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| part.parse().ok())?
    };
    let marks = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    if bytes.len() < 20 || marks.iter().any(|(at, mark)| bytes[*at] != *mark) {
        return None;
    }
    if !matches!(bytes[10], b'T' | b't' | b' ') {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let is_legal = (1..=12).contains(&month)
        && (1..=days_of_month(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !is_legal {
        return None;
    }
    let mut rest = &text[19..];
    let mut nanos = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|c: char| !c.is_ascii_digit())?;
        let digits = fraction.get(..end.min(9))?;
        let scale = u32::try_from(9 - digits.len()).ok()?;
        nanos = digits.parse::<i64>().ok()? * 10i64.pow(scale);
        rest = &fraction[end..];
    }
    let offset_s = parse_offset(rest)?;
    let seconds =
        days_from_civil(year, month, day) * 86400 + hour * 3600 + minute * 60 + second - offset_s;
    let seconds = u64::try_from(seconds).ok()?;
    let nanos = u64::try_from(nanos).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(nanos)
        .map(Timestamp)
}

fn parse_offset(text: &str) -> Option<i64> {
    if matches!(text, "Z" | "z") {
        return Some(0);
    }
    let sign = match text.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let (hours, minutes) = text[1..].split_once(':')?;
    let part = |text: &str, limit: i64| {
        let is_legal = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<i64>()
            .ok()
            .filter(|value| is_legal && *value < limit)
    };
    Some(sign * (part(hours, 24)? * 3600 + part(minutes, 60)? * 60))
}

fn days_of_month(year: i64, month: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 of the proleptic Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Writes a time as RFC 3339 in UTC, with milliseconds.
#[must_use]
pub fn format_time(time: Timestamp) -> String {
    let seconds = time.0 / 1_000_000_000;
    let millis = time.0 / 1_000_000 % 1000;
    let (days, within) = (seconds / 86400, seconds % 86400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (within / 3600, within / 60 % 60, within % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}
