//! The report: a table for people, JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::catalogue::Class;
use super::results::{Row, SideRounds, geometric_mean, ratios, vulnerabilities};

/// What is said about the run itself.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) host_cpu: String,
    /// Versions and settings of the sides, and why one is missing.
    pub(crate) notes: Vec<String>,
}

/// Pairs of sides that are compared: how many times longer the first takes.
fn pairs(sides: &[SideRounds]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    let native = sides.iter().position(|side| !side.is_guest);
    let qemu = sides.iter().position(|side| side.name == "qemu");
    let ours =
        sides.iter().enumerate().filter(|(_, side)| side.name.starts_with("ringfence")).map(|(at, _)| at);
    for ours in ours.clone() {
        pairs.extend(native.map(|native| (ours, native)));
    }
    pairs.extend(qemu.zip(native));
    for ours in ours {
        pairs.extend(qemu.map(|qemu| (qemu, ours)));
    }
    pairs
}

/// The table.
pub(crate) fn text(rows: &[Row], sides: &[SideRounds], facts: &Facts) -> String {
    let pairs = pairs(sides);
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut heading = vec!["program".to_owned(), "class".to_owned()];
    heading.extend(sides.iter().map(|side| format!("{} s", side.name)));
    heading
        .extend(pairs.iter().map(|(above, below)| format!("{}/{}", sides[*above].name, sides[*below].name)));
    lines.push(heading);
    for row in rows {
        let mut line = vec![row.name.to_owned(), row.class.name().to_owned()];
        line.extend(row.figures.iter().zip(sides).map(|(figure, side)| match figure {
            Ok(seconds) => format!("{seconds:.4}"),
            Err(_) if row.class == Class::Boot && !side.is_guest => "-".to_owned(),
            Err(_) => "failed".to_owned(),
        }));
        let ratio = |pair: &(usize, usize)| {
            row.ratio(pair.0, pair.1).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"))
        };
        line.extend(pairs.iter().map(ratio));
        lines.push(line);
    }
    for (name, class) in groups() {
        let mut line = vec![format!("geometric mean, {name}"), String::new()];
        line.extend(sides.iter().map(|_| String::new()));
        line.extend(pairs.iter().map(|&(above, below)| {
            mean(rows, above, below, class)
                .map_or("-".to_owned(), |(mean, count)| format!("{mean:.2} ({count})"))
        }));
        lines.push(line);
    }
    let mut text = columns(&lines);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "\nmeans of ratios; in brackets, of how many programs; `all` leaves boot out");
    for row in rows {
        for (figure, side) in row.figures.iter().zip(sides) {
            if let Err(reason) = figure
                && (side.is_guest || row.class != Class::Boot)
            {
                let _ = writeln!(text, "failed: {} on {}: {reason}", row.name, side.name);
            }
        }
    }
    for side in sides {
        for (round, clocks) in side.rounds.iter().filter_map(|round| round.transcript.clocks()).enumerate() {
            let _ = writeln!(
                text,
                "clock: {}, round {}: {:.2} s by its own, {:.2} s by the host's",
                side.name,
                round + 1,
                clocks.0,
                clocks.1
            );
        }
    }
    let _ = writeln!(text, "host: {}", facts.host_cpu);
    for note in &facts.notes {
        let _ = writeln!(text, "{note}");
    }
    let _ = writeln!(text, "CPU weaknesses as the kernels see them ({}):", names(sides).join(" | "));
    for (name, texts) in vulnerabilities(sides) {
        let same = texts.windows(2).all(|pair| pair[0] == pair[1]);
        let shown = if same { texts.first().cloned().unwrap_or_default() } else { texts.join(" | ") };
        let _ = writeln!(text, "  {name}: {shown}");
    }
    text
}

/// The groups that means are taken over; `None` is everything but boot.
fn groups() -> impl Iterator<Item = (&'static str, Option<Class>)> {
    let classes = Class::ALL.into_iter().filter(|class| *class != Class::Boot);
    classes.map(|class| (class.name(), Some(class))).chain([("all", None)])
}

/// A group's geometric mean, and of how many ratios it is.
fn mean(rows: &[Row], above: usize, below: usize, class: Option<Class>) -> Option<(f64, usize)> {
    let wanted = |found: Class| class.map_or(found != Class::Boot, |class| class == found);
    let values: Vec<f64> = ratios(rows, above, below)
        .into_iter()
        .filter(|(found, _)| wanted(*found))
        .map(|(_, ratio)| ratio)
        .collect();
    Some((geometric_mean(&values)?, values.len()))
}

fn names(sides: &[SideRounds]) -> Vec<&str> {
    sides.iter().map(|side| side.name.as_str()).collect()
}

