//! What comparisons have in common: the sides that are compared, and where everything about them is written.

use std::path::PathBuf;

use clap::Args;

use crate::host::{self, FileError, NoRingfence};

/// Options that all comparisons have.
#[derive(Debug, Args)]
pub(crate) struct SideArguments {
    /// Engines of Ringfence, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "jit", value_name = "LIST")]
    pub(crate) engine: Vec<String>,

    /// The CPU that Ringfence's guest sees
    #[arg(long, default_value = "auto", value_name = "MODEL")]
    pub(crate) cpu: String,

    /// Memory of a guest, in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub(crate) memory: u32,

    /// The `ringfence` program [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    ringfence: Option<PathBuf>,

    /// Writes everything, single figures too, to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One way to run Ringfence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ringfence {
    pub(crate) program: PathBuf,
    pub(crate) engine: String,
    pub(crate) cpu: String,
}

impl Ringfence {
    /// Its name in reports.
    pub(crate) fn name(&self) -> String {
        if self.engine == "jit" { "ringfence".to_owned() } else { format!("ringfence-{}", self.engine) }
    }
}

impl SideArguments {
    /// The command to measure.
    pub(crate) fn program(&self) -> Result<PathBuf, NoRingfence> {
        host::ringfence(self.ringfence.as_deref())
    }

    /// Ringfence's sides with that command; the notes say what they are.
    pub(crate) fn ringfence(&self, program: PathBuf, notes: &mut Vec<String>) -> Vec<Ringfence> {
        let version = host::version(&program).unwrap_or_default();
        notes.push(format!("ringfence: {version}; --engine {} --cpu {}", self.engine.join(","), self.cpu));
        let side = |engine: &String| Ringfence {
            program: program.clone(),
            engine: engine.clone(),
            cpu: self.cpu.clone(),
        };
        self.engine.iter().map(side).collect()
    }

    /// Writes `report` to the file that was asked for, if one was.
    pub(crate) fn write(&self, report: impl FnOnce() -> serde_json::Value) -> Result<(), FileError> {
        let Some(path) = &self.json else { return Ok(()) };
        std::fs::write(path, format!("{:#}\n", report())).map_err(host::at("write", path))
    }
}

/// QEMU and its version; where it does not start the notes say that it is left out.
pub(crate) fn qemu(notes: &mut Vec<String>) -> Option<(PathBuf, String)> {
    let program = PathBuf::from("qemu-system-x86_64");
    let version = host::version(&program);
    if version.is_none() {
        notes.push("qemu: left out: qemu-system-x86_64 does not start; install qemu-system-x86".to_owned());
    }
    Some((program, version?))
}

/// A word in `--against` that names no side.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no side `{side}`; --against takes {}", known.join(" and "))]
pub(crate) struct UnknownSide {
    side: String,
    known: &'static [&'static str],
}

/// Makes sure that every word names a side; an empty one names none.
pub(crate) fn check(against: &[String], known: &'static [&'static str]) -> Result<(), UnknownSide> {
    match against.iter().find(|side| !side.is_empty() && !known.contains(&side.as_str())) {
        Some(side) => Err(UnknownSide { side: side.clone(), known }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_side_is_named_with_those_there_are() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        assert_eq!(check(&words(&["qemu", ""]), &["host", "qemu"]), Ok(()));
        let error = check(&words(&["qemu", "kvm"]), &["host", "qemu"]).unwrap_err();
        assert_eq!(error.to_string(), "there is no side `kvm`; --against takes host and qemu");
    }
}
