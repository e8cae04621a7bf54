//! Random programs: instructions from a table of opcodes, with branches among themselves.

use ringfence_oracle::Random;

use super::{CODE_LEN, DATA, rows, vectors, x87};

/// A program.
pub(super) struct Program {
    /// Both code pages.
    pub(super) code: Vec<u8>,
    /// Offset of its first instruction.
    pub(super) start: usize,
    /// Offsets of all its instructions.
    pub(super) starts: Vec<usize>,
}

/// Registers that point to data, most of the time.
pub(super) const POINTERS: [u8; 7] = [3, 4, 6, 7, 9, 13, 15];

/// A value for a register: often one at which something happens.
pub(super) fn value(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => random.below(16),
        1 => 0_u64.wrapping_sub(random.below(16)),
        2 => 1 << random.below(64),
        3 => random.bits() & 0xffff_ffff,
        4 => DATA + random.below(0x8000),
        _ => random.bits(),
    }
}

/// What follows an opcode.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// ModRM with a register and anything.
    R,
    /// ModRM with a register and memory only.
    M,
    /// ModRM with one of these extensions.
    X(&'static [u8]),
    /// No ModRM.
    N,
    /// The register is in the opcode.
    O,
}

/// An opcode: prefix, bytes, form, immediate (0, 1: one byte, 4: two or four bytes by operand size, 8: likewise or
/// eight), whether 66h is allowed.
pub(super) type Template = (&'static [u8], &'static [u8], Form, u8, bool);

use Form::{M, N, O, R, X};

const ANY: Form = X(&[0, 1, 2, 3, 4, 5, 6, 7]);

/// A count, and a repeated string instruction of any width, rarely upside down.
pub(super) fn repeated(random: &mut Random) -> Vec<u8> {
    let count = match random.below(4) {
        0 => random.below(0x1100),
        1 => random.below(0x100),
        _ => random.below(9),
    };
    let opcode =
        random.pick(&[0xa4, 0xa5, 0xaa, 0xab, 0x6c, 0xac, 0xae, 0xaf, 0xae, 0xaf, 0xa6, 0xa7, 0xa6, 0xa7]);
    let scans = matches!(opcode, 0xae | 0xaf);
    let count = if scans && random.chance(30) { 0xffff_ffff } else { count };
    let mut bytes = vec![if random.chance(5) { 0xfd } else { 0xfc }, 0xb9];
    bytes.extend((count as u32).to_le_bytes());
    if matches!(opcode, 0xa6 | 0xa7) && random.chance(50) {
        // mov esi,edi, of what is the same: otherwise nearly all differs at once
        bytes.extend([0x48, 0x89, 0xfe]);
    }
    if random.chance(20) {
        bytes.push(0x66);
    }
    bytes.push(random.pick(&[0xf3, 0xf3, 0xf2]));
    if random.chance(30) {
        bytes.push(0x48);
    }
    bytes.push(opcode);
    bytes
}

/// PUSHF, a change of what it has pushed, and POPF: never TF.
pub(super) fn flags(random: &mut Random) -> Vec<u8> {
    let usual = 0xed5;
    let mask = if random.chance(70) { usual } else { !0x100 };
    let change = (random.bits() & random.bits() & mask) as u32;
    // pushf; xor dword ptr [rsp],change; popf
    let mut bytes = vec![0x9c, 0x81, 0x34, 0x24];
    bytes.extend(change.to_le_bytes());
    bytes.push(0x9d);
    bytes
}

/// RDFSBASE, RDGSBASE, WRFSBASE or WRGSBASE.
fn base(random: &mut Random) -> Vec<u8> {
    let rex = random.pick(&[0x40, 0x41, 0x48, 0x49]);
    vec![0xf3, rex, 0x0f, 0xae, 0xc0 | random.below(32) as u8]
}

/// MOV from a control register.
fn control(random: &mut Random) -> Vec<u8> {
    let rex = random.pick(&[0x40, 0x41, 0x48]);
    vec![rex, 0x0f, 0x20, 0xc0 | random.pick(&[0, 2, 3, 4, 5]) << 3 | destination(random)]
}

