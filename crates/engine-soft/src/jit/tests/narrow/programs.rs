//! Programs of 32-bit code with known results, and such that must end as in the interpreter.

use super::*;
use crate::jit::stubs::reason;

/// What is left of a program: the exception that ended it, registers, instructions, and memory.
type End = (Exception, [u64; 18], u64, Vec<u8>);

/// Runs 32-bit code until it raises an exception, translated from its first execution on.
fn run(code: &[u8], change: impl FnOnce(&mut Cpu)) -> (End, Interpreter, Jit) {
    run_from(code, CODE, 1, change)
}

fn run_from(
    code: &[u8],
    start: u64,
    threshold: u8,
    change: impl FnOnce(&mut Cpu),
) -> (End, Interpreter, Jit) {
    let mut m = machine();
    prepare(&mut m.cpu, true);
    m.cpu.memory.write_bytes(GuestAddress(CODE + (start & 0xfff)), code).unwrap();
    m.cpu.regs[RIP] = start;
    m.cpu.regs[4] = DATA + 0x2000;
    change(&mut m.cpu);
    let mut jit = Jit::new(Options { threshold, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    let exception = until_fault(&mut m, &mut jit);
    let memory = bytes(&m, DATA, DATA_LEN);
    ((exception, m.cpu.regs, m.cpu.retired, memory), m, jit)
}

/// Runs code under the interpreter and translated; both must end alike. Returns the end, and the share of what handlers had no part in, in percent.
fn same(code: &[u8], start: u64, change: impl Fn(&mut Cpu)) -> (End, u64) {
    let (expected, ..) = run_from(code, start, 200, &change);
    let (found, m, jit) = run_from(code, start, 1, &change);
    assert_eq!((found.0, found.1, found.2), (expected.0, expected.1, expected.2));
    assert!(found.3 == expected.3, "memory");
    (found, 100 * jit.executed.saturating_sub(m.cpu.translated.interpreted) / m.cpu.retired.max(1))
}

#[test]
fn instructions_that_end_together_are_not_taken_for_each_other() {
    // inc ax, whose second byte is inc eax; dec ecx; jnz to that; ud2
    let code = [0x66, 0x40, 0x49, 0x75, 0xfc, 0x0f, 0x0b];
    let (_, m, _) = run(&code, |cpu| (cpu.regs[0], cpu.regs[1]) = (0x1_fffe, 3));
    assert_eq!(m.cpu.regs[0], 0x2_0001);
}

#[test]
fn recursive_fibonacci_is_right_and_translated() {
    // mov edi,20; call fib; ud2; fib: cmp edi,2; jb base; push edi; dec edi; call fib; pop edi; push eax; sub edi,2;
    // call fib; pop ecx; add eax,ecx; ret; base: mov eax,edi; ret
    let code = [
        0xbf, 20, 0, 0, 0, 0xe8, 2, 0, 0, 0, 0x0f, 0x0b, 0x83, 0xff, 0x02, 0x72, 0x16, 0x57, 0x4f, 0xe8,
        0xf4, 0xff, 0xff, 0xff, 0x5f, 0x50, 0x83, 0xef, 0x02, 0xe8, 0xea, 0xff, 0xff, 0xff, 0x59, 0x01, 0xc8,
        0xc3, 0x90, 0x89, 0xf8, 0xc3,
    ];
    let (end, m, jit) = run(&code, |_| ());
    assert_eq!((end.0, m.cpu.regs[0], m.cpu.regs[4]), (Exception::UD, 6765, DATA + 0x2000));
    // 10,946 leaves of 4 instructions, 10,945 inner calls of 12, and 2 around them.
    assert_eq!(m.cpu.retired, 10_946 * 4 + 10_945 * 12 + 2);
    assert!(m.cpu.retired - jit.executed + m.cpu.translated.interpreted < 20);
}

#[test]
fn return_that_takes_arguments_off_the_stack_is_translated() {
    // top: push eax; push ecx; call f; dec ecx; jnz top; ud2; f: inc eax; ret 8
    let code = [0x50, 0x51, 0xe8, 5, 0, 0, 0, 0x49, 0x75, 0xf6, 0x0f, 0x0b, 0x40, 0xc2, 8, 0];
    let (end, m, _) = run(&code, |cpu| (cpu.regs[0], cpu.regs[1]) = (0, 1000));
    assert_eq!((end.0, m.cpu.regs[0], m.cpu.regs[4]), (Exception::UD, 1000, DATA + 0x2000));
    assert!(m.cpu.translated.interpreted < 20, "{}", m.cpu.translated.interpreted);
    // The same with another return address, so that it does not match the call: f: pop edx; lea edx,[edx]; push edx; and a target that
    // nothing is known of.
    let code = [0x50, 0x51, 0x68, 0, 0, 0, 0, 0xc2, 8, 0, 0x0f, 0x0b];
    let ((exception, regs, ..), _) = same(&code, CODE, |cpu| cpu.regs[1] = 7);
    assert_eq!((exception.vector, regs[4]), (ringfence_x86::Vector::PageFault, DATA + 0x2000));
}

#[test]
fn addresses_wrap_at_4_gib() {
    // mov ecx,100; top: inc dword [ebx+DATA+0x20]; add eax,[ebx+DATA+0x24]; mov edx,[ebx+DATA+0x20]; dec ecx; jnz top;
    // lea esi,[ebx+0x30]; ud2
    let field = |at: u64| (at as u32).to_le_bytes();
    let code = [
        &[0xb9, 100, 0, 0, 0, 0xff, 0x83][..],
        &field(DATA + 0x20),
        &[0x03, 0x83],
        &field(DATA + 0x24),
        &[0x8b, 0x93],
        &field(DATA + 0x20),
        &[0x49, 0x75, 0xeb, 0x8d, 0x73, 0x30, 0x0f, 0x0b],
    ]
    .concat();
    let ((exception, regs, ..), share) = same(&code, CODE, |cpu| {
        cpu.regs[3] = 0xffff_fff0;
        cpu.memory.write(GuestAddress(DATA + 0x14), 3_u32).unwrap();
    });
    assert_eq!((exception, regs[2], regs[0], regs[6]), (Exception::UD, 100, 300, 0x20));
    assert!(share > 95, "{share} %");
}

/// Makes the last page of 4 GiB that of [`DATA`].
fn map_the_last_page(cpu: &mut Cpu) {
    cpu.memory.write(GuestAddress(0x3000 + 8 * 511), 0x4003_u64).unwrap();
    cpu.memory.write(GuestAddress(0x4000 + 8 * 511), DATA | 3).unwrap();
}

#[test]
fn stack_pointer_wraps_at_4_gib() {
    // top: push eax; push ebx; pop edx; pop esi; dec ecx; jnz top; ud2
    let code = [0x50, 0x53, 0x5a, 0x5e, 0x49, 0x75, 0xf9, 0x0f, 0x0b];
    for (pointer, ends_with) in [
        (0, Exception::UD),
        (4, Exception::UD),
        (8, Exception::UD),
        (0xffff_fffc, Exception::UD),
        (2, Exception::SS0),
    ] {
        let ((exception, regs, ..), share) = same(&code, CODE, |cpu| {
            map_the_last_page(cpu);
            cpu.memory.write(GuestAddress(0x4000), DATA | 3).unwrap();
            (cpu.regs[0], cpu.regs[1], cpu.regs[3], cpu.regs[4]) = (1, 100, 2, pointer);
        });
        assert_eq!((exception, regs[4]), (ends_with, pointer), "{pointer:#x}");
        assert!(share > 90 || ends_with != Exception::UD, "{share} %");
    }
}

#[test]
fn counted_branches_are_translated() {
    // top: inc eax; loop top; jecxz on; ud2; on: mov ecx,10; top: cmp eax,eax; loope top; mov ecx,5; top: test eax,eax; loopne top; ud2
    let code = [
        0x40, 0xe2, 0xfd, 0xe3, 2, 0x0f, 0x0b, 0xb9, 10, 0, 0, 0, 0x39, 0xc0, 0xe1, 0xfc, 0xb9, 5, 0, 0, 0,
        0x85, 0xc0, 0xe0, 0xfc, 0x0f, 0x0b,
    ];
    let ((exception, regs, ..), share) = same(&code, CODE, |cpu| cpu.regs[1] = 7 << 32 | 1000);
    assert_eq!((exception, regs[0], regs[1], regs[RIP]), (Exception::UD, 1000, 0, CODE + 25));
    assert!(share > 95, "{share} %");
    // top: jecxz on; ud2; on: dec ebx; jnz top; ud2: of ECX, not RCX
    let ((exception, regs, ..), share) =
        same(&[0xe3, 2, 0x0f, 0x0b, 0x4b, 0x75, 0xf9, 0x0f, 0x0b], CODE, |cpu| {
            (cpu.regs[1], cpu.regs[3]) = (7 << 32, 1000);
        });
    assert_eq!((exception, regs[1], regs[RIP]), (Exception::UD, 7 << 32, CODE + 7));
    assert!(share > 95, "{share} %");
    // With a count of 16 bits: top: inc eax; loop top (cx); ud2
    let ((exception, regs, ..), _) =
        same(&[0x40, 0x67, 0xe2, 0xfc, 0x0f, 0x0b], CODE, |cpu| cpu.regs[1] = 0x5_0003);
    assert_eq!((exception, regs[0], regs[1]), (Exception::UD, 3, 0x5_0000));
}

#[test]
fn strings_are_measured_and_copied_by_host_code() {
    let text = |length: usize| [vec![b'x'; length], vec![0]].concat();
    let measured = |at: u64, length: usize| {
        // top: mov edi,esi; or ecx,-1; xor eax,eax; repne scasb; not ecx; dec ecx; add edx,ecx; dec ebx; jnz top; ud2
        let code = [
            0x89, 0xf7, 0x83, 0xc9, 0xff, 0x31, 0xc0, 0xf2, 0xae, 0xf7, 0xd1, 0x49, 0x01, 0xca, 0x4b, 0x75,
            0xef, 0x0f, 0x0b,
        ];
        let ((exception, regs, ..), share) = same(&code, CODE, |cpu| {
            (cpu.regs[2], cpu.regs[3], cpu.regs[6], cpu.regs[7]) = (0, 100, at, 9 << 32);
            cpu.memory.write_bytes(GuestAddress(at), &text(length)).unwrap();
        });
        assert_eq!(
            (exception, regs[2], regs[7]),
            (Exception::UD, 100 * length as u64, at + length as u64 + 1)
        );
        share
    };
    assert!(measured(DATA + 0x10, 20) > 97);
    assert!(measured(DATA + 0x10, 0) > 97);
    assert!(measured(DATA + 0xff0, 15) > 97, "up to the page's last byte");
    assert!(measured(DATA + 0xff0, 16) < 95, "beyond it, the handler does it");
    // top: lodsb; stosb; test al,al; jnz top; ud2
    let ((exception, _, _, memory), share) =
        same(&[0xac, 0xaa, 0x84, 0xc0, 0x75, 0xfa, 0x0f, 0x0b], CODE, |cpu| {
            (cpu.regs[6], cpu.regs[7]) = (DATA, 5 << 32 | (DATA + 0x800));
            cpu.memory.write_bytes(GuestAddress(DATA), &text(300)).unwrap();
        });
    assert_eq!((exception, &memory[0x800..0x92d]), (Exception::UD, &text(300)[..]));
    assert!(share > 97, "{share} %");
}

#[test]
fn pops_to_memory_are_translated() {
    // top: push ecx; pop [ebx]; push [ebx]; pop [ebx+ecx*4]; add eax,[ebx+ecx*4]; push ecx; pop [esp+8]; loop top; ud2
    let code = [
        0x51, 0x8f, 0x03, 0xff, 0x33, 0x8f, 0x04, 0x8b, 0x03, 0x04, 0x8b, 0x51, 0x8f, 0x44, 0x24, 8, 0xe2,
        0xee, 0x0f, 0x0b,
    ];
    let ((exception, regs, _, memory), share) =
        same(&code, CODE, |cpu| (cpu.regs[0], cpu.regs[1], cpu.regs[3]) = (0, 200, DATA));
    assert_eq!((exception, regs[0], regs[4]), (Exception::UD, 20_100, DATA + 0x2000));
    assert_eq!((memory[800], memory[0x2008]), (200, 1));
    assert!((80..95).contains(&share), "all but the one with ESP: {share} %");
}

#[test]
fn repeated_comparison_of_nothing_leaves_the_flags_alone() {
    // top: xchg eax,ebx; cmp eax,ebx; repne scasb, with ECX 0; setb dl; add esi,edx; dec ebp; jnz top; ud2
    let code = [0x93, 0x39, 0xd8, 0xf2, 0xae, 0x0f, 0x92, 0xc2, 0x01, 0xd6, 0x4d, 0x75, 0xf3, 0x0f, 0x0b];
    let ((exception, regs, ..), _) = same(&code, CODE, |cpu| {
        for (register, value) in [(0, 7), (1, 0), (2, 0), (3, 9), (5, 100), (6, 0), (7, DATA)] {
            cpu.regs[register] = value;
        }
    });
    assert_eq!((exception, regs[6]), (Exception::UD, 50));
}

#[test]
fn stack_pointer_with_more_than_32_bits_is_cut() {
    // top: push eax; pop edx; dec ecx; jnz top; ud2, with the stack's page in the soft TLB
    let code = [0x50, 0x5a, 0x49, 0x75, 0xfb, 0x0f, 0x0b];
    let ((exception, regs, ..), _) = same(&code, CODE, |cpu| {
        cpu.store(SegmentRegister::Ss as u8, DATA + 0x1ff0, 0_u32).unwrap();
        (cpu.regs[1], cpu.regs[4]) = (100, 7 << 32 | (DATA + 0x2000));
    });
    assert_eq!((exception, regs[4]), (Exception::UD, DATA + 0x2000));
    // add esi,[esp]; dec ecx; jnz top; ud2: nothing cuts it.
    let code = [0x03, 0x34, 0x24, 0x49, 0x75, 0xfa, 0x0f, 0x0b];
    same(&code, CODE, |cpu| (cpu.regs[1], cpu.regs[4]) = (100, 7 << 32 | (DATA + 0x2000)));
}

#[test]
fn data_segment_that_is_not_flat_has_its_limit() {
    // mov ecx,20; top: add eax,[ebx]; dec ecx; jnz top; mov ecx,20; mov edx,SHORT; mov ds,edx; top: add eax,[ebx]; add ebx,0x400;
    // dec ecx; jnz top; ud2
    let code = [
        0xb9,
        20,
        0,
        0,
        0,
        0x03,
        0x03,
        0x49,
        0x75,
        0xfb,
        0xb9,
        20,
        0,
        0,
        0,
        0xba,
        selector::SHORT as u8,
        0,
        0,
        0,
        0x8e,
        0xda,
        0x03,
        0x03,
        0x81,
        0xc3,
        0,
        4,
        0,
        0,
        0x49,
        0x75,
        0xf5,
        0x0f,
        0x0b,
    ];
    let ((exception, regs, ..), share) = same(&code, CODE, |cpu| cpu.regs[3] = DATA);
    // 0x22 pages.
    assert_eq!((exception, regs[3], regs[RIP]), (Exception::GP0, 0x2_2000, CODE + 22));
    assert!((10..80).contains(&share), "{share} %");
}

#[test]
fn segment_of_its_own_base_is_used_and_limited() {
    // top: inc dword [edi]; add eax,gs:[ebx]; inc dword gs:[8]; mov ebx,esi; dec ecx; jnz top; ud2: where GS has no say, all are found in the
    // soft TLB.
    let code = [
        0xff, 0x07, 0x65, 0x03, 0x03, 0x65, 0xff, 0x05, 8, 0, 0, 0, 0x89, 0xf3, 0x49, 0x75, 0xef, 0x0f, 0x0b,
    ];
    let with = |selector: u16, first: u64, then: u64| {
        same(&code, CODE, |cpu| {
            load(cpu, SegmentRegister::Gs, selector);
            cpu.update_mode();
            let base = cpu.segment(SegmentRegister::Gs).base;
            (cpu.regs[1], cpu.regs[3], cpu.regs[6], cpu.regs[7]) = (100, first, then, base + 8);
            cpu.memory.write(GuestAddress(0x2_0ffe + 0x10), 7_u32).unwrap();
        })
    };
    let ((exception, regs, _, memory), share) = with(selector::AHEAD, 0x10, 0x10);
    assert_eq!((exception, regs[0]), (Exception::UD, 700));
    assert_eq!(memory[0x1006], 200);
    assert!(share > 95, "{share} %");
    // Four bytes from there end with the segment, or go beyond it.
    assert_eq!(with(selector::AHEAD, 0xffff_fff0, 0xffff_fffc).0.0, Exception::UD);
    for at in [0xffff_fffd, 0xffff_ffff] {
        let ((exception, regs, ..), _) = with(selector::AHEAD, 0xffff_fff0, at);
        assert_eq!((exception, regs[1], regs[RIP]), (Exception::GP0, 99, CODE + 2));
    }
    let ((exception, regs, ..), _) = with(selector::READABLE, 16, 16);
    assert_eq!((exception, regs[RIP]), (Exception::GP0, CODE + 5), "what cannot be written is read");
    let ((exception, regs, ..), _) = with(0, 16, 16);
    assert_eq!((exception, regs[RIP]), (Exception::GP0, CODE + 2), "there is no segment");
}

#[test]
fn code_segment_is_not_written() {
    // top: add eax,cs:[ebx]; dec ecx; jnz top; mov cs:[ebx],eax; ud2
    let code = [0x2e, 0x03, 0x03, 0x49, 0x75, 0xfa, 0x2e, 0x89, 0x03, 0x0f, 0x0b];
    let ((exception, regs, ..), _) = same(&code, CODE, |cpu| (cpu.regs[1], cpu.regs[3]) = (10, DATA));
    assert_eq!((exception, regs[RIP]), (Exception::GP0, CODE + 6));
}

/// Two pages of code, with these bytes at the start of the first and at an offset in the second.
fn pages(first: &[u8], offset: usize, second: &[u8]) -> Vec<u8> {
    let mut code = vec![0xcc; CODE_LEN];
    code[..first.len()].copy_from_slice(first);
    code[0x1000 + offset..][..second.len()].copy_from_slice(second);
    code
}

#[test]
fn branches_wrap_at_4_gib() {
    // top: dec ecx; jmp to the next page 1 GiB below 0; there: xor edx,edx; div ecx; jmp top, 1 GiB above 4
    let code =
        pages(&[0x49, 0xe9, 0, 0x10, 0, 0xc0], 6, &[0x31, 0xd2, 0xf7, 0xf1, 0xe9, 0xf1, 0xef, 0xff, 0x3f]);
    let ((exception, regs, ..), share) = same(&code, CODE, |cpu| cpu.regs[1] = 1000);
    assert_eq!((exception, regs[RIP]), (Exception::DE, ALIAS32 + CODE + 0x1008));
    assert!(share > 95, "{share} %");
    // top: dec ecx; js out; call the ret in the next page 1 GiB below 0; jmp top; out: ud2
    let code = pages(&[0x49, 0x78, 7, 0xe8, 4, 0x10, 0, 0xc0, 0xeb, 0xf6, 0x0f, 0x0b], 12, &[0xc3]);
    let ((exception, regs, ..), share) = same(&code, CODE, |cpu| cpu.regs[1] = 1000);
    assert_eq!((exception, regs[RIP]), (Exception::UD, CODE + 10));
    assert!(share > 95, "{share} %");
}

#[test]
fn code_that_runs_out_of_4_gib_faults_there() {
    // nops up to the last byte of the last page
    let code = [0x90; 64];
    let ((exception, regs, ..), _) = same(&code, 0xffff_ffc0, |cpu| {
        map_the_last_page(cpu);
        cpu.memory.write(GuestAddress(0x4000 + 8 * 511), CODE | 3).unwrap();
    });
    assert_eq!((exception, regs[RIP]), (Exception::GP0, 1 << 32));
}

#[test]
fn upper_halves_of_registers_have_no_part_in_addresses() {
    // top: mov [ebx+esi*4],ecx; add eax,[edi]; jmp edx; ud2: all of them with something above
    let code = [0x89, 0x0c, 0xb3, 0x03, 0x07, 0xff, 0xe2];
    let ((exception, ..), _) = same(&code, CODE, |cpu| {
        let above = 0x1234_5678_0000_0000;
        (cpu.regs[3], cpu.regs[6], cpu.regs[7]) = (above | DATA, above | 8, above | (DATA + 0x20));
        cpu.regs[2] = above | (CODE + 0x100);
        cpu.memory.write_bytes(GuestAddress(CODE + 0x100), &[0x0f, 0x0b]).unwrap();
    });
    assert_eq!(exception, Exception::UD);
    // mov ecx,7; rep movsd; movsd; stosb; ud2
    let code = [0xb9, 7, 0, 0, 0, 0xf3, 0xa5, 0xa5, 0xaa, 0x0f, 0x0b];
    let ((exception, regs, ..), _) = same(&code, CODE, |cpu| {
        (cpu.regs[6], cpu.regs[7]) = (9 << 32 | DATA, 9 << 32 | (DATA + 0x100));
    });
    assert_eq!((exception, regs[6], regs[7]), (Exception::UD, DATA + 32, DATA + 0x121));
}

#[test]
fn endless_code_of_every_shape_is_left_when_its_budget_is_spent() {
    let call_by_register =
        [&[0xb8][..], &(CODE as u32).to_le_bytes(), &[0x54, 0x5c, 0x54, 0x5c, 0xff, 0xe0]].concat();
    let return_to_itself = [&[0x68][..], &(CODE as u32).to_le_bytes(), &[0xc3]].concat();
    let shapes: [&[u8]; 5] = [
        &[0xeb, 0xfe],
        &call_by_register,
        // call to the next; pop eax; jmp back
        &[0xe8, 0, 0, 0, 0, 0x58, 0xeb, 0xf8],
        &return_to_itself,
        // call +2; jmp -7; ret
        &[0xe8, 2, 0, 0, 0, 0xeb, 0xf9, 0xc3],
    ];
    for code in shapes {
        let mut m = machine();
        prepare(&mut m.cpu, true);
        m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
        (m.cpu.regs[RIP], m.cpu.regs[4]) = (CODE, DATA + 0x2000);
        let mut jit = Jit::new(Options { threshold: 2, ..OPTIONS }, &m.cpu.code).unwrap();
        for limit in [1, 7, 1000, 100_000] {
            let end = m.cpu.retired + limit;
            while m.cpu.retired < end {
                let left = end - m.cpu.retired;
                jit.run(&mut m, left).unwrap();
            }
            assert_eq!(m.cpu.retired, end, "{code:x?}");
        }
        assert!(jit.executed > 90_000, "{code:x?}");
        assert!(jit.exits[reason::LEAVE as usize] < 10, "{code:x?}");
    }
}
