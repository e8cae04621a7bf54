//! SIMD exceptions that are not masked, in translated code: against the interpreter, and with known results.

use iced_x86::code_asm::*;
use iced_x86::{Code as C, Decoder, DecoderOptions, Encoder, Instruction, MemoryOperand, Register as R};
use iced_x86::{IcedError, RoundingControl};

use ringfence_x86::Vector;

use super::*;

/// Pointers to data: some in host registers, one in none.
const BASES: [R; 4] = [R::RDI, R::RSI, R::RBX, R::R9];
/// Registers for integers, likewise.
const VALUES: [R; 6] = [R::RAX, R::RDX, R::R8, R::R10, R::R14, R::R15];
/// Bytes of data that programs find.
const DATA_BYTES: usize = 0x4000;

/// Numbers with which arithmetic raises this or that.
const DOUBLES: [u64; 10] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0x4008_0000_0000_0000,
    0xc000_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0x7ff0_0000_0000_0001,
    0x0000_0000_0000_1000,
    0x7fef_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
];
const SINGLES: [u32; 8] =
    [0, 0x3f80_0000, 0xbf80_0000, 0x7f80_0001, 0x0000_0100, 0x7f7f_ffff, 0x0080_0000, 0x4040_0000];

fn number(random: &mut Random) -> u64 {
    match random.below(10) {
        0..4 => random.pick(&DOUBLES),
        4 | 5 => u64::from(random.pick(&SINGLES)) | u64::from(random.pick(&SINGLES)) << 32,
        6 => random.bits(),
        _ => (random.below(2000) as f64 - 1000.0).to_bits(),
    }
}

fn xmm(random: &mut Random) -> R {
    random.pick(&[R::XMM0, R::XMM1, R::XMM7, R::XMM12])
}

fn operand(random: &mut Random) -> MemoryOperand {
    let base = random.pick(&BASES);
    MemoryOperand::with_base_displ(base, 16 * random.below(8) as i64)
}

/// An instruction that may raise SIMD exceptions.
fn arithmetic(random: &mut Random) -> Result<Instruction, IcedError> {
    let (to, from, memory) = (xmm(random), xmm(random), operand(random));
    let wide = |register: R, first: R| first + (register.number() as u32);
    let two = [
        C::Divsd_xmm_xmmm64,
        C::Addsd_xmm_xmmm64,
        C::Mulss_xmm_xmmm32,
        C::Divps_xmm_xmmm128,
        C::Sqrtsd_xmm_xmmm64,
        C::Ucomisd_xmm_xmmm64,
        C::Comiss_xmm_xmmm32,
        C::Maxsd_xmm_xmmm64,
        C::Minpd_xmm_xmmm128,
        C::Cvtsd2ss_xmm_xmmm64,
        C::Cvtss2sd_xmm_xmmm32,
        C::Cvtdq2ps_xmm_xmmm128,
        C::Haddpd_xmm_xmmm128,
    ];
    match random.below(if host_has_avx512() { 22 } else { 18 }) {
        0..6 => Instruction::with2(random.pick(&two), to, from),
        6..12 => Instruction::with2(random.pick(&two), to, memory),
        12 => Instruction::with2(C::Cvttsd2si_r64_xmmm64, random.pick(&VALUES), from),
        13 => Instruction::with2(C::Cvtsd2si_r64_xmmm64, random.pick(&VALUES), memory),
        14 => Instruction::with2(C::Cvtsi2sd_xmm_rm64, to, random.pick(&VALUES)),
        15 => Instruction::with3(C::Cmpsd_xmm_xmmm64_imm8, to, from, 1),
        16 => Instruction::with3(C::VEX_Vfmadd231sd_xmm_xmm_xmmm64, to, from, memory),
        17 => {
            Instruction::with3(C::VEX_Vdivpd_ymm_ymm_ymmm256, wide(to, R::YMM0), wide(from, R::YMM0), memory)
        }
        18 | 19 => {
            let (to, from) = (wide(to, R::ZMM16), wide(from, R::ZMM0));
            let mut made = Instruction::with3(C::EVEX_Vaddpd_zmm_k1z_zmm_zmmm512b64_er, to, from, memory)?;
            made.set_op_mask(R::K1);
            Ok(made)
        }
        _ => {
            // Neither raises anything.
            let (to, from) = (wide(to, R::ZMM16), wide(from, R::ZMM0));
            let mut made = Instruction::with3(C::EVEX_Vdivpd_zmm_k1z_zmm_zmmm512b64_er, to, from, from)?;
            made.set_rounding_control(RoundingControl::RoundDown);
            Ok(made)
        }
    }
}

