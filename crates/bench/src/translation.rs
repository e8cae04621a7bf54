//! What translation costs: a program's code is translated and not executed, so that a run does the same whatever the host is
//! doing, and its instructions can be counted by a tool.
//!
//! Regions start where calls and branches of the program lead. Of the branches' targets one half counts as executed before,
//! as about that many are when real programs are translated.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use ringfence_engine_soft::interp::cpu::Cpu;
use ringfence_engine_soft::interp::op::RIP;
use ringfence_engine_soft::jit::{Jit, Options};
use ringfence_memory::GuestAddress;
use ringfence_x86::segment::{Segment, Selector};
use ringfence_x86::{Cr0, SegmentRegister};

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
    #[error("{} is no ELF program for x86 with code; give one, such as /bin/ls", path.display())]
    NoCode {
        /// Which.
        path: PathBuf,
    },
}

/// What to translate.
#[derive(Debug, Args)]
pub(crate) struct TranslationArguments {
    /// 64-bit or 32-bit ELF programs or libraries.
    #[arg(required = true)]
    programs: Vec<PathBuf>,
    /// How often, each time with an empty translator.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// Whether an ELF file has 32-bit code.
fn is_narrow(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF\x01\x01")
}

/// The ranges of an ELF file that are loaded executable (System V ABI, "Program Header"). Whatever is wrong with the
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
    let narrow = is_narrow(file);
    if !narrow && !file.starts_with(b"\x7fELF\x02\x01") {
        return Vec::new();
    }
    let word = if narrow { number::<4> } else { number::<8> };
    let [table, count] = if narrow { [0x1c, 0x2c] } else { [0x20, 0x38] };
    // Size of a header, and where flags, offset and size in the file are in it.
    let [size, flags, offset, length] = if narrow { [0x20, 0x18, 4, 0x10] } else { [0x38, 4, 8, 0x20] };
    let (Some(table), Some(count)) = (word(file, table), number::<2>(file, count)) else {
        return Vec::new();
    };
    let range = |n: u64| {
        let header = usize::try_from(table.checked_add(n * size)?).ok()?;
        let at = |field: u64| header + field as usize;
        let wanted = number::<4>(file, header)? == LOAD && number::<4>(file, at(flags))? & EXECUTABLE != 0;
        let start = usize::try_from(word(file, at(offset))?).ok()?;
        let length = usize::try_from(word(file, at(length))?).ok()?;
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
        let bits = if is_narrow(file) { 32 } else { 64 };
        for instruction in &mut Decoder::with_ip(bits, code, low, DecoderOptions::NONE) {
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

/// Makes a vCPU's code flat 32-bit code.
fn make_flat(cpu: &mut Cpu) {
    // Of 4 GiB from 0: code that can be read, and data that can be written (SDM 3A 3.4.5).
    let [code, data] = [0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let segments = &mut cpu.segments;
    for register in [SegmentRegister::Ds, SegmentRegister::Es, SegmentRegister::Ss] {
        segments[register as usize] = Segment::from_descriptor(Selector(0x10), data);
    }
    segments[SegmentRegister::Cs as usize] = Segment::from_descriptor(Selector(8), code);
    cpu.cr0 |= Cr0::PE;
    cpu.update_mode();
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
        if is_narrow(&file) {
            make_flat(&mut machine.cpu);
        }
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
