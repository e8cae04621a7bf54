//! x87 exceptions that are not masked, in translated code: against the interpreter, and with known results.

use iced_x86::code_asm::*;
use iced_x86::{Code as C, Decoder, DecoderOptions, Encoder, IcedError, Instruction};
use iced_x86::{MemoryOperand, Register as R};
use ringfence_engine::X87State;
use ringfence_x86::Vector;

use super::*;
use crate::vector::Quirks;

/// Pointers to data: some in host registers, one in none.
const BASES: [R; 4] = [R::RDI, R::RSI, R::RBX, R::R9];
/// Registers for integers, likewise.
const VALUES: [R; 5] = [R::RDX, R::R8, R::R10, R::R14, R::R15];
/// Bytes of data that programs find.
const DATA_BYTES: usize = 0x4000;
/// The sticky flags of the status word, stack fault and summary included.
const FLAGS: u16 = 0x80ff;

const MEMORY: [C; 25] = [
    C::Fld_m32fp,
    C::Fld_m64fp,
    C::Fld_m64fp,
    C::Fld_m80fp,
    C::Fild_m16int,
    C::Fild_m32int,
    C::Fild_m64int,
    C::Fadd_m32fp,
    C::Fmul_m64fp,
    C::Fdiv_m32fp,
    C::Fdivr_m64fp,
    C::Fsub_m64fp,
    C::Fcomp_m64fp,
    C::Fiadd_m32int,
    C::Fidiv_m16int,
    C::Fbld_m80bcd,
    C::Fst_m32fp,
    C::Fst_m64fp,
    C::Fstp_m64fp,
    C::Fstp_m80fp,
    C::Fstp_m32fp,
    C::Fistp_m64int,
    C::Fist_m32int,
    C::Fisttp_m16int,
    C::Fbstp_m80bcd,
];

fn operand(random: &mut Random) -> MemoryOperand {
    let (base, place) = (random.pick(&BASES), 16 * random.below(8) as i64);
    if random.chance(20) {
        // RCX counts rounds, and is small.
        MemoryOperand::with_base_index_scale_displ_size(base, R::RCX, random.pick(&[1, 8]), place, 1)
    } else {
        MemoryOperand::with_base_displ(base, place)
    }
}

/// An x87 or MMX instruction, or a few about them.
fn operation(random: &mut Random, out: &mut Vec<u8>) {
    match random.below(20) {
        0..9 => put(out, Instruction::with1(random.pick(&MEMORY), operand(random))),
        9..17 => loop {
            let bytes = [0xd8 + random.below(8) as u8, 0xc0 | random.below(64) as u8];
            let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            if !decoded.is_invalid() && !matches!(decoded.code(), C::Fninit | C::Fnclex) {
                return out.extend(bytes);
            }
        },
        17 => out.extend(random.pick(&[[0xdf, 0xe0], [0xdb, 0xe2], [0x9b, 0x90], [0xd9, 0xd0]])),
        // Exchange with an MMX register's number: paddd mm1, mm2.
        18 if random.chance(30) => out.extend([0x0f, 0xfe, 0xca]),
        _ => {
            // push word; fldcw [rsp]; pop rax
            let [low, high] = control(random).to_le_bytes();
            out.extend([0x68, low, high, 0, 0, 0xd9, 0x2c, 0x24, 0x58]);
        }
    }
}

fn put(out: &mut Vec<u8>, made: Result<Instruction, IcedError>) {
    let mut encoder = Encoder::new(64);
    encoder.encode(&made.unwrap(), 0).unwrap();
    out.extend(encoder.take_buffer());
}

