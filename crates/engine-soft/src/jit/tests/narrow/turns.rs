//! The same bytes in both modes, and the ways from one to the other.

use ringfence_engine::Activity;
use ringfence_x86::cpuid::Vendor;
use ringfence_x86::msr;
use ringfence_x86::segment::system_type;

use super::*;
use crate::interp::testing::{Lab, at, sel};
use crate::jit::stubs::reason;

#[test]
fn bytes_have_the_meaning_of_the_mode_that_they_run_in() {
    // add rax,rbx or dec eax; add eax,ebx. Then dec rcx or dec eax; dec ecx; jnz back; ud2
    let code = [0x48, 0x01, 0xd8, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0x0f, 0x0b];
    let mut m = machine();
    prepare(&mut m.cpu, false);
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    let mut jit = Jit::new(Options { threshold: 1, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    for round in 0..6 {
        let narrow = round % 2 == 1;
        prepare(&mut m.cpu, narrow);
        (m.cpu.regs[RIP], m.cpu.regs[0], m.cpu.regs[1], m.cpu.regs[3]) = (CODE, 0, 10, 7);
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD);
        assert_eq!(m.cpu.regs[0], if narrow { 50 } else { 70 }, "round {round}");
    }
    assert_eq!(jit.cache.sizes.regions, 2, "one for each mode");
    // Both go when the bytes are written: mov [rdx],dl, the immediate of another addition.
    let code = [0x83, 0xc0, 1, 0xff, 0xc9, 0x75, 0xf9, 0x0f, 0x0b];
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    m.cpu.code.written(GuestAddress(CODE), code.len() as u64);
    for (round, step) in [(0, 1), (1, 1), (2, 5), (3, 5)] {
        prepare(&mut m.cpu, round % 2 == 1);
        m.cpu.memory.write::<u8>(GuestAddress(CODE + 2), step).unwrap();
        m.cpu.code.written(GuestAddress(CODE + 2), 1);
        (m.cpu.regs[RIP], m.cpu.regs[0], m.cpu.regs[1]) = (CODE, 0, 10);
        assert_eq!(until_fault(&mut m, &mut jit), Exception::UD);
        assert_eq!(m.cpu.regs[0], 10 * u64::from(step), "round {round}");
    }
}

/// Where #UD leads to.
const HALT: u64 = at::HANDLERS + 16 * 6;

/// A machine at CPL 0 whose INT 80h may be used at CPL 3, with code for both levels.
fn lab(kernel: &[u8], handler: &[u8], user: &[u8]) -> Lab {
    let mut lab = Lab::long_of(Vendor::Amd);
    lab.gate(0x80, sel::CODE, system_type::INTERRUPT_GATE, 3, 0);
    for (at, code) in [(at::CODE, kernel), (at::HANDLERS + 16 * 0x80, handler), (at::USER_CODE, user)] {
        lab.memory.write_bytes(GuestAddress(at), code).unwrap();
    }
    for (number, value) in [
        (msr::STAR, u64::from(sel::CODE) << 32 | u64::from(sel::USER_CODE32) << 48),
        (msr::LSTAR, at::HANDLERS + 16 * 0x80),
        (msr::CSTAR, at::HANDLERS + 16 * 0x80),
        (msr::FMASK, 0x4_7700),
    ] {
        lab.m.cpu.write_msr(number, value).unwrap();
    }
    lab
}

/// Runs until #UD has led to [`HALT`], under the interpreter and translated: registers alike, and how often translated code
/// was left.
fn run(make: impl Fn() -> Lab) -> ([u64; 18], u64) {
    let mut ends = Vec::new();
    for threshold in [200, 1] {
        let mut lab = make();
        lab.put::<u8>(HALT, 0xf4);
        lab.m.cpu.translated.delivers = true;
        let options = Options { threshold, code_size: 1 << 20, ..OPTIONS };
        let mut jit = Jit::new(options, &lab.m.cpu.code).unwrap();
        for _ in 0..100_000 {
            if lab.m.cpu.activity == Activity::Halted {
                break;
            }
            if lab.m.cpu.steps_singly() {
                lab.m.single_step().unwrap();
            } else if let Err(exception) = jit.run(&mut lab.m, 10_000) {
                lab.m.cpu.raise(exception).unwrap();
            }
        }
        assert_eq!(lab.m.cpu.rip(), HALT + 1, "left {:?}", jit.exits);
        ends.push((lab.m.cpu.regs, lab.m.cpu.retired, jit.exits[reason::LEAVE as usize], jit.executed));
    }
    assert_eq!((ends[0].0, ends[0].1), (ends[1].0, ends[1].1));
    assert!(ends[1].3 > ends[1].1 * 9 / 10, "{} of {}", ends[1].3, ends[1].1);
    (ends[1].0, ends[1].2)
}

/// push rax five times for a frame: SS, RSP, RFLAGS, CS, RIP; iretq
fn frame() -> Vec<u8> {
    let mut code = Vec::new();
    for value in [u64::from(sel::USER_DATA), at::USER_STACK, 2, u64::from(sel::USER_CODE32), at::USER_CODE] {
        code.push(0x68);
        code.extend((value as u32).to_le_bytes());
    }
    code.extend([0x48, 0xcf]);
    code
}

/// `mov eax,USER_DATA; mov ds,eax; mov es,eax`, which the way to CPL 3 has taken away.
fn load_data() -> Vec<u8> {
    vec![0xb8, sel::USER_DATA as u8, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0]
}

/// `top: call f; int 80h` or another way up; `jmp top; f: inc ebp; push ebp; pop edx; ret`
fn call_up(up: [u8; 2]) -> Vec<u8> {
    vec![0xe8, 4, 0, 0, 0, up[0], up[1], 0xeb, 0xf7, 0x45, 0x55, 0x5a, 0xc3]
}

#[test]
fn interrupts_and_their_returns_go_from_mode_to_mode() {
    // dec rbx, which is dec eax; dec ebx in the other mode; jz to ud2; iretq
    let handler = [0x48, 0xff, 0xcb, 0x74, 2, 0x48, 0xcf, 0x0f, 0x0b];
    let user = [load_data(), call_up([0xcd, 0x80])].concat();
    let (regs, left) = run(|| {
        let mut lab = lab(&frame(), &handler, &user);
        (lab.m.cpu.regs[3], lab.m.cpu.regs[5]) = (1000, 0);
        lab
    });
    assert_eq!((regs[3], regs[5], regs[2]), (0, 1000, 1000));
    assert!(left < 50, "left {left} times");
}

#[test]
fn system_calls_and_their_returns_go_from_mode_to_mode() {
    // dec rbx; jz to ud2; sysretl, which goes to ECX: what SYSCALL has put there
    let handler = [0x48, 0xff, 0xcb, 0x74, 2, 0x0f, 0x07, 0x0f, 0x0b];
    let user = [load_data(), call_up([0x0f, 0x05])].concat();
    let (regs, left) = run(|| {
        let mut lab = lab(&frame(), &handler, &user);
        (lab.m.cpu.regs[3], lab.m.cpu.regs[5]) = (1000, 0);
        lab
    });
    assert_eq!((regs[3], regs[5], regs[2]), (0, 1000, 1000));
    assert!(left < 1100, "left {left} times");
}

#[test]
fn exceptions_of_32_bit_code_are_delivered_to_64_bit_code() {
    // Of #DE: dec rbx; jz to ud2; add qword [rsp],2, behind the division; iretq
    let handler = [0x48, 0xff, 0xcb, 0x74, 7, 0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf, 0x0f, 0x0b];
    // top: inc ebp; xor ecx,ecx; div ecx; jmp top
    let user = [load_data(), vec![0x45, 0x31, 0xc9, 0xf7, 0xf1, 0xeb, 0xf9]].concat();
    let (regs, left) = run(|| {
        let mut lab = lab(&frame(), &[0xf4], &user);
        // In 16 bytes, so all of it is.
        lab.memory.write_bytes(GuestAddress(at::HANDLERS), &handler).unwrap();
        (lab.m.cpu.regs[3], lab.m.cpu.regs[5]) = (1000, 0);
        lab
    });
    assert_eq!((regs[3], regs[5]), (0, 1000));
    assert!(left < 50, "left {left} times");
}

#[test]
fn protected_mode_without_paging_is_translated() {
    // top: call f; dec ebx; jnz top; ud2; f: inc ebp; push ebp; pop edx; ret
    let code = [0xe8, 5, 0, 0, 0, 0x4b, 0x75, 0xf8, 0x0f, 0x0b, 0x45, 0x55, 0x5a, 0xc3];
    let (regs, left) = run(|| {
        let mut lab = Lab::protected();
        lab.memory.write_bytes(GuestAddress(at::CODE), &code).unwrap();
        (lab.m.cpu.regs[3], lab.m.cpu.regs[5]) = (1000, 0);
        lab
    });
    assert_eq!((regs[3], regs[5], regs[2]), (0, 1000, 1000));
    assert!(left < 10, "left {left} times");
}
