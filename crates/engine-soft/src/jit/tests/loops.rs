//! Loops whose laps are checked together.

use iced_x86::{Code as C, Encoder, Instruction, MemoryOperand, Register as R};

use ringfence_x86::Vector;

use super::*;

/// Registers that point to data: some in host registers, one in none.
const BASES: [R; 5] = [R::RDI, R::RSI, R::RBX, R::R13, R::R9];
/// Registers for what is loaded, likewise.
const VALUES: [R; 4] = [R::RAX, R::RDX, R::R10, R::R15];
const VECTORS: [R; 3] = [R::XMM0, R::XMM3, R::XMM9];

/// A random loop's instructions.
struct Body<'a> {
    random: &'a mut Random,
    bases: Vec<R>,
    index: bool,
    vectors: bool,
    /// Moves are such that laps are worth it, and registers such that scratch ones can hold the distances.
    tame: bool,
}

impl Body<'_> {
    fn value(&mut self, wide: bool) -> R {
        let count = if self.tame { 2 } else { VALUES.len() };
        let register = self.random.pick(&VALUES[..count]);
        if wide { register } else { register.full_register32() }
    }

    fn operand(&mut self) -> MemoryOperand {
        let base = self.random.pick(&self.bases);
        let spread = self.random.pick(&[8, 0x40, 0x200]);
        let disp = self.random.below(spread) as i64 - self.random.below(3) as i64 * 8;
        let disp = if self.random.chance(60) { disp & !15 } else { disp };
        let indexed = self.index && self.random.chance(60);
        let (index, scale) = if indexed { (R::RCX, self.random.pick(&[1, 2, 8])) } else { (R::None, 1) };
        let (base, index) =
            if scale == 1 && indexed && self.random.chance(30) { (R::RCX, base) } else { (base, index) };
        MemoryOperand::new(base, index, scale, disp, 1, false, R::None)
    }

    /// An access.
    fn access(&mut self) -> Instruction {
        let (wide, memory) = (self.value(true), self.operand());
        let narrow = self.value(false);
        let xmm = self.random.pick(&VECTORS);
        let made = match self.random.below(if self.vectors { 15 } else { 10 }) {
            0 | 1 => Instruction::with2(C::Mov_r64_rm64, wide, memory),
            2 | 3 => Instruction::with2(C::Mov_rm64_r64, memory, wide),
            4 => Instruction::with2(C::Add_r64_rm64, wide, memory),
            5 => Instruction::with2(C::Adc_r32_rm32, narrow, memory),
            6 => Instruction::with2(C::Movzx_r32_rm8, narrow, memory),
            7 => Instruction::with2(C::Xor_rm32_r32, memory, narrow),
            8 => Instruction::with1(C::Inc_rm8, memory),
            9 => Instruction::with2(C::Cmp_r64_rm64, wide, memory),
            10 => Instruction::with2(C::Movups_xmm_xmmm128, xmm, memory),
            11 => Instruction::with2(C::Movups_xmmm128_xmm, memory, xmm),
            12 => Instruction::with2(C::Movaps_xmm_xmmm128, xmm, memory),
            13 => Instruction::with2(C::Paddd_xmm_xmmm128, xmm, memory),
            _ => Instruction::with3(C::VEX_Vpxor_ymm_ymm_ymmm256, R::YMM3, R::YMM9, memory),
        };
        made.unwrap()
    }

    /// A base or the index moved by a constant.
    fn r#move(&mut self) -> Instruction {
        let of_index = self.index && self.random.chance(50);
        let register = if of_index { R::RCX } else { self.random.pick(&self.bases) };
        let by = match self.random.below(if self.tame { 4 } else { 6 }) {
            0 => 1,
            1 => 8,
            2 => 16,
            3 => -8,
            4 => 0x40,
            _ => self.random.below(0x240) as i32 - 0x100,
        };
        let made = match self.random.below(5) {
            0 => Instruction::with2(C::Add_rm64_imm32, register, by),
            1 => Instruction::with2(C::Sub_rm64_imm32, register, by),
            2 => Instruction::with1(C::Inc_rm64, register),
            3 => Instruction::with1(C::Dec_rm64, register),
            _ => Instruction::with2(
                C::Lea_r64_m,
                register,
                MemoryOperand::with_base_displ(register, by.into()),
            ),
        };
        made.unwrap()
    }

    /// Something else, which may change a base now and then.
    fn other(&mut self) -> Instruction {
        let (one, two, narrow) = (self.value(true), self.value(true), self.value(false));
        let base = self.random.pick(&self.bases);
        let page = MemoryOperand::with_base_displ(R::RIP, 0x1000);
        let made = match self.random.below(10) {
            0 => Instruction::with2(C::Add_r64_rm64, one, two),
            1 => Instruction::with2(C::Adc_r64_rm64, one, two),
            2 => Instruction::with2(C::Lea_r64_m, one, MemoryOperand::with_base_index_scale(two, base, 4)),
            3 => Instruction::with1(C::Setb_rm8, R::DL),
            4 => Instruction::with2(C::Cmovs_r32_rm32, narrow, R::EDX),
            5 => Instruction::with2(C::Xor_rm64_imm8, one, 0x55),
            6 => Instruction::with2(C::Mov_r64_rm64, one, base),
            8 => Instruction::with2(C::Lea_r64_m, one, page),
            7 if self.random.chance(10) => Instruction::with2(C::Xor_rm64_imm8, base, 8),
            _ => Instruction::with2(C::Rol_rm32_imm8, narrow, 7),
        };
        made.unwrap()
    }
}