/// Anything else; what moves pointers among it, and what looks at flags.
fn other(random: &mut Random, out: &mut Vec<u8>) {
    let (one, two, memory) = (random.pick(&VALUES), random.pick(&VALUES), operand(random));
    let made = match random.below(13) {
        0..3 => Instruction::with2(C::Add_rm64_imm8, random.pick(&BASES), random.pick(&[8, 16, -8])),
        3 => Instruction::with2(C::Adc_r64_rm64, one, two),
        4 => Instruction::with2(C::Mov_r64_rm64, one, memory),
        5 => Instruction::with2(C::Mov_rm64_r64, memory, one),
        6 => Instruction::with1(random.pick(&[C::Setb_rm8, C::Setp_rm8, C::Sete_rm8]), R::DL),
        7 => Instruction::with2(C::Xor_r64_rm64, one, two),
        8 => Instruction::with2(C::Cmp_r64_rm64, one, memory),
        9 => Instruction::with2(C::Movups_xmmm128_xmm, memory, R::XMM1),
        10 => Instruction::with1(C::Push_r64, one),
        11 => Instruction::with1(C::Pop_r64, one),
        _ => Instruction::with2(C::Mulsd_xmm_xmmm64, R::XMM1, memory),
    };
    put(out, made);
}

/// A control word, with some exceptions not masked; not inexactness mostly, which nearly everything raises.
fn control(random: &mut Random) -> u16 {
    let masks = random.bits() as u16 & 0x3f | if random.chance(70) { 0x20 } else { 0 };
    let masks = if random.chance(30) { masks | 1 } else { masks };
    random.pick(&[0x340, 0x340, 0x240, 0xf40, 0x040]) | if random.chance(10) { 0x3f } else { masks }
}

