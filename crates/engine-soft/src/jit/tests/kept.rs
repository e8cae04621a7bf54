//! Guest registers that are kept in scratch ones along rows and stretches.

use iced_x86::{Decoder, DecoderOptions, Register};
use ringfence_memory::GuestAddress;
use ringfence_oracle::Random;

use super::stack_rows::{TOP, row_is_as_interpreted, same_as_interpreter};
use super::*;

/// Stack pointers from which rows run: in the middle of a page, over the edges of pages, into one that is not present, and into one that
/// is read-only.
const TOPS: [u64; 7] =
    [TOP, DATA + 0xff0, DATA + 0x1fc8, DATA + 0x3fd8, DATA + 0x4fe0, DATA + 0x5800, DATA + 0x1040];

/// xor edi,edi: the flags are what they are whatever was before.
const CLEAR: &[u8] = &[0x31, 0xff];

/// An instruction that names two registers or three, mostly such as have no host register.
fn plain(random: &mut Random) -> Vec<u8> {
    let mut any = || random.pick(&[8, 9, 10, 11, 14, 15, 8, 9, 10, 11, 14, 15, 0, 1, 2, 12]);
    let (a, b, c) = (any(), any(), any());
    let rex = |wide: u8| 0x40 | wide << 3 | (a >> 3) << 2 | b >> 3;
    let modrm = 0xc0 | (a & 7) << 3 | b & 7;
    match random.below(10) {
        0 => vec![rex(1), 0x89, modrm],                                       // mov b,a
        1 => vec![rex(0), 0x8b, modrm],                                       // mov a32,b32
        2 => vec![rex(1), random.pick(&[0x01, 0x13, 0x1b, 0x31]), modrm],     // add, adc, sbb, xor
        3 => vec![rex(0), random.pick(&[0x01, 0x29, 0x21, 0x09]), modrm],     // add, sub, and, or
        4 => vec![0x40 | b >> 3, 0xc1, 0xc8 | b & 7, random.below(32) as u8], // ror b32,n
        5 => vec![rex(1), 0x0f, 0x40 | random.below(16) as u8, modrm],        // cmov a,b
        6 => vec![rex(1), 0x87, modrm],                                       // xchg
        7 => vec![rex(0), 0x88, modrm],                                       // mov b8,a8
        8 => {
            // lea a,[b+c*n+d]
            let rex = 0x40 | (random.below(2) as u8) << 3 | (a >> 3) << 2 | (c >> 3) << 1 | b >> 3;
            let sib = (random.below(4) as u8) << 6 | (c & 7) << 3 | b & 7;
            vec![rex, 0x8d, 0x44 | (a & 7) << 3, sib, random.bits() as u8]
        }
        _ => {
            // mulx a,b,c
            let first = (!(a >> 3) & 1) << 7 | 1 << 6 | (!(c >> 3) & 1) << 5 | 2;
            vec![0xc4, first, 0x80 | (!b & 15) << 3 | 3, 0xf6, 0xc0 | (a & 7) << 3 | c & 7]
        }
    }
}

#[test]
fn stretch_leaves_registers_and_flags_as_its_instructions_do() {
    let mut random = Random::new(4);
    for round in 0..300 {
        let count = 2 + random.below(60);
        let mut code = CLEAR.to_vec();
        code.extend((0..count).flat_map(|_| plain(&mut random)));
        code.extend([0x0f, 0x0b]);
        same_as_interpreter(&code, &[TOP; 2], true, &format!("round {round}: {code:x?}"));
    }
}

#[test]
fn row_with_registers_kept_runs_apart_and_faults_as_its_instructions_do() {
    let mut random = Random::new(5);
    for round in 0..100 {
        // xor edi,edi; mov rbx,rsp; mov r13,rsp
        let mut code = [CLEAR, &[0x48, 0x89, 0xe3, 0x49, 0x89, 0xe5]].concat();
        for _ in 0..2 + random.below(20) {
            if random.chance(50) {
                // mov r,[rbx+d], mov [rbx+d],r, or the same from R13
                let reg = random.pick(&[8, 9, 10, 11, 15, 0, 1]);
                let [rex, base] = random.pick(&[[0x48, 3], [0x49, 5]]);
                let store = random.pick(&[0x8b, 0x89]);
                let displacement = 8 * random.below(8) as u8;
                code.extend([rex | (reg >> 3) << 2, store, 0x40 | (reg & 7) << 3 | base, displacement]);
            } else {
                code.extend(plain(&mut random));
            }
        }
        code.extend([0x0f, 0x0b]);
        for warm in [true, false] {
            same_as_interpreter(&code, &TOPS, warm, &format!("round {round}: {code:x?}"));
        }
    }
}

