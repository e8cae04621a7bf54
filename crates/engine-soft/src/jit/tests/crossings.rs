//! Links to other pages, and what becomes of them when pages are mapped otherwise.

use ringfence_memory::GuestAddress;
use ringfence_x86::Vector;

use super::*;
use crate::mmu::tlb::Page;

/// Where the functions are that are called; the program knows one linear page, [`CALLED`].
const CALLED: u64 = 0x4_0000;
const ONE: u64 = 0x4_0000;
const TWO: u64 = 0x5_0000;
/// The entry of the page table for [`CALLED`].
const MAPPING: u64 = 0x4000 + 8 * (CALLED >> 12);
/// More than what it takes for a check to learn.
const ROUNDS: u32 = 50;

/// `mov ecx,rounds; top: call CALLED; jmp CALLED+0x100 (which comes back); dec ecx; jnz top; ud2`. The function adds to RBX.
fn lab() -> (Interpreter, Jit) {
    let mut code = vec![0xb9];
    code.extend_from_slice(&ROUNDS.to_le_bytes());
    let far = |code: &mut Vec<u8>, opcode: u8, at: u64, target: u64| {
        code.push(opcode);
        let behind = at + code.len() as u64 + 4;
        code.extend_from_slice(&(target.wrapping_sub(behind) as i32).to_le_bytes());
    };
    far(&mut code, 0xe8, CODE, CALLED);
    far(&mut code, 0xe9, CODE, CALLED + 0x100);
    let back = CODE + code.len() as u64;
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xf2, 0x0f, 0x0b]);
    let m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    for (page, number) in [(ONE, 1), (TWO, 100)] {
        put_function(&m, page, number);
        // add ebx,number; jmp back
        let mut code = vec![0x83, 0xc3, number];
        far(&mut code, 0xe9, CALLED + 0x100, back);
        m.cpu.memory.write_bytes(GuestAddress(page + 0x100), &code).unwrap();
    }
    let jit = Jit::new(Options { threshold: 2, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    (m, jit)
}

/// `add ebx,number; ret`.
fn put_function(m: &Interpreter, page: u64, number: u8) {
    m.cpu.memory.write_bytes(GuestAddress(page), &[0x83, 0xc3, number, 0xc3]).unwrap();
}

/// What RBX is after the program.
fn run(m: &mut Interpreter, jit: &mut Jit) -> u64 {
    m.cpu.regs[RIP] = CODE;
    m.cpu.regs[4] = DATA + 0x2000;
    m.cpu.regs[3] = 0;
    assert_eq!(until_fault(m, jit), Exception::UD, "at {:#x}", m.cpu.rip());
    assert_eq!(m.cpu.regs[4], DATA + 0x2000);
    m.cpu.regs[3]
}

fn map(m: &mut Interpreter, page: u64) {
    m.cpu.memory.write(GuestAddress(MAPPING), page | 3).unwrap();
    m.cpu.tlb.flush_page(CALLED);
}

#[test]
fn links_to_a_page_that_is_mapped_otherwise_lead_to_what_is_there() {
    let (mut m, mut jit) = lab();
    let rounds = u64::from(ROUNDS);
    for turn in 0..3 {
        assert_eq!(run(&mut m, &mut jit), rounds * 2, "turn {turn}");
        // There, and the way back.
        assert!(jit.cache.learnt() >= 3, "{} in turn {turn}", jit.cache.learnt());
        map(&mut m, TWO);
        assert_eq!(run(&mut m, &mut jit), rounds * 200, "turn {turn}");
        map(&mut m, ONE);
    }
    assert_eq!(jit.cache.sizes.invalidated, 0);
}

#[test]
fn links_lead_to_code_as_it_was_rewritten() {
    let (mut m, mut jit) = lab();
    assert_eq!(run(&mut m, &mut jit), u64::from(ROUNDS) * 2);
    let learnt = jit.cache.learnt();
    put_function(&m, ONE, 10);
    m.cpu.code.written(GuestAddress(ONE), 4);
    assert_eq!(run(&mut m, &mut jit), u64::from(ROUNDS) * 11);
    assert!(jit.cache.sizes.invalidated > 0 && jit.cache.learnt() >= learnt, "{:?}", jit.cache.sizes);
}

#[test]
fn page_that_is_gone_faults_at_the_call_through_a_learnt_link() {
    let (mut m, mut jit) = lab();
    run(&mut m, &mut jit);
    m.cpu.memory.write(GuestAddress(MAPPING), 0_u64).unwrap();
    m.cpu.tlb.flush_page(CALLED);
    // Another linear page has its place in the table, and its physical page.
    m.cpu.tlb.fill_fetch(false, ALIAS + CALLED, ONE, Page { size: 0x1000, global: false });
    m.cpu.regs[RIP] = CODE;
    assert_eq!(until_fault(&mut m, &mut jit).vector, Vector::PageFault);
    // The call has been executed, and the address that it came from is on the stack.
    assert_eq!((m.cpu.rip(), m.cpu.regs[4]), (CALLED, DATA + 0x2000 - 8));
}

#[test]
fn numbers_of_user_and_supervisor_code_differ_in_what_code_knows_of_them() {
    let (mut m, mut jit) = lab();
    run(&mut m, &mut jit);
    // Supervisor code in pages that are not global shares its address space's number.
    assert_eq!(m.cpu.tlb.generation(true), m.cpu.tlb.generation(false));
    let [kernel, user] = m.cpu.translated.privileges.map(|privilege| (privilege.context >> 32) as u32);
    assert!(kernel != user && kernel != 0 && user != 0, "{kernel:#x} and {user:#x}");
}

#[test]
fn code_does_not_outlive_the_numbers_that_it_can_tell_apart() {
    let (mut m, mut jit) = lab();
    for newest in [(1 << 31) - 10, u32::MAX - 10] {
        run(&mut m, &mut jit);
        let flushes = jit.cache.sizes.flushes;
        assert!(jit.cache.learnt() > 0);
        m.cpu.tlb.skip_generations(newest);
        let before = m.cpu.tlb.generation(false);
        assert_eq!(run(&mut m, &mut jit), u64::from(ROUNDS) * 2);
        assert_eq!(jit.cache.sizes.flushes, flushes + 1);
        assert_ne!(m.cpu.tlb.generation(false), before);
    }
}

#[test]
fn code_at_two_addresses_goes_from_each_to_the_page_behind_it() {
    // A page that calls the next one is mapped at two addresses of one address space.
    let m = machine();
    let first = 0x4_0000_u64;
    let second = 0x6_0000_u64;
    let map =
        |at: u64, page: u64| m.cpu.memory.write(GuestAddress(0x4000 + 8 * (at >> 12)), page | 3).unwrap();
    map(second, first);
    // call +0x1000; ret
    m.cpu.memory.write_bytes(GuestAddress(first), &[0xe8, 0xfb, 0x0f, 0, 0, 0xc3]).unwrap();
    put_function(&m, first + 0x1000, 1);
    put_function(&m, second + 0x1000, 100);
    // mov ecx,rounds; top: call rax; dec ecx; jnz top; xchg rax,rdx; call rax; ud2
    let mut code = vec![0xb9];
    code.extend_from_slice(&ROUNDS.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xd0, 0xff, 0xc9, 0x75, 0xfa, 0x48, 0x92, 0xff, 0xd0, 0x0f, 0x0b]);
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    let mut jit = Jit::new(Options { threshold: 2, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    let mut m = m;
    for turn in 0..4 {
        (m.cpu.regs[0], m.cpu.regs[2]) = (first, second);
        assert_eq!(run(&mut m, &mut jit), u64::from(ROUNDS) + 100, "turn {turn}");
    }
}
