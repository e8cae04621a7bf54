//! x87 and MMX instructions: for random programs, and programs with known results.

use iced_x86::{Decoder, DecoderOptions};
use ringfence_engine::X87State;

use super::generate::POINTERS;
use super::vectors::{self, Template};
use super::*;
use crate::vector::Quirks;

/// MMX instructions, and those between MMX and XMM registers.
const MMX: &[Template] = &[
    (&[vectors::NONE], 1, 0x60, 0x6b, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0x6e, 0x6f, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0x7e, 0x7f, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0x70, 0x70, vectors::Form::Any, true),
    (&[vectors::NONE], 1, 0x71, 0x72, vectors::Form::Extension(&[2, 4, 6]), true),
    (&[vectors::NONE], 1, 0x73, 0x73, vectors::Form::Extension(&[2, 6]), true),
    (&[vectors::NONE], 1, 0x74, 0x76, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xc4, 0xc4, vectors::Form::Any, true),
    (&[vectors::NONE], 1, 0xc5, 0xc5, vectors::Form::Registers, true),
    (&[vectors::NONE], 1, 0xd1, 0xd5, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xd7, 0xd7, vectors::Form::Registers, false),
    (&[vectors::NONE], 1, 0xd8, 0xdf, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xe0, 0xe5, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xe7, 0xe7, vectors::Form::Memory, false),
    (&[vectors::NONE], 1, 0xe8, 0xef, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xf1, 0xf6, vectors::Form::Any, false),
    (&[vectors::NONE], 1, 0xf7, 0xf7, vectors::Form::Registers, false),
    (&[vectors::NONE], 1, 0xf8, 0xfe, vectors::Form::Any, false),
    (&[vectors::NONE], 2, 0x00, 0x0b, vectors::Form::Any, false),
    (&[vectors::NONE], 2, 0x1c, 0x1e, vectors::Form::Any, false),
    (&[vectors::NONE], 3, 0x0f, 0x0f, vectors::Form::Any, true),
    (&[vectors::NONE, vectors::P66], 1, 0x2a, 0x2a, vectors::Form::Any, false),
    (&[vectors::NONE, vectors::P66], 1, 0x2c, 0x2d, vectors::Form::Any, false),
    (&[vectors::F3, vectors::F2], 1, 0xd6, 0xd6, vectors::Form::Registers, false),
];

/// Control words that mask all exceptions, with all precisions and roundings; and such as do not.
const MASKED: [u16; 6] = [0x37f, 0x37f, 0x27f, 0x07f, 0xf7f, 0x77f];
const UNMASKED: [u16; 4] = [0x37e, 0x340, 0x35b, 0x36f];

fn control(random: &mut Random) -> u16 {
    if random.chance(12) { random.pick(&UNMASKED) } else { random.pick(&MASKED) }
}

/// One x87 or MMX instruction, or a few about them; rarely one that no processor knows.
pub(super) fn instruction(random: &mut Random) -> Vec<u8> {
    loop {
        let bytes = candidate(random);
        let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        // Environments are read from random memory, which is enough of them.
        use iced_x86::Mnemonic as M;
        let rare = matches!(
            decoded.mnemonic(),
            M::Fldenv | M::Frstor | M::Fnsave | M::Fnstenv | M::Fninit | M::Fldcw
        );
        if !decoded.is_invalid() && !rare || random.chance(3) {
            return bytes;
        }
    }
}

