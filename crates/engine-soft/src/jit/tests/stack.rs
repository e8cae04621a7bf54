//! The stack's page is remembered apart; what is not in it must not be taken for it.

use ringfence_memory::GuestAddress;

use super::*;
use crate::jit::state::NO_STACK;

/// `top: mov rsp,[rsi]; add rsi,8; xor [rsp+0x57],r13b; jmp top`.
const LOOP: [u8; 14] = [0x48, 0x8b, 0x26, 0x48, 0x83, 0xc6, 0x08, 0x44, 0x30, 0x6c, 0x24, 0x57, 0xeb, 0xf2];

/// A machine that has executed the loop with good pointers, and is about to with a bad one, from a stack whose page is not there.
fn about_to_use(bad: u64) -> (Interpreter, Jit) {
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &LOOP).unwrap();
    let write = |m: &Interpreter, at: u64, value: u64| m.cpu.memory.write(GuestAddress(at), value).unwrap();
    for n in 0..40 {
        write(&m, DATA + 0x6000 + 8 * n, DATA + 0x1000 * (n % 3));
    }
    write(&m, DATA + 0x6000 + 8 * 40, bad);
    m.cpu.regs[6] = DATA + 0x6000;
    m.cpu.regs[13] = 0xff;
    m.cpu.regs[RIP] = CODE;
    let mut jit = Jit::new(Options { threshold: 1, ..OPTIONS }, &m.cpu.code).unwrap();
    while m.cpu.regs[6] < DATA + 0x6000 + 8 * 40 {
        jit.run(&mut m, 4).unwrap();
    }
    assert!(jit.cache.sizes.regions > 0);
    m.cpu.regs[RIP] = CODE;
    m.cpu.regs[4] = 0x2_4800;
    (m, jit)
}

#[test]
fn stack_pointer_that_is_not_canonical_faults_while_the_stack_is_not_known() {
    for bad in [1 << 63, (1 << 63) - 0x57, 1 << 47, u64::MAX << 48, NO_STACK - 0x58, NO_STACK + 0x1000] {
        let (mut m, mut jit) = about_to_use(bad);
        assert_eq!(until_fault(&mut m, &mut jit), Exception::SS0, "{bad:#x}");
        assert_eq!((m.cpu.regs[RIP], m.cpu.regs[4]), (CODE + 7, bad));
    }
}

#[test]
fn stack_pointer_that_stands_for_no_page_reaches_nothing() {
    let (mut m, mut jit) = about_to_use(NO_STACK + 0x800);
    let before = bytes(&m, 0, 1 << 20);
    jit.run(&mut m, 4).unwrap();
    assert!(before == bytes(&m, 0, 1 << 20));
}
