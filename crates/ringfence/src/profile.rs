//! `--profile`: where the guest's instructions were, as text.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;

use ringfence_machine::{GuestProfile, Machine, MachineError, Place};

use crate::args::RunArguments;

/// Most lines of each list.
const LINES: usize = 100;
/// The most that is read of a list of symbols; Linux's have about 10 MiB.
const MAX_SYMBOLS: u64 = 256 << 20;

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    #[error("the profile `{0}` cannot be written")]
    Write(PathBuf, #[source] io::Error),
    #[error("the list of symbols `{0}` cannot be read")]
    Read(PathBuf, #[source] io::Error),
    #[error(
        "`{0}` is no list of symbols: give the kernel's System.map or what the guest's /proc/kallsyms says to root"
    )]
    NoSymbols(PathBuf),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A profile to be written when the machine has ended.
#[derive(Debug)]
pub(crate) struct ProfileFile {
    path: PathBuf,
    file: File,
    symbols: Symbols,
}

impl ProfileFile {
    /// Opens what the arguments ask for, before the machine runs.
    pub(crate) fn open(arguments: &RunArguments) -> Result<Option<Self>, ProfileError> {
        let Some(path) = arguments.profile.clone() else { return Ok(None) };
        let symbols = match &arguments.profile_symbols {
            Some(path) => read_symbols(path)?,
            None => Symbols::default(),
        };
        let file = File::create(&path).map_err(|error| ProfileError::Write(path.clone(), error))?;
        Ok(Some(Self { path, file, symbols }))
    }

    /// Writes what the machine's vCPUs have seen.
    pub(crate) fn write(mut self, machine: &Machine) -> Result<(), ProfileError> {
        let mut all = String::new();
        for (index, vcpu) in machine.statistics()?.iter().enumerate() {
            if let Some(profile) = &vcpu.profile {
                // Writing to a string cannot fail.
                let _ = writeln!(all, "vCPU {index}\n\n{}", text(profile, &self.symbols));
            }
        }
        self.file.write_all(all.as_bytes()).map_err(|error| ProfileError::Write(self.path, error))
    }
}

fn read_symbols(path: &PathBuf) -> Result<Symbols, ProfileError> {
    let cannot = |error| ProfileError::Read(path.clone(), error);
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(File::open(path).map_err(cannot)?, MAX_SYMBOLS), &mut bytes)
        .map_err(cannot)?;
    let symbols = Symbols::parse(&String::from_utf8_lossy(&bytes));
    // Debian's packages have a System.map of one line, which says where the real one is; and the guest's kernel shows
    // zeros to all but root.
    if symbols.0.len() > 1 { Ok(symbols) } else { Err(ProfileError::NoSymbols(path.clone())) }
}

/// Names of the kernel's code by address.
#[derive(Debug, Default, PartialEq, Eq)]
struct Symbols(BTreeMap<u64, String>);

/// A kernel's function is hardly longer; what is further behind a symbol is something else.
const LONGEST: u64 = 1 << 20;

impl Symbols {
    /// Lines of address, kind and name; of those only code.
    fn parse(text: &str) -> Self {
        let mut symbols = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let Ok(address) = u64::from_str_radix(address, 16) else { continue };
            if address >> 63 == 0 || !matches!(kind, "t" | "T" | "w" | "W") {
                continue;
            }
            // Of several names the first that is not local.
            match symbols.entry(address) {
                Entry::Vacant(entry) => drop(entry.insert((kind.to_owned(), name.to_owned()))),
                Entry::Occupied(mut entry) if entry.get().0 == "t" && kind == "T" => {
                    entry.insert((kind.to_owned(), name.to_owned()));
                }
                Entry::Occupied(_) => {}
            }
        }
        Self(symbols.into_iter().map(|(address, (_, name))| (address, name)).collect())
    }

    /// The symbol that an address belongs to, and how far behind its start it is.
    fn find(&self, address: u64) -> Option<(&str, u64)> {
        let (start, name) = self.0.range(..=address).next_back()?;
        (address - start < LONGEST).then_some((name.as_str(), address - start))
    }
}

/// The largest first; of equal ones in the order of their keys.
fn sorted<K: Ord>(counts: impl IntoIterator<Item = (K, u64)>) -> Vec<(K, u64)> {
    let mut sum: BTreeMap<K, u64> = BTreeMap::new();
    for (key, count) in counts {
        let all = sum.entry(key).or_default();
        *all = all.saturating_add(count);
    }
    let mut list: Vec<(K, u64)> = sum.into_iter().collect();
    list.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    list
}

fn percent(part: u64, all: u64) -> f64 {
    part as f64 * 100.0 / all.max(1) as f64
}