fn candidate(random: &mut Random) -> Vec<u8> {
    match random.below(100) {
        0..45 => with_memory(random),
        45..70 => vec![0xd8 + random.below(8) as u8, 0xc0 | random.below(64) as u8],
        // Comparisons whose result gets into flags, as flags and by way of AX.
        70..73 => vec![random.pick(&[0xdb, 0xdf]), 0xe8 | random.below(16) as u8],
        73..76 => vec![0xd8, 0xd1, 0xdf, 0xe0, 0x9e],
        76 => vec![0xdf, 0xe0],
        77 => vec![0x9b],
        78..81 => {
            // push word; fldcw [rsp]; pop rax
            let [low, high] = control(random).to_le_bytes();
            vec![0x68, low, high, 0, 0, 0xd9, 0x2c, 0x24, 0x58]
        }
        81 => vec![0xdb, random.pick(&[0xe2, 0xe2, 0xe3])],
        82 => {
            // mov rax,cr0; or al,8; mov cr0,rax; or clts, which is more often.
            if random.chance(15) {
                vec![0x0f, 0x20, 0xc0, 0x0c, 0x08, 0x0f, 0x22, 0xc0]
            } else {
                vec![0x0f, 0x06]
            }
        }
        83 | 84 => vec![0x0f, 0x77],
        _ => {
            let template = random.pick(MMX);
            vectors::legacy(random, template)
        }
    }
}

/// An x87 instruction with an operand in memory.
fn with_memory(random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    if random.chance(4) {
        out.push(random.pick(&[0x64, 0x65, 0x67, 0x66, 0xf3]));
    }
    let (base, reg) = (random.pick(&POINTERS), random.below(8) as u8);
    if base >= 8 || random.chance(20) {
        out.push(0x40 | base >> 3);
    }
    out.push(0xd8 + random.below(8) as u8);
    let near = random.chance(70);
    out.push(if near { 0x40 } else { 0x80 } | reg << 3 | base & 7);
    if base & 7 == 4 {
        out.push(0x24);
    }
    if near {
        out.push(random.bits() as u8);
    } else {
        out.extend_from_slice(&(random.below(0x2000) as i32 - 0x800).to_le_bytes());
    }
    out
}

/// A state of the x87 unit: registers with numbers of every kind, all exceptions masked more often than not.
pub(super) fn state(random: &mut Random) -> X87State {
    X87State {
        fcw: control(random),
        fsw: random.bits() as u16 & if random.chance(50) { 0x7f7f } else { 0x3800 },
        ftw: if random.chance(40) { 0 } else { random.bits() as u8 },
        fop: random.bits() as u16 & 0x7ff,
        fip: random.bits() >> 16,
        fdp: random.bits() >> 16,
        fcs: if random.chance(80) { 0 } else { random.bits() as u16 },
        fds: if random.chance(80) { 0 } else { random.bits() as u16 },
        st: std::array::from_fn(|_| register(random)),
    }
}

fn register(random: &mut Random) -> [u64; 2] {
    let sign = random.below(2) << 15;
    match random.below(8) {
        0 => [0, sign],
        1 => [1 << 63, sign | 0x7fff],
        2 => [3 << 62 | random.bits() >> 2, sign | 0x7fff],
        3 => [random.bits() >> 1, sign],
        4 => [random.bits(), random.bits() & 0xffff],
        _ => [1 << 63 | random.bits() >> random.below(63), sign | (0x3fff - 70 + random.below(140))],
    }
}

/// As the processor may record: whether the opcode, the address of data and selectors.
pub(super) fn quirks(bits: u64) -> Quirks {
    Quirks {
        tracks_opcode: bits & 1 != 0,
        tracks_data: bits & 2 != 0,
        tracks_selectors: bits & 4 != 0,
        ..Quirks::host()
    }
}

/// As FNINIT leaves the unit.
fn initial() -> X87State {
    X87State { fcw: 0x37f, ftw: 0, ..X87State::default() }
}

/// A vCPU that may execute x87 instructions, with code at [`CODE`].
fn x87_machine(code: &[u8]) -> (Interpreter, Jit) {
    let mut m = machine();
    allow_vectors(&mut m.cpu, 1);
    m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
    m.cpu.vector.unit.set_x87(&initial());
    (m.cpu.regs[RIP], m.cpu.regs[3], m.cpu.regs[4]) = (CODE, DATA, DATA + 0x2000);
    let jit = Jit::new(Options { threshold: 1, profile: true, ..OPTIONS }, &m.cpu.code).unwrap();
    (m, jit)
}