pub(super) const TABLE: &[Template] = &[
    (&[], &[0x80], ANY, 1, false),
    (&[], &[0x81], ANY, 4, true),
    (&[], &[0x83], ANY, 1, true),
    (&[], &[0x83], ANY, 1, false),
    (&[], &[0x84], R, 0, false),
    (&[], &[0x85], R, 0, true),
    (&[], &[0x86], R, 0, false),
    (&[], &[0x87], R, 0, true),
    (&[], &[0x88], R, 0, false),
    (&[], &[0x89], R, 0, true),
    (&[], &[0x8a], R, 0, false),
    (&[], &[0x8b], R, 0, true),
    (&[], &[0x89], R, 0, false),
    (&[], &[0x8b], R, 0, false),
    (&[], &[0x8d], M, 0, true),
    (&[], &[0x8d], M, 0, false),
    (&[], &[0x63], R, 0, true),
    (&[], &[0xc6], X(&[0]), 1, false),
    (&[], &[0xc7], X(&[0]), 4, true),
    (&[], &[0xf6], X(&[0]), 1, false),
    (&[], &[0xf6], X(&[2, 3, 4, 5, 6, 7]), 0, false),
    (&[], &[0xf7], X(&[0]), 4, true),
    (&[], &[0xf7], X(&[2, 3, 4, 5, 6, 7]), 0, true),
    (&[], &[0xf7], X(&[6, 7]), 0, true),
    (&[], &[0xfe], X(&[0, 1]), 0, false),
    (&[], &[0xff], X(&[0, 1]), 0, true),
    (&[], &[0xff], X(&[6]), 0, false),
    (&[], &[0xff], X(&[2, 4]), 0, false),
    (&[], &[0x8f], X(&[0]), 0, false),
    (&[], &[0xc0], ANY, 1, false),
    (&[], &[0xc1], ANY, 1, true),
    (&[], &[0xd0], ANY, 0, false),
    (&[], &[0xd1], ANY, 0, true),
    (&[], &[0xd2], ANY, 0, false),
    (&[], &[0xd3], ANY, 0, true),
    (&[], &[0x0f, 0xb6], R, 0, true),
    (&[], &[0x0f, 0xb7], R, 0, false),
    (&[], &[0x0f, 0xbe], R, 0, true),
    (&[], &[0x0f, 0xbf], R, 0, false),
    (&[], &[0x0f, 0xa3], R, 0, true),
    (&[], &[0x0f, 0xab], R, 0, true),
    (&[], &[0x0f, 0xb3], R, 0, true),
    (&[], &[0x0f, 0xbb], R, 0, true),
    (&[], &[0x0f, 0xba], X(&[4, 5, 6, 7]), 1, true),
    (&[], &[0x0f, 0xa4], R, 1, false),
    (&[], &[0x0f, 0xa5], R, 0, false),
    (&[], &[0x0f, 0xac], R, 1, false),
    (&[], &[0x0f, 0xad], R, 0, false),
    (&[], &[0x0f, 0xaf], R, 0, true),
    (&[], &[0x69], R, 4, true),
    (&[], &[0x6b], R, 1, true),
    (&[], &[0x0f, 0xbc], R, 0, true),
    (&[], &[0x0f, 0xbd], R, 0, true),
    (&[0xf3], &[0x0f, 0xb8], R, 0, false),
    (&[0xf3], &[0x0f, 0xbc], R, 0, false),
    (&[0xf3], &[0x0f, 0xbd], R, 0, false),
    (&[], &[0x0f, 0xb0], R, 0, false),
    (&[], &[0x0f, 0xb1], R, 0, true),
    (&[], &[0x0f, 0xc0], R, 0, false),
    (&[], &[0x0f, 0xc1], R, 0, true),
    (&[], &[0x0f, 0xc7], X(&[1]), 0, false),
    (&[], &[0x0f, 0xc8], O, 0, true),
    (&[], &[0x0f, 0xae], X(&[7]), 0, true),
    (&[0xf3], &[0x0f, 0xc7], X(&[7]), 0, false),
    (&[], &[0x0f, 0x18], X(&[4, 7]), 0, false),
    (&[], &[0xd7], N, 0, false),
    (&[], &[0x0f, 0x38, 0xf0], M, 0, true),
    (&[], &[0x0f, 0x38, 0xf1], M, 0, true),
    (&[0xf2], &[0x0f, 0x38, 0xf0], R, 0, false),
    (&[0xf2], &[0x0f, 0x38, 0xf1], R, 0, false),
    (&[0x66], &[0x0f, 0x38, 0xf6], R, 0, false),
    (&[0xf3], &[0x0f, 0x38, 0xf6], R, 0, false),
    (&[], &[0x50], O, 0, true),
    (&[], &[0x50], O, 0, false),
    (&[], &[0x50], O, 0, false),
    (&[], &[0x58], O, 0, true),
    (&[], &[0x58], O, 0, false),
    (&[], &[0x58], O, 0, false),
    (&[], &[0x8f], X(&[0]), 0, true),
    (&[], &[0x8f], X(&[0]), 0, false),
    (&[], &[0x68], N, 4, true),
    (&[], &[0x6a], N, 1, false),
    (&[], &[0xc9], N, 0, false),
    (&[], &[0xc8, 0x10, 0x00, 0x01], N, 0, false),
    (&[], &[0xc8, 0x18, 0x00, 0x00], N, 0, false),
    (&[], &[0xc8, 0xf0, 0x0f, 0x20], N, 0, true),
    (&[], &[0x98], N, 0, true),
    (&[], &[0x99], N, 0, true),
    (&[], &[0x9e], N, 0, false),
    (&[], &[0x9f], N, 0, false),
    (&[], &[0xf5], N, 0, false),
    (&[], &[0xf8], N, 0, false),
    (&[], &[0xf9], N, 0, false),
    (&[], &[0xfc], N, 0, false),
    (&[], &[0xfd], N, 0, false),
    (&[], &[0xa4], N, 0, false),
    (&[], &[0xa5], N, 0, true),
    (&[], &[0xaa], N, 0, false),
    (&[], &[0xac], N, 0, false),
    (&[], &[0xad], N, 0, true),
    (&[], &[0xae], N, 0, false),
    (&[], &[0xaf], N, 0, true),
    (&[], &[0x8c], X(&[0, 1, 2, 3, 4, 5]), 0, true),
    (&[], &[0xab], N, 0, true),
    (&[], &[0xa6], N, 0, false),
    (&[], &[0xa7], N, 0, true),
    (&[], &[0xb0], O, 1, false),
    (&[], &[0xb8], O, 8, true),
    (&[], &[0x04], N, 1, false),
    (&[], &[0x2d], N, 4, true),
    (&[], &[0xa9], N, 4, true),
    (&[], &[0x91], N, 0, true),
];

