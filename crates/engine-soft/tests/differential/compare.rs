//! Where the machine under test and the host differ.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Register};
use ringfence_oracle::layout::{DATA_LEN, data_address};
use ringfence_oracle::{Case, End, Mode, Outcome};

use crate::liberties::Liberties;
use crate::machine::{Machine, Observed};

/// The end of what Linux gives to a process, a page below the end of the lower half. It reports any fault beyond as a
/// protection violation, so as not to show what it has mapped there.
const SUPERVISOR: u64 = (1 << 47) - 0x1000;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Describes every difference between `host` and `ours`; empty if there is none.
pub(crate) fn differences(case: &Case, host: &Outcome, ours: &Observed, machine: &Machine) -> Vec<String> {
    let mut list = Vec::new();
    let free = Liberties::new(case, host);
    if free.goes_on(ours.end) {
        return list;
    }
    if normal(host.end) != normal(ours.end) && !free.either_will_do(ours.end) {
        list.push(format!("end: host {}, ours {}", end(host.end), end(ours.end)));
    }
    let mut check = |name: &str, host: u64, ours: u64| {
        if host != ours {
            list.push(format!("{name}: host {host:#x}, ours {ours:#x}"));
        }
    };
    let long = case.mode() == Mode::Bits64;
    // Outside 64-bit mode the upper halves cannot be seen, and the upper registers cannot be reached.
    let (registers, mask) = if long { (16, u64::MAX) } else { (8, 0xffff_ffff) };
    for (i, name) in NAMES.iter().enumerate().take(registers) {
        let mask = mask & !free.registers(i);
        check(name, host.gpr[i] & mask, ours.gpr[i] & mask);
    }
    check("rip", host.rip, ours.rip);
    let flags = free.flags();
    check("rflags", host.rflags & !flags, ours.rflags & !flags);
    for (i, name) in SEGMENTS.iter().enumerate() {
        // The way from the host's kernel to the code that looks clears the RPL of null selectors (SDM 2A, IRET).
        let visible = |selector: u16| if selector < 4 { 0 } else { u64::from(selector) };
        check(name, visible(host.segments[i]), visible(ours.segments[i]));
    }
    if long {
        check("fs base", host.fs_base, ours.fs_base);
        check("gs base", host.gs_base, ours.gs_base);
    }
    if !free.is_memory_free() {
        memory(host, machine, &mut list);
    }
    vectors(case, host, ours, free.mxcsr(), &mut list);
    list
}

/// `free`: the flags of MXCSR that are not compared.
fn vectors(case: &Case, host: &Outcome, ours: &Observed, free: u32, list: &mut Vec<String>) {
    let (host, ours) = (&host.vectors, &ours.vectors);
    // The upper registers cannot be reached outside 64-bit mode, but nothing may change them either.
    for (n, (host, ours)) in host.zmm.iter().zip(&ours.zmm).enumerate() {
        if host != ours {
            list.push(format!("zmm{n}: was {:x?}, host {host:x?}, ours {ours:x?}", case.vectors.zmm[n]));
        }
    }
    for (n, (host, ours)) in host.st.iter().zip(&ours.st).enumerate() {
        if host != ours {
            list.push(format!("st{n}: was {:x?}, host {host:x?}, ours {ours:x?}", case.vectors.st[n]));
        }
    }
    let mut check = |name: &str, host: u64, ours: u64| {
        if host != ours {
            list.push(format!("{name}: host {host:#x}, ours {ours:#x}"));
        }
    };
    // KMOVD from a general register moves all 64 bits on a host that is not in 64-bit mode and ignores VEX.W.
    let mask = if case.mode() == Mode::Bits64 { u64::MAX } else { 0xffff_ffff };
    for n in 0..8 {
        let changed = host.k[n] != case.vectors.k[n];
        let mask = if changed { mask } else { u64::MAX };
        check(&format!("k{n}"), host.k[n] & mask, ours.k[n] & mask);
    }
    // After an overflow or underflow that is not masked the host reports inexactness as if the exponent had no bounds,
    // which our flags (from the masked response) cannot tell.
    let unmasked = !(case.vectors.mxcsr >> 7) & host.mxcsr;
    let imprecise = free | if unmasked & 0x18 != 0 { 0x20 } else { 0 };
    check("mxcsr", (host.mxcsr | imprecise).into(), (ours.mxcsr | imprecise).into());
    check("fcw", host.fcw.into(), ours.fcw.into());
    check("fsw", host.fsw.into(), ours.fsw.into());
    check("ftw", host.ftw.into(), ours.ftw.into());
}