/// A heading and a line for each of the largest.
fn section<K>(out: &mut String, heading: &str, list: &[(K, u64)], all: u64, describe: impl Fn(&K) -> String) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{heading}\n  share %    count");
    for (key, count) in list.iter().take(LINES) {
        let _ = writeln!(out, "{:9.4} {count:8}  {}", percent(*count, all), describe(key));
    }
    if let Some(rest) = list.get(LINES..).filter(|rest| !rest.is_empty()) {
        let count: u64 = rest.iter().map(|(_, count)| count).sum();
        let _ = writeln!(out, "{:9.4} {count:8}  {} more", percent(count, all), rest.len());
    }
    out.push('\n');
}

fn ring(user: bool) -> &'static str {
    if user { "user  " } else { "kernel" }
}

/// The whole report.
fn text(profile: &GuestProfile, symbols: &Symbols) -> String {
    let samples = &profile.samples;
    let all = samples.iter().map(|(_, count)| count).sum::<u64>() + profile.elsewhere;
    let user: u64 = samples.iter().filter(|(place, _)| place.user).map(|(_, count)| count).sum();
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} instructions, {all} samples, one every {} instructions: shares are of instructions executed, not of time.\n\
         user {:.2} %, kernel {:.2} %, not told apart {:.2} %\n",
        profile.instructions,
        profile.period,
        percent(user, all),
        percent(all - user - profile.elsewhere, all),
        percent(profile.elsewhere, all)
    );
    let name = |place: &Place| match symbols.find(place.rip).filter(|_| !place.user) {
        Some((name, _)) => name.to_owned(),
        None if place.user => "(user)".to_owned(),
        None => "(kernel, no symbol)".to_owned(),
    };
    section(&mut out, "Symbols", &sorted(samples.iter().map(|(p, n)| (name(p), *n))), all, String::clone);
    let pages = sorted(samples.iter().map(|(p, n)| ((p.user, p.page, p.rip & !0xfff), *n)));
    section(&mut out, "Pages: linear and physical address", &pages, all, |(user, page, linear)| {
        format!("{} {linear:#018x} {}", ring(*user), physical(*page))
    });
    let blocks = sorted(samples.iter().copied());
    section(&mut out, "Blocks: where they start, or a part of one", &blocks, all, |place| {
        let symbol = symbols.find(place.rip).filter(|_| !place.user);
        let symbol = symbol.map(|(name, offset)| format!(" {name}+{offset:#x}")).unwrap_or_default();
        format!("{} {:#018x} {}{symbol}", ring(place.user), place.rip, physical(place.page))
    });
    let handed = sorted(profile.handed.iter().map(|(name, count)| (name, *count)));
    let heading = format!(
        "Instructions that translated code left to the interpreter: {} in all; shares of all instructions",
        handed.iter().map(|(_, count)| count).sum::<u64>()
    );
    section(&mut out, &heading, &handed, profile.instructions, |name| (*name).clone());
    out
}

fn physical(page: Option<u64>) -> String {
    page.map_or("-".to_owned(), |page| format!("{page:#014x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 t local\nffffffff81000000 T startup\nffffffff81000040 T next\n\
                       ffffffff82000000 D data\n0000000000000000 T zero\nnonsense\n";

    #[test]
    fn symbols_are_code_and_global_names_come_first() {
        let symbols = Symbols::parse(MAP);
        assert_eq!(symbols.find(0xffff_ffff_8100_0000), Some(("startup", 0)));
        assert_eq!(symbols.find(0xffff_ffff_8100_0043), Some(("next", 3)));
        assert_eq!(symbols.find(0xffff_ffff_8200_0000), None);
        assert_eq!(symbols.find(0x40_0000), None);
    }

    #[test]
    fn report_adds_up_and_names_what_is_hot() {
        let at = |rip, user| Place { rip, user, page: Some(0x1000) };
        let profile = GuestProfile {
            period: 1000,
            instructions: 10_000,
            samples: vec![
                (at(0xffff_ffff_8100_0041, false), 4),
                (at(0xffff_ffff_8100_0050, false), 2),
                (at(0x40_1010, true), 3),
            ],
            elsewhere: 1,
            handed: vec![("Cpuid".to_owned(), 5), ("Rdmsr".to_owned(), 20)],
        };
        let text = text(&profile, &Symbols::parse(MAP));
        for part in [
            "10000 instructions, 10 samples, one every 1000 instructions",
            "user 30.00 %, kernel 60.00 %, not told apart 10.00 %",
            "  60.0000        6  next\n  30.0000        3  (user)\n",
            "  30.0000        3  user   0x0000000000401010 0x000000001000\n",
            " next+0x1\n",
            "25 in all",
            "   0.2000       20  Rdmsr\n   0.0500        5  Cpuid\n",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
    }

    #[test]
    fn long_lists_are_cut_and_say_so() {
        let samples = (0..LINES as u64 + 7).map(|i| (Place { rip: i << 12, user: true, page: None }, 1));
        let profile = GuestProfile { samples: samples.collect(), ..GuestProfile::default() };
        assert!(text(&profile, &Symbols::default()).contains("        7  7 more\n"));
    }
}
