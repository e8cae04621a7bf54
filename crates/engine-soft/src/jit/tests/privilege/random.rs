//! Whatever comes.

use super::*;

#[test]
fn random_system_calls_and_returns_run_as_in_the_interpreter() {
    for (vendor, seed) in [(Vendor::Intel, seed(21)), (Vendor::Amd, seed(22))] {
        let mut both = both(vendor);
        let (mut direct, mut features) = (0, 0xff);
        for round in 0..count(2000) {
            let mut random = Random::new(seed << 32 | round);
            let random = &mut random;
            let user = random.chance(60);
            let at = if random.chance(80) == user { at::USER_CODE } else { BACK };
            let at = if random.chance(10) { CROSSING } else { at };
            both.start(user, at);
            let flags = random.bits() & Rflags::WRITABLE.bits() & !Rflags::VM.bits();
            let flags = if random.chance(80) { flags & !0x5_0100 } else { flags };
            let star = if random.chance(80) { STAR } else { random.bits() };
            let fmask = if random.chance(50) { 0x4_7700 } else { random.bits() & 0xffff_ffff };
            let entry = ENTRY + 3 * random.below(2);
            // A change of these forgets all translations.
            if random.chance(10) {
                features = random.bits();
            }
            let address = |random: &mut Random| {
                let page = random.pick(&[at::DATA, at::DATA, at::KERNEL_ONLY, at::ABSENT, at::USER_STACK]);
                page + 0xe00 + random.below(0x210)
            };
            let (from, to) = (address(random), address(random));
            let target = match random.below(10) {
                0 => random.bits(),
                1 => ENTRY,
                2 => (1 << 47) - random.below(3),
                _ => at::USER_CODE + 2,
            };
            let other = random.bits();
            let r11 = if random.chance(80) { other & !0x4_0100 } else { other };
            both.each(|cpu| {
                for (number, value) in [(msr::STAR, star), (msr::FMASK, fmask), (msr::LSTAR, entry)] {
                    set_msr(cpu, number, value);
                }
                cpu.cr0.set(Cr0::AM, features & 1 != 0);
                let before = cpu.cr4;
                cpu.cr4.set(Cr4::SMAP, features & 2 != 0);
                cpu.cr4.set(Cr4::SMEP, features & 4 != 0);
                if cpu.cr4 != before {
                    cpu.tlb.flush();
                }
                cpu.efer.set(Efer::SCE, features & 0x78 != 0);
                cpu.set_rflags(flags);
                (cpu.regs[1], cpu.regs[11], cpu.regs[3]) = (target, r11, other);
                (cpu.regs[6], cpu.regs[7]) = (from, to);
                cpu.update_mode();
            });
            direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
        }
        assert!(direct > count(2000) / 2, "{direct}");
    }
}

#[test]
fn random_returns_from_interrupts_run_as_in_the_interpreter() {
    use super::interrupts::{ALL, FRAME, KERNEL_IRET};
    use ringfence_x86::SegmentRegister as S;
    for (vendor, seed) in [(Vendor::Intel, seed(23)), (Vendor::Amd, seed(24))] {
        let mut both = super::interrupts::both(vendor);
        let mut direct = 0;
        for round in 0..count(3000) {
            let mut random = Random::new(seed << 32 | round);
            let random = &mut random;
            let mut frame = random.pick(&ALL);
            frame[0] = match random.below(12) {
                0 => random.bits(),
                1 => at::ABSENT,
                2 => (1 << 47) - random.below(3),
                _ => frame[0],
            };
            let flags = random.bits();
            frame[2] = if random.chance(85) { flags & !0x6_4100 } else { flags };
            for part in [1, 4] {
                if random.chance(4) {
                    frame[part] = random.pick(&[0, 3, 0x10, 0x18, 0x23, 0x28, 0x2b, 0x2f, 0x30, 0xfff8]);
                }
            }
            let user = random.chance(3);
            both.limit = if random.chance(85) { 5000 } else { 40 };
            both.start(user, if user { super::interrupts::USER_IRET } else { KERNEL_IRET });
            let place = match random.below(12) {
                0 => at::STACK - random.below(0x30),
                1 => at::ABSENT,
                _ => FRAME + random.below(0x80),
            };
            both.put_frame(if place == at::ABSENT { FRAME } else { place }, frame);
            let (bit, broken) = (random.below(64), random.pick(&[sel::CODE, sel::DATA, sel::USER_CODE]));
            let breaks = random.chance(5);
            let data: &[u16] =
                if random.chance(85) { &[0, sel::USER_DATA] } else { &[1, sel::DATA, sel::CODE] };
            let data = random.pick(data);
            let register = random.pick(&[S::Es, S::Ds, S::Fs, S::Gs]);
            let now = random.bits() & Rflags::WRITABLE.bits() & !0x2_0100;
            let now = if random.chance(95) { now & !0x1_4000 } else { now & !0x1_0000 };
            let (from, flush) = (random.pick(&[at::DATA, at::KERNEL_ONLY]), random.chance(5));
            both.each(|cpu| {
                if breaks {
                    super::interrupts::flip(cpu, broken, 1 << bit);
                }
                super::interrupts::set_data_segment(cpu, register, data);
                cpu.set_rflags(now);
                cpu.nmi_masked = now & 0x1c00_0000 == 0 && flags & 0x1f_0000_0000 == 0;
                (cpu.regs[6], cpu.regs[7], cpu.regs[4]) = (from, at::DATA + 8, place);
                if flush {
                    cpu.tlb.flush();
                }
            });
            direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
            both.each(|cpu| {
                if breaks {
                    // As it was, with the bit that the processor has set.
                    super::interrupts::flip(cpu, broken, 1 << bit);
                    super::interrupts::accessed(cpu, broken);
                }
            });
        }
        assert!(direct > count(3000) / 3, "{direct}");
    }
}