/// How often the code of the region at [`CODE`] names what is `displacement` from the pinned register.
fn accesses(jit: &Jit, displacement: u64) -> usize {
    let code = jit.host_code(CodeAddress::new(GuestAddress(CODE), false)).unwrap();
    let (at, bytes) = &code.parts[0];
    let all = Decoder::with_ip(64, bytes, *at, DecoderOptions::NONE);
    let names = |i: &iced_x86::Instruction| {
        i.memory_base() == Register::R15 && i.memory_displacement64() == displacement
    };
    all.into_iter().filter(names).count()
}

#[test]
fn stretch_stores_a_register_once() {
    // mov r8,rcx; ror r8,3; xor r8,rdx; lea r8,[r8+rax]; ud2
    let code = [0x49, 0x89, 0xc8, 0x49, 0xc1, 0xc8, 3, 0x49, 0x31, 0xd0, 0x4d, 0x8d, 0x04, 0x00, 0x0f, 0x0b];
    let jit = same_as_interpreter(&code, &[TOP; 2], true, "stretch");
    assert_eq!(accesses(&jit, 8 * 8), 1);
    // mov r8,[rsp]; ror r8,3; mov [rsp+8],r8; ror r8,5; ud2
    let code = [
        0x4c, 0x8b, 0x04, 0x24, 0x49, 0xc1, 0xc8, 3, 0x4c, 0x89, 0x44, 0x24, 8, 0x49, 0xc1, 0xc8, 5, 0x0f,
        0x0b,
    ];
    let jit = row_is_as_interpreted(&code, &[TOP; 2], true);
    assert_eq!(accesses(&jit, 8 * 8), 1);
}

#[test]
fn stack_pointer_that_gave_way_to_others_comes_back() {
    // push rax, so that the vCPU's is another.
    let mut code = vec![0x50];
    for _ in 0..6 {
        // add r8,r9; add r9,r10; add r10,r11; add r11,r15; add r15,r8
        code.extend([0x4d, 1, 0xc8, 0x4d, 1, 0xd1, 0x4d, 1, 0xda, 0x4d, 1, 0xfb, 0x4d, 1, 0xc7]);
    }
    // push r8; pop rax; push r15; pop rcx; mov rbx,rsp; ud2
    code.extend([0x41, 0x50, 0x58, 0x41, 0x57, 0x59, 0x48, 0x89, 0xe3, 0x0f, 0x0b]);
    same_as_interpreter(&code, &TOPS, true, "stretch");
}

#[test]
fn stack_pointer_that_is_named_does_not_give_way() {
    // mov rax,rsp; lea rcx,[rsp+8]; add r8,rsp; lea rsp,[rsp-8]
    let names: [&[u8]; 4] = [
        &[0x48, 0x89, 0xe0],
        &[0x48, 0x8d, 0x4c, 0x24, 8],
        &[0x49, 1, 0xe0],
        &[0x48, 0x8d, 0x64, 0x24, 0xf8],
    ];
    for name in names {
        let mut code = Vec::new();
        for _ in 0..3 {
            // add r8,r9; add r9,r10; add r10,r11; ...; add r11,r15; add r15,r8
            code.extend([0x4d, 1, 0xc8, 0x4d, 1, 0xd1, 0x4d, 1, 0xda]);
            code.extend(name);
            code.extend([0x4d, 1, 0xfb, 0x4d, 1, 0xc7]);
        }
        code.extend([0x0f, 0x0b]);
        same_as_interpreter(&code, &TOPS, true, &format!("{name:x?}"));
    }
}
