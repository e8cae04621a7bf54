//! Programs with known results.

use ringfence_memory::GuestAddress;

use super::*;

/// Runs code at [`CODE`] under the translator until it raises #UD.
fn run(code: &[u8]) -> (Interpreter, Jit) {
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
    m.cpu.regs[RIP] = CODE;
    m.cpu.regs[4] = DATA + 0x2000;
    let options = Options { threshold: 2, code_size: 1 << 20, ..OPTIONS };
    let mut jit = Jit::new(options, &m.cpu.code).unwrap();
    assert_eq!(until_fault(&mut m, &mut jit), Exception::UD, "at {:#x}", m.cpu.rip());
    (m, jit)
}

#[test]
fn recursive_fibonacci_is_right_and_counted() {
    // mov edi,20; call fib; ud2; fib: cmp edi,2; jb base; push rdi; dec edi; call fib; pop rdi; push rax; sub edi,2;
    // call fib; pop rcx; add rax,rcx; ret; base: mov eax,edi; ret
    let code = [
        0xbf, 20, 0, 0, 0, 0xe8, 2, 0, 0, 0, 0x0f, 0x0b, 0x83, 0xff, 0x02, 0x72, 0x18, 0x57, 0xff, 0xcf,
        0xe8, 0xf3, 0xff, 0xff, 0xff, 0x5f, 0x50, 0x83, 0xef, 0x02, 0xe8, 0xe9, 0xff, 0xff, 0xff, 0x59, 0x48,
        0x01, 0xc8, 0xc3, 0xc3, 0x89, 0xf8, 0xc3,
    ];
    let (m, jit) = run(&code);
    assert_eq!(m.cpu.regs[0], 6765);
    assert_eq!(m.cpu.regs[4], DATA + 0x2000);
    // 10,946 leaves of 4 instructions, 10,945 inner calls of 12, and 2 around them.
    assert_eq!(m.cpu.retired, 10_946 * 4 + 10_945 * 12 + 2);
    assert!(jit.cache.sizes.regions >= 2, "{:?}", jit.cache.sizes);
}

#[test]
fn loop_whose_body_is_rewritten_runs_the_new_one() {
    // mov ecx,100; xor eax,eax; top: add eax,1 (its immediate is at CODE+9); mov byte [rip-8],2 if ecx==50; ...
    let code = [
        0xb9, 100, 0, 0, 0, 0x31, 0xc0, // mov ecx,100; xor eax,eax
        0x83, 0xc0, 0x01, // add eax,1
        0x83, 0xf9, 51, // cmp ecx,51
        0x75, 0x07, // jne +7
        0xc6, 0x05, 0xf3, 0xff, 0xff, 0xff, 2, // mov byte [rip-13],2: the immediate of the addition
        0xff, 0xc9, // dec ecx
        0x75, 0xed, // jnz top
        0x0f, 0x0b,
    ];
    let (m, jit) = run(&code);
    assert_eq!(m.cpu.regs[0], 50 + 100);
    assert!(jit.cache.sizes.invalidated > 0);
}

#[test]
fn full_code_memory_is_flushed_and_execution_goes_on() {
    let mut m = machine();
    let options = Options { threshold: 1, code_size: super::super::SMALLEST_CODE, ..OPTIONS };
    let mut jit = Jit::new(options, &m.cpu.code).unwrap();
    // A page of stores, rewritten over and over.
    let mut code: Vec<u8> = [0x48, 0xff, 0x03].repeat(40);
    code.extend_from_slice(&[0x0f, 0x0b]);
    m.cpu.regs[3] = DATA;
    for round in 0..800 {
        code[2] = 0x03;
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.regs[RIP] = CODE;
        while jit.run(&mut m, 1000).is_ok() {}
        assert_eq!(m.cpu.memory.read::<u64>(GuestAddress(DATA)).unwrap(), 40 * (round + 1));
    }
    assert!(jit.cache.sizes.flushes > 0, "{:?}", jit.cache.sizes);
}

