//! Gathers and scatters whose elements are anywhere: the translator against the interpreter, instruction by instruction.

use std::sync::Mutex;

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, Register};

use super::generate::{POINTERS, destination};
use super::*;

/// A gather or scatter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elements {
    /// Encoded with EVEX, not VEX.
    pub(super) evex: bool,
    scatter: bool,
    /// The opcode's low two bits: 64-bit indices; floating point.
    kind: u8,
    wide_element: bool,
    /// log2 of the vector length in units of 128 bits.
    length: u8,
    /// Destination of a gather, source of a scatter.
    register: u8,
    index: u8,
    /// A vector register, or an opmask register.
    mask: u8,
    base: Option<u8>,
    scale: u8,
    displacement: i32,
    /// 0x64, 0x65, 0x67 or none.
    prefix: Option<u8>,
}

impl Elements {
    pub(super) fn has_wide_index(&self) -> bool {
        self.kind & 1 != 0
    }

    /// The instruction's bytes (SDM 2A 2.3.5, 2.7.1).
    pub(super) fn bytes(&self) -> Vec<u8> {
        let Self { register, index, mask, .. } = *self;
        let opcode = if self.scatter { 0xa0 } else { 0x90 } | self.kind;
        let inverted = |number: u8, bit: u8| !(number >> bit) & 1;
        let base = self.base.unwrap_or(5);
        let first = inverted(register, 3) << 7 | inverted(index, 3) << 6 | inverted(base, 3) << 5 | 2;
        let wide = u8::from(self.wide_element) << 7;
        let mut bytes: Vec<u8> = self.prefix.into_iter().collect();
        if self.evex {
            let last = self.length << 5 | inverted(index, 4) << 3 | mask & 7;
            bytes.extend([0x62, first | inverted(register, 4) << 4, wide | 0x7d, last]);
        } else {
            bytes.extend([0xc4, first, wide | (!mask & 15) << 3 | (self.length & 1) << 2 | 1]);
        }
        let size = if self.wide_element { 8 } else { 4 };
        let unit = if self.evex { size } else { 1 };
        let short = i8::try_from(self.displacement / unit).ok().filter(|_| self.displacement % unit == 0);
        let mode = match (self.base, short) {
            (None, _) => 0,
            (_, Some(_)) => 0x40,
            _ => 0x80,
        };
        bytes.extend([opcode, mode | (register & 7) << 3 | 4]);
        bytes.push(self.scale << 6 | (index & 7) << 3 | base & 7);
        match short.filter(|_| mode == 0x40) {
            Some(short) => bytes.push(short as u8),
            None => bytes.extend(self.displacement.to_le_bytes()),
        }
        bytes
    }

    /// Any of them whose registers are not the same.
    pub(super) fn any(random: &mut Random) -> Self {
        loop {
            let evex = host_has_avx512() && random.chance(60);
            let high = |random: &mut Random| if evex { 16 * (random.below(4) / 3) as u8 } else { 0 };
            let kind = random.below(4) as u8;
            // Where programs have indices; see `indices`.
            let index = if kind & 1 != 0 { random.pick(&[3, 4]) } else { random.pick(&[6, 7]) };
            let elements = Self {
                evex,
                scatter: evex && random.chance(40),
                kind,
                wide_element: random.chance(50),
                length: random.below(if evex { 3 } else { 2 }) as u8,
                register: destination(random) + high(random),
                index: index + high(random),
                mask: if evex { 1 + random.below(7) as u8 } else { destination(random) },
                base: random.chance(95).then(|| random.pick(&POINTERS)),
                scale: random.below(4) as u8,
                displacement: if random.chance(50) {
                    random.below(256) as i32 - 128
                } else {
                    random.below(0x800) as i32 - 0x200
                },
                prefix: random.chance(10).then(|| random.pick(&[0x64, 0x65, 0x67])),
            };
            let elements = match elements.base {
                None => Self { displacement: elements.displacement + DATA as i32 + 0x1000, ..elements },
                Some(_) => elements,
            };
            if !Decoder::new(64, &elements.bytes(), DecoderOptions::NONE).decode().is_invalid() {
                return elements;
            }
        }
    }
}

