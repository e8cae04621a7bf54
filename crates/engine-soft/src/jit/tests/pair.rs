//! Interpreter and translator side by side.

use ringfence_x86::SegmentRegister;

use super::*;
use crate::vector::Quirks;

/// The modes that programs run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Modes {
    /// 64-bit code.
    Bits64,
    /// 32-bit code.
    Narrow,
    /// Both by turns, the same bytes.
    Both,
}

/// A vCPU and the translator under test.
pub(super) struct Pair {
    reference: Interpreter,
    subject: Interpreter,
    pub(super) jit: Jit,
    options: Options,
    /// What programs have besides integers.
    mix: Mix,
    /// What the x87 unit records.
    quirks: Quirks,
    modes: Modes,
    /// SIMD exceptions are not all masked at first.
    unmasked: bool,
    /// The program under way, for messages.
    code: Vec<u8>,
    start: u64,
    /// What makes this round, and the count of instructions before it.
    seed: u64,
    origin: u64,
    /// Some of the round's code was not what was loaded, if only for a while.
    rewritten: bool,
    /// Rounds given up; see [`Pair::may_have_stale_flags`].
    pub(super) given_up: u64,
}

impl Pair {
    pub(super) fn new(options: Options, mix: Mix) -> Self {
        Self::of(options, mix, Modes::Bits64)
    }

    pub(super) fn of(options: Options, mix: Mix, modes: Modes) -> Self {
        let (mut reference, mut subject) = (machine(), machine());
        for cpu in [&mut reference.cpu, &mut subject.cpu].into_iter().filter(|_| mix != Mix::Integers) {
            allow_vectors(cpu, 7);
        }
        let jit = Jit::new(options, &subject.cpu.code).unwrap();
        Self {
            reference,
            subject,
            jit,
            options,
            mix,
            quirks: Quirks::host(),
            modes,
            unmasked: false,
            code: Vec::new(),
            start: 0,
            seed: 0,
            origin: 0,
            rewritten: false,
            given_up: 0,
        }
    }

    /// Likewise, with programs that find some SIMD exceptions not masked.
    pub(super) fn unmasked(mut self) -> Self {
        self.unmasked = true;
        self
    }

    /// Likewise, with an x87 unit that records as a processor of another kind would.
    pub(super) fn recording(mut self, quirks: Quirks) -> Self {
        self.quirks = quirks;
        self.jit.cache.stubs.quirks = quirks;
        for machine in [&mut self.reference, &mut self.subject] {
            machine.cpu.vector.unit.set_quirks(quirks);
            for (number, segment) in machine.cpu.segments.iter_mut().enumerate() {
                segment.selector.0 = 8 * number as u16 + 0x100;
            }
        }
        self
    }

    /// How many of the instructions executed the translator's code had a part in, in percent.
    pub(super) fn share(&self) -> u64 {
        100 * self.jit.executed / self.subject.cpu.retired.max(1)
    }

    /// Whether what is different now may be for flags that an instruction found as they were before a store into the code that
    /// follows it: without exact flags those may be stale, where the code that was there before would have overwritten them.
    fn may_have_stale_flags(&self) -> bool {
        !self.options.exact_flags && self.rewritten
    }

    /// Gives the round up: both go on anew.
    fn give_up(&mut self) {
        let given_up = self.given_up + 1;
        *self = Self {
            given_up,
            unmasked: self.unmasked,
            ..Self::of(self.options, self.mix, self.modes).recording(self.quirks)
        };
    }

    /// Loads a program and registers.
    fn load(&mut self, random: &mut Random, program: &generate::Program) {
        let data: Vec<u8> = (0..DATA_LEN / 8).flat_map(|_| random.bits().to_le_bytes()).collect();
        let narrow = self.choose_mode(random);
        let alias = match narrow {
            _ if !random.chance(30) => 0,
            true => narrow::ALIAS32,
            false => ALIAS,
        };
        let rip = CODE + program.start as u64 + alias;
        let mut regs: [u64; 16] = std::array::from_fn(|_| generate::value(random));
        for pointer in generate::POINTERS {
            regs[usize::from(pointer)] = DATA + 0x800 + random.below(0x2800);
        }
        if self.mix != Mix::Integers {
            self.load_vectors(random, &mut regs);
        }
        if self.mix == Mix::X87 {
            let (state, switched) = (x87::state(random), random.chance(5));
            for machine in [&mut self.reference, &mut self.subject] {
                machine.cpu.vector.unit.set_x87(&state);
                machine.cpu.cr0.set(Cr0::TS, switched);
                machine.cpu.update_mode();
            }
        }
        regs[4] &= !7;
        if narrow && random.chance(70) {
            // Otherwise there is something above the 32 bits that such code knows.
            for register in &mut regs {
                *register &= 0xffff_ffff;
            }
        }
        let flags = random.bits();
        for machine in [&mut self.reference, &mut self.subject] {
            machine.cpu.memory.write_bytes(GuestAddress(CODE), &program.code).unwrap();
            machine.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
            machine.cpu.regs[..16].copy_from_slice(&regs);
            machine.cpu.regs[RIP] = rip;
            machine.cpu.set_rflags(flags & 0x8d5);
        }
        (self.code, self.start) = (program.code.clone(), rip);
    }