#[test]
fn region_goes_on_behind_a_doubtful_branch_only_to_what_was_executed() {
    // Forty times JE to far behind, then UD2.
    let code: Vec<u8> = (0..40_u32)
        .flat_map(|n| [vec![0x0f, 0x84], (0x800 - n * 6).to_le_bytes().to_vec()].concat())
        .chain([0x0f, 0x0b])
        .collect();
    let instructions = |executed: u64| {
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.regs[RIP] = CODE;
        let mut jit = Jit::new(Options { ample: 20, ..OPTIONS }, &m.cpu.code).unwrap();
        jit.translate(&mut m.cpu, GuestAddress(CODE), |at| at < GuestAddress(executed));
        jit.cache.sizes.instructions
    };
    assert_eq!(instructions(0), 20);
    assert_eq!(instructions(CODE + 26 * 6), 26, "up to the first that was not executed");
    assert_eq!(instructions(CODE + 0x400), 41);
}

/// Runs a row of two stores and a load, with vector registers and flags in the host's, that the soft TLB knows nothing of: once for each room
/// that there is for its translation apart.
fn row_apart(rooms: &[bool]) -> (Interpreter, Jit) {
    // movq xmm0,rax; stc; movq [rbx],xmm0; mov [rbx+8],rcx; movq xmm1,[rbx]; setb dl; movq rsi,xmm1; ud2
    let code = [
        0x66, 0x48, 0x0f, 0x6e, 0xc0, 0xf9, 0x66, 0x0f, 0xd6, 0x03, 0x48, 0x89, 0x4b, 0x08, 0xf3, 0x0f, 0x7e,
        0x0b, 0x0f, 0x92, 0xc2, 0x66, 0x48, 0x0f, 0x7e, 0xce, 0x0f, 0x0b,
    ];
    let mut m = machine();
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    allow_vectors(&mut m.cpu, 1);
    m.cpu.regs[3] = DATA;
    m.cpu.regs[RIP] = CODE;
    let mut jit = Jit::new(Options { threshold: 1, ..OPTIONS }, &m.cpu.code).unwrap();
    jit.translate(&mut m.cpu, GuestAddress(CODE), |_| false);
    let rare = jit.cache.rare;
    for (round, &room) in rooms.iter().enumerate() {
        m.cpu.tlb.forget_all();
        (m.cpu.regs[0], m.cpu.regs[1], m.cpu.regs[2], m.cpu.regs[RIP]) = (round as u64 + 1, 7, 0, CODE);
        let retired = m.cpu.retired;
        jit.cache.rare = if room { rare } else { jit.cache.used };
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD, "at {:#x}", m.cpu.rip());
        assert_eq!((m.cpu.regs[6], m.cpu.regs[2]), (round as u64 + 1, 1));
        assert_eq!(m.cpu.memory.read::<u64>(GuestAddress(DATA + 8)).unwrap(), 7);
        assert_eq!(m.cpu.retired - retired, 7);
    }
    (m, jit)
}

#[test]
fn row_that_misses_is_translated_apart_once() {
    let (m, jit) = row_apart(&[true, true]);
    assert_eq!(jit.cache.sizes.apart, 1);
    assert!(m.cpu.translated.interpreted >= 2, "the first access of each round is its handler's");
}

#[test]
fn row_that_misses_where_there_is_no_room_is_interpreted() {
    let (_, jit) = row_apart(&[false, false]);
    assert_eq!(jit.cache.sizes.apart, 0);
}