fn encoded(instruction: Instruction) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, 0).unwrap();
    encoder.take_buffer()
}

/// One for a random program, often with an instruction before it that selects elements.
pub(super) fn instruction(random: &mut Random) -> Vec<u8> {
    let elements = Elements::any(random);
    let mask = u32::from(elements.mask);
    let (vector, opmask) = (Register::YMM0 + mask, Register::K0 + mask % 8);
    let select = match (random.below(4), elements.evex) {
        (0, true) => Instruction::with3(Code::VEX_Kxnorw_kr_kr_kr, opmask, opmask, opmask),
        (1, true) => {
            Instruction::with2(Code::VEX_Kmovd_kr_r32, opmask, Register::EAX + random.below(8) as u32)
        }
        (0, false) => Instruction::with3(Code::VEX_Vpcmpeqd_ymm_ymm_ymmm256, vector, vector, vector),
        (1, false) => Instruction::with2(
            Code::VEX_Vmovdqu_ymm_ymmm256,
            vector,
            Register::YMM0 + random.below(16) as u32,
        ),
        _ => return elements.bytes(),
    };
    [encoded(select.unwrap()), elements.bytes()].concat()
}

/// Gives the registers that [`Elements::any`] takes for indices small ones.
pub(super) fn indices(random: &mut Random, zmm: &mut [[u64; 8]]) {
    for (number, register) in
        zmm.iter_mut().enumerate().filter(|(number, _)| matches!(number % 16, 3 | 4 | 6 | 7))
    {
        let wide = number % 16 < 5;
        let mut lane = || random.below(300).wrapping_sub(100);
        for word in register.iter_mut().filter(|word| **word != 0) {
            *word = if wide { lane() } else { lane() & 0xffff_ffff | lane() << 32 };
        }
    }
}

/// What a device was asked: addresses, and what was written.
type Asked = Arc<Mutex<Vec<(u64, Option<Vec<u8>>)>>>;

/// A device whose registers say where they are.
struct Registers(Asked);

impl Bus for Registers {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}

    fn memory_read(&self, address: GuestAddress, bytes: &mut [u8]) {
        self.0.lock().unwrap().push((address.0, None));
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (address.0 as u8).wrapping_mul(3).wrapping_add(i as u8);
        }
    }

    fn memory_write(&self, address: GuestAddress, bytes: &[u8]) {
        self.0.lock().unwrap().push((address.0, Some(bytes.to_vec())));
    }
}

/// Where the device is seen.
const DEVICE: u64 = DATA + 0x7000;
/// Behind all memory.
const DEVICE_PHYSICAL: u64 = 0x4000_0000;

/// One machine, and what its device was asked.
struct Side {
    m: Interpreter,
    asked: Asked,
}

impl Side {
    fn new(narrow: bool) -> Self {
        let (memory, asked) = (memory(), Arc::new(Mutex::new(Vec::new())));
        memory.write(GuestAddress(0x4000 + 8 * (DEVICE >> 12)), DEVICE_PHYSICAL | 3).unwrap();
        let mut m = machine_of(Connections {
            code: CodeMap::new(Arc::clone(&memory)),
            memory,
            bus: Arc::new(Registers(Arc::clone(&asked))),
            clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
            cpuid: Arc::new(host_cpuid().clone()),
        });
        assert!(allow_vectors(&mut m.cpu, if host_has_avx512() { 0xe7 } else { 7 }));
        if narrow {
            super::narrow::prepare(&mut m.cpu, true);
        }
        Self { m, asked }
    }

    /// Everything that an instruction can change.
    fn state(&mut self) -> String {
        let cpu = &self.m.cpu;
        let vectors = cpu.vector.unit.vector_state();
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        format!(
            "{:x?} {:x} {:x?} {:x?} {:x} {asked:x?}",
            cpu.regs,
            cpu.rflags(),
            vectors.zmm,
            vectors.k,
            cpu.vector.unit.mxcsr()
        )
    }
}

