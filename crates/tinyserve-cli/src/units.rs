//! Numbers for people: bytes, times, counts.

use std::time::Duration;

/// Bytes as `12.3 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // Above 1023.995 two decimals would show 1024.00 of the smaller unit.
    while value >= 1023.995 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if unit == 0 { 0 } else { 2 };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// Milliseconds as `850 µs`, `12.3 ms` or `4.56 s`.
pub(crate) fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms < 1.0 => format!("{:.0} µs", ms * 1e3),
        ms if ms < 1e3 => format!("{ms:.1} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// Milliseconds of a duration.
pub(crate) fn as_milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A count as `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count as `260.03 K` or `124.44 M`.
pub(crate) fn short_count(n: u64) -> String {
    match n as f64 {
        n if n < 1e3 => format!("{n}"),
        n if n < 999_995.0 => format!("{:.2} K", n / 1e3),
        n if n < 999_995_000.0 => format!("{:.2} M", n / 1e6),
        n => format!("{:.2} B", n / 1e9),
    }
}

/// A share as `12.3 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024 * 1024 - 1), "1.00 MiB");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
        assert_eq!(milliseconds(0.85), "850 µs");
        assert_eq!(milliseconds(12.34), "12.3 ms");
        assert_eq!(milliseconds(4560.0), "4.56 s");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(999), "999");
        assert_eq!(short_count(260_032), "260.03 K");
        assert_eq!(short_count(124_439_808), "124.44 M");
        assert_eq!(short_count(512), "512");
        assert_eq!(percent(0.1234), "12.3 %");
    }
}
