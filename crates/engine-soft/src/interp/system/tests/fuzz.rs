//! Random code from random states: whatever it does, the host must not notice.

use ringfence_engine::Activity;

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at};

/// Cases; `RINGFENCE_FUZZ_CASES` chooses another number.
const CASES: u64 = 20_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A value that is likely to matter: a small number, an address in use, a selector, or anything.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(0x100),
            1 => at::IDT + self.below(0xc000),
            2 => 1 << self.below(64),
            3 => !0 << self.below(64),
            4 => self.below(0x20) << 3 | self.below(4),
            _ => self.next(),
        }
    }
}

/// An instruction with a bias to those of this family.
fn code(random: &mut Random) -> Vec<u8> {
    const OPCODES: &[u8] = &[
        0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x62, 0x63, 0x6c, 0x6d, 0x6e, 0x6f, 0x8c, 0x8e, 0x9a, 0x9c,
        0x9d, 0xc4, 0xc5, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf, 0xe4, 0xe6, 0xea, 0xec, 0xee, 0xf1, 0xf4, 0xfa,
        0xfb, 0xff,
    ];
    const TWO_BYTE: &[u8] = &[
        0x00, 0x01, 0x02, 0x03, 0x05, 0x06, 0x07, 0x08, 0x09, 0x20, 0x21, 0x22, 0x23, 0x30, 0x31, 0x32, 0x33,
        0x34, 0x35, 0xa0, 0xa1, 0xa2, 0xa8, 0xa9, 0xae, 0xb2, 0xb4, 0xb5, 0xc7,
    ];
    let mut bytes = Vec::new();
    for _ in 0..random.below(3) {
        bytes.push([0x66, 0x67, 0xf3, 0xf2, 0x48, 0x2e, 0x36][random.below(7) as usize]);
    }
    match random.below(3) {
        0 => bytes.push(OPCODES[random.below(OPCODES.len() as u64) as usize]),
        1 => bytes.extend([0x0f, TWO_BYTE[random.below(TWO_BYTE.len() as u64) as usize]]),
        _ => {}
    }
    bytes.extend(random.next().to_le_bytes());
    bytes.extend(random.next().to_le_bytes());
    bytes
}

#[test]
fn random_code_in_every_mode_never_panics() {
    let cases = std::env::var("RINGFENCE_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(CASES);
    let mut random = Random(0x5eed);
    let mut made: [fn() -> Lab; 3] = [Lab::real, Lab::protected, Lab::long];
    let mut lab = made[0]();
    for case in 0..cases {
        if case % 64 == 0 {
            made.rotate_left(1);
            lab = made[0]();
        }
        if lab.m.cpu.activity != Activity::Active {
            lab.m.cpu.activity = Activity::Active;
        }
        for _ in 0..random.below(4) {
            let register = random.below(16) as usize;
            lab.m.cpu.regs[register] = random.value();
        }
        if random.below(4) == 0 {
            lab.put(at::IDT + random.below(0x3000), random.value());
        }
        if random.below(8) == 0 {
            let value = random.value();
            let flags = lab.m.cpu.rflags() & 0x2_0000 | value & 0x25_7fd5 | 2;
            lab.m.cpu.set_rflags(flags);
        }
        let bytes = code(&mut random);
        // Code may have jumped anywhere.
        if lab.memory.write_bytes(ringfence_memory::GuestAddress(lab.m.cpu.fetch_address()), &bytes).is_err()
        {
            lab.m.cpu.regs[RIP] = at::CODE;
        }
        let result = lab.m.single_step().or_else(|exception| lab.m.cpu.raise(exception));
        if result.is_err() || lab.m.cpu.take_shutdown().is_some() {
            lab = made[0]();
        }
        assert_eq!(lab.m.cpu.rflags() & !0x3f_7fd7, 0, "case {case}");
    }
}