fn modrm(random: &mut Random, out: &mut Vec<u8>, form: Form, rex: &mut u8) {
    let reg = match form {
        X(extensions) => random.pick(extensions),
        _ => {
            *rex |= (random.below(2) as u8) << 2;
            destination(random)
        }
    };
    if form != M && random.chance(50) {
        *rex |= random.below(2) as u8;
        let rm = destination(random);
        out.push(0xc0 | reg << 3 | rm);
        return;
    }
    if random.chance(8) {
        // RIP-relative, near enough to hit the program now and then.
        out.push(reg << 3 | 5);
        let distance = if random.chance(20) {
            random.below(40) as i32 - 8
        } else {
            -(random.below(0x6000) as i32) - 0x8000
        };
        out.extend_from_slice(&distance.to_le_bytes());
        return;
    }
    let base = if random.chance(88) { random.pick(&POINTERS) } else { random.below(16) as u8 };
    *rex |= base >> 3;
    let indexed = random.chance(20);
    let mode = 1 + random.below(2) as u8;
    if indexed || base & 7 == 4 {
        let index = if indexed && random.chance(80) { random.below(16) as u8 } else { 4 };
        *rex |= (index >> 3) << 1;
        out.push(mode << 6 | reg << 3 | 4);
        out.push((random.below(4) as u8) << 6 | (index & 7) << 3 | base & 7);
    } else {
        out.push(mode << 6 | reg << 3 | base & 7);
    }
    match mode {
        1 => out.push(random.bits() as u8),
        _ => out.extend_from_slice(&(random.below(0x2000) as i32 - 0x800).to_le_bytes()),
    }
}

/// The low bits of a register that is mostly not one of the pointers.
pub(super) fn destination(random: &mut Random) -> u8 {
    if random.chance(90) { random.pick(&[0, 1, 2, 5, 0, 2]) } else { random.below(8) as u8 }
}

fn immediate(random: &mut Random, out: &mut Vec<u8>, kind: u8, narrow: bool, rex: u8) {
    let len = match kind {
        4 | 8 if narrow && rex & 8 == 0 => 2,
        8 if rex & 8 != 0 => 8,
        4 | 8 => 4,
        n => usize::from(n),
    };
    out.extend_from_slice(&value(random).to_le_bytes()[..len]);
}

fn from_table(random: &mut Random) -> Vec<u8> {
    let (prefix, opcode, form, imm, sized) = match random.below(10) {
        0..3 => return alu(random),
        3 => return conditional(random),
        _ => random.pick(TABLE),
    };
    let mut rex = if random.chance(50) { 0x48 } else { 0x40 };
    let mut tail = Vec::new();
    let mut opcode = opcode.to_vec();
    match form {
        N => {}
        O => {
            rex |= random.below(2) as u8;
            *opcode.last_mut().unwrap() |= destination(random);
        }
        _ => modrm(random, &mut tail, form, &mut rex),
    }
    let narrow = sized && random.chance(15);
    immediate(random, &mut tail, imm, narrow, rex);
    assemble(random, narrow, prefix, rex, &opcode, &tail)
}

fn assemble(
    random: &mut Random,
    narrow: bool,
    prefix: &[u8],
    rex: u8,
    opcode: &[u8],
    tail: &[u8],
) -> Vec<u8> {
    let mut out = Vec::new();
    if narrow {
        out.push(0x66);
    }
    if random.chance(4) {
        out.push(random.pick(&[0x64, 0x65, 0x67]));
    }
    if random.chance(2) {
        out.push(0xf0);
    }
    out.extend_from_slice(prefix);
    if rex != 0x40 || random.chance(30) {
        out.push(rex);
    }
    out.extend_from_slice(opcode);
    out.extend_from_slice(tail);
    out
}