/// Where an element is to be: plain memory, or one of these, and what is near them.
const PLACES: [u64; 11] = [
    DATA + 0xffc,
    DATA + 0x1ff8,
    DATA + 0x3ffc,
    DATA + 0x4010,
    DATA + 0x4ffc,
    DATA + 0x5010,
    DATA + 0x5ffc,
    DEVICE + 0x10,
    DEVICE - 4,
    CODE + 0x800,
    CODE + 0x20,
];
/// Not canonical.
const NOWHERE: u64 = 1 << 47;

/// Counts of cases, by how they ended.
#[derive(Debug, Default)]
struct Counts {
    /// All elements in plain memory, and how often the handler was called for one of those.
    plain: u64,
    plain_handed: u64,
    faults: u64,
    asked: u64,
    handed: u64,
    code: u64,
}

/// Executes `elements` with its elements in many places.
fn run_cases(random: &mut Random, elements: Elements, narrow: bool, counts: &mut Counts) {
    let [mut reference, mut subject] = [false, true].map(|_| Side::new(narrow));
    let options = Options { region: 1, exact_flags: true, ..OPTIONS };
    let mut jit = Jit::new(options, &subject.m.cpu.code).unwrap();
    let mut code = elements.bytes();
    code.resize(0x1000, 0x90);
    let data: Vec<u8> = (0..0x1000).flat_map(|_| random.bits().to_le_bytes()).collect();
    for cpu in [&mut reference.m.cpu, &mut subject.m.cpu] {
        // What may be read need not be writable.
        for page in (DATA..DEVICE).step_by(0x1000).chain([CODE]) {
            let _ = cpu.load::<u64>(3, page);
        }
    }
    let mut loaded = false;
    for case in 0..60 {
        let plain = case < 20 || random.chance(20);
        let mut regs: [u64; 16] =
            std::array::from_fn(|_| random.bits() & if narrow { 0xffff_ffff } else { !0 });
        let cut = narrow || elements.prefix == Some(0x67);
        // With 32-bit addresses, the sum may be more than that.
        let below = if cut && random.chance(30) { 0x1000_0000 } else { 0 };
        let middle = DATA + 0x1800 + random.below(8);
        let segment = match elements.prefix {
            Some(0x64) if !narrow => 0x100,
            Some(0x65) if !narrow => 0x40,
            _ => 0,
        };
        let start = match elements.base {
            Some(base) => {
                let wanted = middle.wrapping_sub(below).wrapping_sub(elements.displacement as u64);
                regs[usize::from(base)] = if narrow {
                    wanted & 0xffff_ffff
                } else if cut {
                    wanted & 0xffff_ffff | random.bits() << 32
                } else {
                    wanted
                };
                middle.wrapping_sub(below) + segment
            }
            None => elements.displacement as u64 + segment,
        };
        if narrow {
            regs[4] &= 0xffff_ffff;
        }
        let mut lane = || {
            let place = match random.below(10) {
                _ if plain => DATA + 0x1008 + random.below(0xfe0),
                0..5 => DATA + 8 + random.below(0x3fe0),
                5 if elements.has_wide_index() && random.chance(20) => NOWHERE,
                _ => random.pick(&PLACES) + random.below(9) - 4,
            };
            let distance = place.wrapping_sub(start);
            (if cut { distance as u32 as i32 as i64 } else { distance as i64 } >> elements.scale) as u64
        };
        let index: [u64; 8] = std::array::from_fn(|_| {
            if elements.has_wide_index() { lane() } else { lane() & 0xffff_ffff | lane() << 32 }
        });
        let mut state = reference.m.cpu.vector.unit.vector_state();
        for (number, register) in state.zmm.iter_mut().enumerate() {
            let there = number < 16 || host_has_avx512();
            *register = std::array::from_fn(|_| if there { random.bits() } else { 0 });
        }
        if !host_has_avx512() {
            state.zmm.iter_mut().for_each(|register| register[4..].fill(0));
        }
        let chosen = random.below(5);
        let mask = |random: &mut Random| match chosen {
            0 | 1 => u64::MAX,
            2 => 0x7fff_ffff_7fff_ffff,
            _ => random.bits(),
        };
        if elements.evex {
            state.k = std::array::from_fn(|_| mask(random) & if chosen == 2 { 0xffff_0000 } else { !0 });
        } else {
            let words = if host_has_avx512() { 8 } else { 4 };
            let register = &mut state.zmm[usize::from(elements.mask)];
            register[..words].iter_mut().for_each(|word| *word = mask(random));
        }
        let words = if host_has_avx512() { 8 } else { 4 };
        state.zmm[usize::from(elements.index)][..words].copy_from_slice(&index[..words]);
        let flags = random.bits() & 0x8d5;
        for side in [&mut reference, &mut subject] {
            if !loaded {
                side.m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
                side.m.cpu.memory.write_bytes(GuestAddress(DATA), &data[..0x7000]).unwrap();
            }
            side.m.cpu.regs[..16].copy_from_slice(&regs);
            side.m.cpu.regs[RIP] = CODE;
            side.m.cpu.set_rflags(flags);
            side.m.cpu.vector.unit.set_vector_state(&state);
        }
        loaded = true;
        let handed = subject.m.cpu.translated.interpreted;
        let executed = jit.executed;
        let expected = reference.m.run_block(1);
        let outcome = jit.run(&mut subject.m, 1);
        let context =
            || format!("{elements:?} {:x?} case {case}, index {index:x?} from {start:x}", elements.bytes());
        assert_eq!(expected, outcome, "{}", context());
        assert_eq!(reference.m.cpu.fault_address, subject.m.cpu.fault_address, "{}", context());
        let (one, other) = (reference.state(), subject.state());
        assert_eq!(one, other, "{}", context());
        for (at, len) in [(DATA, 0x7000), (CODE, 0x1000)] {
            let (one, other) = (bytes(&reference.m, at, len), bytes(&subject.m, at, len));
            let differs = (0..len).find(|&i| one[i] != other[i]);
            let differs = differs.map(|i| (at + i as u64, &one[i..][..8], &other[i..][..8]));
            assert!(differs.is_none(), "memory: {differs:x?}, {}", context());
        }
        let handed = subject.m.cpu.translated.interpreted - handed;
        counts.faults += u64::from(outcome.is_err());
        if jit.executed != executed {
            counts.handed += handed;
            counts.asked += u64::from(!one.ends_with("[]"));
            if plain {
                counts.plain += 1;
                // The first ones may have found nothing in the soft TLB.
                counts.plain_handed += if case < 15 { 0 } else { handed };
            }
        }
        if bytes(&reference.m, CODE, 0x1000) != code {
            counts.code += 1;
            loaded = false;
        }
    }
}

