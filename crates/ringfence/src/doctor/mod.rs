//! `ringfence doctor`: what this host offers, and what it lacks.

mod cpu;
mod host;

use std::io::{Write, stdout};

use serde::Serialize;

use crate::args::{Format, Listing};
use crate::exit::{Failure, SUCCESS};
use crate::table::columns;

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// There, and of use.
    Ok,
    /// A fact, neither good nor bad.
    Info,
    /// Not there; something is slower or needs another way.
    Lacks,
}

/// One thing about the host.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    topic: &'static str,
    name: &'static str,
    verdict: Verdict,
    value: String,
    /// What it means for machines, or what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
}

impl Finding {
    fn info(topic: &'static str, name: &'static str, value: impl Into<String>) -> Self {
        Self { topic, name, verdict: Verdict::Info, value: value.into(), hint: None }
    }

    /// There or not; the hint is for the case that it is not.
    fn check(
        topic: &'static str,
        name: &'static str,
        there: bool,
        value: impl Into<String>,
        hint: &'static str,
    ) -> Self {
        let verdict = if there { Verdict::Ok } else { Verdict::Lacks };
        Self { topic, name, verdict, value: value.into(), hint: (!there).then_some(hint) }
    }

    fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }
}

pub(crate) fn doctor(listing: Listing) -> Result<u8, Failure> {
    let mut findings = cpu::findings();
    findings.extend(host::findings());
    let text = match listing.format {
        Format::Table => table(&findings),
        Format::Json => serde_json::to_string_pretty(&findings).map_err(Failure::failed)? + "\n",
    };
    stdout().write_all(text.as_bytes()).map_err(Failure::failed)?;
    Ok(SUCCESS)
}

fn table(findings: &[Finding]) -> String {
    let mut rows = Vec::new();
    let mut topic = "";
    for finding in findings {
        let mark = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Info => "",
            Verdict::Lacks => "lacks",
        };
        let shown = if finding.topic == topic { "" } else { finding.topic };
        topic = finding.topic;
        let [name, value] = [finding.name.to_owned(), finding.value.clone()];
        rows.push([shown.to_owned(), mark.to_owned(), name, value]);
        if let Some(hint) = finding.hint {
            rows.push([String::new(), String::new(), String::new(), format!("- {hint}")]);
        }
    }
    columns(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hint_shows_only_for_what_is_missing() {
        let there = Finding::check("CPU", "AVX2", true, "yes", "slow");
        let missing = Finding::check("CPU", "AVX2", false, "no", "slow");
        assert_eq!(table(&[there]), "CPU  ok  AVX2  yes\n");
        assert_eq!(table(&[missing]), "CPU  lacks  AVX2  no\n                  - slow\n");
    }
}
