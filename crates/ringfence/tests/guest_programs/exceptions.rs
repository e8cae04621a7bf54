//! Raises floating-point exceptions that it does not mask, of SIMD and x87 instructions by turns, and prints what its handler of SIGFPE has
//! found: how many of each as `@simd` and `@x87`, and a `@digest` of codes, addresses, control and status words, registers and results. The handler goes on elsewhere, by
//! a return or by a jump. Arguments: a seed and a number of rounds.
//!
//! Built on its own as a static program, so that its addresses are the same wherever it runs.

use std::arch::global_asm;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

global_asm!(
    r#"
    // Rounds: extern "C" fn(data, number), with the control words in place. What raises something may be found with R9 still at the data.
    .macro simd insn:vararg
    .p2align 4
    movupd xmm0, [rdi]
    movsd xmm1, [rdi + 16]
    mov r8, rsi
    lea r10, [rsi + rsi * 2]
    cmp r8, r10
    \insn
    setb al
    add r9, 5
    add r10, rax
    jmp resumed
    .endm

    .macro x87 insn:vararg
    .p2align 4
    fld qword ptr [rdi]
    fld qword ptr [rdi + 8]
    mov r8, rsi
    lea r10, [rsi + rsi * 2]
    \insn
    // These do not wait. The address that the unit is to tell is gone.
    lea r9, [r9 + r9 * 2 + 1]
    fnstsw ax
    add r10, rax
    fnstcw [rdi + 64]
    mov [rdi + 72], r10
    // This does.
    fld1
    fnstsw ax
    add r10, rax
    jmp resumed
    .endm

    .globl run, resumed, escape, snippets
run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + saved], rsp
    mov rcx, rdi
    lea rdi, [rip + DATA]
    mov r9, rdi
    xor eax, eax
    fninit
    fldcw [rip + CONTROLS + 4]
    ldmxcsr [rip + CONTROLS]
    call rcx
leave_run:
    fninit
    ldmxcsr [rip + CONTROLS + 8]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
resumed:
    mov rax, r9
    xor rax, r10
    ret
escape:
    mov rsp, [rip + saved]
    mov eax, 77
    jmp leave_run

1:  simd divsd xmm0, xmm1
2:  simd mulsd xmm0, [r9 + 24]
3:  simd sqrtsd xmm0, xmm1
4:  simd addpd xmm0, [r9 + 32]
5:  simd cvttsd2si rax, xmm1
6:  simd ucomisd xmm0, xmm1
7:  simd divps xmm0, [r9 + 16]
8:  simd cvtsd2ss xmm0, [r9 + 16]
21: x87 fdiv qword ptr [r9 + 16]
22: x87 fmul qword ptr [r9 + 24]
23: x87 fdivp st(1), st
24: x87 fsqrt
25: x87 fadd st, st(5)
26: x87 fst dword ptr [r9 + 80]
27: x87 fistp qword ptr [r9 + 80]
28: x87 fld tbyte ptr [r9 + 32]
29: x87 fcomi st, st(1)
30: x87 fscale
31: x87 fbstp tbyte ptr [r9 + 80]
32: x87 fsubr dword ptr [r9 + rax + 20]
33: x87 fxtract
34: x87 fstp tbyte ptr [r9 + 80]
    .p2align 4
    // Several, and the state put by and taken back between.
35: fld qword ptr [rdi]
    fmul qword ptr [rdi + 8]
    fadd qword ptr [rdi + 16]
    fnstenv [rdi + 128]
    fldenv [rdi + 128]
    fdiv qword ptr [rdi + 24]
    fstp qword ptr [rdi + 80]
    fwait
    jmp resumed

    .section .rodata
    .p2align 3
snippets:
    .quad 1b, 2b, 3b, 4b, 5b, 6b, 7b, 8b
    .quad 21b, 22b, 23b, 24b, 25b, 26b, 27b, 28b, 29b, 30b, 31b, 32b, 33b, 34b, 35b
    .bss
    .p2align 3
saved:
    .skip 8
    .text
"#
);

unsafe extern "C" {
    fn run(snippet: u64, number: u64) -> u64;
    fn resumed();
    fn escape() -> !;
    fn sigaction(signal: i32, action: *const Action, before: *mut Action) -> i32;
    static snippets: [u64; SNIPPETS];
}

const SNIPPETS: usize = 23;
const SIGFPE: i32 = 8;
const SA_SIGINFO: i32 = 4;
const SA_NODEFER: i32 = 0x4000_0000;

#[repr(align(64))]
struct Data([u64; 32]);

/// What the rounds work on: six numbers, and room.
#[unsafe(no_mangle)]
static mut DATA: Data = Data([0; 32]);
/// MXCSR and the x87 control word of a round, and the MXCSR of everybody else.
#[unsafe(no_mangle)]
static mut CONTROLS: [u32; 3] = [0x1f80, 0x37f, 0x1f80];