/// A loop, and UD2 behind it. Branches out of it lead there, too. Whether RCX is the counter.
fn program(random: &mut Random) -> (Vec<u8>, bool) {
    let mut code = Encoder::new(64);
    let count = 1 + random.below(3) as usize;
    let tame = random.chance(70);
    let few = if tame { &BASES[..4] } else { &BASES };
    let bases = (0..count).map(|_| random.pick(few)).collect();
    let (index, vectors) = (random.chance(50), random.chance(40));
    let mut body = Body { bases, index, vectors, tame, random };
    let mut exits = Vec::new();
    let put = |code: &mut Encoder, instruction: &Instruction| {
        code.encode(instruction, 0).unwrap();
    };
    // Where the loop starts in its page is another matter, as is what is before it.
    for _ in 0..body.random.below(4) {
        let before = body.other();
        put(&mut code, &before);
    }
    let mut all = code.take_buffer();
    let top = all.len();
    code.set_buffer(std::mem::take(&mut all));
    for _ in 0..1 + body.random.below(9) {
        let instruction = match body.random.below(10) {
            0..5 => body.access(),
            5..8 if !tame => body.r#move(),
            5 => body.r#move(),
            _ => body.other(),
        };
        put(&mut code, &instruction);
        if body.random.chance(5) {
            // jb out or js out
            let mut bytes = code.take_buffer();
            bytes.extend([0x0f, body.random.pick(&[0x82, 0x88]), 0, 0, 0, 0]);
            exits.push(bytes.len());
            code.set_buffer(bytes);
        }
    }
    let counters = [R::RBP, R::R12, R::R8];
    let counter = body.random.pick(if tame { &counters[..2] } else { &counters });
    let count = match body.random.below(3) {
        0 => Instruction::with1(C::Dec_rm64, counter),
        1 => Instruction::with2(C::Sub_rm64_imm8, counter, 1),
        _ => Instruction::with2(C::Add_rm64_imm8, counter, -1),
    };
    let mut bytes = code.take_buffer();
    let length = bytes.len() - top;
    let counts = !index && length < 120 && body.random.chance(30);
    if counts {
        // LOOP
        bytes.extend([0xe2, (length as u8 + 2).wrapping_neg()]);
    } else {
        code.set_buffer(bytes);
        put(&mut code, &count.unwrap());
        bytes = code.take_buffer();
        let back = (top as i32) - (bytes.len() as i32 + 6);
        bytes.extend([0x0f, 0x85]);
        bytes.extend(back.to_le_bytes());
    }
    if body.random.chance(80) {
        // add eax,eax: nobody wants the flags of the loop's end, which then is that of a unit.
        bytes.extend([0x01, 0xc0]);
    }
    for _ in 0..body.random.below(3) {
        let behind = if body.random.chance(40) { body.access() } else { body.other() };
        code.set_buffer(std::mem::take(&mut bytes));
        put(&mut code, &behind);
        bytes = code.take_buffer();
    }
    let out = bytes.len();
    for exit in exits {
        bytes[exit - 4..exit].copy_from_slice(&((out - exit) as i32).to_le_bytes());
    }
    // mov rdx,[rbx]: what the soft TLB is asked behind branches out.
    bytes.extend([0x48, 0x8b, 0x13, 0x0f, 0x0b]);
    (bytes, counts)
}

