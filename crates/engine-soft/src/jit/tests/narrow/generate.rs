//! Random programs of 32-bit code, and programs that are executed in both modes.

use iced_x86::{Decoder, DecoderOptions};
use ringfence_oracle::Random;

use super::super::generate::{self, Form, Program, TABLE, destination, value};
use super::super::{CODE, CODE_LEN, DATA, Mix, vectors, x87};
use super::selector;

/// Registers that point to data, most of the time.
const POINTERS: [u8; 4] = [3, 4, 6, 7];

/// What only 32-bit code has, or has otherwise: bytes, whether the register is in the last of them, and whether 66h is allowed.
const OWN: &[(&[u8], bool, bool)] = &[
    (&[0x40], true, true),                     // inc
    (&[0x48], true, true),                     // dec
    (&[0x40], true, false),                    // inc
    (&[0x48], true, false),                    // dec
    (&[0x60], false, true),                    // pusha
    (&[0x61], false, true),                    // popa
    (&[0x27], false, false),                   // daa
    (&[0x2f], false, false),                   // das
    (&[0x37], false, false),                   // aaa
    (&[0x3f], false, false),                   // aas
    (&[0xd4, 10], false, false),               // aam
    (&[0xd5, 10], false, false),               // aad
    (&[0xd6], false, false),                   // salc
    (&[0xce], false, false),                   // into
    (&[0x9c], false, true),                    // pushf
    (&[0x62, 0x03], false, true),              // bound eax,[ebx]
    (&[0x06, 0x07], false, true),              // push es; pop es
    (&[0x1e, 0x1f], false, false),             // push ds; pop ds
    (&[0x0f, 0xa0, 0x0f, 0xa1], false, false), // push fs; pop fs
    (&[0x0f, 0xa8, 0x0f, 0xa9], false, false), // push gs; pop gs
    (&[0x82, 0xc0, 0x7f], false, false),       // add al,0x7f
    (&[0x0f, 0x05], false, false),             // syscall
    (&[0xd7], false, false),                   // xlat
];

/// Loads of segment registers by a register: what they may become, and `mov eax,selector; mov sreg,eax`.
fn load_segment(random: &mut Random) -> Vec<u8> {
    let register = random.pick(&[0, 3, 4, 5, 5, 4]);
    let flat = [selector::DATA, selector::DATA, selector::DATA, selector::SHORT, selector::AHEAD];
    let any = [selector::AHEAD, selector::AHEAD, selector::SHORT, selector::READABLE, 0, selector::DATA];
    let selector = random.pick(if register >= 4 { &any[..] } else { &flat });
    vec![0xb8, selector as u8, 0, 0, 0, 0x8e, 0xc0 | register << 3]
}

fn modrm(random: &mut Random, out: &mut Vec<u8>, form: Form) {
    let reg = match form {
        Form::X(extensions) => random.pick(extensions),
        _ => destination(random),
    };
    if form != Form::M && random.chance(45) {
        out.push(0xc0 | reg << 3 | destination(random));
        return;
    }
    if random.chance(12) {
        // Absolute, in the program now and then.
        out.push(reg << 3 | 5);
        let at = if random.chance(10) {
            CODE + random.below(CODE_LEN as u64)
        } else {
            DATA + random.below(0x8000)
        };
        out.extend((at as u32).to_le_bytes());
        return;
    }
    let base = if random.chance(90) { random.pick(&POINTERS) } else { random.below(8) as u8 };
    let indexed = random.chance(20);
    let mode = 1 + random.below(2) as u8;
    if indexed || base == 4 {
        let index = if indexed && random.chance(80) { random.below(8) as u8 } else { 4 };
        out.push(mode << 6 | reg << 3 | 4);
        out.push((random.below(4) as u8) << 6 | index << 3 | base);
    } else {
        out.push(mode << 6 | reg << 3 | base);
    }
    match mode {
        1 => out.push(random.bits() as u8),
        _ => out.extend((random.below(0x2000) as i32 - 0x800).to_le_bytes()),
    }
}