#[test]
fn profile_counts_what_is_handed_to_handlers() {
    // mov edi,1000; top: cpuid; dec edi; jnz top; ud2
    let code = [0xbf, 0xe8, 3, 0, 0, 0x0f, 0xa2, 0xff, 0xcf, 0x75, 0xfa, 0x0f, 0x0b];
    let counted = [false, true].map(|profile| {
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.regs[RIP] = CODE;
        let mut jit = Jit::new(Options { threshold: 2, profile, ..OPTIONS }, &m.cpu.code).unwrap();
        while jit.run(&mut m, 1000).is_ok() {}
        assert_eq!(m.cpu.regs[7], 0);
        crate::jit::handed(&m.cpu).into_iter().find(|(name, _)| name == "Cpuid").map_or(0, |(_, count)| count)
    });
    assert_eq!(counted[0], 0);
    assert!((990..=1000).contains(&counted[1]), "{counted:?}");
}

#[test]
fn avx512_and_masked_accesses_run_as_they_are() {
    if !host_has_avx512() {
        println!("skipped: this host has no AVX-512");
        return;
    }
    // mov edi,1000; mov eax,0xf0f; kmovd k1,eax; top: vpaddd zmm20,zmm21,[rbx]; vmovdqu8 [rbx+64]{k1},zmm20;
    // vpcmpeqb k2,zmm20,[rbx+64]; kortestq k2,k2; vpternlogd zmm22{k1}{z},zmm20,zmm21,0x96; dec edi; jnz top;
    // kmovq rcx,k2; ud2
    let code = [
        0xbf, 0xe8, 3, 0, 0, 0xb8, 0x0f, 0x0f, 0, 0, 0xc5, 0xfb, 0x92, 0xc8, 0x62, 0xe1, 0x55, 0x40, 0xfe,
        0x23, 0x62, 0xe1, 0x7f, 0x49, 0x7f, 0x63, 0x01, 0x62, 0xf1, 0x5d, 0x40, 0x74, 0x53, 0x01, 0xc4, 0xe1,
        0xf8, 0x98, 0xd2, 0x62, 0xa3, 0x5d, 0xc1, 0x25, 0xf5, 0x96, 0xff, 0xcf, 0x75, 0xdc, 0xc4, 0xe1, 0xfb,
        0x93, 0xca, 0x0f, 0x0b,
    ];
    let mut m = machine();
    assert!(allow_vectors(&mut m.cpu, 0xe7));
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    m.cpu.memory.write_bytes(GuestAddress(DATA), &[7; 64]).unwrap();
    (m.cpu.regs[RIP], m.cpu.regs[3]) = (CODE, DATA);
    let mut jit = Jit::new(Options { threshold: 2, profile: true, ..OPTIONS }, &m.cpu.code).unwrap();
    while jit.run(&mut m, 20_000).is_ok() {}
    // Seven in the bytes that the mask lets through, zero in the others.
    assert_eq!((m.cpu.regs[7], m.cpu.regs[1]), (0, 0x0f0f));
    let stored: Vec<_> = bytes(&m, DATA + 64, 64).iter().map(|byte| byte / 7).collect();
    assert_eq!(stored[..16], [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]);
    assert!(stored[16..].iter().all(|byte| *byte == 0));
    // The first access to a page may be a handler's.
    let handed: u64 = crate::jit::handed(&m.cpu).iter().map(|(_, count)| count).sum();
    assert!(handed < 10, "{:?}", crate::jit::handed(&m.cpu));
}

#[test]
fn branch_with_a_16_bit_target_leaves_the_region() {
    // mov ecx,20; top: dec ecx; jz done; 66 jnz +0 (to the low 16 bits: not mapped there, so #PF or the next
    // instruction, as the interpreter says)
    let code = [0xb9, 20, 0, 0, 0, 0xff, 0xc9, 0x74, 0x07, 0x66, 0x0f, 0x85, 0, 0, 0x0f, 0x0b, 0x0f, 0x0b];
    let ends = [1, 200].map(|threshold| {
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.regs[RIP] = CODE;
        let mut jit = Jit::new(Options { threshold, ..OPTIONS }, &m.cpu.code).unwrap();
        let end = (0..100).find_map(|_| jit.run(&mut m, 1000).err());
        (end, m.cpu.regs, m.cpu.retired)
    });
    assert_eq!(ends[0], ends[1]);
}

