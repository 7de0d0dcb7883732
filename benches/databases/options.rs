//! What the environment asks for.

use crate::Result;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How much is measured.
pub struct Options {
    /// Rounds per scenario.
    pub rounds: usize,
    /// Part of the full number of rows.
    pub scale: f64,
    /// Names of scenarios; all when empty.
    pub only: Vec<String>,
    /// Part of the results' file name.
    pub name: String,
    /// Folder of the results.
    pub results: PathBuf,
    /// How to repeat it.
    pub command: String,
}

impl Options {
    /// Reads the variables that `main.rs` lists.
    pub fn from_environment() -> Result<Self> {
        let preset = text("PRESET").unwrap_or_else(|| "full".into());
        let (rounds, scale) = match preset.as_str() {
            "full" => (5, 1.0),
            "short" => (5, 0.4),
            "quick" => (3, 0.2),
            "smoke" => (1, 0.01),
            other => return Err(format!("PRESET {other}: full, short, quick or smoke").into()),
        };
        let only = text("ONLY").unwrap_or_default();
        let mut command = "make bench".to_owned();
        for variable in ["PRESET", "ROUNDS", "SCALE", "ONLY", "NAME"] {
            if let Some(value) = text(variable) {
                command += &format!(" {variable}={value}");
            }
        }
        let options = Self {
            rounds: number("ROUNDS", rounds)?,
            scale: number("SCALE", scale)?,
            only: only.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect(),
            name: text("NAME").unwrap_or(preset),
            results: text("RESULTS").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results"), PathBuf::from),
            command,
        };
        if options.rounds == 0 || !(options.scale > 0.0 && options.scale <= 10.0) {
            return Err("ROUNDS is at least 1, SCALE above 0 and at most 10".into());
        }
        if options.name.contains(['/', '.']) {
            return Err("NAME is part of a file name".into());
        }
        Ok(options)
    }

    /// A number of rows, scaled and a whole multiple of `unit`.
    pub fn rows(&self, full: i64, unit: i64) -> i64 {
        ((full as f64 * self.scale / unit as f64).round() as i64).max(1) * unit
    }
}

fn text(variable: &str) -> Option<String> {
    std::env::var(variable).ok().filter(|value| !value.is_empty())
}

fn number<T: FromStr>(variable: &str, default: T) -> Result<T> {
    match text(variable) {
        None => Ok(default),
        Some(value) => value.parse().map_err(|_| format!("{variable} {value} is not a number").into()),
    }
}
