//! Tables for people, JSON for scripts.

use std::io::{self, IsTerminal, Write};

use afterimage_blockdev::Timestamp;
use afterimage_protocol::rest::time::format_rfc3339;
use serde::Serialize;

use crate::error::AftError;

/// Where answers go.
pub struct Output {
    is_json: bool,
}

impl Output {
    /// Makes an output.
    #[must_use]
    pub fn new(is_json: bool) -> Self {
        Self { is_json }
    }

    /// Gives an answer: the value itself to scripts, `text` to people.
    pub fn answer<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        if self.is_json {
            match serde_json::to_string_pretty(value) {
                Ok(json) => print(&json),
                Err(error) => eprintln!("aft: the answer is no JSON: {error}"),
            }
        } else {
            print(text().trim_end());
        }
    }

    /// Gives one of many answers: a line of JSON to scripts, `text` to people.
    pub fn line<T: Serialize>(&self, value: &T, text: &str) {
        if self.is_json {
            match serde_json::to_string(value) {
                Ok(json) => print(&json),
                Err(error) => eprintln!("aft: the answer is no JSON: {error}"),
            }
        } else {
            print(text);
        }
    }

    /// Gives bytes as they are, a script or a manual page for instance.
    pub fn raw(&self, bytes: &[u8]) {
        // Whoever reads may have had enough.
        let _had_enough = io::stdout().write_all(bytes);
    }

    /// Says what went wrong.
    pub fn error(&self, error: &AftError) {
        if self.is_json {
            match serde_json::to_string_pretty(&error.0) {
                Ok(json) => eprintln!("{json}"),
                Err(_) => eprintln!("aft: {error}"),
            }
            return;
        }
        eprintln!("aft: {}", error.0.message);
        if !error.0.hint.is_empty() {
            eprintln!("     {}", error.0.hint);
        }
    }

    /// Says whether answers are for scripts.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.is_json
    }

    /// Says whether progress may be drawn over itself.
    #[must_use]
    pub fn is_lively(&self) -> bool {
        !self.is_json && io::stderr().is_terminal()
    }
}

fn print(text: &str) {
    let mut out = io::stdout().lock();
    // Whoever reads may have had enough.
    let _had_enough = writeln!(out, "{text}");
}

/// Rows of cells under a heading. Columns are as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Begins a table.
    #[must_use]
    pub fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Lays the table out.
    #[must_use]
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&printable(cell));
                let missing = width + 2 - cell.chars().count();
                line.extend(std::iter::repeat_n(' ', missing));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Names come from elsewhere; none of them may move the cursor.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// A number of bytes with a binary unit.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut whole = count;
    let mut tenths = 0;
    let mut name = "B";
    for unit in UNITS {
        if whole < 1024 {
            break;
        }
        tenths = (whole % 1024) * 10 / 1024;
        whole /= 1024;
        name = unit;
    }
    format!("{whole}.{tenths} {name}")
}

/// A time span in milliseconds, in the unit that suits it.
#[must_use]
pub fn span(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        120_000..7_200_000 => format!("{} min {:02} s", ms / 60_000, ms / 1000 % 60),
        7_200_000..172_800_000 => format!("{} h {:02} min", ms / 3_600_000, ms / 60_000 % 60),
        _ => format!("{} d {} h", ms / 86_400_000, ms / 3_600_000 % 24),
    }
}

/// A time span that may not be known.
#[must_use]
pub fn maybe_span(ms: Option<u64>) -> String {
    ms.map_or("-".to_owned(), span)
}

/// A time, or a dash for none.
#[must_use]
pub fn time(time: Timestamp) -> String {
    if time == Timestamp::default() {
        "-".to_owned()
    } else {
        format_rfc3339(time)
    }
}

/// Parts done of a whole, such as `42 %`.
#[must_use]
pub fn percent(done: u64, total: u64) -> String {
    if total == 0 {
        return "-".to_owned();
    }
    let percent = u128::from(done.min(total)) * 100 / u128::from(total);
    format!("{percent} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_nothing_moves_the_cursor() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(["a-long-name".to_owned(), "1".to_owned()]);
        table.row(["b\x1b[2J".to_owned(), "2".to_owned()]);
        assert_eq!(
            table.text(),
            "NAME         SIZE\na-long-name  1\nb?[2J        2\n"
        );
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(bytes(u64::MAX), "15.9 EiB");
        assert_eq!(span(999), "999 ms");
        assert_eq!(span(61_500), "61.5 s");
        assert_eq!(span(125_000), "2 min 05 s");
        assert_eq!(span(u64::MAX).split(' ').count(), 4);
        assert_eq!(percent(1, 3), "33 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
        assert_eq!(percent(0, 0), "-");
    }
}