/// A vCPU whose programs may have vector instructions.
fn vector_machine() -> Interpreter {
    let mut m = machine();
    allow_vectors(&mut m.cpu, 7);
    m
}

fn registers(random: &mut Random, counts: bool) -> [u64; 16] {
    let mut regs: [u64; 16] = std::array::from_fn(|_| random.bits());
    for pointer in [3, 6, 7, 9, 13] {
        // Rarely where the fifth page, which is not present, comes soon.
        let room = if random.chance(15) { 0x6c00 } else { 0x3000 };
        let at = random.below(room);
        regs[pointer] = DATA + 0x100 + if random.chance(60) { at & !31 } else { at };
    }
    regs[1] = random.pick(&[0, 0, 8, 0x40, 0x100]);
    regs[4] = DATA + 0x7800;
    let most = random.pick(&[1, 6, 40, 200, 700]);
    for counter in [5, 8, 12].into_iter().chain(counts.then_some(1)) {
        regs[counter] = 1 + random.below(most);
    }
    regs
}

#[test]
fn random_loops_run_as_in_the_interpreter() {
    let mut random = Random::new(seed(21));
    let (mut laps, mut faults) = (0, 0);
    for round in 0..count(2000) {
        let exact_flags = random.chance(20);
        let options = Options { threshold: 1 + random.below(3) as u8, exact_flags, ..OPTIONS };
        let (mut reference, mut subject) = (vector_machine(), vector_machine());
        let mut jit = Jit::new(options, &subject.cpu.code).unwrap();
        let ((code, counts), data) = (program(&mut random), random.bits());
        for m in [&mut reference, &mut subject] {
            m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
            let data: Vec<u8> =
                (0..DATA_LEN as u64).map(|i| (data.wrapping_mul(i | 1) >> 13) as u8).collect();
            m.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
        }
        for run in 0..4 {
            let (regs, flags) = (registers(&mut random, counts), random.bits() & 0x8d5);
            for m in [&mut reference, &mut subject] {
                m.cpu.regs[..16].copy_from_slice(&regs);
                m.cpu.regs[RIP] = CODE;
                m.cpu.set_rflags(flags);
            }
            let expected = (0..1_000_000).find_map(|_| reference.run_block(1000).err()).unwrap();
            let limit = 1100 + random.below(5000);
            let found = (0..1_000_000).find_map(|_| jit.run(&mut subject, limit).err()).unwrap();
            let what = || format!("round {round}, run {run}, {regs:x?}, {code:x?}");
            assert_eq!(expected, found, "{}", what());
            assert_eq!(reference.cpu.regs[..17], subject.cpu.regs[..17], "{}", what());
            assert_eq!(reference.cpu.retired, subject.cpu.retired, "{}", what());
            let [one, other] = [&reference, &subject].map(|m| bytes(m, DATA, DATA_LEN));
            assert!(one == other, "memory, {}", what());
            let [one, other] = [&reference, &subject].map(|m| m.cpu.vector.unit.vector_state().zmm);
            assert!(one == other, "vectors, {}", what());
            // Where an access faults, those may be stale that the loop would have overwritten unread.
            if exact_flags || expected.vector == Vector::InvalidOpcode {
                assert_eq!(reference.cpu.rflags(), subject.cpu.rflags(), "{}", what());
            }
            faults += u64::from(expected.vector == Vector::PageFault);
            laps += u64::from(std::mem::take(&mut subject.cpu.translated.laps_end) != 0);
        }
    }
    assert!(laps > count(2000) / 4 && faults > count(2000) / 8, "{laps}, {faults}");
}