/// Executions that were handed to handlers.
fn handed(m: &Interpreter) -> u64 {
    crate::jit::handed(&m.cpu).iter().map(|(_, count)| count).sum()
}

#[test]
fn loop_with_x87_and_mmx_runs_as_it_is() {
    // mov ecx,1000; fldz; top: fld1; faddp; fld tbyte [rbx]; fstp tbyte [rbx+16]; fnstcw [rbx+32]; fldcw [rbx+32];
    // fld qword [rbx+40]; fcomip st1; fnstsw ax; dec ecx; jnz top; fistp qword [rbx+48]; emms; movq mm0,[rbx+48];
    // paddd mm0,mm0; movd eax,mm0; emms; ud2
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0xd9, 0xee, 0xd9, 0xe8, 0xde, 0xc1, 0xdb, 0x2b, 0xdb, 0x7b, 0x10, 0xd9, 0x7b,
        0x20, 0xd9, 0x6b, 0x20, 0xdd, 0x43, 0x28, 0xdf, 0xf1, 0xdf, 0xe0, 0xff, 0xc9, 0x75, 0xe6, 0xdf, 0x7b,
        0x30, 0x0f, 0x77, 0x0f, 0x6f, 0x43, 0x30, 0x0f, 0xfe, 0xc0, 0x0f, 0x7e, 0xc0, 0x0f, 0x77, 0x0f, 0x0b,
    ];
    let (mut m, mut jit) = x87_machine(&code);
    let value = [1, 2, 3, 4, 5, 6, 7, 0x88, 0xff, 0x3f];
    m.cpu.memory.write_bytes(GuestAddress(DATA), &value).unwrap();
    assert_eq!(until_fault(&mut m, &mut jit), Exception::UD, "at {:#x}", m.cpu.rip());
    assert_eq!((m.cpu.regs[0], bytes(&m, DATA + 16, 10)), (2000, value.to_vec()));
    assert!(handed(&m) < 10, "{:?}", crate::jit::handed(&m.cpu));
    m.cpu.vector.unit.park();
}

#[test]
fn exception_unmasked_within_a_unit_is_raised_by_the_next_operation() {
    // fld1; fldz; fldcw [rbx]; fdivp; fld1; mov eax,1; ud2
    let code = [0xd9, 0xe8, 0xd9, 0xee, 0xd9, 0x2b, 0xde, 0xf9, 0xd9, 0xe8, 0xb8, 1, 0, 0, 0, 0x0f, 0x0b];
    for (control, end) in [(0x37b_u16, CODE + 8), (0x37f, CODE + 15)] {
        let (mut m, mut jit) = x87_machine(&code);
        for round in 0..3 {
            m.cpu.memory.write(GuestAddress(DATA), control).unwrap();
            m.cpu.vector.unit.park();
            m.cpu.vector.unit.set_x87(&initial());
            m.cpu.regs[RIP] = CODE;
            let exception = until_fault(&mut m, &mut jit);
            m.cpu.vector.unit.park();
            let expected =
                if end == CODE + 8 { Exception::new(ringfence_x86::Vector::X87Error) } else { Exception::UD };
            assert_eq!((exception, m.cpu.rip()), (expected, end), "round {round}");
            let record = m.cpu.vector.unit.pointers();
            // Behind the division nothing was executed, or FLD1.
            assert_eq!(record.fip, if end == CODE + 8 { CODE + 6 } else { CODE + 8 });
        }
    }
}