    /// Chooses the mode to go on in: whether it is that of 32-bit code.
    fn choose_mode(&mut self, random: &mut Random) -> bool {
        let narrow = match self.modes {
            Modes::Bits64 => return false,
            Modes::Narrow => true,
            Modes::Both => random.chance(60),
        };
        for machine in [&mut self.reference, &mut self.subject] {
            narrow::prepare(&mut machine.cpu, narrow);
            if narrow && self.seed.is_multiple_of(5) {
                narrow::load(&mut machine.cpu, SegmentRegister::Gs, narrow::selector::DATA);
                machine.cpu.update_mode();
            }
        }
        narrow
    }

    /// Loads vector registers, and makes pointers such as vector operands want: aligned, or near the end of a page.
    fn load_vectors(&mut self, random: &mut Random, regs: &mut [u64; 16]) {
        let aligned = random.chance(85);
        for pointer in generate::POINTERS {
            let pointer = &mut regs[usize::from(pointer)];
            if random.chance(25) {
                *pointer = (*pointer & !0xfff) + 0x1000 * random.below(2) - random.below(0x60);
            }
            if aligned {
                *pointer &= !31;
            }
        }
        let mut state = self.reference.cpu.vector.unit.vector_state();
        // The upper halves are clear often, and what lies above is nobody's here: mostly, where it exists at all.
        let words = if is_x86_feature_detected!("avx512f") && random.chance(20) {
            8
        } else if random.chance(50) {
            4
        } else {
            2
        };
        for register in &mut state.zmm[..16] {
            *register = std::array::from_fn(|i| if i < words { vectors::word(random) } else { 0 });
        }
        let wide = host_has_avx512() && random.chance(60);
        for register in state.zmm[16..].iter_mut().filter(|_| wide) {
            *register = std::array::from_fn(|_| vectors::word(random));
        }
        gather::indices(random, &mut state.zmm);
        for register in state.k.iter_mut().filter(|_| wide) {
            *register = random.bits() >> random.below(64);
        }
        state.mxcsr = 0x1f80;
        if self.unmasked && random.chance(80) {
            // Inexactness is masked mostly: nearly everything raises it.
            let masks = random.bits() as u32 & 0x3f | if random.chance(80) { 0x22 } else { 0 };
            state.mxcsr = masks << 7 | random.bits() as u32 & (masks | 0xe040);
        }
        for machine in [&mut self.reference, &mut self.subject] {
            let _ = machine.cpu.vector.set_xcr0(if wide { 0xe7 } else { 7 });
            machine.cpu.vector.unit.set_vector_state(&state);
        }
    }

    /// One run of the translator, and the interpreter up to the same count. The exception, if there was one; or what is different.
    fn advance(&mut self, limit: u64) -> Result<Option<Exception>, String> {
        let before = self.subject.cpu.retired;
        let outcome = self.jit.run(&mut self.subject, limit);
        // x87 state is the thread's while it is in use, and two machines share this one.
        self.subject.cpu.vector.unit.park();
        let count = self.subject.cpu.retired - before;
        assert!(count <= limit, "{count} instructions where {limit} were allowed");
        let (start, mut expected) = (self.reference.cpu.retired, Ok(()));
        loop {
            let done = self.reference.cpu.retired - start;
            if done > count || expected.is_err() || done == count && outcome.is_ok() {
                break;
            }
            let left = (count - done).max(u64::from(outcome.is_err()));
            // Programs stray from their code as well, by returns to wherever.
            let ahead = (self.reference.cpu.regs[RIP] & 0xf_ffff).min(0xf_ffff - AHEAD as u64);
            let before = bytes(&self.reference, ahead, AHEAD);
            expected = self.reference.run_block(left as usize);
            // What an exchange has written, the next one may take back.
            self.rewritten = self.rewritten
                || bytes(&self.reference, CODE, CODE_LEN) != self.code
                || bytes(&self.reference, ahead, AHEAD) != before;
        }
        self.reference.cpu.vector.unit.park();
        self.same("outcome", &expected, &outcome)?;
        self.compare(outcome.is_err())?;
        Ok(outcome.err())
    }

    fn same<T: PartialEq + std::fmt::Debug>(&self, what: &str, a: &T, b: &T) -> Result<(), String> {
        if a == b { Ok(()) } else { Err(format!("{what}: {a:x?} became {b:x?}: {}", self.context())) }
    }