/// Anything else: integers in registers of every kind, stores, the stack unless that is to be left alone.
fn other(random: &mut Random, stack: bool) -> Result<Instruction, IcedError> {
    let (one, two, memory) = (random.pick(&VALUES), random.pick(&VALUES), operand(random));
    match random.below(if stack { 14 } else { 10 }) {
        0 | 1 => Instruction::with2(C::Add_r64_rm64, one, two),
        2 => Instruction::with2(C::Adc_r64_rm64, one, two),
        3 => Instruction::with2(C::Lea_r64_m, one, MemoryOperand::with_base_index_scale(two, R::RCX, 4)),
        4 => Instruction::with2(C::Mov_r64_rm64, one, memory),
        5 => Instruction::with2(C::Mov_rm64_r64, memory, one),
        6 => Instruction::with1(C::Setb_rm8, R::DL),
        7 => Instruction::with2(C::Xor_r64_rm64, one, two),
        8 => Instruction::with2(C::Mov_r64_rm64, one, two),
        9 => Instruction::with2(C::Movups_xmmm128_xmm, memory, xmm(random)),
        10 | 11 => Instruction::with1(C::Push_r64, one),
        12 => Instruction::with1(C::Pop_r64, one),
        _ => Instruction::with2(C::Lea_r64_m, one, MemoryOperand::with_base_displ(R::RSP, 8)),
    }
}

/// A loop over some of these, and UD2 behind it.
fn program(random: &mut Random) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    let mut put = |made: Result<Instruction, IcedError>| encoder.encode(&made.unwrap(), 0).unwrap();
    let mut length = 0;
    // Long ones that leave the stack alone may have its register for others.
    let long = random.chance(30);
    for _ in 0..2 + random.below(if long { 45 } else { 12 }) {
        let raises = random.chance(if long { 20 } else { 45 });
        length += put(if raises { arithmetic(random) } else { other(random, !long) });
    }
    for _ in 0..random.below(3) {
        let by = random.pick(&[8, 16, -8]);
        length += put(Instruction::with2(C::Add_rm64_imm8, random.pick(&BASES), by));
    }
    length += put(Instruction::with1(C::Dec_rm64, R::RCX));
    let mut code = encoder.take_buffer();
    // jnz top; ud2
    code.extend([0x0f, 0x85]);
    code.extend((-(length as i32) - 6).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code
}

/// A vCPU that may execute vector instructions of all kinds.
fn vector_machine() -> Interpreter {
    let mut m = machine();
    allow_vectors(&mut m.cpu, if host_has_avx512() { 0xe7 } else { 7 });
    m.cpu.vector.unit.set_x87(&ringfence_engine::X87State { fcw: 0x37f, ..Default::default() });
    m
}

/// What there is to compare; flags if those are exact.
fn seen(m: &Interpreter, flags: bool) -> (Vec<u64>, ringfence_engine::VectorState, Vec<u8>) {
    let mut words = m.cpu.regs.to_vec();
    words.extend([m.cpu.retired, if flags { m.cpu.rflags() } else { 0 }]);
    (words, m.cpu.vector.unit.vector_state(), bytes(m, DATA, DATA_LEN))
}

