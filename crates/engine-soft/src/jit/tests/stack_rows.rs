//! Rows of pushes and pops move the stack pointer once.

use ringfence_memory::GuestAddress;

use super::*;

/// Where the stack starts.
pub(super) const TOP: u64 = DATA + 0x1800;

/// How a run ended: the exception, registers, instructions and data.
pub(super) type End = (Exception, Vec<u64>, u64, Vec<u8>);

/// Runs code from each stack pointer in turn, all that the soft TLB knows being forgotten before if it is not `warm`.
pub(super) fn ends(code: &[u8], tops: &[u64], warm: bool, threshold: u8) -> (Vec<End>, Jit) {
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
    let mut jit = Jit::new(Options { threshold, ..OPTIONS }, &m.cpu.code).unwrap();
    let ends = tops.iter().map(|&top| {
        for number in 0..16 {
            m.cpu.regs[number] = 0x1111 * (number as u64 + 1);
        }
        (m.cpu.regs[4], m.cpu.regs[RIP]) = (top, CODE);
        if !warm {
            m.cpu.tlb.forget_all();
        }
        let before = m.cpu.retired;
        let end = until_fault(&mut m, &mut jit);
        (end, m.cpu.regs.to_vec(), m.cpu.retired - before, bytes(&m, DATA, DATA_LEN))
    });
    (ends.collect(), jit)
}

/// Runs code as [`ends`] and compares with the interpreter.
#[track_caller]
pub(super) fn same_as_interpreter(code: &[u8], tops: &[u64], warm: bool, what: &str) -> Jit {
    let (expected, _) = ends(code, tops, warm, 200);
    let (found, jit) = ends(code, tops, warm, 1);
    assert!(jit.cache.sizes.regions > 0);
    for (a, b) in expected.iter().zip(&found) {
        assert_eq!((a.0, &a.1, a.2), (b.0, &b.1, b.2), "{what}");
        assert!(a.3 == b.3, "memory, {what}");
    }
    jit
}

/// Likewise; there is a row in it.
#[track_caller]
pub(super) fn row_is_as_interpreted(code: &[u8], tops: &[u64], warm: bool) -> Jit {
    let jit = same_as_interpreter(code, tops, warm, "row");
    assert!(!jit.cache.rows.is_empty(), "no row");
    jit
}

/// Every way in which a row names the stack pointer while pushes are behind it.
const NAMES: &[&[u8]] = &[
    &[0x54],                         // push rsp
    &[0x48, 0x89, 0xe5],             // mov rbp,rsp
    &[0x48, 0x8d, 0x44, 0x24, 0x18], // lea rax,[rsp+0x18]
    &[0x48, 0x8d, 0x54, 0x8c, 0xf8], // lea rdx,[rsp+rcx*4-8]
    &[0x48, 0x01, 0xe6],             // add rsi,rsp
    &[0x40, 0x80, 0xfc, 0xf0],       // cmp spl,0xf0
    &[0x48, 0x89, 0x64, 0x24, 0x08], // mov [rsp+8],rsp
    &[0x48, 0x3b, 0x64, 0x24, 0x10], // cmp rsp,[rsp+0x10]
];

#[test]
fn row_that_names_the_stack_pointer_finds_it_moved() {
    for name in NAMES {
        // push rbx; push rcx; ...; push rdx; pop rdi; pop r12; setc al; ud2
        let code = [&[0x53, 0x51], *name, &[0x52, 0x5f, 0x41, 0x5c, 0x0f, 0x92, 0xc0, 0x0f, 0x0b]].concat();
        let jit = row_is_as_interpreted(&code, &[TOP; 3], true);
        assert_eq!(jit.cache.rows.len(), 1, "{name:x?}");
    }
}

#[test]
fn row_that_runs_apart_comes_back_with_the_stack_pointer() {
    // push rbx; push rcx; push rsp; pop rdx; push rbp; mov rax,rsp; ud2
    let code = [0x53, 0x51, 0x54, 0x5a, 0x55, 0x48, 0x89, 0xe0, 0x0f, 0x0b];
    // All in one page and over the edge of one, by turns.
    let tops = [TOP, DATA + 0x1010, TOP, DATA + 0x1008, DATA + 0x2000, TOP];
    for warm in [true, false] {
        let jit = row_is_as_interpreted(&code, &tops, warm);
        assert_eq!(jit.cache.sizes.apart, 1);
    }
}

#[test]
fn row_that_ends_in_a_call_leaves_the_stack_pointer_at_its_return_address() {
    // push rbx; push rcx; call f; mov rax,rsp; ud2; f: mov rdx,rsp; pop rsi; push rsi; ret
    let code =
        [0x53, 0x51, 0xe8, 5, 0, 0, 0, 0x48, 0x89, 0xe0, 0x0f, 0x0b, 0x48, 0x89, 0xe2, 0x5e, 0x56, 0xc3];
    row_is_as_interpreted(&code, &[TOP; 3], true);
}

/// What leads to a return to one of [`TARGETS`], and the return: in rows that move the stack pointer, and alone.
const RETURNS: [&[u8]; 3] = [
    // push rax; push rbx; pop rcx; ret
    &[0x50, 0x53, 0x59, 0xc3],
    // push rax; push rax; jmp next; next: pop rcx; ret
    &[0x50, 0x50, 0xeb, 0, 0x59, 0xc3],
    // push rax; push rax; jmp next; next: ret
    &[0x50, 0x50, 0xeb, 0, 0xc3],
];

/// An address that RET itself faults for, one of a page that is not present, and that of UD2.
const TARGETS: [u64; 3] = [0x8000_0000_0000_0001, DATA + 0x4000, CODE + 0x100];

#[test]
fn return_that_does_not_match_faults_with_the_stack_pointer_before_it() {
    for target in TARGETS {
        for way in RETURNS {
            // mov rax,target
            let mut code = [&[0x48, 0xb8], &target.to_le_bytes()[..], way].concat();
            code.resize(0x100, 0x90);
            code.extend_from_slice(&[0x0f, 0x0b]);
            same_as_interpreter(&code, &[TOP; 3], true, &format!("to {target:#x} by {way:x?}"));
        }
    }
}

#[test]
fn row_that_is_given_up_leaves_no_move_behind() {
    // push rax; lea cx,[rax], which has no code of its own; push rdx; ud2
    let code = [0x50, 0x66, 0x8d, 0x08, 0x52, 0x0f, 0x0b];
    let (found, jit) = ends(&code, &[TOP; 3], true, 1);
    assert!(jit.cache.rows.is_empty() && jit.cache.sizes.regions > 0);
    assert!(found.iter().all(|run| run.1[4] == TOP - 16));
}

#[test]
fn return_that_drops_a_call_comes_back_to_the_one_before() {
    // call f; mov rax,rsp; ud2; f: call g; nop; ud2; g: pop rdx; ret
    let code =
        [0xe8, 5, 0, 0, 0, 0x48, 0x89, 0xe0, 0x0f, 0x0b, 0xe8, 3, 0, 0, 0, 0x90, 0x0f, 0x0b, 0x5a, 0xc3];
    row_is_as_interpreted(&code, &[TOP; 4], true);
}
