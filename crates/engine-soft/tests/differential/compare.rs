//! Where the machine under test and the host differ.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, Mnemonic, Register};
use ringfence_oracle::layout::{self, DATA_LEN, data_address};
use ringfence_oracle::{Case, End, Mode, Outcome};

use crate::machine::{Machine, Observed};

/// The end of what Linux gives to a process, a page below the end of the lower half. It reports any fault beyond as a
/// protection violation, so as not to show what it has mapped there.
const SUPERVISOR: u64 = (1 << 47) - 0x1000;

/// RF.
const RESUME: u64 = 1 << 16;
/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8d5;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Whether processors are free to raise either of two different exceptions.
fn either_will_do(case: &Case, host: End, ours: End) -> bool {
    let (End::Exception { vector: host, address: at, .. }, End::Exception { vector: ours, error, address }) =
        (host, ours)
    else {
        return false;
    };
    // An instruction that is known to be invalid from the bytes in this page: whether the next page is fetched before
    // saying so is the processor's choice.
    let end = layout::CODE + layout::CODE_LEN as u64;
    let fetch = ours == 14 && error & 0x10 != 0 && address == end && case.code_address() < end;
    // Both operands of CMPS fault: which one is read first differs by operand size and repeat prefix.
    let mut decoder = Decoder::new(case.mode().bits(), case.code(), DecoderOptions::NONE);
    let instruction = decoder.decode();
    use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw};
    let compares = instruction.is_string_instruction()
        && matches!(instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq);
    let fault = |vector| matches!(vector, 12 | 13 | 14 | 17);
    // AMD's processors want the offset in FS or GS to be canonical by itself, before the base is added.
    let offset = host == 13 && wild_offset(case, &instruction);
    // Fifteen bytes or more, and invalid.
    let long = matches!((host, ours), (13, 6) | (6, 13)) && is_invalid_without_prefixes(case);
    // A gather or scatter under the trap flag that faults after some elements: the host's trap comes first.
    let stepped = host == 1 && instruction.memory_index().is_vector_register();
    // A wide vector across the end of the lower half or of 4 GiB: processors that take it in two halves see the missing
    // page under the first one.
    let edge = if case.mode() == Mode::Bits64 { 1u64 << 47 } else { 1 << 32 };
    let wraps = host == 14 && matches!(ours, 12 | 13) && (edge - 64..edge).contains(&at);
    stepped || wraps || fetch && host == 6 || long || compares && fault(host) && fault(ours) || offset
}

/// Whether the instruction would be invalid without the segment prefixes that make it so long.
fn is_invalid_without_prefixes(case: &Case) -> bool {
    let code = case.code();
    let start = code.iter().position(|&byte| byte != 0x2e).unwrap_or(0);
    let mut decoder = Decoder::new(case.mode().bits(), &code[start..], DecoderOptions::NONE);
    code.len() >= 15 && decoder.decode().is_invalid()
}

/// Flags that the manuals leave open, in a way that the interpreter does not follow.
fn free_flags(case: &Case, host: &Outcome) -> u64 {
    use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw, Scasb, Scasd, Scasq, Scasw};
    let mut decoder = Decoder::new(case.mode().bits(), case.code(), DecoderOptions::NONE);
    let instruction = decoder.decode();
    // A repeated comparison that faults leaves the flags from before it, as SDM 2B (REP) says, or those of the last
    // comparison, as AMD's processors mostly have it.
    let compares =
        matches!(instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq);
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let fault = matches!(host.end, End::Exception { vector: 12..=17, .. });
    if compares && repeated && fault && (host.rflags ^ case.rflags) & STATUS == 0 {
        return STATUS;
    }
    // A gather or scatter that faults after some of its elements, with a trap pending: some processors push RF clear.
    if instruction.is_vsib() { RESUME } else { 0 }
}

/// Whether a memory operand in FS or GS has an offset that is not canonical.
fn wild_offset(case: &Case, instruction: &Instruction) -> bool {
    let value = |register: Register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let full = register.full_register();
        let index = (full as usize).checked_sub(Register::RAX as usize)?;
        let value = *case.gpr.get(index)?;
        Some(if register.size() == 4 { value & 0xffff_ffff } else { value })
    };
    use Mnemonic::{Bt, Btc, Btr, Bts};
    // The bit number moves the address, too.
    let bit_string = matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc);
    matches!(instruction.memory_segment(), Register::FS | Register::GS)
        && (0..instruction.op_count()).any(|i| {
            let offset = instruction.virtual_address(i, 0, value);
            offset.is_some_and(|offset| bit_string || !ringfence_x86::paging::is_canonical(offset))
        })
}

/// Describes every difference between `host` and `ours`; empty if there is none.
pub(crate) fn differences(case: &Case, host: &Outcome, ours: &Observed, machine: &Machine) -> Vec<String> {
    let mut list = Vec::new();
    if normal(host.end) != normal(ours.end) && !either_will_do(case, host.end, ours.end) {
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
        check(name, host.gpr[i] & mask, ours.gpr[i] & mask);
    }
    check("rip", host.rip, ours.rip);
    let free = free_flags(case, host);
    check("rflags", host.rflags & !free, ours.rflags & !free);
    for (i, name) in SEGMENTS.iter().enumerate() {
        // The way from the host's kernel to the code that looks clears the RPL of null selectors (SDM 2A, IRET).
        let visible = |selector: u16| if selector < 4 { 0 } else { u64::from(selector) };
        check(name, visible(host.segments[i]), visible(ours.segments[i]));
    }
    if long {
        check("fs base", host.fs_base, ours.fs_base);
        check("gs base", host.gs_base, ours.gs_base);
    }
    memory(host, machine, &mut list);
    vectors(case, host, ours, &mut list);
    list
}

fn two_steps(case: &Case) -> bool {
    let mnemonic = Decoder::new(case.mode().bits(), case.code(), DecoderOptions::NONE).decode().mnemonic();
    matches!(mnemonic, Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd)
}

fn vectors(case: &Case, host: &Outcome, ours: &Observed, list: &mut Vec<String>) {
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
    // which our flags (from the masked response) cannot tell; and the two steps of DPPS and DPPD cannot be told apart.
    let unmasked = !(case.vectors.mxcsr >> 7) & host.mxcsr;
    let imprecise = if unmasked & 0x18 != 0 { 0x20 } else { 0 } | if two_steps(case) { 0x3f } else { 0 };
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
