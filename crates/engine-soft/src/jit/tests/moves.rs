//! Rows whose bases are moved by constants on the way.

use super::stack_rows::{TOP, row_is_as_interpreted, same_as_interpreter};
use super::*;

/// Where a row starts: in the middle of a page, over edges of pages, and at those of pages that are not present or read-only.
const TOPS: [u64; 9] = [
    TOP,
    DATA + 0xfc0,
    DATA + 0xff9,
    DATA + 0x1fa0,
    DATA + 0x1fff,
    DATA + 0x3f90,
    DATA + 0x3fe0,
    DATA + 0x4ff0,
    DATA + 0x5800,
];

/// Instructions that move RDI, and how far.
const MOVES: &[&[u8]] = &[
    &[0x48, 0x83, 0xc7, 0x40],                   // add rdi,0x40
    &[0x48, 0x83, 0xc7, 0xe8],                   // add rdi,-0x18
    &[0x48, 0x81, 0xc7, 0x80, 0, 0, 0],          // add rdi,0x80
    &[0x48, 0x83, 0xef, 0x80],                   // sub rdi,-0x80
    &[0x48, 0x81, 0xef, 0x90, 0, 0, 0],          // sub rdi,0x90
    &[0x48, 0xff, 0xc7],                         // inc rdi
    &[0x48, 0xff, 0xcf],                         // dec rdi
    &[0x48, 0x8d, 0x7f, 0x20],                   // lea rdi,[rdi+0x20]
    &[0x48, 0x8d, 0xbf, 0x60, 0xff, 0xff, 0xff], // lea rdi,[rdi-0xa0]
];

/// Instructions that change RDI otherwise, or move it too far.
const CHANGES: &[&[u8]] = &[
    &[0x83, 0xc7, 0x40],                         // add edi,0x40
    &[0x66, 0x83, 0xc7, 0x40],                   // add di,0x40
    &[0x48, 0x01, 0xc7],                         // add rdi,rax
    &[0x48, 0x8d, 0x7c, 0x07, 8],                // lea rdi,[rdi+rax+8]
    &[0x8d, 0x7f, 8],                            // lea edi,[rdi+8]
    &[0x67, 0x48, 0x8d, 0x7f, 8],                // lea rdi,[edi+8]
    &[0x48, 0x8d, 0x7e, 8],                      // lea rdi,[rsi+8]
    &[0x48, 0x83, 0xd7, 8],                      // adc rdi,8
    &[0x48, 0x83, 0xcf, 8],                      // or rdi,8
    &[0x48, 0x81, 0xc7, 0xff, 0xff, 0xff, 0x7f], // add rdi,0x7fffffff
    &[0x48, 0x81, 0xef, 0, 0, 0, 0x80],          // sub rdi,-0x80000000
];

/// mov rdi,rsp; mov rsi,rdi; xor eax,eax; mov rbx,0x1122334455667788
const START: &[u8] = &[
    0x48, 0x89, 0xe7, 0x48, 0x89, 0xfe, 0x31, 0xc0, 0x48, 0xbb, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22,
    0x11,
];

/// Accesses from RDI before and behind what is done to it, then UD2: mov [rdi+8],rbx; mov rcx,[rdi]; ...; mov [rdi],rcx; mov rdx,[rdi+8]
fn around(what: &[&[u8]]) -> Vec<u8> {
    let mut code = [START, &[0x48, 0x89, 0x5f, 8, 0x48, 0x8b, 0x0f]].concat();
    for what in what {
        // ...; mov [rdi],rcx; mov rdx,[rdi+8]; add rbx,rdx
        code.extend([*what, &[0x48, 0x89, 0x0f, 0x48, 0x8b, 0x57, 8, 0x48, 1, 0xd3]].concat());
    }
    code.extend([0x0f, 0x0b]);
    code
}

#[test]
fn row_goes_on_where_its_base_is_moved() {
    for &first in MOVES {
        for &second in MOVES {
            for warm in [true, false] {
                let jit = row_is_as_interpreted(&around(&[first, second]), &TOPS, warm);
                assert_eq!(jit.cache.rows.len(), 1, "{first:x?} {second:x?}");
            }
        }
    }
}

#[test]
fn row_ends_where_its_base_is_changed_otherwise() {
    for what in CHANGES {
        let jit = row_is_as_interpreted(&around(&[what]), &TOPS, true);
        assert_eq!(jit.cache.rows.len(), 2, "{what:x?}");
    }
    // There and back: adds of 0x7fffffff, three times, and subs.
    let far: &[u8] = &[0x48, 0x81, 0xc7, 0xff, 0xff, 0xff, 0x7f];
    let back: &[u8] = &[0x48, 0x81, 0xef, 0xff, 0xff, 0xff, 0x7f];
    let code = around(&[&[far, far, far, back, back, back].concat(), far]);
    row_is_as_interpreted(&code, &TOPS, true);
    // The first access from RSI is where it has been moved 4 GiB away.
    let away: &[u8] = &[0x48, 0x81, 0xc6, 0xff, 0xff, 0xff, 0x7f];
    let read: &[u8] = &[0x48, 0x8b, 0x4e, 2];
    let code = around(&[&[away, away, read].concat()]);
    same_as_interpreter(&code, &TOPS, true, "4 GiB away");
}

#[test]
fn row_goes_on_where_an_index_is_moved() {
    for scale in 0..4 {
        let sib = scale << 6 | 0x0f; // rdi+rcx*n
        // xor ecx,ecx; mov [rdi+rcx*n],rbx; add rcx,8; mov rdx,[rdi+rcx*n-8]; add rdi,0x10; dec rcx; mov [rdi+rcx*n],rdx
        let row: &[&[u8]] = &[
            START,
            &[0x31, 0xc9, 0x48, 0x89, 0x1c, sib, 0x48, 0x83, 0xc1, 8, 0x48, 0x8b, 0x54, sib, 0xf8],
            &[0x48, 0x83, 0xc7, 0x10, 0x48, 0xff, 0xc9, 0x48, 0x89, 0x14, sib, 0x0f, 0x0b],
        ];
        for warm in [true, false] {
            let jit = row_is_as_interpreted(&row.concat(), &TOPS, warm);
            assert_eq!(jit.cache.rows.len(), 1);
        }
    }
}

#[test]
fn sum_of_registers_is_one_base_in_either_order() {
    // mov ecx,0x30; mov [rdi+rcx],rbx; mov rdx,[rcx+rdi+8]; mov [rcx+rdi+0x10],rdx; ud2
    let code = [
        START,
        &[
            0xb9, 0x30, 0, 0, 0, 0x48, 0x89, 0x1c, 0x0f, 0x48, 0x8b, 0x54, 0x39, 8, 0x48, 0x89, 0x54, 0x39,
            0x10,
        ],
        &[0x0f, 0x0b],
    ]
    .concat();
    let jit = row_is_as_interpreted(&code, &TOPS, true);
    assert_eq!((jit.cache.rows.len(), jit.cache.rows[0].count), (1, 3));
    // mov ecx,0x30; mov [rsp+rcx],rbx; mov rdx,[rsp+rcx+8]; ud2
    let code = [START, &[0xb9, 0x30, 0, 0, 0, 0x48, 0x89, 0x1c, 0x0c, 0x48, 0x8b, 0x54, 0x0c, 8, 0x0f, 0x0b]];
    row_is_as_interpreted(&code.concat(), &TOPS, true);
}