/// Runs random loops, going on behind each instruction that faults: how many SIMD exceptions were raised.
fn run(seed: u64, rounds: u64, options: Options) -> u64 {
    let (mut reference, mut subject) = (vector_machine(), vector_machine());
    let mut jit = Jit::new(options, &subject.cpu.code).unwrap();
    let mut raised = 0;
    for round in 0..rounds {
        let mut random = Random::new(seed << 32 | round);
        let random = &mut random;
        let code = program(random);
        let data: Vec<u8> = (0..DATA_BYTES / 8).flat_map(|_| number(random).to_le_bytes()).collect();
        let mut regs: [u64; 16] = std::array::from_fn(|_| random.bits());
        for base in BASES {
            let near_the_end = if random.chance(30) { 0xf80 } else { 0x400 };
            regs[base.number()] = DATA + 0x1000 * random.below(3) + near_the_end;
        }
        (regs[1], regs[4]) = (1 + random.below(60), DATA + 0x3800 - 8 * random.below(2) * 0x100);
        let mut state = reference.cpu.vector.unit.vector_state();
        for register in &mut state.zmm {
            *register = std::array::from_fn(|_| number(random));
        }
        state.k = std::array::from_fn(|_| random.bits());
        let masks =
            if random.chance(70) { random.bits() as u32 & 0x3f | 0x20 } else { random.bits() as u32 & 0x3f };
        state.mxcsr =
            masks << 7 | random.bits() as u32 & if random.chance(50) { 0 } else { 0xe07f & masks | 0xe040 };
        let delivered = random.chance(90);
        for m in [&mut reference, &mut subject] {
            m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
            m.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
            m.cpu.regs[..16].copy_from_slice(&regs);
            m.cpu.regs[RIP] = CODE;
            m.cpu.vector.unit.set_vector_state(&state);
            m.cpu.cr4.set(Cr4::OSXMMEXCPT, delivered);
        }
        for _ in 0..40 {
            let exception = until_fault(&mut subject, &mut jit);
            let expected = (0..1_000_000).find_map(|_| reference.run_block(1000).err()).expect("it ends");
            let text = |m: &Interpreter| format!("{:x?} {:x}", m.cpu.regs, m.cpu.vector.unit.mxcsr());
            let context = || {
                let listing: Vec<_> = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE)
                    .iter()
                    .map(|i| format!("{:x} {i}", i.ip()))
                    .collect();
                format!("round {round}\n{}\n{}\n{listing:#?}", text(&reference), text(&subject))
            };
            assert!(exception == expected, "{exception:?}, not {expected:?}: {}", context());
            let (a, b) = (seen(&reference, options.exact_flags), seen(&subject, options.exact_flags));
            assert!(a.0 == b.0, "registers: {:x?}, not {:x?}; {}", b.0, a.0, context());
            assert!(a.1 == b.1, "vectors: {}", context());
            assert!(a.2 == b.2, "memory: {}", context());
            subject.cpu.status = reference.cpu.status;
            let at = (reference.cpu.rip() - CODE) as usize;
            let instruction = Decoder::new(64, &code[at..], DecoderOptions::NONE).decode();
            if instruction.code() == C::Ud2 {
                break;
            }
            let simd = Exception::new(Vector::SimdError);
            raised += u64::from(exception == if delivered { simd } else { Exception::UD });
            for m in [&mut reference, &mut subject] {
                m.cpu.regs[RIP] += instruction.len() as u64;
            }
        }
    }
    assert!(100 * jit.executed > 85 * subject.cpu.retired, "translated code does it");
    raised
}

#[test]
fn loops_with_unmasked_exceptions_run_as_in_the_interpreter() {
    let options = Options { exact_flags: true, ..OPTIONS };
    assert!(run(seed(41), count(3000), options) > 10_000);
}

#[test]
fn loops_with_unmasked_exceptions_and_inexact_flags_run_as_in_the_interpreter() {
    assert!(run(seed(42), count(3000), OPTIONS) > 10_000);
}

#[test]
fn loops_with_unmasked_exceptions_in_the_smallest_code_memory_run_as_in_the_interpreter() {
    assert!(run(seed(43), count(3000), Options { code_size: SMALLEST_CODE, ..OPTIONS }) > 10_000);
}

#[test]
fn exception_leaves_the_record_of_the_x87_operation_before() {
    let alone: fn(&mut CodeAssembler) -> Result<(), IcedError> = |a| {
        a.fld1()?;
        a.divsd(xmm0, xmm1)
    };
    let in_a_row: fn(&mut CodeAssembler) -> Result<(), IcedError> = |a| {
        a.fld(qword_ptr(rbx))?;
        a.mov(r8, qword_ptr(rbx + 8))?;
        a.mov(r10, r8)?;
        a.divsd(xmm0, xmm1)?;
        a.mov(qword_ptr(rbx + 16), r10)
    };
    let no_record = ringfence_engine::X87State { fcw: 0x37f, ..Default::default() };
    for (emit, distance) in [(alone, 2), (in_a_row, 9)] {
        let mut a = CodeAssembler::new(64).unwrap();
        emit(&mut a).unwrap();
        a.fldpi().unwrap();
        a.ud2().unwrap();
        let (mut m, mut jit) = prepared(&mut a, 0x3b);
        load(&mut m, &[1.0, 0.0]);
        for _ in 0..3 {
            // Without a record of the round before, which the interpreter may have executed.
            m.cpu.vector.unit.park();
            m.cpu.vector.unit.set_x87(&no_record);
            m.cpu.regs[RIP] = CODE;
            assert_eq!(until_fault(&mut m, &mut jit), Exception::new(Vector::SimdError));
            assert_eq!((m.cpu.rip(), m.cpu.vector.unit.pointers().fip), (CODE + distance, CODE));
        }
        m.cpu.vector.unit.park();
    }
}