    fn compare(&self, faulted: bool) -> Result<(), String> {
        let (a, b) = (&self.reference.cpu, &self.subject.cpu);
        self.same("registers", &a.regs, &b.regs)?;
        self.same("count", &a.retired, &b.retired)?;
        self.same("system flags", &a.flags, &b.flags)?;
        if self.options.exact_flags {
            // Otherwise flags that nothing will look at may differ; a wrong one that something looks at shows there.
            self.same("flags", &a.status.canonical(), &b.status.canonical())?;
        }
        if self.mix != Mix::Integers {
            self.compare_vectors()?;
        }
        if faulted {
            self.same("fault address", &a.fault_address, &b.fault_address)?;
        }
        Ok(())
    }

    fn compare_vectors(&self) -> Result<(), String> {
        let (a, b) = (&self.reference.cpu.vector.unit, &self.subject.cpu.vector.unit);
        if a.same(b) {
            return Ok(());
        }
        self.same("x87 state", &a.x87(), &b.x87())?;
        let (a, b) = (a.vector_state(), b.vector_state());
        for i in 0..32 {
            self.same(&format!("zmm{i}"), &a.zmm[i], &b.zmm[i])?;
        }
        self.same("masks", &a.k, &b.k)?;
        self.same("MXCSR", &a.mxcsr, &b.mxcsr)?;
        Err(format!("vector state: {}", self.context()))
    }

    fn compare_memory(&self) -> Result<(), String> {
        for (at, len) in [(DATA, DATA_LEN), (CODE, CODE_LEN)] {
            let (a, b) = (bytes(&self.reference, at, len), bytes(&self.subject, at, len));
            if let Some(i) = (0..len).find(|&i| a[i] != b[i]) {
                self.same(&format!("memory at {:#x}", at + i as u64), &a[i], &b[i])?;
            }
        }
        Ok(())
    }

    /// The program and where it is.
    fn context(&self) -> String {
        use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
        use std::fmt::Write;
        let offset = (self.start & 0x1fff) as usize;
        let mut formatter = GasFormatter::new();
        let (a, b) = (&self.reference.cpu, &self.subject.cpu);
        let mut text = format!("seed of round {:#x}\n", self.seed);
        for (cpu, name) in [(a, "reference"), (b, "subject  ")] {
            writeln!(
                text,
                "{name} {:x?} {:#x} retired {}",
                cpu.regs,
                cpu.rflags(),
                cpu.retired - self.origin
            )
            .unwrap();
        }
        let code = &self.code[offset..];
        let bits = a.code_size.bits();
        for instruction in Decoder::with_ip(bits, code, self.start, DecoderOptions::NONE).iter().take(60) {
            write!(text, "{:x}: ", instruction.ip()).unwrap();
            formatter.format(&instruction, &mut text);
            text.push('\n');
        }
        text
    }
}

/// Bytes of code that a block may be made from, and more.
const AHEAD: usize = 256;

pub(super) fn run_rounds(mut pair: Pair, seed: u64, count: u64) -> u64 {
    run_rounds_of(&mut pair, seed, count);
    pair.jit.cache.sizes.regions
}

pub(super) fn run_rounds_of(pair: &mut Pair, seed: u64, count: u64) {
    for round in 0..count {
        match run_round(pair, seed << 32 | round) {
            Ok(()) => {}
            Err(_) if pair.may_have_stale_flags() => pair.give_up(),
            Err(difference) => panic!("{difference}"),
        }
    }
    assert!(pair.given_up * 500 <= count, "{} of {count} rounds given up", pair.given_up);
}

fn run_round(pair: &mut Pair, seed: u64) -> Result<(), String> {
    let mut random = Random::new(seed);
    let random = &mut random;
    (pair.seed, pair.origin, pair.rewritten) = (seed, pair.subject.cpu.retired, false);
    let program = match pair.modes {
        Modes::Bits64 => generate::program(random, pair.mix),
        modes => narrow::generate::program(random, pair.mix, modes == Modes::Both),
    };
    if random.chance(50) {
        // Otherwise all code of a page is careful after the first time ([`crate::jit::x87`]).
        pair.jit.careful.clear();
    }
    pair.load(random, &program);
    let end = pair.subject.cpu.retired + 400;
    let mut faults = 0;
    while pair.subject.cpu.retired < end && faults < 12 {
        let most = if pair.options.region == 1 {
            1
        } else if random.chance(50) {
            12
        } else {
            200
        };
        let limit = 1 + random.below(most);
        if pair.advance(limit)?.is_some() {
            faults += 1;
            let mut next = pair.start & !0x1fff | random.pick(&program.starts) as u64;
            if pair.choose_mode(random) && next >> 32 != 0 {
                next = next & 0x1f_ffff | narrow::ALIAS32;
            }
            // Going on elsewhere, where other flags are looked at.
            pair.subject.cpu.status = pair.reference.cpu.status;
            for machine in [&mut pair.reference, &mut pair.subject] {
                machine.cpu.regs[RIP] = next;
                machine.cpu.regs[4] = DATA + 0x1800;
            }
        }
    }
    pair.compare_memory()
}
