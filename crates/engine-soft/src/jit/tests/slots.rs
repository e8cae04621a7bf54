//! Guest registers that live in the vCPU are loaded where an instruction makes use of what was in them.

use super::stack_rows::ends;
use super::*;

/// Instructions that write R8, all of it or part of it or nothing, and whether they read it.
const WRITES: &[&[u8]] = &[
    &[0x49, 0x89, 0xf0],                   // mov r8,rsi
    &[0x41, 0x89, 0xf0],                   // mov r8d,esi
    &[0x66, 0x41, 0x89, 0xf0],             // mov r8w,si
    &[0x41, 0x88, 0xf0],                   // mov r8b,sil
    &[0x4d, 0x89, 0xc8],                   // mov r8,r9
    &[0x45, 0x8b, 0xc1],                   // mov r8d,r9d
    &[0x45, 0x89, 0xc0],                   // mov r8d,r8d
    &[0x4c, 0x89, 0xc6],                   // mov rsi,r8
    &[0x44, 0x89, 0xc6],                   // mov esi,r8d
    &[0x4c, 0x89, 0xc4],                   // mov rsp,r8
    &[0x49, 0x89, 0xe0],                   // mov r8,rsp
    &[0x41, 0xb8, 1, 2, 3, 0x84],          // mov r8d,0x84030201
    &[0x66, 0x41, 0xb8, 1, 2],             // mov r8w,0x201
    &[0x41, 0xb0, 5],                      // mov r8b,5
    &[0x44, 0x0f, 0xb6, 0xc6],             // movzx r8d,sil
    &[0x66, 0x44, 0x0f, 0xb6, 0xc6],       // movzx r8w,sil
    &[0x4d, 0x63, 0xc1],                   // movsxd r8,r9d
    &[0x4c, 0x0f, 0x44, 0xc6],             // cmove r8,rsi
    &[0x4c, 0x0f, 0x45, 0xc6],             // cmovne r8,rsi
    &[0x44, 0x0f, 0x44, 0xc6],             // cmove r8d,esi
    &[0x44, 0x0f, 0x45, 0xc6],             // cmovne r8d,esi
    &[0x41, 0x0f, 0x94, 0xc0],             // sete r8b
    &[0x4c, 0x0f, 0xbc, 0xc7],             // bsf r8,rdi: of zero
    &[0x4c, 0x0f, 0xbd, 0xc7],             // bsr r8,rdi: of zero
    &[0xf3, 0x4c, 0x0f, 0xb8, 0xc6],       // popcnt r8,rsi
    &[0xf3, 0x66, 0x44, 0x0f, 0xb8, 0xc6], // popcnt r8w,si
    &[0x4d, 0x6b, 0xc1, 3],                // imul r8,r9,3
    &[0x66, 0x45, 0x6b, 0xc1, 3],          // imul r8w,r9w,3
    &[0x4d, 0x6b, 0xc0, 3],                // imul r8,r8,3
    &[0x4c, 0x0f, 0xaf, 0xc6],             // imul r8,rsi
    &[0x49, 0xc1, 0xe0, 0],                // shl r8,0
    &[0x41, 0xd3, 0xe0],                   // shl r8d,cl
    &[0x45, 0x31, 0xc0],                   // xor r8d,r8d
    &[0x49, 0x0f, 0xc8],                   // bswap r8
    &[0x4c, 0x87, 0xc6],                   // xchg rsi,r8
    &[0x4c, 0x8b, 0x03],                   // mov r8,[rbx]
    &[0x44, 0x8b, 0x03],                   // mov r8d,[rbx]
    &[0x66, 0x44, 0x8b, 0x03],             // mov r8w,[rbx]
    &[0x44, 0x8a, 0x03],                   // mov r8b,[rbx]
    &[0x4c, 0x89, 0x03],                   // mov [rbx],r8
    &[0xc4, 0x42, 0xb3, 0xf6, 0xc0],       // mulx r8,r9,r8
    &[0xc4, 0x62, 0xb3, 0xf6, 0xc6],       // mulx r8,r9,rsi
    &[0xc4, 0x62, 0xc8, 0xf2, 0xc7],       // andn r8,rsi,rdi
];

#[test]
fn instruction_that_writes_a_register_without_a_host_register_leaves_what_it_does_not_write() {
    let loads: Vec<u8> = [
        [0x49, 0xb8], // mov r8
        [0x49, 0xb9], // mov r9
        [0x48, 0xbe], // mov rsi
        [0x48, 0xba], // mov rdx
    ]
    .into_iter()
    .zip([0x8877_6655_4433_2211_u64, 0xfedc_ba98_f654_3210, 0x1234_5678_9abc_def0, 0x7777_7777_8888_8888])
    .flat_map(|(mov, value)| [&mov[..], &value.to_le_bytes()].concat())
    .collect();
    for write in WRITES {
        // ...; mov ebx,DATA; xor edi,edi; ...; ud2; alone, and in a row: push rax; ...; push rcx
        for [before, behind] in [[&[][..], &[][..]], [&[0x50][..], &[0x51][..]]] {
            let code = [
                &loads[..],
                &[0xbb],
                &(DATA as u32).to_le_bytes(),
                &[0x31, 0xff],
                before,
                write,
                behind,
                &[0x0f, 0x0b],
            ]
            .concat();
            let [expected, found] =
                [200, 1].map(|threshold| ends(&code, &[DATA + 0x1800; 3], true, threshold).0);
            for (a, b) in expected.iter().zip(&found) {
                assert_eq!((a.0, &a.1, a.2), (b.0, &b.1, b.2), "{write:x?}");
                assert!(a.3 == b.3, "memory after {write:x?}");
            }
        }
    }
}
