//! What translation costs: a program's code is translated and not executed, so that a run does the same whatever the host is
//! doing, and its instructions can be counted by a tool.
//!
//! Regions start where calls and branches of the program lead. Of the branches' targets one half counts as executed before,
//! as about that many are when real programs are translated.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use ringfence_engine_soft::interp::op::RIP;
use ringfence_engine_soft::jit::{Jit, Options};
use ringfence_memory::GuestAddress;

use crate::interpreter::vcpu;

/// Where the program's file starts in the guest's memory.
const BASE: u64 = 1 << 20;

/// Why translation could not be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TranslationError {
    /// The program cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It has no code.
    #[error("{} is no 64-bit ELF program with code; give one, such as /bin/ls", path.display())]
    NoCode {
        /// Which.
        path: PathBuf,
    },
}

/// What to translate.
#[derive(Debug, Args)]
pub(crate) struct TranslationArguments {
    /// 64-bit ELF programs or libraries.
    #[arg(required = true)]
    programs: Vec<PathBuf>,
    /// How often, each time with an empty translator.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// The ranges of a 64-bit ELF file that are loaded executable (System V ABI, "Program Header"). Whatever is wrong with the
/// file makes them fewer.
fn executable(file: &[u8]) -> Vec<std::ops::Range<usize>> {
    fn number<const N: usize>(file: &[u8], at: usize) -> Option<u64> {
        let bytes = file.get(at..at.checked_add(N)?)?;
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(bytes);
        Some(u64::from_le_bytes(wide))
    }
    const LOAD: u64 = 1;
    const EXECUTABLE: u64 = 1;
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return Vec::new();
    }
    let (Some(table), Some(count)) = (number::<8>(file, 0x20), number::<2>(file, 0x38)) else {
        return Vec::new();
    };
    let range = |n: u64| {
        let header = usize::try_from(table.checked_add(n * 0x38)?).ok()?;
        let wanted = number::<4>(file, header)? == LOAD && number::<4>(file, header + 4)? & EXECUTABLE != 0;
        let start = usize::try_from(number::<8>(file, header + 8)?).ok()?;
        let length = usize::try_from(number::<8>(file, header + 0x20)?).ok()?;
        let end = start.checked_add(length)?;
        (wanted && end <= file.len()).then_some(start..end)
    };
    (0..count).filter_map(range).collect()
}

/// Where regions start, in the order in which the code names them.
fn starts(file: &[u8]) -> Vec<u64> {
    let (mut known, mut starts) = (BTreeSet::new(), Vec::new());
    for range in executable(file) {
        let (low, high) = (BASE + range.start as u64, BASE + range.end as u64);
        let code = &file[range];
        for instruction in &mut Decoder::with_ip(64, code, low, DecoderOptions::NONE) {
            let branches = matches!(
                instruction.flow_control(),
                FlowControl::Call | FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            );
            let target = instruction.near_branch_target();
            if branches && (low..high).contains(&target) && known.insert(target) {
                starts.push(target);
            }
        }
    }
    starts
}

/// Whether code counts as executed before: half of all does.
fn executed(address: GuestAddress) -> bool {
    address.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 != 0
}

fn translate(path: &Path, rounds: u32) -> Result<(), TranslationError> {
    let file =
        std::fs::read(path).map_err(|source| TranslationError::Read { path: path.to_path_buf(), source })?;
    let starts = starts(&file);
    if starts.is_empty() {
        return Err(TranslationError::NoCode { path: path.to_path_buf() });
    }
    for _ in 0..rounds {
        let mut machine = vcpu(&file, BASE);
        let mut jit = Jit::new(Options::default(), &machine.cpu.code).expect("memory for translated code");
        for &start in &starts {
            machine.cpu.regs[RIP] = start;
            jit.translate(&mut machine.cpu, GuestAddress(start), executed);
        }
        let figures = jit.counters(&machine.cpu);
        let figure = |name| figures.iter().find(|(known, _)| *known == name).map_or(0, |&(_, value)| value);
        println!(
            "{}: {} instructions in {} regions, {} bytes of host code, {} ns for each instruction",
            path.display(),
            figure("instructions translated"),
            figure("regions translated"),
            figure("bytes of host code"),
            figure("nanoseconds per instruction translated"),
        );
    }
    Ok(())
}

/// Prints what each round cost.
pub(crate) fn measure(arguments: &TranslationArguments) -> Result<(), TranslationError> {
    arguments.programs.iter().try_for_each(|path| translate(path, arguments.rounds))
}