#[test]
fn return_to_what_the_stack_of_calls_ends_with_is_like_any_other() {
    // mov rax,target; push rax; ret
    for target in [crate::jit::stubs::NOWHERE, 0x8000_0000_0000_0001, CODE + 0x100] {
        let mut code = vec![0x48, 0xb8];
        code.extend_from_slice(&target.to_le_bytes());
        code.extend_from_slice(&[0x50, 0xc3]);
        let ends = [1, 200].map(|threshold| {
            let mut m = machine();
            m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
            m.cpu.memory.write_bytes(GuestAddress(CODE + 0x100), &[0x0f, 0x0b]).unwrap();
            m.cpu.regs[RIP] = CODE;
            m.cpu.regs[4] = DATA + 0x2000;
            let mut jit = Jit::new(Options { threshold, ..OPTIONS }, &m.cpu.code).unwrap();
            let end = (0..100).find_map(|_| jit.run(&mut m, 1000).err());
            (end, m.cpu.regs, m.cpu.retired)
        });
        assert_eq!(ends[0], ends[1], "to {target:#x}");
    }
}

#[test]
fn link_whose_target_is_translated_into_emptied_code_memory_stays_unlinked() {
    const SIZE: usize = 1 << 20;
    let mut m = machine();
    let mut jit = Jit::new(Options { threshold: 1, code_size: SIZE, ..OPTIONS }, &m.cpu.code).unwrap();
    (m.cpu.regs[3], m.cpu.regs[1]) = (DATA, DATA + 8);
    let run = |m: &mut Interpreter, jit: &mut Jit, code: &[u8]| {
        m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
        m.cpu.regs[RIP] = CODE;
        let end = (0..100).find_map(|_| jit.run(m, 1000).err());
        assert_eq!(end, Some(Exception::UD));
    };
    // Regions without links, until there is room for little more than the first of those below.
    let increment = [0x48, 0xff, 0x03]; // inc qword [rbx]
    for (count, enough) in [(40, 1000), (4, 300)] {
        let mut fill = increment.repeat(count);
        fill.extend_from_slice(&[0x0f, 0x0b]);
        while jit.cache.rare - jit.cache.used > enough {
            run(&mut m, &mut jit, &fill);
        }
    }
    assert_eq!((jit.cache.sizes.flushes, jit.cache.sizes.links), (0, 0));
    // A branch to what does not fit, which has a branch as well: either would be link number 0.
    let mut code = vec![0xcc; 0x400];
    code[..11].copy_from_slice(&[0x48, 0xff, 0x03, 0x0f, 0x85, 0xf7, 0, 0, 0, 0x0f, 0x0b]); // jnz 0x100
    code[0x100..0x100 + 180].copy_from_slice(&increment.repeat(60));
    code[0x1b4..0x1bc].copy_from_slice(&[0x0f, 0x85, 0x46, 1, 0, 0, 0x0f, 0x0b]); // jnz 0x300
    code[0x300..0x305].copy_from_slice(&[0x48, 0xff, 0x01, 0x0f, 0x0b]); // inc qword [rcx]
    let word = |m: &Interpreter, at| m.cpu.memory.read::<u64>(GuestAddress(at)).unwrap();
    let before = word(&m, DATA);
    run(&mut m, &mut jit, &code);
    assert_eq!(jit.cache.sizes.flushes, 1);
    assert_eq!((word(&m, DATA) - before, word(&m, DATA + 8)), (61, 1));
}