#[test]
fn task_switched_flag_set_between_runs_is_seen() {
    // top: fld1; fstp st0; dec ecx; jnz top; ud2
    let code = [0xd9, 0xe8, 0xdd, 0xd8, 0xff, 0xc9, 0x75, 0xf8, 0x0f, 0x0b];
    let (mut m, mut jit) = x87_machine(&code);
    m.cpu.regs[1] = 1 << 20;
    jit.run(&mut m, 1000).unwrap();
    m.cpu.cr0 |= Cr0::TS;
    m.cpu.update_mode();
    let exception = (0..10).find_map(|_| jit.run(&mut m, 1000).err());
    assert_eq!(exception, Some(Exception::new(ringfence_x86::Vector::DeviceNotAvailable)));
    m.cpu.cr0 -= Cr0::TS;
    m.cpu.update_mode();
    let before = handed(&m);
    jit.run(&mut m, 10_000).unwrap();
    assert!(handed(&m) < before + 3);
    m.cpu.vector.unit.park();
}

/// Runs code from a state until it faults; the x87 state that it leaves, and where.
fn leaves(code: &[u8], threshold: u8, quirks: Quirks) -> (X87State, u64) {
    let (mut m, _) = x87_machine(code);
    let mut jit = Jit::new(Options { threshold, ..OPTIONS }, &m.cpu.code).unwrap();
    jit.cache.stubs.quirks = quirks;
    m.cpu.vector.unit.set_quirks(quirks);
    m.cpu.segments[1].selector.0 = 0x33;
    m.cpu.segments[3].selector.0 = 0x2b;
    m.cpu.regs[6] = DATA + 0x4000 - 4;
    until_fault(&mut m, &mut jit);
    m.cpu.vector.unit.park();
    (m.cpu.vector.unit.x87(), m.cpu.rip())
}

#[test]
fn page_fault_of_an_operand_leaves_state_and_record_of_the_operation_before() {
    // fldpi; fld dword [rbx]; fxch; fstp tbyte [rsi] (the page behind is not present)
    let code = [0xd9, 0xeb, 0xd9, 0x03, 0xd9, 0xc9, 0xdb, 0x3e, 0x0f, 0x0b];
    for bits in 0..8 {
        let (state, rip) = leaves(&code, 1, quirks(bits));
        assert_eq!(rip, CODE + 6);
        assert_eq!((state.fsw >> 11 & 7, state.ftw, state.fip), (6, 0xc0, CODE + 4));
        assert_eq!(state.fop, if bits & 1 != 0 { 0x1c9 } else { 0 });
        assert_eq!(state.fdp, if bits & 2 != 0 { DATA } else { 0 });
        assert_eq!(state.fcs, if bits & 4 != 0 { 0x33 } else { 0 });
        assert_eq!(state.fds, if bits & 6 == 6 { 0x2b } else { 0 });
        assert_eq!((state, rip), leaves(&code, 200, quirks(bits)));
    }
}

#[test]
fn record_is_that_of_the_last_operation_wherever_code_is_left() {
    let tails: [&[u8]; 6] = [
        &[0x0f, 0x0b],
        // jmp +0; ud2
        &[0xeb, 0, 0x0f, 0x0b],
        // call +0; ud2
        &[0xe8, 0, 0, 0, 0, 0x0f, 0x0b],
        // mov eax,[rsi+4]: not present
        &[0x8b, 0x46, 0x04],
        // push 0; pop rdx; div edx
        &[0x6a, 0, 0x5a, 0xf7, 0xf2],
        // mov [rbx],eax; mov [rsi],eax; mov [rbx+4],eax; mov [rsi+4],eax: a row
        &[0x89, 0x03, 0x89, 0x06, 0x89, 0x43, 0x04, 0x89, 0x46, 0x04],
    ];
    for tail in tails {
        for bits in 0..8 {
            // fld1; fstp qword [rbx]; fnop; emms
            let mut code = vec![0xd9, 0xe8, 0xdd, 0x1b, 0xd9, 0xd0, 0x0f, 0x77];
            code.extend_from_slice(tail);
            let (state, rip) = leaves(&code, 1, quirks(bits));
            assert_eq!(state.fip, CODE + 4, "{tail:x?}");
            assert_eq!((state, rip), leaves(&code, 200, quirks(bits)), "{tail:x?}");
        }
    }
}
