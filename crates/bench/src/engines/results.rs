//! What the rounds amount to: one figure for each program and side, or why there is none.

use std::collections::BTreeMap;

use super::catalogue::{BOOT, COLD, Class, Program, WARM};
use super::side::Round;
use super::transcript::Measured;

/// Seconds, or why there are none.
pub(crate) type Figure = Result<f64, String>;

/// A program's figures, in the order of the sides.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) class: Class,
    pub(crate) figures: Vec<Figure>,
}

/// All rounds of one side.
#[derive(Debug, Clone)]
pub(crate) struct SideRounds {
    pub(crate) name: String,
    pub(crate) is_guest: bool,
    pub(crate) rounds: Vec<Round>,
}

/// The middle value; the mean of the two in the middle of an even count.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some((upper + lower) / 2.0)
}

/// The geometric mean of positive values.
pub(crate) fn geometric_mean(values: &[f64]) -> Option<f64> {
    let usable = !values.is_empty() && values.iter().all(|value| *value > 0.0);
    usable.then(|| (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp())
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Measure {
    /// Time as it passes
    Wall,
    /// Processor time of the whole process, which other work on the host disturbs less
    Cpu,
}

/// Which of several times stands for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Take {
    /// The middle one
    Median,
    /// The shortest, of runs and of rounds, on every side alike: what a host's other work disturbed least
    Least,
}

impl Take {
    fn of(self, values: &[f64]) -> Option<f64> {
        match self {
            Self::Median => median(values),
            Self::Least => values.iter().copied().min_by(f64::total_cmp),
        }
    }
}

impl Measure {
    fn of(self, measured: &Measured) -> &[f64] {
        match self {
            Self::Wall => &measured.seconds,
            Self::Cpu => &measured.processor,
        }
    }
}

/// The table's rows.
pub(crate) fn rows(programs: &[&Program], sides: &[SideRounds], by: Measure, take: Take) -> Vec<Row> {
    let mut rows = Vec::new();
    for program in programs {
        let wanted = reference(program.name, sides);
        let row = |name, pick: &dyn Fn(&[f64]) -> Option<f64>| Row {
            name,
            class: program.class,
            figures: sides
                .iter()
                .map(|side| {
                    over_rounds(side, take, |round| figure(round, program.name, wanted.as_deref(), by, pick))
                })
                .collect(),
        };
        rows.push(row(program.name, &|seconds| take.of(seconds.get(1..)?)));
        if program.name == WARM {
            let mut cold = row(COLD, &|seconds| seconds.first().copied());
            // A native CPU has nothing to translate: its time is the same as ever.
            for ((figure, warm), side) in
                cold.figures.iter_mut().zip(&rows[rows.len() - 1].figures).zip(sides)
            {
                if !side.is_guest {
                    figure.clone_from(warm);
                }
            }
            rows.push(cold);
        }
    }
    let boot = sides.iter().map(|side| {
        if !side.is_guest {
            return Err("has no boot".to_owned());
        }
        over_rounds(side, take, |round| {
            let begin = match by {
                Measure::Wall => round.transcript.host_clock[0],
                Measure::Cpu => round.transcript.boot_processor,
            };
            begin.ok_or_else(|| round.failure.clone().unwrap_or_else(|| "did not start".to_owned()))
        })
    });
    rows.push(Row { name: BOOT, class: Class::Boot, figures: boot.collect() });
    rows
}

/// The result that all sides must have: the first side's that has one, which is the native one unless it failed.
fn reference(program: &str, sides: &[SideRounds]) -> Option<String> {
    sides.iter().flat_map(|side| &side.rounds).find_map(|round| {
        let measured = round.transcript.programs.get(program)?;
        measured.status.is_none().then(|| measured.result.clone())?
    })
}

fn figure(
    round: &Round,
    program: &str,
    wanted: Option<&str>,
    by: Measure,
    pick: &dyn Fn(&[f64]) -> Option<f64>,
) -> Figure {
    if let Some((own, host)) = round.transcript.clocks()
        && round.transcript.clock_is_wrong()
    {
        return Err(format!("its clock went {own:.2} s while the host's went {host:.2} s"));
    }
    let reason = || round.failure.clone().unwrap_or_else(|| "was not run".to_owned());
    let measured = round.transcript.programs.get(program).ok_or_else(reason)?;
    if let Some(status) = measured.status {
        return Err(format!("ended with status {status}"));
    }
    let result = measured.result.as_deref().ok_or_else(reason)?;
    if Some(result) != wanted {
        return Err("computed another result".to_owned());
    }
    pick(by.of(measured)).ok_or_else(reason)
}

/// The one that is taken over rounds; one failure fails them all.
fn over_rounds(side: &SideRounds, take: Take, of: impl Fn(&Round) -> Figure) -> Figure {
    let values = side.rounds.iter().map(of).collect::<Result<Vec<f64>, String>>()?;
    take.of(&values).ok_or_else(|| "was not run".to_owned())
}

/// Ratios of side `above` to side `below`, with the class, for the programs where both have a figure.
pub(crate) fn ratios(rows: &[Row], above: usize, below: usize) -> Vec<(Class, f64)> {
    rows.iter().filter_map(|row| Some((row.class, row.ratio(above, below)?))).collect()
}

impl Row {
    /// How many times longer side `above` takes than side `below`.
    pub(crate) fn ratio(&self, above: usize, below: usize) -> Option<f64> {
        let seconds = |side: usize| self.figures.get(side)?.as_ref().ok().filter(|value| **value > 0.0);
        Some(seconds(above)? / seconds(below)?)
    }
}

/// The CPU weaknesses that the sides report differently or alike: file, then the text of each side.
pub(crate) fn vulnerabilities(sides: &[SideRounds]) -> BTreeMap<String, Vec<String>> {
    let of = |side: &SideRounds| {
        side.rounds.first().map(|round| round.transcript.vulnerabilities.clone()).unwrap_or_default()
    };
    let all: Vec<BTreeMap<String, String>> = sides.iter().map(of).collect();
    let names: std::collections::BTreeSet<&String> = all.iter().flat_map(BTreeMap::keys).collect();
    let texts = |name: &String| {
        all.iter().map(|side| side.get(name).cloned().unwrap_or_else(|| "-".to_owned())).collect()
    };
    names.into_iter().map(|name| (name.clone(), texts(name))).collect()
}

#[cfg(test)]
mod tests;
