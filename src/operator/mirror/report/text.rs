//! Numbers in words.

use crate::worker::contract::Status;

/// Units of bytes, each 1024 of the one before.
const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// Lag such as `1.2 MiB, 3s`; what is not known is left out.
pub fn lag(size: Option<u64>, seconds: Option<u64>) -> Option<String> {
    let parts: Vec<_> = size.map(bytes).into_iter().chain(seconds.map(duration)).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// How far the copy is.
pub fn copying(status: &Status) -> String {
    let estimate = if status.rows_to_copy > 0 { format!(" of about {}", status.rows_to_copy) } else { String::new() };
    let step = status.waiting.as_ref().map(|step| format!("; {step}")).unwrap_or_default();
    format!("the initial copy runs: {}{estimate} rows{step}", status.rows_copied)
}

/// `12 B`, `1.2 MiB`.
#[allow(clippy::cast_precision_loss)] // one decimal is shown
pub fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, 0);
    // 1023.95 would be shown as 1024.0 of the smaller unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `3s`, `4m5s`, `2h3m`, `1d2h`.
fn duration(seconds: u64) -> String {
    let two = |big: u64, unit: &str, small: u64, smaller: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{smaller}") }
    };
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => two(seconds / 60, "m", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds % 3_600 / 60, "m"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3_600, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_in_words() {
        for (bytes, seconds, words) in [
            (Some(0), Some(0), "0 B, 0s"),
            (Some(1_258_291), Some(3), "1.2 MiB, 3s"),
            (Some(1023), None, "1023 B"),
            (Some(1_048_575), Some(60), "1.0 MiB, 1m"),
            (Some(5 << 40), Some(7_381), "5.0 TiB, 2h3m"),
            (Some(u64::MAX), Some(93_600), "16384.0 PiB, 1d2h"),
            (None, Some(245), "4m5s"),
        ] {
            assert_eq!(lag(bytes, seconds).as_deref(), Some(words));
        }
        assert_eq!(lag(None, None), None);
    }
}