/// A loop over some of these, and UD2 behind it.
fn program(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..2 + random.below(14) {
        if random.chance(60) { operation(random, &mut code) } else { other(random, &mut code) }
    }
    put(&mut code, Instruction::with1(C::Dec_rm64, R::RCX));
    // jnz top; ud2
    code.extend([0x0f, 0x85]);
    code.extend((-(code.len() as i32) - 4).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code
}

/// Sixteen bytes of data: a number of 80 bits, or two shorter ones.
fn numbers(random: &mut Random) -> [u64; 2] {
    let double = |random: &mut Random| match random.below(8) {
        0 => 0,
        1 => 0x7ff0_0000_0000_0001,
        2 => random.below(1 << 20),
        3 => 0x7fef_ffff_ffff_ffff,
        4 => u64::from(f32::to_bits(random.below(100) as f32 - 50.0)) << (32 * random.below(2)),
        5 => random.bits(),
        _ => (random.below(2000) as f64 - 1000.0).to_bits(),
    };
    if random.chance(30) { x87::state(random).st[0] } else { [double(random), double(random)] }
}

fn x87_of(m: &mut Interpreter) -> X87State {
    m.cpu.vector.unit.park();
    m.cpu.vector.unit.x87()
}

/// Takes the flags out of the status word, so that nothing is pending.
fn clear_flags(m: &mut Interpreter) {
    let mut state = x87_of(m);
    state.fsw &= !FLAGS;
    m.cpu.vector.unit.set_x87(&state);
}

/// Runs random loops on processors that record more or less, going on behind each exception once it has been cleared: how many were raised.
fn run(seed: u64, rounds: u64, options: Options) -> u64 {
    let mut raised = 0;
    for bits in 0..8 {
        let quirks = x87::quirks(bits);
        let (mut reference, mut subject) = (machine(), machine());
        for m in [&mut reference, &mut subject] {
            allow_vectors(&mut m.cpu, 7);
            m.cpu.vector.unit.set_quirks(quirks);
        }
        let mut jit = Jit::new(options, &subject.cpu.code).unwrap();
        jit.cache.stubs.quirks = quirks;
        let count = if bits == 0 { rounds / 2 } else { rounds / 14 };
        for round in 0..count {
            let mut random = Random::new(seed << 32 | bits << 24 | round);
            if random.chance(50) {
                // Otherwise all code of the page is careful after the first time.
                jit.careful.clear();
            }
            raised += run_round(&mut random, [&mut reference, &mut subject], &mut jit, options);
        }
        let share = 100 * jit.executed / subject.cpu.retired;
        assert!(share > 60, "translated code does {share} percent");
    }
    raised
}

fn run_round(random: &mut Random, machines: [&mut Interpreter; 2], jit: &mut Jit, options: Options) -> u64 {
    let [reference, subject] = machines;
    let code = program(random);
    let data: Vec<u8> =
        (0..DATA_BYTES / 16).flat_map(|_| numbers(random)).flat_map(u64::to_le_bytes).collect();
    let mut regs: [u64; 16] = std::array::from_fn(|_| random.bits());
    for base in BASES {
        let near_the_end = if random.chance(30) { 0xf80 } else { 0x400 };
        regs[base.number()] = DATA + 0x1000 * random.below(3) + near_the_end;
    }
    (regs[1], regs[4]) = (1 + random.below(40), DATA + 0x3000);
    let mut state = x87::state(random);
    (state.fcw, state.fsw) = (control(random), state.fsw & !FLAGS);
    (state.fcs, state.fds) = (0, 0);
    for m in [&mut *reference, &mut *subject] {
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
        m.cpu.regs[..16].copy_from_slice(&regs);
        m.cpu.regs[RIP] = CODE;
        m.cpu.vector.unit.set_x87(&state);
    }
    let (mut raised, mut faults) = (0, 0);
    loop {
        let exception = until_fault(subject, jit);
        let found = x87_of(subject);
        let expected = (0..1_000_000).find_map(|_| reference.run_block(1000).err()).expect("it ends");
        let wanted = x87_of(reference);
        let context = || {
            let listing: Vec<_> = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE)
                .iter()
                .map(|i| format!("{:x} {i}", i.ip()))
                .collect();
            let text = |m: &Interpreter, state: &X87State| format!("{:x?}\n{state:x?}", m.cpu.regs);
            format!("{}\n{}\n{listing:#?}", text(reference, &wanted), text(subject, &found))
        };
        assert!(exception == expected, "{exception:?}, not {expected:?}: {}", context());
        assert!(reference.cpu.regs == subject.cpu.regs, "registers: {}", context());
        assert!(reference.cpu.retired == subject.cpu.retired, "count: {}", context());
        assert!(wanted == found, "x87 state: {}", context());
        if options.exact_flags {
            let flags = [&*reference, &*subject].map(|m| m.cpu.rflags());
            assert!(flags[0] == flags[1], "flags {flags:x?}: {}", context());
        }
        let memory = [&*reference, &*subject].map(|m| bytes(m, DATA, DATA_LEN));
        assert!(memory[0] == memory[1], "memory: {}", context());
        subject.cpu.status = reference.cpu.status;
        faults += 1;
        if exception != Exception::new(Vector::X87Error) || faults == 60 {
            return raised;
        }
        raised += 1;
        for m in [&mut *reference, &mut *subject] {
            clear_flags(m);
        }
    }
}

#[test]
fn loops_with_unmasked_x87_exceptions_run_as_in_the_interpreter() {
    let options = Options { exact_flags: true, ..OPTIONS };
    assert!(run(seed(51), count(4000), options) > 10_000);
}

#[test]
fn loops_with_unmasked_x87_exceptions_and_inexact_flags_run_as_in_the_interpreter() {
    assert!(run(seed(52), count(4000), OPTIONS) > 10_000);
}

#[test]
fn loops_with_unmasked_x87_exceptions_one_instruction_at_a_time_run_as_in_the_interpreter() {
    assert!(run(seed(53), count(2000), Options { region: 1, exact_flags: true, ..OPTIONS }) > 5_000);
}

#[test]
fn loops_with_unmasked_x87_exceptions_in_the_smallest_code_memory_run_as_in_the_interpreter() {
    assert!(run(seed(54), count(4000), Options { code_size: SMALLEST_CODE, ..OPTIONS }) > 10_000);
}

