//! The results: a JSON file with every single figure, and a page made from it.

use crate::options::Options;
use crate::run::Samples;
use crate::scenario::{ALL, Competitor, Goal, Limit, Scenario};
use crate::{Result, machine};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Results of this run and of those that it completes.
pub struct Report {
    json: PathBuf,
    all: Value,
}

impl Report {
    /// Goes on with the file of this name and day, or begins one.
    pub fn open(options: &Options, facts: &Value) -> Result<Self> {
        let json = options.results.join(format!("{}-{}.json", jiff::Zoned::now().date(), options.name));
        let mut all = match std::fs::read(&json) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(_) => json!({ "scenarios": {} }),
        };
        for (name, fact) in facts.as_object().into_iter().flatten() {
            all[name] = fact.clone();
        }
        Ok(Self { json, all })
    }

    /// Where the figures are.
    pub fn path(&self) -> &Path {
        &self.json
    }

    /// Adds a scenario, in place of what was measured of it before, and writes both files.
    ///
    /// `idle`: the part of the processors that nobody used before it began.
    pub fn add(&mut self, scenario: &Scenario, options: &Options, idle: f64, samples: &Samples) -> Result<()> {
        let results: Map<String, Value> = samples.iter().map(|(competitor, runs)| (competitor.name().to_owned(), figures(runs))).collect();
        self.all["scenarios"][scenario.name] = json!({
            "title": scenario.title,
            "measured": jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
            "sluice": machine::sluice(),
            "command": options.command,
            "rounds": options.rounds,
            "scale": options.scale,
            "idle_before": (idle * 100.0).round() / 100.0,
            "results": results,
        });
        std::fs::create_dir_all(self.json.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(&self.json, serde_json::to_string_pretty(&self.all)? + "\n")?;
        Ok(std::fs::write(self.json.with_extension("md"), self.page())?)
    }

    /// Machine, versions, settings.
    pub fn heading(&self) -> String {
        let list = |name: &str| {
            let entries = self.all[name].as_object().into_iter().flatten();
            entries.map(|(name, value)| format!("{name} {}", plain(value))).collect::<Vec<_>>().join("; ")
        };
        let settings: Vec<String> = self.all["settings"].as_array().into_iter().flatten().map(plain).collect();
        format!(
            "Machine: {}.\n\nVersions: {}.\n\nSettings of both servers: `{}`.\n",
            list("machine"),
            list("versions"),
            settings.join("`, `")
        )
    }

    fn page(&self) -> String {
        let measured: Vec<&Scenario> = ALL.iter().filter(|scenario| !self.all["scenarios"][scenario.name].is_null()).collect();
        let mut page = self.heading();
        page += "\n| scenario | Sluice | beside | goal | |\n|---|---|---|---|---|\n";
        for scenario in &measured {
            page += &self.summary(scenario);
        }
        for scenario in &measured {
            let facts = &self.all["scenarios"][scenario.name];
            let _ = write!(
                page,
                "\n### {}\n\n{}. Measured {} with Sluice {}: `{}`; {} rounds, {} × the rows; the machine was {} idle before.\n\n{}",
                scenario.name,
                scenario.title,
                plain(&facts["measured"]),
                plain(&facts["sluice"]),
                plain(&facts["command"]),
                facts["rounds"],
                facts["scale"],
                facts["idle_before"].as_f64().map_or_else(String::new, |idle| format!("{:.0} %", idle * 100.0)),
                self.table(scenario)
            );
        }
        page
    }

    /// One line of the page's first table: ratios to the others, goals and whether they are reached.
    fn summary(&self, scenario: &Scenario) -> String {
        let figure = if scenario.name == "latency" { "p50_milliseconds" } else { "seconds" };
        let Some(ours) = self.median(scenario, Competitor::Sluice, figure) else { return String::new() };
        let others = scenario.competitors.iter().filter(|competitor| **competitor != Competitor::Sluice);
        let ratios: Vec<String> =
            others.filter_map(|other| Some(format!("{:.2} × {}", self.median(scenario, *other, figure)? / ours, other.name()))).collect();
        let goals: Vec<(String, bool)> = scenario.goals.iter().filter_map(|goal| self.judge(scenario, goal)).collect();
        let join = |texts: Vec<String>| texts.join("<br>");
        format!(
            "| {} | {} | {} | {} | {} |\n",
            scenario.name,
            if figure == "seconds" { format!("{ours:.2} s") } else { format!("p50 {ours:.1} ms") },
            join(ratios),
            join(goals.iter().map(|(text, _)| text.clone()).collect()),
            join(goals.iter().map(|(_, reached)| if *reached { "reached".to_owned() } else { "**not reached**".to_owned() }).collect()),
        )
    }

    /// A goal in words, and whether it is reached.
    fn judge(&self, scenario: &Scenario, goal: &Goal) -> Option<(String, bool)> {
        let ours = self.median(scenario, Competitor::Sluice, goal.figure)?;
        let fastest = |than: &[Competitor]| than.iter().filter_map(|other| self.median(scenario, *other, goal.figure)).reduce(f64::min);
        Some(match goal.limit {
            Limit::TimesAsFast(times, than) => (format!("≥ {times} × {}", than[0].name()), fastest(than)? / ours >= times),
            Limit::PartOfTime(part, than) => (format!("≤ {part} × the time of {}", than[0].name()), ours / fastest(than)? <= part),
            Limit::Below(limit) => (format!("{} < {limit}", goal.figure.replace('_', " ")), ours < limit),
        })
    }

    /// All medians of a scenario.
    pub fn table(&self, scenario: &Scenario) -> String {
        let results = &self.all["scenarios"][scenario.name]["results"];
        let measured: Vec<(&str, &Value)> = scenario
            .competitors
            .iter()
            .map(|competitor| (competitor.name(), &results[competitor.name()]))
            .filter(|(_, figures)| !figures.is_null())
            .collect();
        let mut columns: Vec<&str> = measured.iter().flat_map(|(_, figures)| names(figures)).collect();
        columns.sort_unstable();
        columns.dedup();
        let titles: Vec<String> = columns.iter().map(|column| column.replace('_', " ")).collect();
        let mut table = format!("| | {} | all seconds |\n|---|{}---|\n", titles.join(" | "), "--:|".repeat(columns.len()));
        for (competitor, figures) in measured {
            let cell = |column: &&str| figures[*column]["median"].as_f64().map(short).unwrap_or_default();
            let cells: Vec<String> = columns.iter().map(cell).collect();
            let all: Vec<String> =
                figures["seconds"]["runs"].as_array().into_iter().flatten().filter_map(Value::as_f64).map(short).collect();
            let _ = writeln!(table, "| {competitor} | {} | {} |", cells.join(" | "), all.join(", "));
        }
        table
    }

    fn median(&self, scenario: &Scenario, competitor: Competitor, figure: &str) -> Option<f64> {
        self.all["scenarios"][scenario.name]["results"][competitor.name()][figure]["median"].as_f64()
    }
}

/// Every figure of a competitor: its median and all runs.
fn figures(runs: &[crate::run::Sample]) -> Value {
    let mut all = Map::new();
    for name in runs.iter().flat_map(|run| run.keys()) {
        let values: Vec<f64> = runs.iter().filter_map(|run| run.get(name)).map(|value| (value * 1e4).round() / 1e4).collect();
        all.insert((*name).to_owned(), json!({ "median": median(&values), "runs": values }));
    }
    // Changes or rows per second of the median run.
    let of = |name: &str| all.get(name).and_then(|figure| figure["median"].as_f64());
    if let (Some(rows), Some(seconds)) = (of("rows"), of("seconds")) {
        all.insert("rows_per_second".to_owned(), json!({ "median": (rows / seconds).round() }));
    }
    Value::Object(all)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn names(figures: &Value) -> Vec<&str> {
    figures.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).filter(|name| *name != "rows").collect()
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn short(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}