static SUM: AtomicU64 = AtomicU64::new(7);
static RAISED: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn mix(word: u64) {
    let sum = (SUM.load(Relaxed) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    SUM.store(sum ^ sum >> 29, Relaxed);
}

/// `struct sigaction` of the C library.
#[repr(C)]
struct Action {
    handler: extern "C" fn(i32, *const Info, *mut Context),
    mask: [u64; 16],
    flags: i32,
    restorer: usize,
}

/// The start of `siginfo_t`.
#[repr(C)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    address: u64,
}

/// The start of `ucontext_t`.
#[repr(C)]
struct Context {
    before: [u64; 5],
    registers: [u64; 23],
    floating: *mut Floating,
}

/// R8 to R10, RAX and RIP among the registers.
const FOUND: [usize; 4] = [0, 1, 2, 13];
const RIP: usize = 16;

/// The start of the image of FXSAVE.
#[repr(C)]
struct Floating {
    control: u16,
    status: u16,
    tags: u16,
    opcode: u16,
    instruction: u64,
    data: u64,
    mxcsr: u32,
    mask: u32,
    registers: [[u64; 2]; 8],
    vectors: [[u64; 2]; 16],
}

extern "C" fn on_signal(_: i32, info: *const Info, context: *mut Context) {
    // SAFETY: the kernel hands these over, and nobody else uses them meanwhile.
    let (info, context, floating) = unsafe { (&*info, &mut *context, &mut *(*context).floating) };
    let pending = floating.status & 0x80 != 0;
    RAISED[usize::from(pending)].fetch_add(1, Relaxed);
    mix(info.code as u64);
    mix(info.address);
    mix(context.registers[RIP]);
    FOUND.iter().for_each(|&register| mix(context.registers[register]));
    mix(floating.mxcsr.into());
    if pending {
        for half in [floating.control, floating.status, floating.tags, floating.opcode] {
            mix(half.into());
        }
        mix(floating.instruction);
        mix(floating.data);
        floating.registers.iter().flatten().for_each(|&word| mix(word));
    }
    floating.vectors[..2].iter().flatten().for_each(|&word| mix(word));
    floating.status &= !0x80ff;
    floating.mxcsr &= !0x3f;
    if SUM.load(Relaxed) & 1 == 0 {
        // SAFETY: `run` is under way, and what has come since has nothing to clean up.
        unsafe { escape() }
    }
    context.registers[RIP] = resumed as *const () as u64;
}

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number with which arithmetic raises this or that.
    fn number(&mut self) -> u64 {
        let bits = self.bits();
        match bits >> 60 {
            0 => 0,
            1 => f64::MAX.to_bits() - (bits & 0xff),
            2 => bits & 0xf_ffff,
            3 => 0x7ff0_0000_0000_0001,
            4 => f64::INFINITY.to_bits(),
            5 => f64::MIN_POSITIVE.to_bits() | bits & 0xfff,
            6 => self.bits(),
            _ => ((bits & 0xffff) as f64 - 30000.0).to_bits(),
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (seed, rounds): (u64, u64) = (arguments[1].parse().unwrap(), arguments[2].parse().unwrap());
    let action = Action { handler: on_signal, mask: [0; 16], flags: SA_SIGINFO | SA_NODEFER, restorer: 0 };
    // SAFETY: as the C library declares it.
    assert_eq!(unsafe { sigaction(SIGFPE, &action, std::ptr::null_mut()) }, 0);
    let mut random = Random(seed | 1);
    for _ in 0..rounds {
        let bits = random.bits();
        // Inexactness is masked mostly: nearly everything raises it.
        let masks = (bits & 0x3f) as u32 | if bits >> 8 & 7 != 0 { 0x20 } else { 0 };
        let snippet = (bits >> 16) as usize % SNIPPETS;
        let values: [u64; 6] = std::array::from_fn(|_| random.number());
        // SAFETY: there is one thread, and `run` is not under way where these are borrowed.
        unsafe {
            (&mut *(&raw mut DATA)).0[..6].copy_from_slice(&values);
            (&mut *(&raw mut CONTROLS))[..2].copy_from_slice(&[masks << 7, 0x340 | masks]);
            mix(run(snippets[snippet], bits >> 32));
            (&*(&raw const DATA)).0[8..16].iter().for_each(|&word| mix(word));
        }
    }
    let [simd, x87] = RAISED.each_ref().map(|count| count.load(Relaxed));
    println!("@simd {simd}");
    println!("@x87 {x87}");
    println!("@digest {:016x}", SUM.load(Relaxed));
}
