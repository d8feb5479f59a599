//! Numbers, durations, sizes and tables as people read them.
//!
//! Contract: plain text without colour; the same input gives the same text everywhere.

use std::time::Duration;

/// `512 B`, `1.5 KiB`, `33.8 GiB`: binary units, one decimal.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `0.8s`, `42s`, `3m 07s`, `2h 05m`, `3d 04h`: two units at most.
pub fn duration(time: Duration) -> String {
    if time.as_secs_f64() < 9.95 {
        return format!("{:.1}s", time.as_secs_f64());
    }
    let seconds = time.as_secs_f64().round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if minutes == 0 => format!("{seconds}s"),
        () if hours == 0 => format!("{minutes}m {:02}s", seconds % 60),
        () if days == 0 => format!("{hours}h {:02}m", minutes % 60),
        () => format!("{days}d {:02}h", hours % 24),
    }
}

/// `1,234,567`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 line`, `2 lines`, `2 classes`: an English noun with a regular plural.
pub fn plural(value: u64, noun: &str) -> String {
    let ending = match value {
        1 => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    };
    format!("{} {noun}{ending}", count(value))
}

/// `675.1M`, `33.4k`, `128`: decimal units, for parameters and tokens.
pub fn short_count(value: u64) -> String {
    const UNITS: [(&str, f64); 4] = [("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    let value = value as f64;
    for (unit, size) in UNITS {
        // 999,950 would print as 1000.0k.
        if value >= size * 0.99995 && value >= 1000.0 {
            return format!("{:.1}{unit}", value / size);
        }
    }
    format!("{value}")
}

/// Four significant digits where people compare them, powers of ten where the value is far from 1.
pub fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value.is_nan() { "nan".into() } else { format!("{value}") };
    }
    // Rounded first, so that 0.99999 counts as 1.
    let rounded: f64 = format!("{value:.3e}").parse().expect("a formatted number parses");
    match rounded.abs().log10().floor() as i32 {
        digits @ -3..=3 => format!("{rounded:.*}", (3 - digits) as usize),
        4 | 5 => format!("{value:.0}"),
        _ => format!("{rounded:.2e}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// A table in aligned columns, two spaces apart, under a line of headings.
#[derive(Clone, Debug)]
pub struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const COLUMNS: usize>(headings: [(&str, Align); COLUMNS]) -> Self {
        Self {
            align: headings.iter().map(|(_, align)| *align).collect(),
            rows: vec![headings.iter().map(|(text, _)| (*text).to_owned()).collect()],
        }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// If it has not one cell per heading.
    pub fn row<Cell: Into<String>>(&mut self, cells: impl IntoIterator<Item = Cell>) -> &mut Self {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        assert_eq!(cells.len(), self.align.len(), "one cell per heading: {cells:?}");
        self.rows.push(cells);
        self
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let widths: Vec<usize> = (0..self.align.len())
            .map(|column| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.align) {
                match align {
                    Align::Left => line += &format!("{cell:<width$}  "),
                    Align::Right => line += &format!("{cell:>width$}  "),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let expected = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (36_283_883_520, "33.8 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ];
        for (value, text) in expected {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn durations() {
        let expected = [
            (0.0, "0.0s"),
            (0.84, "0.8s"),
            (9.94, "9.9s"),
            (9.96, "10s"),
            (59.4, "59s"),
            (59.6, "1m 00s"),
            (187.0, "3m 07s"),
            (7500.0, "2h 05m"),
            (273_600.0, "3d 04h"),
        ];
        for (seconds, text) in expected {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), text);
        }
    }

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1,000");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(plural(1, "line"), "1 line");
        assert_eq!(plural(1797, "image"), "1,797 images");
        assert_eq!(plural(10, "class"), "10 classes");
        assert_eq!(short_count(128), "128");
        assert_eq!(short_count(999), "999");
        assert_eq!(short_count(999_960), "1.0M");
        assert_eq!(short_count(33_400), "33.4k");
        assert_eq!(short_count(675_129_632), "675.1M");
    }

    #[test]
    fn numbers() {
        let expected = [
            (0.0, "0"),
            (0.123_456, "0.1235"),
            (0.999_99, "1.000"),
            (-2.5, "-2.500"),
            (0.001_234_5, "0.001234"),
            (1e-4, "1.00e-4"),
            (1234.4, "1234"),
            (123_456.0, "123456"),
            (1.5e9, "1.50e9"),
            (f64::NAN, "nan"),
            (f64::INFINITY, "inf"),
        ];
        for (value, text) in expected {
            assert_eq!(number(value), text, "{value}");
        }
    }

    #[test]
    fn tables_line_up() {
        let mut table = Table::new([("tensor", Align::Left), ("bytes", Align::Right), ("type", Align::Left)]);
        table.row(["pos_embed", "1.0 MiB", "f32"]).row(["é", "8 B", ""]);
        assert_eq!(
            table.to_string(),
            "tensor       bytes  type\n\
             pos_embed  1.0 MiB  f32\n\
             é              8 B\n"
        );
    }

    #[test]
    #[should_panic(expected = "one cell per heading")]
    fn a_short_row_is_a_mistake() {
        Table::new([("a", Align::Left), ("b", Align::Left)]).row(["only"]);
    }
}
