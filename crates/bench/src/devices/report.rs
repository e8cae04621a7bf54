//! The report: a table for people, JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::catalogue::Case;
use super::side::Round;

/// All rounds of one side.
#[derive(Debug)]
pub(crate) struct SideRounds {
    pub(crate) name: String,
    pub(crate) rounds: Vec<Round>,
}

impl SideRounds {
    /// The median over rounds; one failure fails them all.
    fn figure(&self, case: &str) -> Result<f64, String> {
        let mut values = self.values(case)?;
        values.sort_by(f64::total_cmp);
        let upper = values.get(values.len() / 2).copied().ok_or("was not run")?;
        let lower = values.get((values.len() - 1) / 2).copied().unwrap_or(upper);
        Ok((upper + lower) / 2.0)
    }

    fn values(&self, case: &str) -> Result<Vec<f64>, String> {
        self.rounds.iter().map(|round| round.figure(case)).collect()
    }
}

/// What Ringfence's figure is set beside: how many times QEMU's it is, and how many times the host's. More is better.
fn comparisons(sides: &[SideRounds]) -> Vec<(usize, usize)> {
    let find = |name: &str| sides.iter().position(|side| side.name == name);
    let ours = (0..sides.len()).filter(|at| sides[*at].name.starts_with("ringfence"));
    ours.flat_map(|ours| {
        ["qemu", "host"].into_iter().filter_map(find).map(move |theirs| (ours, theirs)).collect::<Vec<_>>()
    })
    .collect()
}

/// The table, in Markdown.
pub(crate) fn text(cases: &[Case], sides: &[SideRounds], notes: &[String]) -> String {
    let pairs = comparisons(sides);
    let mut text = String::from("| | unit |");
    let mut failures = String::new();
    // Writing to a string cannot fail.
    for side in sides {
        let _ = write!(text, " {} |", side.name);
    }
    for (ours, theirs) in &pairs {
        let _ = write!(text, " {} to {} |", sides[*ours].name, sides[*theirs].name);
    }
    text.push_str("\n|---|---|");
    text.push_str(&"--:|".repeat(sides.len() + pairs.len()));
    text.push('\n');
    for case in cases {
        let name = case.name();
        let figures: Vec<_> = sides.iter().map(|side| side.figure(&name)).collect();
        let _ = write!(text, "| {name} | {} |", case.test.unit.name());
        for (figure, side) in figures.iter().zip(sides) {
            match figure {
                Ok(value) => _ = write!(text, " {} |", digits(*value)),
                Err(reason) => {
                    text.push_str(" - |");
                    if !side.rounds.iter().any(|round| round.failure.as_ref() == Some(reason)) {
                        let _ = writeln!(failures, "no figure: {name} on {}: {reason}", side.name);
                    }
                }
            }
        }
        for &(ours, theirs) in &pairs {
            match (&figures[ours], &figures[theirs]) {
                (Ok(ours), Ok(theirs)) => {
                    _ = write!(text, " {:.2} |", case.test.unit.times(*ours, *theirs));
                }
                _ => text.push_str(" - |"),
            }
        }
        text.push('\n');
    }
    text.push_str("\nmedians over rounds; ratios: how many times better, of times how many times shorter\n");
    text.push_str(&failures);
    for side in sides {
        for (number, reason) in side.rounds.iter().enumerate() {
            if let Some(reason) = &reason.failure {
                let _ = writeln!(text, "no figures: {}, round {}: {reason}", side.name, number + 1);
            }
        }
    }
    for note in notes {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// Three digits that count, or all before the point.
fn digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}")
}

/// The same for programs, with every round.
pub(crate) fn json(cases: &[Case], sides: &[SideRounds], notes: &[String]) -> Value {
    let tests: Vec<Value> = cases
        .iter()
        .map(|case| {
            let name = case.name();
            let of = |side: &SideRounds| match side.figure(&name) {
                Ok(figure) => json!({ "median": figure, "rounds": side.values(&name).ok() }),
                Err(reason) => json!({ "failed": reason }),
            };
            let figures = sides.iter().map(|side| (side.name.clone(), of(side)));
            let ratios = comparisons(sides).into_iter().filter_map(|(ours, theirs)| {
                let ratio =
                    case.test.unit.times(sides[ours].figure(&name).ok()?, sides[theirs].figure(&name).ok()?);
                Some((format!("{}/{}", sides[ours].name, sides[theirs].name), json!(ratio)))
            });
            json!({
                "name": name, "unit": case.test.unit.name(),
                "figures": figures.collect::<serde_json::Map<_, _>>(),
                "times_better": ratios.collect::<serde_json::Map<_, _>>(),
            })
        })
        .collect();
    json!({ "tests": tests, "notes": notes })
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::choose;
    use super::*;

    #[test]
    fn report_shows_medians_ratios_and_why_something_failed() {
        let side = |name: &str, rounds: &[(&str, Result<f64, &str>)]| SideRounds {
            name: name.to_owned(),
            rounds: rounds
                .iter()
                .map(|(case, figure)| {
                    let mut round = Round::default();
                    for case in case.split(' ') {
                        round.figures.insert(case.to_owned(), figure.map_err(str::to_owned));
                    }
                    round
                })
                .collect(),
        };
        let both = "net/tcp-1 net/to-host";
        let sides = [
            side("host", &[(both, Ok(20.0))]),
            side("qemu", &[(both, Ok(100.0)), (both, Ok(300.0))]),
            side("ringfence", &[(both, Ok(50.0)), (both, Ok(10.0)), (both, Ok(40.0))]),
        ];
        let cases = choose(&["tcp-1".to_owned(), "to-host".to_owned()]).expect("are there");
        let shown = text(&cases, &sides, &["a note".to_owned()]);
        assert!(shown.contains("| net/to-host | Gbit/s | 20.0 | 200 | 40.0 | 0.20 | 2.00 |"), "{shown}");
        assert!(shown.contains("| net/tcp-1 | us | 20.0 | 200 | 40.0 | 5.00 | 0.50 |"), "{shown}");
        assert!(shown.ends_with("a note\n"));
        let value = json(&cases, &sides, &[]);
        assert_eq!(value["tests"][1]["times_better"]["ringfence/qemu"], 5.0);

        let sides = [side("ringfence", &[(both, Ok(1.0)), (both, Err("lost"))])];
        let shown = text(&cases, &sides, &[]);
        assert!(shown.contains("| net/tcp-1 | us | - |"), "{shown}");
        assert!(shown.contains("no figure: net/tcp-1 on ringfence: lost"), "{shown}");
    }
}
