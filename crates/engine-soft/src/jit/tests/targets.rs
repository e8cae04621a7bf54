//! Indirect branches that go to different places.

use ringfence_memory::GuestAddress;

use super::*;
use crate::jit::stubs::{TARGETS, jump_index, reason};

/// Two functions whose physical addresses share the rows of the table of jump targets.
const FIRST: u64 = 0x4_0000;
const SECOND: u64 = 0x4_8008;

/// [`run_two`] of those.
fn run(rounds: u32, between: &[u8], numbers: [u8; 2]) -> (Interpreter, Jit) {
    run_two(SECOND, rounds, between, numbers)
}

/// Calls a function at [`FIRST`] and one at `second` in turn, `rounds` times in all, with `between` after each call, and then raises #UD.
/// Each adds its number to RBX. RSI points at the immediate that is the first one's number.
fn run_two(second: u64, rounds: u32, between: &[u8], numbers: [u8; 2]) -> (Interpreter, Jit) {
    let mut code = Vec::new();
    for (opcode, value) in
        [(0xb9, rounds), (0xb8, FIRST as u32), (0xba, second as u32), (0xbe, FIRST as u32 + 2)]
    {
        code.push(opcode); // mov ecx, mov eax, mov edx, mov esi
        code.extend_from_slice(&value.to_le_bytes());
    }
    let top = code.len();
    code.extend_from_slice(&[0xff, 0xd0, 0x48, 0x92]); // call rax; xchg rax,rdx
    code.extend_from_slice(between);
    code.extend_from_slice(&[0xff, 0xc9]); // dec ecx
    let back = (top as i32 - code.len() as i32 - 2) as i8;
    code.extend_from_slice(&[0x75, back as u8, 0x0f, 0x0b]); // jnz top; ud2
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    for (at, number) in [FIRST, second].into_iter().zip(numbers) {
        m.cpu.memory.write_bytes(GuestAddress(at), &[0x83, 0xc3, number, 0xc3]).unwrap(); // add ebx,number; ret
    }
    m.cpu.regs[RIP] = CODE;
    m.cpu.regs[4] = DATA + 0x2000;
    m.cpu.regs[3] = 0;
    let mut jit = Jit::new(Options { threshold: 2, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    assert_eq!(until_fault(&mut m, &mut jit), Exception::UD, "at {:#x}", m.cpu.rip());
    (m, jit)
}

#[test]
fn targets_that_share_rows_do_not_displace_each_other() {
    let index = |address| jump_index(CodeAddress::new(GuestAddress(address), false));
    assert_eq!(index(FIRST), index(SECOND));
    // invlpg [rsi]: the first function's page must be asked for at every call, and addresses that were known are known no more.
    let (m, jit) = run(2000, &[0x0f, 0x01, 0x3e], [1, 100]);
    assert_eq!(m.cpu.regs[3], 1000 * 101);
    let unknown = jit.exits[reason::LOOKUP as usize];
    assert!((900..1200).contains(&unknown), "left {unknown} times");
}

#[test]
fn targets_in_turn_are_found_in_translated_code() {
    let (m, jit) = run(2000, &[], [1, 100]);
    assert_eq!(m.cpu.regs[3], 1000 * 101);
    let unknown = jit.exits[reason::LOOKUP as usize];
    assert!(unknown < 30, "left {unknown} times");
}

#[test]
fn targets_that_share_a_row_by_linear_address_are_found_in_translated_code() {
    // Bits 4 and up tell the row.
    let (m, jit) = run_two(FIRST + 16 * TARGETS as u64, 2000, &[], [1, 100]);
    assert_eq!(m.cpu.regs[3], 1000 * 101);
    let unknown = jit.exits[reason::LOOKUP as usize];
    assert!(unknown < 30, "left {unknown} times");
}

#[test]
fn target_that_is_rewritten_is_not_found_as_it_was() {
    // cmp ecx,1001; jne +3; mov byte [rsi],3: the first function adds 3 in the second half.
    let (m, _) = run(2000, &[0x81, 0xf9, 0xe9, 3, 0, 0, 0x75, 3, 0xc6, 0x06, 3], [1, 100]);
    assert_eq!(m.cpu.regs[3], 1000 * 100 + 500 + 500 * 3);
}