/// A vCPU with code at [`CODE`], whose x87 unit is as FNINIT leaves it but for this control word, and finds these numbers at [`DATA`] in
/// RBX.
fn prepared(a: &mut CodeAssembler, control: u16, values: &[f64]) -> (Interpreter, Jit) {
    let code = a.assemble(CODE).unwrap();
    let mut m = machine();
    allow_vectors(&mut m.cpu, 1);
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    let jit =
        Jit::new(Options { threshold: 1, profile: true, exact_flags: true, ..OPTIONS }, &m.cpu.code).unwrap();
    begin(&mut m, control, values);
    (m, jit)
}

fn begin(m: &mut Interpreter, control: u16, values: &[f64]) {
    for (at, value) in (DATA..).step_by(8).zip(values) {
        m.cpu.memory.write(GuestAddress(at), value.to_bits()).unwrap();
    }
    m.cpu.vector.unit.park();
    m.cpu.vector.unit.set_x87(&X87State { fcw: control, ftw: 0, ..X87State::default() });
    (m.cpu.regs[RIP], m.cpu.regs[3], m.cpu.regs[4]) = (CODE, DATA, DATA + 0x2000);
}

const X87_ERROR: Exception = Exception::new(Vector::X87Error);

#[test]
fn each_x87_exception_unmasked_alone_is_raised_by_the_next_that_waits() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    /// Which is not masked; the instruction, with the second of the numbers at the top and the first below; the opcode and distance of data
    /// recorded, and flags behind it (SDM 1 8.5).
    type Case = (u16, Emit, [f64; 2], u16, Option<u64>, u16);
    let cases: [Case; 8] = [
        (0x01, |a| a.fsqrt(), [1.0, -2.0], 0x1fa, None, 0x01),
        // Stack underflow.
        (0x01, |a| a.fadd_2(st0, st4), [1.0, 2.0], 0x0c4, None, 0x41),
        (0x02, |a| a.fadd(qword_ptr(rbx + 24)), [1.0, 2.0], 0x443, Some(24), 0x02),
        (0x04, |a| a.fdiv(qword_ptr(rbx + 16)), [1.0, 2.0], 0x473, Some(16), 0x04),
        (0x04, |a| a.fdivrp(st1, st0), [0.0, 2.0], 0x6f1, None, 0x04),
        (0x08, |a| a.fst(dword_ptr(rbx + 40)), [1.0, 1e300], 0x153, Some(40), 0x08),
        (0x10, |a| a.fstp(dword_ptr(rbx + 40)), [1.0, 1e-300], 0x15b, Some(40), 0x10),
        (0x20, |a| a.fdivp(st1, st0), [1.0, 3.0], 0x6f9, None, 0x20),
    ];
    for (unmasked, emit, values, opcode, data, flags) in cases {
        let mut a = CodeAssembler::new(64).unwrap();
        a.fld(qword_ptr(rbx)).unwrap();
        a.fld(qword_ptr(rbx + 8)).unwrap();
        let raiser = CODE + 2 + 3;
        emit(&mut a).unwrap();
        // Neither of these waits; one moves the pointer, another the stack.
        a.lea(rbx, qword_ptr(rbx + rbx * 2 + 5)).unwrap();
        a.push(rbx).unwrap();
        a.fnstsw(ax).unwrap();
        let at = CODE + a.assemble(CODE).unwrap().len() as u64;
        a.fld1().unwrap();
        a.ud2().unwrap();
        let all = [values[0], values[1], 0.0, f64::MIN_POSITIVE / 4.0];
        let (mut m, mut jit) = prepared(&mut a, 0x37f & !unmasked, &all);
        for round in 0..4 {
            begin(&mut m, 0x37f & !unmasked, &all);
            m.cpu.memory.write(GuestAddress(DATA + 40), 0x1234u64).unwrap();
            assert_eq!((until_fault(&mut m, &mut jit), m.cpu.rip()), (X87_ERROR, at), "{unmasked:x} {round}");
            let state = x87_of(&mut m);
            assert_eq!(state.fsw & 0xff, flags | 0x80, "flags of {unmasked:x} in round {round}");
            let expected = (raiser, opcode, data.map_or(state.fdp, |data| DATA + data));
            assert_eq!((state.fip, state.fop, state.fdp), expected, "{unmasked:x} {flags:x} {round}");
            assert_eq!(m.cpu.regs[0] as u16 & 0xff, flags | 0x80, "what FNSTSW has seen");
            assert_eq!(m.cpu.regs[3], 3 * DATA + 5);
            let stored = m.cpu.memory.read::<u64>(GuestAddress(DATA + 40)).unwrap();
            assert_eq!(stored, 0x1234, "nothing is stored");
        }
        assert!(jit.executed > 10, "in translated code");
    }
}