/// The same for programs, with every single time.
pub(crate) fn json(rows: &[Row], sides: &[SideRounds], facts: &Facts) -> Value {
    let pairs = pairs(sides);
    let pair_name = |pair: &(usize, usize)| format!("{}/{}", sides[pair.0].name, sides[pair.1].name);
    let programs: Vec<Value> = rows
        .iter()
        .map(|row| {
            let figures = row.figures.iter().zip(sides).map(|(figure, side)| {
                let value = match figure {
                    Ok(seconds) => json!({ "seconds": seconds }),
                    Err(reason) => json!({ "failed": reason }),
                };
                (side.name.clone(), value)
            });
            let ratios = pairs.iter().map(|pair| (pair_name(pair), json!(row.ratio(pair.0, pair.1))));
            json!({
                "name": row.name, "class": row.class.name(),
                "figures": figures.collect::<serde_json::Map<_, _>>(),
                "ratios": ratios.collect::<serde_json::Map<_, _>>(),
            })
        })
        .collect();
    let means = groups().map(|(name, class)| {
        let of = |pair: &(usize, usize)| mean(rows, pair.0, pair.1, class).map(|(mean, _)| mean);
        let values = pairs.iter().map(|pair| (pair_name(pair), json!(of(pair))));
        (name.to_owned(), Value::Object(values.collect()))
    });
    let raw = sides.iter().map(|side| {
        let rounds = side.rounds.iter().map(|round| {
            let programs = round.transcript.programs.iter();
            let times = programs.map(|(name, measured)| {
                let times = json!({ "wall": measured.seconds, "cpu": measured.processor });
                (name.clone(), times)
            });
            json!({
                "seconds": times.collect::<serde_json::Map<_, _>>(),
                "clocks": round.transcript.clocks(), "failure": round.failure,
            })
        });
        (side.name.clone(), Value::Array(rounds.collect()))
    });
    json!({
        "programs": programs,
        "geometric_means": means.collect::<serde_json::Map<_, _>>(),
        "rounds": raw.collect::<serde_json::Map<_, _>>(),
        "vulnerabilities": vulnerabilities(sides), "sides": names(sides),
        "host": facts.host_cpu, "notes": facts.notes,
    })
}

/// Left-aligned text, right-aligned figures.
fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.iter().map(Vec::len).max().unwrap_or(0);
    // A mean's long name reaches into the column beside it.
    let width = |column: usize| {
        let cells =
            lines.iter().filter(|line| column > 0 || line.get(1).is_some_and(|class| !class.is_empty()));
        cells.filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let (first, second) =
            (line.first().map_or("", String::as_str), line.get(1).map_or("", String::as_str));
        let mut shown = if second.is_empty() {
            format!("{first:<0$}", widths[0] + widths[1] + 2)
        } else {
            format!("{first:<0$}  {second:<1$}", widths[0], widths[1])
        };
        for (cell, width) in line.iter().zip(&widths).skip(2) {
            let _ = write!(shown, "  {cell:>width$}");
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_shows_ratios_means_and_why_something_failed() {
        let side =
            |name: &str| SideRounds { name: name.to_owned(), is_guest: name != "native", rounds: Vec::new() };
        let sides = [side("native"), side("qemu"), side("ringfence")];
        let row = |name, class, figures: [Result<f64, &str>; 3]| Row {
            name,
            class,
            figures: figures.map(|figure| figure.map_err(str::to_owned)).into(),
        };
        let rows = [
            row("sort", Class::Integer, [Ok(0.1), Ok(0.8), Ok(0.2)]),
            row("gzip", Class::Integer, [Ok(0.1), Ok(0.8), Ok(0.8)]),
            row("find", Class::Kernel, [Ok(0.1), Err("lost"), Ok(0.3)]),
            row("boot", Class::Boot, [Err("has no boot"), Ok(4.0), Ok(1.0)]),
        ];
        let facts = Facts { host_cpu: "A CPU".to_owned(), notes: vec!["qemu: version 10".to_owned()] };
        let shown = text(&rows, &sides, &facts);
        let line = |start: &str| {
            let line =
                shown.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{shown}"));
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(line("sort")[2..], ["0.1000", "0.8000", "0.2000", "2.00", "8.00", "4.00"]);
        assert_eq!(line("find")[2..], ["0.1000", "failed", "0.3000", "3.00", "-", "-"]);
        assert_eq!(line("boot")[2..], ["-", "4.0000", "1.0000", "-", "-", "4.00"]);
        assert_eq!(line("geometric mean, integer")[3..], ["4.00", "(2)", "8.00", "(2)", "2.00", "(2)"]);
        assert_eq!(line("geometric mean, all")[3..], ["3.63", "(3)", "8.00", "(2)", "2.00", "(2)"]);
        assert_eq!(line("geometric mean, vector")[3..], ["-", "-", "-"]);
        assert!(shown.contains("failed: find on qemu: lost") && !shown.contains("has no boot"));
        let value = json(&rows, &sides, &facts);
        assert_eq!(value["programs"][0]["ratios"]["qemu/ringfence"], 4.0);
        assert_eq!(value["programs"][2]["figures"]["qemu"]["failed"], "lost");
        assert_eq!(
            value["geometric_means"]["integer/branchy"]["qemu/native"].as_f64().map(f64::round),
            Some(8.0)
        );
    }
}