/// ADD to CMP in their four register and memory forms.
fn alu(random: &mut Random) -> Vec<u8> {
    let opcode = (random.below(8) as u8) << 3 | random.below(4) as u8;
    let (mut rex, mut tail) = (if random.chance(50) { 0x48 } else { 0x40 }, Vec::new());
    modrm(random, &mut tail, R, &mut rex);
    let narrow = random.chance(10);
    assemble(random, narrow, &[], rex, &[opcode], &tail)
}

/// SETcc, CMOVcc, or an instruction with a VEX prefix.
fn conditional(random: &mut Random) -> Vec<u8> {
    let (mut rex, mut tail) = (if random.chance(50) { 0x48 } else { 0x40 }, Vec::new());
    let cc = random.below(16) as u8;
    match random.below(3) {
        0 => {
            modrm(random, &mut tail, X(&[0]), &mut rex);
            assemble(random, false, &[], rex, &[0x0f, 0x90 | cc], &tail)
        }
        1 => {
            modrm(random, &mut tail, R, &mut rex);
            assemble(random, false, &[], rex, &[0x0f, 0x40 | cc], &tail)
        }
        _ => vex(random),
    }
}

/// BMI1 and BMI2: map, mandatory prefix, opcode, extension.
const VEX: &[(u8, u8, u8, Form)] = &[
    (2, 0, 0xf2, R),
    (2, 0, 0xf7, R),
    (2, 0, 0xf3, X(&[1, 2, 3])),
    (2, 0, 0xf5, R),
    (2, 3, 0xf5, R),
    (2, 2, 0xf5, R),
    (2, 3, 0xf6, R),
    (2, 1, 0xf7, R),
    (2, 2, 0xf7, R),
    (2, 3, 0xf7, R),
    (3, 3, 0xf0, R),
];

fn vex(random: &mut Random) -> Vec<u8> {
    let (map, pp, opcode, form) = random.pick(VEX);
    let (mut rex, mut tail) = (0, Vec::new());
    modrm(random, &mut tail, form, &mut rex);
    if map == 3 {
        tail.push(random.bits() as u8);
    }
    let other = if map == 3 { 0 } else { random.below(16) as u8 };
    let mut out =
        vec![0xc4, (!rex & 7) << 5 | map, (random.below(2) as u8) << 7 | (!other & 15) << 3 | pp, opcode];
    out.append(&mut tail);
    out
}

/// What half of a program's instructions are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    Integers,
    Vectors,
    /// x87 and MMX, with some of vectors.
    X87,
}

/// A program of 4 to 40 instructions.
pub(super) fn program(random: &mut Random, mix: Mix) -> Program {
    let mut code = vec![0xcc; CODE_LEN];
    let start = match random.below(4) {
        0 => 0xf80 + random.below(0x7f),
        _ => random.below(0xf00),
    } as usize;
    let (mut at, mut starts, mut branches) = (start, Vec::new(), Vec::new());
    for _ in 0..4 + random.below(37) {
        starts.push(at);
        let bytes = match random.below(100) {
            0..14 => {
                let cc = random.below(16) as u8;
                branches.push(at + 2);
                vec![0x0f, 0x80 | cc, 0, 0, 0, 0]
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
            20 => vec![0xc2, 8 * random.below(4) as u8, 0],
            21 => {
                branches.push(at + 3);
                // lea rax, [rip + branch]; jmp or call rax
                vec![0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xff, random.pick(&[0xe0, 0xd0])]
            }
            22 | 24 => repeated(random),
            25 => match random.below(3) {
                0 => control(random),
                1 => base(random),
                _ => flags(random),
            },
            23 => {
                // LOOPNE, LOOPE, LOOP or JRCXZ, or with ECX.
                let mut bytes = if random.chance(30) { vec![0x67] } else { vec![] };
                bytes.extend([0xe0 + random.below(4) as u8, random.pick(&[0xfe, 0x00, 0x02])]);
                bytes
            }
            26 | 76 => {
                let mut row = rows::row(random);
                let last = row.pop().unwrap_or_default();
                for bytes in row {
                    code[at..at + bytes.len()].copy_from_slice(&bytes);
                    at += bytes.len();
                    starts.push(at);
                }
                last
            }
            26..34 if mix == Mix::X87 => vectors::instruction(random),
            26..76 if mix == Mix::X87 => x87::instruction(random),
            26..76 if mix == Mix::Vectors => vectors::instruction(random),
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
    Program { code, start, starts }
}
