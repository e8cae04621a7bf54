//! SYSRET.

use super::*;

#[test]
fn system_return_that_is_unusual_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 13] = [
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), true, Some(Exception::UD)),
        ("another STAR", |cpu| set_msr(cpu, msr::STAR, STAR ^ 0x48 << 48), false, NOWHERE),
        ("trap behind it", |cpu| cpu.regs[11] |= 0x100, true, step),
        ("AC", |cpu| cpu.regs[11] |= 0x4_0000, true, NOWHERE),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.regs[11] |= 0x4_0000;
                cpu.regs[6] += 1;
            },
            true,
            Some(Exception::with_code(ringfence_x86::Vector::AlignmentCheck, 0)),
        ),
        ("NT and IOPL", |cpu| cpu.regs[11] |= 0x7000, false, NOWHERE),
        ("flags that are none", |cpu| cpu.regs[11] = !0x4_0100, false, NOWHERE),
        ("no flags", |cpu| cpu.regs[11] = 0, false, NOWHERE),
        ("something waits", post, true, NOWHERE),
        ("target not mapped", |cpu| cpu.regs[1] = at::ABSENT, false, Some(fetch_fault(4))),
        ("target of the kernel's", |cpu| cpu.regs[1] = ENTRY, false, Some(fetch_fault(5))),
        ("data of the kernel's", |cpu| cpu.regs[6] = at::KERNEL_ONLY, false, Some(page_fault(5))),
        ("just canonical", |cpu| cpu.regs[1] = (1 << 47) - 2, false, Some(fetch_fault(4))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let mut both = both(vendor);
            // The kernel's code is known, to the kernel.
            assert_eq!(both.call("call", at::USER_CODE, |_| ()), (false, NOWHERE));
            assert_eq!(both.back(what, change), (handed, end), "{what}");
        }
        let got = both(vendor).back("not canonical", |cpu| cpu.regs[1] = 1 << 47);
        assert_eq!(got, (true, Some(Exception::GP0)));
        let mut at_user = both(vendor);
        assert_eq!(
            at_user.repeat("at CPL 3", true, at::USER_CODE + 0x800, |_| ()),
            (true, Some(Exception::GP0))
        );
    }
}

#[test]
fn return_behind_a_change_of_privilege_asks_what_may_be_fetched() {
    // A call of the kernel's is not returned from; the program behind SYSRET returns to where it was made.
    let mut both = both(Vendor::Amd);
    let call = ENTRY + 0x300;
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        put(call, &[0xe8, 0, 0, 0, 0, 0x48, 0x0f, 0x07]); // call to the next; sysretq
        put(at::USER_CODE + 0x400, &[0xc3]);
    });
    for _ in 0..6 {
        both.start(false, call);
        both.each(|cpu| (cpu.regs[1], cpu.regs[11]) = (at::USER_CODE + 0x400, 2));
        assert_eq!(both.go("return to the kernel's"), (false, Some(fetch_fault(5))));
        assert_eq!(both.subject.m.cpu.rip(), call + 5);
    }
}
