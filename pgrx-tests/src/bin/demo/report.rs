//! The lines that the demo prints. Pure.

use std::time::Duration;

use super::clients::Figures;

/// What the replication was behind, sampled over one state.
#[derive(Default)]
pub struct Lag {
    rows: i64,
    seconds: f64,
    samples: u32,
    sum_seconds: f64,
}

impl Lag {
    pub fn sample(&mut self, rows: i64, seconds: f64) {
        self.rows = self.rows.max(rows);
        self.seconds = self.seconds.max(seconds);
        self.sum_seconds += seconds;
        self.samples += 1;
    }

    fn text(&self) -> String {
        if self.samples == 0 {
            return "-".into();
        }
        format!(
            "{:.1} s (at most {:.1} s, {} rows)",
            self.sum_seconds / f64::from(self.samples),
            self.seconds,
            grouped(self.rows)
        )
    }
}

pub fn heading() {
    println!("  {:<9} {:>24} {:>24}  {:>6}  {:>9}  lag", "state", "old shape", "new shape", "errors", "pause");
}

/// One state: what clients of the old and of the new shape did, what went wrong for them, the pause that led here, the lag.
pub fn line(state: &str, clients: [Option<(Figures, u64)>; 2], lag: &Lag, pause_ms: Option<f64>) {
    let [old, new] =
        clients.map(|c| c.map_or_else(|| "-".to_owned(), |(f, _)| format!("{:.0} tps, {:.1} ms", f.tps, f.latency_ms)));
    let errors: u64 = clients.iter().flatten().map(|(_, errors)| errors).sum();
    let pause = pause_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0} ms"));
    println!("  {state:<9} {old:>24} {new:>24}  {errors:>6}  {pause:>9}  {}", lag.text());
}

/// One line of the copy's progress.
pub fn copy(copied: i64, estimated: i64, since: Duration, phase: &str, error: Option<&str>) {
    let rate = copied as f64 / since.as_secs_f64().max(0.001);
    let left = if rate < 1.0 { "?".to_owned() } else { format!("{:.0}", (estimated - copied) as f64 / rate) };
    println!(
        "  {} {:>9} of {} rows, {:>7} rows/s, {left:>3} s left   {phase}{}",
        bar(copied, estimated),
        grouped(copied),
        grouped(estimated),
        grouped(rate as i64),
        error.map_or_else(String::new, |e| format!(" (last error: {e})")),
    );
}

fn bar(part: i64, whole: i64) -> String {
    const WIDTH: i64 = 30;
    let whole = whole.max(1);
    let full = (part * WIDTH / whole).clamp(0, WIDTH) as usize;
    format!("[{}{}] {:>3} %", "#".repeat(full), ".".repeat(WIDTH as usize - full), (part * 100 / whole).clamp(0, 100))
}

/// 1234567 as 1,234,567.
pub fn grouped(n: i64) -> String {
    let digits = n.unsigned_abs().to_string();
    let mut text = String::from(if n < 0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        assert_eq!([0, 999, 1000, 1_234_567, -12_345].map(grouped), ["0", "999", "1,000", "1,234,567", "-12,345"]);
    }

    #[test]
    fn a_bar_has_one_width() {
        for part in [0, 1, 50, 99, 100, 250] {
            assert_eq!(bar(part, 100).chars().count(), 38);
        }
        assert!(bar(0, 0).ends_with("  0 %"));
    }
}