#[test]
fn endless_code_of_every_shape_is_left_when_its_budget_is_spent() {
    let shapes: [(&str, &[u8]); 6] = [
        ("jmp to itself", &[0xeb, 0xfe]),
        ("jump through a register", &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xe0]),
        ("call whose return address is dropped", &[0xe8, 0, 0, 0, 0, 0x58, 0xeb, 0xf8]),
        // lea rax,[rip-7]; push rax; ret
        ("return to itself", &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0x50, 0xc3]),
        // call +2; jmp -7; ret
        ("call and return", &[0xe8, 2, 0, 0, 0, 0xeb, 0xf9, 0xc3]),
        // jmp to the next page, and back
        ("jumps between pages", &[0xe9, 0xfb, 0x0f, 0, 0]),
    ];
    for (name, code) in shapes {
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
        m.cpu.memory.write_bytes(GuestAddress(CODE + 0x1000), &[0xe9, 0xfb, 0xef, 0xff, 0xff]).unwrap();
        m.cpu.regs[RIP] = CODE;
        m.cpu.regs[4] = DATA + 0x2000;
        let mut jit = Jit::new(Options { threshold: 2, ..OPTIONS }, &m.cpu.code).unwrap();
        for limit in [1, 7, 1000, 100_000] {
            let end = m.cpu.retired + limit;
            while m.cpu.retired < end {
                let left = end - m.cpu.retired;
                jit.run(&mut m, left).unwrap();
            }
            assert_eq!(m.cpu.retired, end, "{name}");
        }
        assert!(jit.cache.sizes.regions > 0, "{name}");
    }
}

/// A way to store: its name, bytes written, and the instructions. rbx is where; the bytes are in rdx or at r8.
type Store = (&'static str, usize, &'static [u8]);

const STORES: [Store; 8] = [
    ("mov 1", 1, &[0x88, 0x13]),
    ("mov 2", 2, &[0x66, 0x89, 0x13]),
    ("mov 4", 4, &[0x89, 0x13]),
    ("mov 8", 8, &[0x48, 0x89, 0x13]),
    ("movups 16", 16, &[0x41, 0x0f, 0x10, 0x00, 0x0f, 0x11, 0x03]),
    // mov rdi,rbx; mov rsi,r8; mov ecx,LEN; rep movsb
    ("rep movsb 16", 16, &[0x48, 0x89, 0xdf, 0x4c, 0x89, 0xc6, 0xb9, 16, 0, 0, 0, 0xf3, 0xa4]),
    ("rep movsb 32", 32, &[0x48, 0x89, 0xdf, 0x4c, 0x89, 0xc6, 0xb9, 32, 0, 0, 0, 0xf3, 0xa4]),
    ("vmovups 32", 32, &[0xc4, 0xc1, 0x7c, 0x10, 0x00, 0xc5, 0xfc, 0x11, 0x03]),
];

