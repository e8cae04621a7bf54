//! POPFQ.

use super::*;

/// POPFQ and a look, for the kernel and for programs.
const KERNEL_POP: u64 = at::KERNEL_ONLY + 0xb00;
const USER_POP: u64 = at::USER_CODE + 0xb00;

fn with_pops(vendor: Vendor) -> Both {
    let mut both = both(vendor);
    both.each(|cpu| {
        for code in [KERNEL_POP, USER_POP] {
            cpu.memory.write_bytes(GuestAddress(code), &[&[0x9d], LOOK].concat()).unwrap();
        }
    });
    both
}

impl Both {
    /// Before POPF of `image`, with such flags.
    fn prepare_pop(&mut self, user: bool, flags: u64, image: u64) {
        self.start(user, if user { USER_POP } else { KERNEL_POP });
        self.each(|cpu| {
            cpu.set_rflags(flags);
            (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
            cpu.regs[4] -= 8;
            cpu.memory.write(GuestAddress(cpu.regs[4]), image).unwrap();
        });
    }

    /// POPF of `image`, often enough to be translated; the last time after `change`.
    fn pop(
        &mut self,
        what: &str,
        user: bool,
        [flags, image]: [u64; 2],
        change: fn(&mut Cpu),
    ) -> (bool, Option<Exception>) {
        let mut last = (false, None);
        for round in 0..6 {
            self.prepare_pop(user, flags, if round == 5 { image } else { flags });
            if round == 5 {
                self.each(change);
            }
            last = self.go(what);
        }
        last
    }
}

const OFF: u64 = 0x46;
const ON: u64 = 0x246;
const IF: u64 = 0x200;

#[test]
fn flags_that_programs_and_kernels_restore_need_no_handler() {
    let cases = [
        ("the same", OFF, OFF),
        ("arithmetic flags", OFF, OFF ^ 0x8d5),
        ("DF", OFF, OFF ^ 0x400),
        ("what is no flag", ON, ON ^ 0xffff_ffff_ffc0_802a),
        ("let in already", ON, ON ^ 0xcd5),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for user in [false, true] {
            for (what, flags, image) in cases {
                let mut both = with_pops(vendor);
                assert_eq!(both.pop(what, user, [flags, image], |_| ()), (false, NOWHERE), "{what}");
                let flags = both.subject.m.cpu.rflags();
                assert_eq!(flags, image & Rflags::all().bits() | 2, "{what}");
            }
        }
        for [flags, image] in [[OFF, ON], [ON, OFF], [OFF, ON | 0x491], [ON, OFF | 0xc81]] {
            let mut both = with_pops(vendor);
            assert_eq!(both.pop("IF", false, [flags, image], |_| ()), (false, NOWHERE));
            assert_eq!(both.subject.m.cpu.rflags() & IF, image & IF);
        }
    }
}

#[test]
fn flags_that_are_unusual_are_as_in_the_interpreter() {
    type Case = (&'static str, u64, u64, fn(&mut Cpu), bool, Option<Exception>);
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let kernel: [Case; 15] = [
        ("TF", ON, ON | 0x100, |_| (), true, step),
        ("NT", ON, ON | 0x4000, |_| (), true, NOWHERE),
        ("IOPL", ON, ON | 0x3000, |_| (), true, NOWHERE),
        ("AC", ON, ON | 0x4_0000, |_| (), true, NOWHERE),
        ("AC goes", ON | 0x4_0000, ON, |_| (), true, NOWHERE),
        ("ID", ON, ON | 0x20_0000, |_| (), true, NOWHERE),
        ("VM", ON, ON | 0x2_0000, |_| (), true, NOWHERE),
        ("VIF", ON, ON | 0x8_0000, |_| (), true, NOWHERE),
        ("RF in the image", ON, ON | 0x1_0000, |_| (), true, NOWHERE),
        ("IF and ID", ON, OFF | 0x20_0000, |_| (), true, NOWHERE),
        ("something waits", OFF, ON, post, true, NOWHERE),
        ("something waits for longer", ON, OFF, post, false, NOWHERE),
        ("something waits all the time", OFF, OFF ^ 0x8d5, post, false, NOWHERE),
        ("stack not in the soft TLB", ON, OFF, |cpu| cpu.tlb.flush(), true, NOWHERE),
        ("no stack", ON, OFF, |cpu| cpu.regs[4] = at::ABSENT, true, Some(page_fault(0))),
    ];
    let user: [Case; 6] = [
        ("IF goes", ON, OFF, |_| (), true, NOWHERE),
        ("IF comes", OFF, ON, |_| (), true, NOWHERE),
        ("IF goes with IOPL 3", ON | 0x3000, OFF | 0x3000, |_| (), true, NOWHERE),
        ("IOPL goes", ON | 0x3000, ON, |_| (), true, NOWHERE),
        ("AC", ON, ON | 0x4_0000, |_| (), true, NOWHERE),
        ("no stack", ON, OFF, |cpu| cpu.regs[4] = at::ABSENT, true, Some(page_fault(4))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (user, cases) in [(false, &kernel[..]), (true, &user[..])] {
            for &(what, flags, image, change, handed, end) in cases {
                let mut both = with_pops(vendor);
                assert_eq!(both.pop(what, user, [flags, image], change), (handed, end), "{what}");
            }
        }
    }
}

#[test]
fn resume_flag_is_cleared() {
    // One that is there already, as behind an IRET, with the same in the image.
    let mut both = with_pops(Vendor::Intel);
    let flags = ON | 0x1_0000;
    both.pop("RF", false, [ON, ON], |_| ());
    both.prepare_pop(false, flags, flags);
    assert_eq!(both.go("RF").1, NOWHERE);
    assert_eq!(both.subject.m.cpu.rflags(), ON);
}

#[test]
fn random_flags_are_restored_as_in_the_interpreter() {
    for (vendor, seed) in [(Vendor::Intel, seed(25)), (Vendor::Amd, seed(26))] {
        let mut both = with_pops(vendor);
        let mut direct = 0;
        for round in 0..count(3000) {
            let mut random = Random::new(seed << 32 | round);
            let random = &mut random;
            let mask = if random.chance(70) { 0xed5 } else { u64::MAX };
            let flags = random.bits() & Rflags::WRITABLE.bits() & !Rflags::VM.bits();
            let flags = if random.chance(90) { flags & !0x1_0100 } else { flags };
            let change = random.bits() & random.bits() & mask;
            let change = if random.chance(90) { change & !0x100 } else { change };
            let flush = random.chance(5);
            both.prepare_pop(random.chance(50), flags, flags ^ change);
            let from = random.pick(&[at::DATA, at::KERNEL_ONLY]);
            both.each(|cpu| {
                cpu.regs[6] = from;
                if flush {
                    cpu.tlb.flush();
                }
            });
            direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
        }
        assert!(direct > count(3000) / 3, "{direct}");
    }
}