fn immediate(random: &mut Random, out: &mut Vec<u8>, kind: u8, short: bool) {
    let length = match kind {
        4 | 8 if short => 2,
        4 | 8 => 4,
        length => usize::from(length),
    };
    out.extend_from_slice(&value(random).to_le_bytes()[..length]);
}

fn assemble(random: &mut Random, short: bool, prefix: &[u8], opcode: &[u8], tail: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if short {
        out.push(0x66);
    }
    if random.chance(7) {
        out.push(random.pick(&[0x64, 0x65, 0x64, 0x65, 0x67, 0x2e, 0x36, 0x3e, 0x26]));
    }
    if random.chance(2) {
        out.push(0xf0);
    }
    [&out, prefix, opcode, tail].concat()
}

fn from_table(random: &mut Random) -> Vec<u8> {
    let mut tail = Vec::new();
    match random.below(12) {
        0..3 => {
            let opcode = (random.below(8) as u8) << 3 | random.below(4) as u8;
            modrm(random, &mut tail, Form::R);
            let short = random.chance(10);
            return assemble(random, short, &[], &[opcode], &tail);
        }
        3 => {
            // SETcc and CMOVcc
            let (opcode, form) = random.pick(&[(0x90, Form::X(&[0])), (0x40, Form::R)]);
            modrm(random, &mut tail, form);
            let opcode = [0x0f, opcode | random.below(16) as u8];
            return assemble(random, false, &[], &opcode, &tail);
        }
        4 => {
            let (bytes, register, sized) = random.pick(OWN);
            let mut opcode = bytes.to_vec();
            if register {
                *opcode.last_mut().unwrap() |= destination(random);
            }
            let short = sized && random.chance(15);
            return assemble(random, short, &[], &opcode, &[]);
        }
        5 => {
            // MOV with an absolute address
            let opcode = 0xa0 | random.below(4) as u8;
            let at = (DATA + random.below(0x8000)) as u32;
            let short = random.chance(15);
            return assemble(random, short, &[], &[opcode], &at.to_le_bytes());
        }
        _ => {}
    }
    let (prefix, opcode, form, constant, sized) = random.pick(TABLE);
    let mut opcode = opcode.to_vec();
    match form {
        Form::N => {}
        Form::O => *opcode.last_mut().unwrap() |= destination(random),
        _ => modrm(random, &mut tail, form),
    }
    let short = sized && random.chance(15);
    immediate(random, &mut tail, constant, short);
    assemble(random, short, prefix, &opcode, &tail)
}

/// One of these instructions that 32-bit code has as well.
fn shared(random: &mut Random, of: fn(&mut Random) -> Vec<u8>) -> Vec<u8> {
    loop {
        let bytes = of(random);
        let instruction = Decoder::new(32, &bytes, DecoderOptions::NONE).decode();
        if instruction.len() == bytes.len() || random.chance(2) {
            return bytes;
        }
    }
}

/// Instructions in a row that access memory by turns from a few bases.
fn row(random: &mut Random) -> Vec<Vec<u8>> {
    let bases = [random.pick(&POINTERS), random.pick(&POINTERS)];
    (0..3 + random.below(8))
        .map(|_| {
            let (base, reg) = (random.pick(&bases), random.pick(&[0, 1, 2, 5]));
            let absolute = random.chance(20);
            let displacement =
                if random.chance(20) { random.bits() as i8 } else { 4 * random.below(16) as i8 };
            let operand = |opcode: &[u8]| {
                if absolute {
                    let at = (DATA + 0x1000 + displacement as u8 as u64) as u32;
                    return [opcode, &[reg << 3 | 5], &at.to_le_bytes()].concat();
                }
                let sib: &[u8] = if base == 4 { &[0x24] } else { &[] };
                [opcode, &[0x40 | reg << 3 | base], sib, &[displacement as u8]].concat()
            };
            match random.below(12) {
                0 => vec![0x50 | reg],
                1 => vec![0x58 | reg],
                2 => vec![0x83, 0xc0 | base, 4 * random.below(4) as u8],
                3 => vec![random.pick(&[0x40, 0x48]) | base],
                4 => operand(&[0x8d]),
                5 => vec![0x8d, 0x40 | base << 3 | base, 8]
                    .into_iter()
                    .chain((base == 4).then_some(0))
                    .collect(),
                6 => operand(&[0x0f, 0xaf]),
                7 => operand(&[0x11]),
                8..10 => operand(&[0x89]),
                _ => operand(&[random.pick(&[0x8b, 0x03, 0x13, 0x3b])]),
            }
        })
        .collect()
}

