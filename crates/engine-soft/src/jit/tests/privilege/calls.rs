//! SYSCALL.

use super::*;

#[test]
fn system_calls_and_returns_need_no_handler() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut both = both(vendor);
        for rip in [at::USER_CODE, CROSSING] {
            assert_eq!(both.call("call", rip, |_| ()), (false, NOWHERE));
            assert_eq!((both.subject.m.cpu.cpl, both.subject.m.cpu.regs[1]), (0, rip + 2));
        }
        assert_eq!(both.back("return", |_| ()), (false, NOWHERE));
        assert_eq!(both.subject.m.cpu.cpl, 3);
    }
}

#[test]
fn system_call_that_is_unusual_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 12] = [
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), true, Some(Exception::UD)),
        ("another STAR", |cpu| set_msr(cpu, msr::STAR, STAR ^ 0x48 << 32), false, NOWHERE),
        ("another entry", |cpu| set_msr(cpu, msr::LSTAR, ENTRY + 3), false, NOWHERE),
        ("all flags kept", |cpu| set_msr(cpu, msr::FMASK, 0), false, NOWHERE),
        ("no flag kept", |cpu| set_msr(cpu, msr::FMASK, 0xffff_ffff), false, NOWHERE),
        ("traced", |cpu| cpu.flags.insert(Rflags::TF), false, NOWHERE),
        (
            "traced on",
            |cpu| {
                set_msr(cpu, msr::FMASK, 0);
                cpu.flags.insert(Rflags::TF);
            },
            false,
            step,
        ),
        ("AC", |cpu| cpu.set_rflags(0x4_0202), false, NOWHERE),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.set_rflags(0x4_0202);
            },
            true,
            NOWHERE,
        ),
        ("something waits", post, true, NOWHERE),
        ("breakpoint on data", |cpu| cpu.dr7 = 0x3_0001, false, NOWHERE),
        ("entry not mapped", |cpu| set_msr(cpu, msr::LSTAR, at::ABSENT), false, Some(fetch_fault(0))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let got = both(vendor).call(what, at::USER_CODE, change);
            assert_eq!(got, (handed, end), "{what}");
        }
    }
}

#[test]
fn system_call_below_cpl_3_is_as_in_the_interpreter() {
    let mut both = both(Vendor::Amd);
    let got = both.repeat("at CPL 0", false, at::USER_CODE, |_| ());
    assert_eq!((got, both.subject.m.cpu.cpl), ((true, NOWHERE), 0));
}

#[test]
fn system_call_under_smap_may_access_what_ac_allows() {
    // The kernel's stack is the program's here.
    for (what, fmask, flags, end) in [
        ("masked", 0x4_7700, 0x4_0202, Some(page_fault(3))),
        ("not set", 0x700, 0x202, Some(page_fault(3))),
        ("kept", 0x700, 0x4_0202, NOWHERE),
    ] {
        let mut both = both(Vendor::Amd);
        both.each(|cpu| {
            cpu.cr4.insert(Cr4::SMAP);
            cpu.tlb.flush();
            set_msr(cpu, msr::FMASK, fmask);
            // The look's push comes first: a handler's call would look for the stack anew.
            set_msr(cpu, msr::LSTAR, ENTRY + 6);
        });
        for _ in 0..6 {
            both.start(true, PUSHING);
            both.each(|cpu| {
                cpu.set_rflags(flags);
            });
            assert_eq!(both.go(what).1, end, "{what}");
        }
        assert_eq!(both.handed(), 0, "{what}");
    }
}