/// mov rax,[rsi]; add rax,[rdi]; mov [rbx],rax; ...; add rsi,8; add rdi,8; add rbx,8; dec rbp; jnz back; add eax,eax; mov rdx,[rbx]; ud2
fn sum_of_arrays(between: &[u8]) -> Vec<u8> {
    let start = [0x48, 0x8b, 0x06, 0x48, 0x03, 0x07, 0x48, 0x89, 0x03];
    let moves = [0x48, 0x83, 0xc6, 8, 0x48, 0x83, 0xc7, 8, 0x48, 0x83, 0xc3, 8, 0x48, 0xff, 0xcd];
    let back = 0_u8.wrapping_sub((start.len() + between.len() + moves.len() + 2) as u8);
    [&start, between, &moves, &[0x75, back, 0x01, 0xc0, 0x48, 0x8b, 0x13, 0x0f, 0x0b]].concat()
}

#[test]
fn soft_tlb_is_found_behind_laps_that_have_held_a_distance_in_the_place_of_its_table() {
    // test rax,rax; js behind the loop, or nothing
    for between in [&[0x48, 0x85, 0xc0, 0x78, 0x11][..], &[]] {
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(CODE), &sum_of_arrays(between)).unwrap();
        m.cpu.memory.write_bytes(GuestAddress(DATA), &[1; 0x3000]).unwrap();
        // The hundredth sum is negative.
        m.cpu.memory.write(GuestAddress(DATA + 8 * 100), 1_u64 << 63).unwrap();
        let mut jit = Jit::new(OPTIONS, &m.cpu.code).unwrap();
        for run in 0..3 {
            (m.cpu.regs[6], m.cpu.regs[7], m.cpu.regs[3]) = (DATA, DATA + 0x1000, DATA + 0x2000);
            (m.cpu.regs[5], m.cpu.regs[RIP]) = (200, CODE);
            m.cpu.translated.laps_end = 0;
            let before = m.cpu.translated.interpreted;
            let end = (0..1000).find_map(|_| jit.run(&mut m, 10_000).err()).unwrap();
            assert_eq!(
                (end.vector, m.cpu.regs[5]),
                (Vector::InvalidOpcode, if between.is_empty() { 0 } else { 100 })
            );
            // UD2 alone, once all pages are known.
            let handed = m.cpu.translated.interpreted - before;
            assert!(run == 0 || handed == 1 && m.cpu.translated.laps_end != 0, "run {run}: {handed}");
        }
    }
}

#[test]
fn laps_end_where_a_page_may_be_read_but_not_written() {
    // mov rdx,[rbx]; mov [rdi],rax; sub rdi,8; dec rbp; jnz back; add eax,eax; ud2
    let code = [
        0x48, 0x8b, 0x13, 0x48, 0x89, 0x07, 0x48, 0x83, 0xef, 8, 0x48, 0xff, 0xcd, 0x75, 0xf1, 0x01, 0xc0,
        0x0f, 0x0b,
    ];
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    let mut jit = Jit::new(OPTIONS, &m.cpu.code).unwrap();
    for _ in 0..3 {
        (m.cpu.regs[3], m.cpu.regs[7]) = (DATA + 0x5800, DATA + 0x6800);
        (m.cpu.regs[5], m.cpu.regs[RIP]) = (0x200, CODE);
        let end = (0..1000).find_map(|_| jit.run(&mut m, 10_000).err()).unwrap();
        assert_eq!((end.vector, m.cpu.regs[7]), (Vector::PageFault, DATA + 0x5ff8));
    }
    assert_ne!(m.cpu.translated.laps_end, 0);
}