fn normal(end: End) -> End {
    match end {
        End::Exception { vector: 14, error, address } if address >= SUPERVISOR => {
            End::Exception { vector: 14, error: error | 1, address }
        }
        other => other,
    }
}

fn end(end: End) -> String {
    match end {
        End::Exception { vector: 14, error, address } => format!("#PF({error:#x}) at {address:#x}"),
        End::Exception { vector, error, .. } => format!("vector {vector} ({error:#x})"),
        other => format!("{other:?}"),
    }
}

fn memory(host: &Outcome, machine: &Machine, list: &mut Vec<String>) {
    const SHOWN: usize = 4;
    let expected = |offset: usize| match &host.memory {
        Some(change) if offset >= change.offset && offset - change.offset < change.bytes.len() => {
            change.bytes[offset - change.offset]
        }
        _ => machine.data_before()[offset],
    };
    let same = match &host.memory {
        None => *machine.after == *machine.data_before(),
        Some(change) => {
            let end = change.offset + change.bytes.len();
            machine.after[change.offset..end] == change.bytes[..]
                && machine.after[..change.offset] == machine.data_before()[..change.offset]
                && machine.after[end..] == machine.data_before()[end..]
        }
    };
    if !same {
        let wrong: Vec<usize> =
            (0..DATA_LEN).filter(|&offset| expected(offset) != machine.after[offset]).collect();
        for &offset in wrong.iter().take(SHOWN) {
            let at = data_address(offset);
            let (host, ours) = (expected(offset), machine.after[offset]);
            let before = machine.data_before()[offset];
            list.push(format!("memory {at:#x} (was {before:#04x}): host {host:#04x}, ours {ours:#04x}"));
        }
        if wrong.len() > SHOWN {
            list.push(format!("and {} more bytes of memory", wrong.len() - SHOWN));
        }
    }
}

/// The case as a reader wants it.
pub(crate) fn describe(case: &Case) -> String {
    let mut decoder = Decoder::with_ip(case.mode().bits(), case.code(), case.rip(), DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mut text = String::new();
    GasFormatter::new().format(&instruction, &mut text);
    let mut lines = format!("{:?} {:02x?} at {:#x}: {text}\n", case.mode(), case.code(), case.rip());
    for (i, name) in NAMES.iter().enumerate() {
        lines += &format!("  {name:>3} {:016x}{}", case.gpr[i], if i % 4 == 3 { "\n" } else { "" });
    }
    lines += &format!("  flags {:#x}, segments {:x?}", case.rflags, case.segments);
    if case.mode() == Mode::Bits64 {
        lines += &format!(", fs {:#x}, gs {:#x}", case.fs_base, case.gs_base);
    }
    lines += &format!(", mxcsr {:#x}", case.vectors.mxcsr);
    let base = |register: Register| {
        let full = register.full_register();
        let value = (full as usize).checked_sub(Register::RAX as usize).and_then(|i| case.gpr.get(i));
        value.map_or(0, |value| if register.size() == 4 { value & 0xffff_ffff } else { *value })
    };
    let offset = base(instruction.memory_base())
        .wrapping_add(base(instruction.memory_index()).wrapping_mul(instruction.memory_index_scale().into()))
        .wrapping_add(instruction.memory_displacement64());
    lines += &format!(", operand of {} bytes at offset {offset:#x}", instruction.memory_size().size());
    if instruction.op_mask() != Register::None {
        let n = instruction.op_mask().number();
        lines += &format!(", k{n} {:#x}", case.vectors.k[n & 7]);
    }
    lines
}
