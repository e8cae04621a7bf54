//! Mistakes of the translator, made on purpose: each is told in the first block that makes it.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_engine::VirtualTime;
use ringfence_memory::GuestAddress;

use super::lab::{CODE, DATA, Lab};
use crate::jit::seeded::SeededBug;
use crate::lockstep::LockstepOptions;

const BATCH: LockstepOptions = LockstepOptions {
    batch: Some(100),
    full: 1 << 20,
    jit: crate::jit::Options {
        code_size: 1 << 20,
        threshold: 1,
        region: 64,
        ample: 20,
        exact_flags: true,
        profile: false,
    },
};

/// Some blocks without the mistake, then one that has it, then others.
fn guest(a: &mut CodeAssembler, wrong: impl FnOnce(&mut CodeAssembler)) -> Result<(), IcedError> {
    let (mut first, mut second, mut third) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(eax, 1)?;
    a.jmp(first)?;
    a.nop()?;
    a.set_label(&mut first)?;
    a.add(eax, eax)?;
    a.jmp(second)?;
    a.nop()?;
    a.set_label(&mut second)?;
    wrong(a);
    a.jmp(third)?;
    a.nop()?;
    a.set_label(&mut third)?;
    // A region that does not fit what is left of a batch is interpreted: this keeps the wrong one from being the last.
    for _ in 0..20 {
        a.inc(ecx)?;
    }
    a.hlt()
}

fn condition(a: &mut CodeAssembler) {
    let mut over = a.create_label();
    a.cmp(eax, 2).unwrap();
    a.je(over).unwrap();
    a.mov(edx, 7).unwrap();
    a.set_label(&mut over).unwrap();
}

fn flags(a: &mut CodeAssembler) {
    // ZF changes from clear to set.
    a.shl(eax, 31).unwrap();
}

fn displacement(a: &mut CodeAssembler) {
    a.mov(qword_ptr(rbx + 16), rax).unwrap();
}

fn report(bug: SeededBug, options: LockstepOptions, wrong: fn(&mut CodeAssembler)) -> String {
    let mut right = Lab::new(options, |a| guest(a, wrong));
    right.run();
    let mut lab = Lab::new(options, |a| guest(a, wrong)).seed(bug);
    let report = lab.apart();
    println!("{report}");
    report
}

#[test]
fn wrong_condition_is_told_in_the_block_that_has_it() {
    let report = report(SeededBug::WrongCondition, LockstepOptions::default(), condition);
    // mov, jmp, add and jmp went well.
    assert!(report.contains("2 instructions since they last agreed, at count 4\n"), "{report}");
    assert!(report.contains("je "), "{report}");
    assert!(report.contains("  rip\n"), "{report}");
    assert!(report.contains("translated, "), "{report}");
}

#[test]
fn lost_flags_are_told_in_the_block_that_loses_them() {
    let report = report(SeededBug::LostFlags, LockstepOptions::default(), flags);
    assert!(report.contains("instructions since they last agreed, at count 4\n"), "{report}");
    assert!(report.contains("  rflags\n"), "{report}");
    assert!(!report.contains("  rax\n"), "{report}");
}

#[test]
fn store_to_a_wrong_place_is_told_in_the_block_that_makes_it() {
    let report = report(SeededBug::WrongDisplacement, LockstepOptions::default(), displacement);
    assert!(report.contains("instructions since they last agreed, at count 4\n"), "{report}");
    assert!(report.contains(&format!("memory at {:#x}", DATA + 16)), "{report}");
    assert!(!report.contains("  rip\n"), "{report}");
}

#[test]
fn each_mistake_is_told_where_blocks_lead_to_one_another_too() {
    for (bug, wrong) in [
        (SeededBug::WrongCondition, condition as fn(&mut CodeAssembler)),
        (SeededBug::LostFlags, flags),
        (SeededBug::WrongDisplacement, displacement),
    ] {
        let report = report(bug, BATCH, wrong);
        assert!(report.contains("at count 0\n"), "{report}");
        assert!(report.contains(&format!("guest code at {CODE:#x}")), "{report}");
    }
}

#[test]
fn store_of_what_is_there_already_to_a_wrong_place_is_told() {
    // The right place holds the value before, so only the stray store shows: on a page that nobody else writes.
    let wrong = |a: &mut CodeAssembler| {
        a.mov(qword_ptr(rbx + 0xff8), rdx).unwrap();
    };
    let mut lab =
        Lab::new(LockstepOptions::default(), |a| guest(a, wrong)).seed(SeededBug::WrongDisplacement);
    lab.memory.write(GuestAddress(DATA + 0x1000), 5_u64).unwrap();
    let report = lab.apart();
    assert!(report.contains(&format!("memory at {:#x}", DATA + 0x1000)), "{report}");
    assert!(report.contains("at count 4\n"), "{report}");
}

#[test]
fn memory_that_differs_unseen_is_told_at_the_end() {
    let mut lab = Lab::new(LockstepOptions::default(), |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100_000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
    // What no code of ours does: it changes the translator's memory behind everybody's back.
    let shadow = Arc::clone(&lab.vcpu.pair.shadow);
    let timer = lab.timers.add(move |_| shadow.write(GuestAddress(0x5_0000), 1_u8).unwrap());
    timer.arm(VirtualTime(1000));
    let report = lab.apart();
    assert!(report.contains("memory at 0x50000"), "{report}");
    assert!(report.contains("all memory compared"), "{report}");
}