#[test]
fn store_into_the_instructions_that_follow_it_is_seen_at_every_offset() {
    /// More than two granules of code behind the store.
    const SLED: usize = 136;
    const PASSES: u64 = 12;
    const NOP: u8 = 0x90;
    const PUSH_RAX: u8 = 0x50;
    let mut m = machine();
    allow_vectors(&mut m.cpu, 7);
    m.cpu.memory.write_bytes(GuestAddress(DATA + 0x3000), &[NOP; 32]).unwrap();
    m.cpu.memory.write_bytes(GuestAddress(DATA + 0x3040), &[PUSH_RAX; 32]).unwrap();
    let mut jit = Jit::new(Options { threshold: 2, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    let avx = is_x86_feature_detected!("avx");
    for (name, len, store) in STORES.into_iter().filter(|store| avx || !store.0.starts_with('v')) {
        // top: xor rdx,r9; xor r8,r11; the store; the sled; dec r10; jnz top; ud2
        let mut code = vec![0x4c, 0x31, 0xca, 0x4d, 0x31, 0xd8];
        code.extend_from_slice(store);
        let sled = code.len();
        code.extend_from_slice(&[NOP; SLED]);
        code.extend_from_slice(&[0x49, 0xff, 0xca, 0x0f, 0x85]);
        code.extend_from_slice(&(-(code.len() as i32 + 4)).to_le_bytes());
        code.extend_from_slice(&[0x0f, 0x0b]);
        // Within a page, and with the page's end in the sled.
        for start in [CODE + 0x100, CODE + 0x1000 - (sled + SLED / 2) as u64] {
            for (offset, alias) in (0..=SLED - len).flat_map(|offset| [(offset, 0), (offset, ALIAS)]) {
                m.cpu.memory.write_bytes(GuestAddress(start), &code).unwrap();
                m.cpu.regs[RIP] = start;
                m.cpu.regs[2] = u64::from_le_bytes([NOP; 8]);
                m.cpu.regs[3] = start + (sled + offset) as u64 + alias;
                m.cpu.regs[4] = DATA + 0x2000;
                m.cpu.regs[8] = DATA + 0x3000;
                m.cpu.regs[9] = u64::from_le_bytes([NOP ^ PUSH_RAX; 8]);
                m.cpu.regs[10] = PASSES;
                m.cpu.regs[11] = 0x40;
                let end = (0..10_000).find_map(|_| jit.run(&mut m, 1000).err());
                let what = format!("{name} at {start:#x}, {offset} bytes behind, alias {alias:#x}");
                assert_eq!(end, Some(Exception::UD), "{what}");
                // Every other pass finds pushes.
                let pushed = (DATA + 0x2000 - m.cpu.regs[4]) / 8;
                assert_eq!(pushed, PASSES / 2 * len as u64, "{what}");
            }
        }
    }
    assert!(jit.cache.sizes.regions > 0 && jit.cache.sizes.invalidated > 0, "{:?}", jit.cache.sizes);
}

/// What is left to handlers of eight locked instructions whose operand of eight bytes is at an address, and of the UD2 behind them, once all is
/// translated; as in the interpreter.
fn locked_at(address: u64) -> u64 {
    // lock add [rbx],rax; xchg [rbx],rcx; lock xadd [rbx],rdx; lock cmpxchg [rbx],rsi; lock bts [rbx],rdi (a number from 0 to 63);
    // lock bts [rbx],5; lock inc [rbx]; lock neg [rbx]; ud2
    let code = [
        0xf0, 0x48, 0x01, 0x03, 0x48, 0x87, 0x0b, 0xf0, 0x48, 0x0f, 0xc1, 0x13, 0xf0, 0x48, 0x0f, 0xb1, 0x33,
        0xf0, 0x48, 0x0f, 0xab, 0x3b, 0xf0, 0x48, 0x0f, 0xba, 0x2b, 0x05, 0xf0, 0x48, 0xff, 0x03, 0xf0, 0x48,
        0xf7, 0x1b, 0x0f, 0x0b,
    ];
    let start = |m: &mut Interpreter| {
        m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
        m.cpu.memory.write_bytes(GuestAddress(address), &[0x81; 8]).unwrap();
    };
    let again = |m: &mut Interpreter| {
        m.cpu.regs[..8].copy_from_slice(&[3, 5, 7, address, DATA + 0x2000, 0, 11, 63]);
        m.cpu.regs[RIP] = CODE;
    };
    let (mut m, mut other) = (machine(), machine());
    start(&mut m);
    start(&mut other);
    let mut jit = Jit::new(Options { threshold: 2, ..OPTIONS }, &m.cpu.code).unwrap();
    let mut handed = 0;
    for _ in 0..5 {
        again(&mut m);
        again(&mut other);
        let before = m.cpu.translated.interpreted;
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD);
        let end = (0..100).find_map(|_| other.run_block(1).err());
        assert_eq!(end, Some(Exception::UD));
        handed = m.cpu.translated.interpreted - before;
        assert_eq!(m.cpu.regs, other.cpu.regs);
        let read = |m: &Interpreter| m.cpu.memory.read::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(&m), read(&other));
    }
    handed
}

#[test]
fn locked_operands_that_may_be_in_two_cache_lines_are_left_to_handlers() {
    // UD2 is one.
    assert_eq!(locked_at(DATA + 0x38), 1);
    assert_eq!(locked_at(DATA + 0x3c), 9);
    assert_eq!(locked_at(DATA + 0x3f), 9);
    assert_eq!(locked_at(DATA + 0xffc), 9);
}
