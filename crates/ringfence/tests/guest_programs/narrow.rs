//! Goes from 64-bit code to 32-bit code and back, and computes the same in both: prints `@64 DIGEST` and, unless told `reference`,
//! `@32 DIGEST` and how many system calls of 32-bit code gave the wrong answer. Arguments: a seed and a number of rounds.
//!
//! Built on its own as a static program below 4 GiB. The kernel's descriptors are Linux's: 0x23 is 32-bit code, 0x2b data, 0x33 64-bit code.

use std::arch::global_asm;

global_asm!(
    r#"
    .globl enter_narrow
    // edi: the top of a stack below 4 GiB with the arguments
enter_narrow:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + saved_stack], rsp
    mov esp, edi
    sub rsp, 8
    mov dword ptr [rsp + 4], 0x33
    lea rax, [rip + back_to_wide]
    mov [rsp], eax
    push 0x23
    lea rax, [rip + narrow]
    push rax
    .byte 0x48, 0xcb // retfq
back_to_wide:
    mov rsp, [rip + saved_stack]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    mov eax, eax
    ret

    .code32
narrow:
    push ebp
    mov ebp, esp
    mov eax, 0x2b
    mov ds, eax
    mov es, eax
    mov eax, [ebp + 12]
    mov edi, [ebp + 20]
2:
    mov ecx, [ebp + 16]
    test ecx, 0xfff
    jnz 3f
    // getpid
    push eax
    mov eax, 20
    int 0x80
    cmp eax, [ebp + 24]
    setne al
    movzx eax, al
    add [ebp + 28], eax
    pop eax
3:
    push eax
    call step
    add esp, 4
    dec dword ptr [ebp + 16]
    jnz 2b
    push eax
    mov esi, edi
    add edi, 512
    mov ecx, 64
    rep movsd
    pop eax
    leave
    retf

step:
    push ebx
    push esi
    mov eax, [esp + 12]
    mov esi, eax
    movzx ebx, al
    mov edx, [edi + ebx * 4]
    shr eax, 8
    xor eax, edx
    imul eax, eax, 0x9e3779b1
    mov ecx, esi
    and ecx, 0x3f
    inc ecx
    push eax
    xor edx, edx
    div ecx
    rol edx, 7
    xor eax, edx
    cmp eax, esi
    adc eax, 0
    mov [edi + ebx * 4], eax
    pop edx
    cmp eax, edx
    cmovle eax, edx
    pop esi
    pop ebx
    ret
    .code64

    .bss
    .p2align 3
saved_stack:
    .skip 8
    .text
"#
);

unsafe extern "C" {
    fn enter_narrow(stack: usize) -> u32;
}

/// Addresses of these fit into 32 bits, as the program is linked there.
static mut TABLE: [u32; 256] = [0; 256];
static mut STACK: [u32; 4096] = [0; 4096];

/// What `step` does.
fn step(x: u32, table: &mut [u32; 256]) -> u32 {
    let y = (x >> 8 ^ table[(x & 0xff) as usize]).wrapping_mul(0x9e37_79b1);
    let divisor = (x & 0x3f) + 1;
    let z = y / divisor ^ (y % divisor).rotate_left(7);
    let z = z.wrapping_add(u32::from(z < x));
    table[(x & 0xff) as usize] = z;
    if z as i32 > y as i32 { z } else { y }
}

fn filled() -> [u32; 256] {
    std::array::from_fn(|i| (i as u32).wrapping_mul(0x0101_6b2d).rotate_left(i as u32 % 32))
}

/// FNV-1a over the result and the table.
fn digest(result: u32, table: &[u32; 256]) -> u64 {
    let words = std::iter::once(&result).chain(table);
    words.fold(0xcbf2_9ce4_8422_2325, |hash, &word| (hash ^ u64::from(word)).wrapping_mul(0x100_0000_01b3))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |n: usize| arguments[n].parse::<u32>().unwrap();
    let (seed, rounds) = (number(1), number(2));
    let mut table = filled();
    let mut x = seed;
    for _ in 0..rounds {
        x = step(x, &mut table);
    }
    table.copy_within(..64, 128);
    println!("@64 {:016x}", digest(x, &table));
    if arguments.get(3).is_some_and(|argument| argument == "reference") {
        return;
    }
    // SAFETY: nobody else uses either; the code writes nothing but the table and the stack, and gives back every register.
    unsafe {
        let table = &mut *(&raw mut TABLE);
        *table = filled();
        let stack = &mut *(&raw mut STACK);
        let top = stack.len() - 8;
        stack[top..top + 5].copy_from_slice(&[seed, rounds, table.as_ptr() as u32, std::process::id(), 0]);
        let result = enter_narrow(stack[top..].as_ptr() as usize);
        println!("@32 {:016x}", digest(result, table));
        println!("@wrong {}", stack[top + 4]);
    }
}