/// A program of 4 to 40 instructions. With `both`, it goes over from each mode to the other.
pub(in super::super) fn program(random: &mut Random, mix: Mix, both: bool) -> Program {
    let mut code = vec![0xcc; CODE_LEN];
    let start = match random.below(4) {
        0 => 0xf80 + random.below(0x7f),
        _ => random.below(0xf00),
    } as usize;
    let (mut at, mut starts, mut branches, mut absolute) = (start, Vec::new(), Vec::new(), Vec::new());
    for _ in 0..4 + random.below(37) {
        starts.push(at);
        let bytes = match random.below(100) {
            0..14 => {
                branches.push(at + 2);
                vec![0x0f, 0x80 | random.below(16) as u8, 0, 0, 0, 0]
            }
            14..16 => {
                branches.push(at + 1);
                vec![0xe9, 0, 0, 0, 0]
            }
            16..19 => {
                branches.push(at + 1);
                vec![0xe8, 0, 0, 0, 0]
            }
            19 => vec![0xc3],
            20 => vec![0xc2, 4 * random.below(4) as u8, 0],
            21 => {
                absolute.push(at + 1);
                // mov eax,target; jmp or call eax
                vec![0xb8, 0, 0, 0, 0, 0xff, random.pick(&[0xe0, 0xd0])]
            }
            22 if random.chance(20) => generate::flags(random),
            22 => generate::repeated(random),
            23 => {
                // LOOPNE, LOOPE, LOOP or JECXZ; with a prefix, with a count or target of 16 bits.
                let prefix: &[u8] = random.pick(&[&[], &[], &[], &[], &[], &[], &[0x67], &[0x66]]);
                let short = [random.pick(&[0xe0, 0xe1, 0xe2, 0xe3]), random.pick(&[0xfe, 0x00, 0x02])];
                [prefix, &short].concat()
            }
            24 => load_segment(random),
            25 | 26 if both => {
                absolute.push(at + 6);
                let selector = random.pick(&[selector::CODE64, selector::CODE32]);
                // push selector; push target; retfq, or dec eax; retf
                vec![0x68, selector as u8, 0, 0, 0, 0x68, 0, 0, 0, 0, 0x48, 0xcb]
            }
            25 => {
                absolute.push(at + 1);
                // jmp far
                vec![0xea, 0, 0, 0, 0, selector::CODE32 as u8, 0]
            }
            27 | 76 => {
                let mut row = row(random);
                let last = row.pop().unwrap_or_default();
                for bytes in row {
                    code[at..at + bytes.len()].copy_from_slice(&bytes);
                    at += bytes.len();
                    starts.push(at);
                }
                last
            }
            28..36 if mix == Mix::X87 => shared(random, vectors::instruction),
            28..76 if mix == Mix::X87 => shared(random, x87::instruction),
            28..76 if mix == Mix::Vectors => shared(random, vectors::instruction),
            _ => from_table(random),
        };
        code[at..at + bytes.len()].copy_from_slice(&bytes);
        at += bytes.len();
    }
    // Round again.
    branches.push(at + 1);
    code[at..at + 5].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
    for site in branches {
        let distance = random.pick(&starts) as i32 - (site as i32 + 4);
        code[site..site + 4].copy_from_slice(&distance.to_le_bytes());
    }
    for site in absolute {
        let target = CODE as u32 + random.pick(&starts) as u32;
        code[site..site + 4].copy_from_slice(&target.to_le_bytes());
    }
    Program { code, start, starts }
}