#[test]
fn loop_with_unmasked_x87_exceptions_calls_no_handler_until_one_is_raised() {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut top = a.create_label();
    a.fldz().unwrap();
    a.set_label(&mut top).unwrap();
    a.fld(qword_ptr(rbx + rcx * 8 - 8)).unwrap();
    a.fdivr(qword_ptr(rbx + 4096)).unwrap();
    a.fnstcw(word_ptr(rsp - 8)).unwrap();
    a.faddp(st1, st0).unwrap();
    a.fldcw(word_ptr(rsp - 8)).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(top).unwrap();
    a.fistp(qword_ptr(rbx + 4104)).unwrap();
    a.ud2().unwrap();
    let values = vec![0.5; 513];
    // Nothing but inexactness and denormals is masked.
    let (mut m, mut jit) = prepared(&mut a, 0x372, &values);
    for round in 0..6 {
        begin(&mut m, 0x372, &values);
        m.cpu.regs[1] = 500;
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD, "{round}");
        assert_eq!(m.cpu.memory.read::<u64>(GuestAddress(DATA + 4104)).unwrap(), 500);
    }
    // The last UD2, and what brings it about.
    let handed: u64 = crate::jit::handed(&m.cpu).iter().map(|(_, count)| count).sum();
    assert!(handed <= 24, "{:?}", crate::jit::handed(&m.cpu));
    assert!(jit.executed * 100 > m.cpu.retired * 95);
    // Then with one.
    for _ in 0..3 {
        begin(&mut m, 0x372, &values);
        m.cpu.memory.write(GuestAddress(DATA + 8 * 100), 0u64).unwrap();
        m.cpu.regs[1] = 500;
        let before = m.cpu.retired;
        assert_eq!((until_fault(&mut m, &mut jit), m.cpu.regs[1]), (X87_ERROR, 101));
        assert_eq!((m.cpu.retired - before, m.cpu.rip()), (1 + 7 * 399 + 3, CODE + 2 + 4 + 6 + 4));
        let state = x87_of(&mut m);
        assert_eq!((state.fip, state.fdp), (CODE + 6, DATA + 4096));
    }
}

#[test]
fn comparison_that_raises_leaves_flags_as_in_the_interpreter() {
    let mut a = CodeAssembler::new(64).unwrap();
    a.fldz().unwrap();
    a.fld(qword_ptr(rbx)).unwrap();
    // All of OF, SF and PF in turn, from R8.
    a.add(r8, r9).unwrap();
    a.fcomi(st0, st1).unwrap();
    a.setb(dl).unwrap();
    a.wait().unwrap();
    a.ud2().unwrap();
    for options in [OPTIONS, Options { exact_flags: true, ..OPTIONS }] {
        let (mut m, _) = prepared(&mut a, 0x37e, &[]);
        let mut jit = Jit::new(options, &m.cpu.code).unwrap();
        let mut interpreter = Jit::new(Options { threshold: 200, ..options }, &m.cpu.code).unwrap();
        for value in [1_u64 << 63, 1, u64::MAX, 0] {
            let mut flags = |jit: &mut Jit| {
                begin(&mut m, 0x37e, &[f64::NAN]);
                (m.cpu.regs[8], m.cpu.regs[9]) = (value, value);
                assert_eq!(until_fault(&mut m, jit), X87_ERROR);
                assert_eq!(x87_of(&mut m).fip, CODE + 7);
                (m.cpu.regs[2] & 0xff, m.cpu.rflags() & 0x8d5)
            };
            let expected = flags(&mut interpreter);
            for _ in 0..4 {
                assert_eq!(flags(&mut jit), expected);
            }
        }
        assert!(jit.executed > 10);
        assert_eq!(interpreter.executed, 0);
    }
}