fn run_forms(seed: u64, forms: u64, narrow: bool) -> Counts {
    let mut random = Random::new(seed);
    let mut counts = Counts::default();
    for _ in 0..forms {
        let elements = loop {
            let elements = Elements::any(&mut random);
            let known = Decoder::new(32, &elements.bytes(), DecoderOptions::NONE).decode();
            if !narrow || !known.is_invalid() && known.len() == elements.bytes().len() {
                break elements;
            }
        };
        run_cases(&mut random, elements, narrow, &mut counts);
    }
    counts
}

#[test]
fn elements_anywhere_are_moved_as_in_the_interpreter() {
    let counts = run_forms(seed(41), count(200), false);
    assert!(
        counts.plain > 15 * count(200) && counts.faults > count(200) && counts.handed > count(200),
        "{counts:?}"
    );
    // All of them, whatever the prefix, as long as there is but one.
    assert_eq!(counts.plain_handed, 0, "{counts:?}");
    assert!(counts.asked > count(200) && counts.code > count(200) / 4, "{counts:?}");
}

#[test]
fn elements_anywhere_are_moved_by_32_bit_code_as_in_the_interpreter() {
    let counts = run_forms(seed(42), count(200), true);
    assert!(counts.plain > 15 * count(200) && counts.faults > count(200), "{counts:?}");
}
