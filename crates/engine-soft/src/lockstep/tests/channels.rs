//! What reaches the interpreter's machine from outside reaches the translator's.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_engine::{Vcpu, VirtualTime, Vm};
use ringfence_memory::GuestAddress;

use super::lab::{CODE, DATA, DEVICE, Lab};
use crate::lockstep::LockstepOptions;
use crate::mmu::tlb::FETCH_ENTRIES;

fn both(write: fn(&mut CodeAssembler) -> Result<(), IcedError>, check: impl Fn(&mut Lab)) {
    for batch in [None, Some(1), Some(50)] {
        check(&mut Lab::new(LockstepOptions { batch, ..LockstepOptions::default() }, write));
    }
}

#[test]
fn port_accesses_happen_once_and_both_see_what_was_read() {
    let guest = |a: &mut CodeAssembler| {
        a.in_(eax, 0x60)?;
        a.mov(dword_ptr(rbx), eax)?;
        a.in_(al, 0x61)?;
        a.out(0x70, al)?;
        a.mov(dx, 0x80)?;
        a.out(dx, eax)?;
        a.hlt()
    };
    both(guest, |lab| {
        let value = lab.run();
        let log = lab.device.log.lock().unwrap().clone();
        assert_eq!(log, [(0x70, vec![value as u8]), (0x80, (value as u32).to_le_bytes().to_vec())]);
        // A second read would have given another value.
        assert_eq!(lab.word(DATA) as u8, 11);
    });
}

#[test]
fn device_memory_is_read_once_and_both_see_what_was_read() {
    let guest = |a: &mut CodeAssembler| {
        a.mov(esi, DEVICE as u32)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(word_ptr(rsi + 6), ax)?;
        a.add(dword_ptr(rsi + 8), eax)?;
        a.movdqu(xmm0, xmmword_ptr(rsi + 16))?;
        a.movdqu(xmmword_ptr(rbx + 16), xmm0)?;
        a.hlt()
    };
    both(guest, |lab| {
        let value = lab.run();
        assert_eq!(lab.word(DATA), value);
        let log = lab.device.log.lock().unwrap();
        let places: Vec<_> = log.iter().map(|(at, data)| (*at, data.len())).collect();
        assert_eq!(places, [(DEVICE + 6, 2), (DEVICE + 8, 4)]);
        assert_ne!(lab.word(DATA + 16), 0);
    });
}

#[test]
fn memory_that_a_device_writes_is_seen_behind_the_access_and_not_before() {
    let guest = |a: &mut CodeAssembler| {
        // Before: what the guest writes is overwritten by the device. Behind: the other way round.
        a.mov(qword_ptr(rbx), 1)?;
        a.mov(r8, qword_ptr(rbx + 8))?;
        a.mov(al, 16)?;
        a.mov(dx, 0x500)?;
        a.out(dx, al)?;
        a.mov(rcx, qword_ptr(rbx))?;
        a.mov(byte_ptr(rbx + 1), 0)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.hlt()
    };
    both(guest, |lab| {
        assert_eq!(lab.run(), 0xaaaa_aaaa_aaaa_00aa);
        let state = lab.vcpu.state();
        assert_eq!((state.gpr[8], state.gpr[1]), (0, 0xaaaa_aaaa_aaaa_aaaa));
    });
}

#[test]
fn code_that_a_device_writes_runs_on_both() {
    // 0xaa is STOSB: the device puts it over the NOPs at DATA, which the guest has run before.
    let guest = |a: &mut CodeAssembler| {
        a.mov(edi, DATA as u32 + 0x800)?;
        a.call(rbx)?;
        a.mov(al, 3)?;
        a.mov(dx, 0x500)?;
        a.out(dx, al)?;
        a.call(rbx)?;
        a.mov(rax, rdi)?;
        a.hlt()
    };
    both(guest, |lab| {
        lab.memory.write_bytes(GuestAddress(DATA), &[0x90, 0x90, 0x90, 0xc3]).unwrap();
        assert_eq!(lab.run(), DATA + 0x803);
    });
}

#[test]
fn code_that_the_guest_writes_runs_on_both() {
    let guest = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(ecx, 20)?;
        a.xor(eax, eax)?;
        a.lea(rsi, ptr(again))?;
        a.set_label(&mut again)?;
        a.add(eax, 1)?;
        // The immediate of the addition.
        a.inc(byte_ptr(rsi + 1))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    };
    both(guest, |lab| assert_eq!(lab.run(), (1..=20).sum::<u64>()));
}