#[test]
fn page_fault_comes_before_the_exception_that_is_pending() {
    let mut a = CodeAssembler::new(64).unwrap();
    a.fld1().unwrap();
    a.fdiv(qword_ptr(rbx)).unwrap();
    a.mov(rbx, qword_ptr(rsi)).unwrap();
    a.fld1().unwrap();
    a.ud2().unwrap();
    let (mut m, mut jit) = prepared(&mut a, 0x37b, &[0.0]);
    for _ in 0..3 {
        begin(&mut m, 0x37b, &[0.0]);
        m.cpu.regs[6] = DATA + 0x4000;
        assert_eq!((until_fault(&mut m, &mut jit).vector, m.cpu.rip()), (Vector::PageFault, CODE + 4));
        let state = x87_of(&mut m);
        assert_eq!((state.fip, state.fdp, state.fop, state.fsw & 0xff), (CODE + 2, DATA, 0x433, 0x84));
        m.cpu.regs[6] = DATA;
        assert_eq!((until_fault(&mut m, &mut jit), m.cpu.rip()), (X87_ERROR, CODE + 7));
        assert_eq!(x87_of(&mut m), state);
    }
}

#[test]
fn control_word_that_unmasks_what_was_raised_leaves_the_record() {
    let mut a = CodeAssembler::new(64).unwrap();
    a.fldz().unwrap();
    a.fld(qword_ptr(rbx)).unwrap();
    a.fdiv_2(st0, st1).unwrap();
    a.fld1().unwrap();
    a.fldcw(word_ptr(rbx + 8)).unwrap();
    a.mov(r8, 5u64).unwrap();
    let at = CODE + a.assemble(CODE).unwrap().len() as u64;
    a.fld1().unwrap();
    a.ud2().unwrap();
    for (first, second) in [(0x37f, 0x37b), (0x37e, 0x37a), (0x37e, 0x37b)] {
        let values = [1.0, f64::from_bits(second)];
        let (mut m, mut jit) = prepared(&mut a, first, &values);
        for _ in 0..4 {
            begin(&mut m, first, &values);
            assert_eq!((until_fault(&mut m, &mut jit), m.cpu.rip()), (X87_ERROR, at));
            let state = x87_of(&mut m);
            assert_eq!((state.fip, state.fsw & 0xff, state.fcw), (CODE + 6, 0x84, second as u16));
            if !Quirks::host().tracks_data {
                assert_eq!((state.fdp, state.fop), (0, 0));
            }
        }
    }
}

#[test]
fn code_becomes_careful_once_and_stays_so() {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut top = a.create_label();
    a.set_label(&mut top).unwrap();
    a.fld1().unwrap();
    a.fstp(st0).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(top).unwrap();
    a.ud2().unwrap();
    let (mut m, mut jit) = prepared(&mut a, 0x37f, &[]);
    let mut invalidated = Vec::new();
    for control in [0x37f, 0x37e, 0x37f, 0x37e, 0x37f] {
        begin(&mut m, control, &[]);
        m.cpu.regs[1] = 1000;
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD);
        invalidated.push(jit.cache.sizes.invalidated);
    }
    assert_eq!(invalidated[0], 0);
    assert!(invalidated[1] > 0);
    assert_eq!(invalidated[2..], [invalidated[1]; 3]);
    assert!(jit.executed * 100 > m.cpu.retired * 98);
    m.cpu.vector.unit.park();
}
