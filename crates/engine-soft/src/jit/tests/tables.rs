//! A page table that is code as well.

use super::*;
use crate::interp::testing::{Lab, at};

/// The entry that maps [`PAGE`].
const ENTRY: u64 = at::TABLES + 0x3000 + 8 * (PAGE >> 12);
const PAGE: u64 = 0x8_0000;

/// Executes what is at an address until #UD.
fn run(lab: &mut Lab, jit: &mut Option<Jit>, rip: u64) {
    let cpu = &mut lab.m.cpu;
    cpu.regs[RIP] = rip;
    cpu.regs[4] = at::STACK;
    (cpu.regs[0], cpu.regs[6], cpu.regs[7]) = (at::DATA, PAGE, at::DATA);
    let end = (0..100).find_map(|_| {
        match jit {
            Some(jit) => jit.run(&mut lab.m, 100),
            None => lab.m.run_block(100),
        }
        .err()
    });
    assert_eq!(end, Some(Exception::UD));
}

#[test]
fn entry_marked_by_a_walk_is_executed_as_it_is_then() {
    for translated in [false, true] {
        let mut lab = Lab::long();
        let mut jit = translated.then(|| Jit::new(OPTIONS, &lab.m.cpu.code).unwrap());
        // push rbx, and with the accessed bit: jae to the next. Then additions to what RAX and RDI point at.
        lab.put(ENTRY, PAGE | 0x53);
        // The end of the last addition; ud2
        lab.put(ENTRY + 8, 0x0b_0f00_u64);
        // mov cl,[rsi]; ud2
        lab.memory.write_bytes(GuestAddress(at::CODE), &[0x8a, 0x0e, 0x0f, 0x0b]).unwrap();
        for _ in 0..4 {
            run(&mut lab, &mut jit, ENTRY);
            assert_eq!(lab.m.cpu.regs[4], at::STACK - 8, "translated: {translated}");
        }
        run(&mut lab, &mut jit, at::CODE);
        assert_eq!(lab.get::<u8>(ENTRY), 0x73);
        run(&mut lab, &mut jit, ENTRY);
        assert_eq!(lab.m.cpu.regs[4], at::STACK, "translated: {translated}");
    }
}