/// A vCPU with code at [`CODE`] in translated code, that masks no SIMD exception but those in `masks`.
fn prepared(a: &mut CodeAssembler, masks: u32) -> (Interpreter, Jit) {
    let code = a.assemble(CODE).unwrap();
    let mut m = vector_machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    m.cpu.regs[RIP] = CODE;
    (m.cpu.regs[3], m.cpu.regs[4]) = (DATA, DATA + 0x2000);
    let mut state = m.cpu.vector.unit.vector_state();
    state.mxcsr = masks << 7;
    m.cpu.vector.unit.set_vector_state(&state);
    let jit =
        Jit::new(Options { threshold: 1, profile: true, exact_flags: true, ..OPTIONS }, &m.cpu.code).unwrap();
    (m, jit)
}

/// Doubles in the low halves of XMM0 and up.
fn load(m: &mut Interpreter, values: &[f64]) {
    let mut state = m.cpu.vector.unit.vector_state();
    for (register, value) in state.zmm.iter_mut().zip(values) {
        *register = [value.to_bits(), 0, 0, 0, 0, 0, 0, 0];
    }
    m.cpu.vector.unit.set_vector_state(&state);
}

/// MXCSR without flags.
fn clear_flags(m: &mut Interpreter) {
    let mxcsr = m.cpu.vector.unit.mxcsr() & !0x3f;
    assert!(m.cpu.vector.unit.set_mxcsr(mxcsr));
}

const TINY: f64 = f64::MIN_POSITIVE;
const DENORMAL: f64 = f64::MIN_POSITIVE / 4.0;

#[test]
fn each_exception_unmasked_alone_faults_and_leaves_its_flags() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(u32, Emit, [f64; 2], u32); 8] = [
        // Which is not masked, the instruction on XMM0 and XMM1, these, and the flags behind it (SDM 1 11.5.2, 11.5.3).
        (0x01, |a| a.sqrtsd(xmm0, xmm1), [5.0, -1.0], 0x01),
        (0x01, |a| a.cvttsd2si(rax, xmm1), [5.0, 1e300], 0x01),
        (0x02, |a| a.addsd(xmm0, xmm1), [5.0, DENORMAL], 0x02),
        (0x04, |a| a.divsd(xmm0, xmm1), [1.0, 0.0], 0x04),
        (0x08, |a| a.mulsd(xmm0, xmm1), [f64::MAX, 4.0], 0x08),
        (0x10, |a| a.mulsd(xmm0, xmm1), [TINY, 0.25], 0x10),
        (0x20, |a| a.divsd(xmm0, xmm1), [1.0, 3.0], 0x20),
        // What is tiny here is inexact as well.
        (0x30, |a| a.mulsd(xmm0, xmm1), [TINY * 1.1, TINY * 1.3], 0x30),
    ];
    for (unmasked, emit, values, flags) in cases {
        let mut a = CodeAssembler::new(64).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(r8, 7u64).unwrap();
        a.add(r8, r8).unwrap();
        a.push(r8).unwrap();
        let at = CODE + a.assemble(CODE).unwrap().len() as u64;
        emit(&mut a).unwrap();
        a.pop(r9).unwrap();
        a.ud2().unwrap();
        let (mut m, mut jit) = prepared(&mut a, 0x3f & !unmasked);
        load(&mut m, &values);
        for round in 0..4 {
            m.cpu.regs[RIP] = CODE;
            m.cpu.regs[0] = 0x1234;
            m.cpu.regs[4] = DATA + 0x2000;
            clear_flags(&mut m);
            let exception = until_fault(&mut m, &mut jit);
            assert_eq!((exception, m.cpu.rip()), (Exception::new(Vector::SimdError), at), "{unmasked:x}");
            let unit = &m.cpu.vector.unit;
            assert_eq!(unit.mxcsr() & 0x3f, flags, "flags of {unmasked:x} in round {round}");
            assert_eq!(unit.xmm(0), u128::from(values[0].to_bits()), "the destination");
            assert_eq!((m.cpu.regs[0], m.cpu.regs[8], m.cpu.regs[4]), (0x1234, 14, DATA + 0x1ff8));
            m.cpu.cr4.set(Cr4::OSXMMEXCPT, round < 2);
            if round == 2 {
                m.cpu.regs[RIP] = CODE;
                m.cpu.regs[4] = DATA + 0x2000;
                assert_eq!((until_fault(&mut m, &mut jit), m.cpu.rip()), (Exception::UD, at));
                m.cpu.cr4.insert(Cr4::OSXMMEXCPT);
            }
        }
        assert!(jit.executed > 10, "in translated code");
    }
}