/// The local APIC software-enabled, by its page of registers.
fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(esi, 0xfee0_0000_u32)?;
    a.mov(dword_ptr(rsi + 0xf0), 0x1ff)
}

#[test]
fn interrupt_is_taken_by_both_at_the_same_instruction() {
    let guest = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        enable_apic(a)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.inc(r8)?;
        a.jmp(again)
    };
    both(guest, |lab| {
        // The only thing that happens at a time of its own: an interrupt after 100,003 instructions.
        let sink = lab.vm.interrupts();
        let timer = Arc::clone(&lab.timers).add(move |_| sink.send_msi(0xfee0_0000, 0x51));
        timer.arm(VirtualTime(100_003));
        lab.map_apic();
        assert_eq!(lab.run(), 0x51);
        assert_eq!(lab.vcpu.state().gpr[8], 50_000);
    });
}

#[test]
fn local_apic_answers_both_by_its_page_its_msrs_and_cr8() {
    let guest = |a: &mut CodeAssembler| {
        enable_apic(a)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(r8, cr8)?;
        a.mov(r9d, dword_ptr(rsi + 0x80))?;
        // The timer counts down.
        a.mov(dword_ptr(rsi + 0x3e0), 0b1011)?;
        a.mov(dword_ptr(rsi + 0x380), 1_000_000)?;
        a.mov(r10d, dword_ptr(rsi + 0x390))?;
        // x2APIC mode: the page is gone, the MSRs are there.
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 0xc00)?;
        a.wrmsr()?;
        a.mov(ecx, 0x808)?;
        a.rdmsr()?;
        a.hlt()
    };
    both(guest, |lab| {
        lab.map_apic();
        assert_eq!(lab.run(), 0x50);
        let state = lab.vcpu.state();
        assert_eq!((state.gpr[8], state.gpr[9]), (5, 0x50));
        assert!((900_000..1_000_000).contains(&state.gpr[10]), "{}", state.gpr[10]);
    });
}

#[test]
fn exceptions_time_and_random_numbers_are_the_same_on_both() {
    let guest = |a: &mut CodeAssembler| {
        a.rdtsc()?;
        a.mov(qword_ptr(rbx), rax)?;
        a.rdrand(r9)?;
        a.mov(ecx, 100)?;
        a.rep().stosb()?;
        a.fninit()?;
        a.fld1()?;
        a.fldpi()?;
        a.fadd_2(st1, st0)?;
        a.xor(esi, esi)?;
        a.mov(esi, dword_ptr(rsi - 8))?;
        a.hlt()
    };
    both(guest, |lab| {
        let mut state = lab.vcpu.state();
        state.gpr[7] = DATA + 0x100;
        lab.vcpu.set_state(&state).unwrap();
        // A page fault.
        assert_eq!(lab.run(), 14);
    });
}

#[test]
fn accessed_bit_of_running_code_that_is_cleared_without_a_flush_is_no_difference() {
    // Another page of code that takes the place of this one in the soft TLB's table of fetches: the interpreter knows the way
    // back without it, translated code does not.
    const OTHER: u64 = CODE + 0x1000 * FETCH_ENTRIES as u64;
    let guest = |a: &mut CodeAssembler| {
        let (mut again, mut back) = (a.create_label(), a.create_label());
        a.mov(qword_ptr(0x8000 + 8 * (OTHER >> 21)), 0xb003)?;
        a.mov(qword_ptr(0xb000 + 8 * 0x10), 0x5_0003)?;
        // jmp r8
        a.mov(dword_ptr(0x5_0000), 0x00e0_ff41)?;
        a.lea(r8, ptr(back))?;
        a.mov(r9d, OTHER as u32)?;
        a.mov(ecx, 10)?;
        // The page-table entry of this code.
        a.mov(edi, 0x9000 + 8 * 0x10)?;
        a.set_label(&mut again)?;
        a.and(byte_ptr(rdi), !0x20)?;
        a.jmp(r9)?;
        a.set_label(&mut back)?;
        a.inc(eax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    };
    both(guest, |lab| {
        assert_eq!(lab.run(), 10);
        assert!(lab.vcpu.pair.figures.adopted > 0);
    });
}
