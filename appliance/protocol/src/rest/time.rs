//! Appliance time as text: RFC 3339 in UTC, with as many decimals as it takes.

use afterimage_blockdev::Timestamp;

const SECOND_NS: u64 = 1_000_000_000;
const DAY_S: u64 = 86_400;

/// Writes a time in UTC, such as `2026-07-31T12:00:00Z` or `2026-07-31T12:00:00.250Z`.
#[must_use]
pub fn format_rfc3339(time: Timestamp) -> String {
    let seconds = time.0 / SECOND_NS;
    let (year, month, day) = civil(seconds / DAY_S);
    let in_day = seconds % DAY_S;
    let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    let fraction = time.0 % SECOND_NS;
    if fraction > 0 {
        let digits = format!("{fraction:09}");
        let digits = match digits.trim_end_matches('0').len() {
            ..=3 => &digits[..3],
            4..=6 => &digits[..6],
            _ => &digits,
        };
        text.push('.');
        text.push_str(digits);
    }
    text.push('Z');
    text
}

/// Reads a time in UTC, as [`format_rfc3339`] writes it.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<Timestamp> {
    let text = text.strip_suffix(['Z', 'z'])?;
    let (day, time) = text.split_once(['T', 't', ' '])?;
    let (year, month, day) = three(day, '-')?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let (hour, minute, second) = three(clock, ':')?;
    let is_legal = (1970..=2554).contains(&year)
        && (1..=12).contains(&month)
        && (1..=month_days(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !is_legal {
        return None;
    }
    let nanos = format!("{:0<9}", fraction.get(..fraction.len().min(9))?);
    let months = (1..month).map(|month| month_days(year, month));
    let days = days_to(year) + months.sum::<u64>() + day - 1;
    let seconds = days * DAY_S + hour * 3600 + minute * 60 + second;
    let ns = seconds.checked_mul(SECOND_NS)?;
    ns.checked_add(number(&nanos)?).map(Timestamp)
}

fn number(text: &str) -> Option<u64> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

fn three(text: &str, mark: char) -> Option<(u64, u64, u64)> {
    let mut parts = text.split(mark).map(number);
    let found = (parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(found)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to the first of January of a year.
fn days_to(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

fn civil(days: u64) -> (u64, u64, u64) {
    // A year is at most 366 days, so this starts at or before the right one.
    let mut year = 1970 + days / 366;
    while days_to(year + 1) <= days {
        year += 1;
    }
    let mut rest = days - days_to(year);
    let mut month = 1;
    while rest >= month_days(year, month) {
        rest -= month_days(year, month);
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASES: [(&str, u64); 7] = [
        ("1970-01-01T00:00:00Z", 0),
        ("1999-12-31T23:59:59Z", 946_684_799),
        ("2000-02-29T23:59:59Z", 951_868_799),
        ("2024-12-31T00:00:00Z", 1_735_603_200),
        ("2026-07-31T12:34:56Z", 1_785_501_296),
        ("2100-03-01T00:00:00Z", 4_107_542_400),
        ("2554-07-21T23:34:33Z", 18_446_744_073),
    ];

    #[test]
    fn writes_known_times() {
        for (text, seconds) in CASES {
            assert_eq!(format_rfc3339(Timestamp(seconds * SECOND_NS)), text);
        }
    }

    #[test]
    fn reads_what_it_writes_and_nothing_that_is_no_time() {
        for (text, seconds) in CASES {
            assert_eq!(
                parse_rfc3339(text),
                Some(Timestamp(seconds * SECOND_NS)),
                "{text}"
            );
        }
        for ns in [250_000_000, 1_000, 999_999_999, 1_785_501_296_123_456_789] {
            let text = format_rfc3339(Timestamp(ns));
            assert_eq!(parse_rfc3339(&text), Some(Timestamp(ns)), "{text}");
        }
        for wrong in [
            "",
            "Z",
            "2026-07-31",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-07-31T24:00:00Z",
            "2026-07-31T12:00:00",
            "2026-07-31T12:00Z",
            "2026-07-31T12:00:00.é9Z",
            "2026-07-31T12:00:+1Z",
            "9999-01-01T00:00:00Z",
        ] {
            assert_eq!(parse_rfc3339(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn writes_as_many_decimals_as_it_takes() {
        for (ns, text) in [
            (250_000_000, "1970-01-01T00:00:00.250Z"),
            (1_000, "1970-01-01T00:00:00.000001Z"),
            (999_999_999, "1970-01-01T00:00:00.999999999Z"),
        ] {
            assert_eq!(format_rfc3339(Timestamp(ns)), text);
        }
    }
}