#[test]
fn condition_found_before_computing_hides_those_found_after_it() {
    // Of the two, one is divided by zero, the other's quotient is inexact.
    let mut a = CodeAssembler::new(64).unwrap();
    a.divpd(xmm0, xmm1).unwrap();
    a.ud2().unwrap();
    for (masks, flags) in [(0x1b, 0x04), (0x3b, 0x04), (0x1f, 0x24)] {
        let (mut m, mut jit) = prepared(&mut a, masks);
        let mut state = m.cpu.vector.unit.vector_state();
        state.zmm[0][..2].copy_from_slice(&[1f64.to_bits(), 1f64.to_bits()]);
        state.zmm[1][..2].copy_from_slice(&[0f64.to_bits(), 3f64.to_bits()]);
        m.cpu.vector.unit.set_vector_state(&state);
        for _ in 0..3 {
            m.cpu.regs[RIP] = CODE;
            clear_flags(&mut m);
            assert_eq!(until_fault(&mut m, &mut jit), Exception::new(Vector::SimdError));
            assert_eq!((m.cpu.vector.unit.mxcsr() & 0x3f, m.cpu.rip()), (flags, CODE), "{masks:x}");
        }
    }
}

#[test]
fn comparison_that_faults_leaves_flags() {
    let mut a = CodeAssembler::new(64).unwrap();
    // All of OF, SF and PF in turn, from R8.
    a.add(r8, r9).unwrap();
    a.ucomisd(xmm0, qword_ptr(rbx)).unwrap();
    a.ud2().unwrap();
    let (mut m, mut jit) = prepared(&mut a, 0x3e);
    m.cpu.memory.write(GuestAddress(DATA), 0x7ff0_0000_0000_0001_u64).unwrap();
    for (value, flags) in [(1_u64 << 63, 0x845), (1, 0), (u64::MAX, 0x91), (0, 0x44)] {
        for _ in 0..2 {
            (m.cpu.regs[RIP], m.cpu.regs[8], m.cpu.regs[9]) = (CODE, value, value);
            assert_eq!(until_fault(&mut m, &mut jit), Exception::new(Vector::SimdError));
            assert_eq!((m.cpu.rip(), m.cpu.rflags() & 0x8d5), (CODE + 3, flags));
        }
    }
}

#[test]
fn loop_with_unmasked_exceptions_calls_no_handler_until_one_is_raised() {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut top = a.create_label();
    a.set_label(&mut top).unwrap();
    a.addsd(xmm0, qword_ptr(rbx + rcx * 8 - 8)).unwrap();
    a.add(r8, 1).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(top).unwrap();
    a.ud2().unwrap();
    // Nothing but inexactness and denormals is masked.
    let (mut m, mut jit) = prepared(&mut a, 0x22);
    for word in 0..512 {
        m.cpu.memory.write(GuestAddress(DATA + 8 * word), 1f64.to_bits()).unwrap();
    }
    for round in 0..8 {
        load(&mut m, &[0.0]);
        (m.cpu.regs[RIP], m.cpu.regs[1], m.cpu.regs[8]) = (CODE, 500, 0);
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD);
        assert_eq!((m.cpu.vector.unit.xmm(0), m.cpu.regs[8]), (500f64.to_bits().into(), 500), "{round}");
    }
    // The last UD2, and what brings it about.
    let handed: u64 = crate::jit::handed(&m.cpu).iter().map(|(_, count)| count).sum();
    assert!(handed <= 16, "{:?}", crate::jit::handed(&m.cpu));
    // Then in a lap.
    m.cpu.memory.write(GuestAddress(DATA + 8 * 100), 0x7ff0_0000_0000_0001_u64).unwrap();
    for _ in 0..3 {
        load(&mut m, &[0.0]);
        (m.cpu.regs[RIP], m.cpu.regs[1], m.cpu.regs[8]) = (CODE, 500, 0);
        let before = m.cpu.retired;
        assert_eq!(until_fault(&mut m, &mut jit), Exception::new(Vector::SimdError));
        assert_eq!((m.cpu.rip(), m.cpu.regs[1], m.cpu.regs[8]), (CODE, 101, 399));
        assert_eq!((m.cpu.retired - before, m.cpu.vector.unit.xmm(0)), (4 * 399, 399f64.to_bits().into()));
    }
}
