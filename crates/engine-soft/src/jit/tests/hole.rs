//! Code near the addresses that are not canonical, where Linux puts libraries without address space randomisation.

use ringfence_memory::GuestAddress;

use super::*;

/// The first 2 MiB appear here once more, 144 MiB below the hole.
const NEAR_HOLE: u64 = 0x7fff_f700_0000;

/// Runs code near the hole until it raises an exception, which is told together with the translator's share of the instructions in percent.
fn run(code: &[u8], threshold: u8) -> (Exception, Interpreter, u64) {
    let mut m = machine();
    for (at, entry) in
        [(0x1000 + 8 * 255, 0x2003_u64), (0x2000 + 8 * 511, 0x3003), (0x3000 + 8 * 440, 0x4003)]
    {
        m.cpu.memory.write(GuestAddress(at), entry).unwrap();
    }
    m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
    m.cpu.regs[RIP] = NEAR_HOLE + CODE;
    m.cpu.regs[4] = DATA + 0x2000;
    let mut jit = Jit::new(Options { threshold, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
    let exception = until_fault(&mut m, &mut jit);
    let share = 100 * jit.executed / m.cpu.retired;
    (exception, m, share)
}

#[test]
fn code_near_the_hole_is_translated() {
    // mov ecx,10000; top: lea rax,[rip+8]; call rax; dec ecx; jnz top; ud2; add ebx,1; ret
    let code = [
        0xb9, 0x10, 0x27, 0, 0, 0x48, 0x8d, 0x05, 8, 0, 0, 0, 0xff, 0xd0, 0xff, 0xc9, 0x75, 0xf3, 0x0f, 0x0b,
        0x83, 0xc3, 0x01, 0xc3,
    ];
    let (exception, m, share) = run(&code, 2);
    assert_eq!((exception, m.cpu.regs[1]), (Exception::UD, 0));
    assert!(share > 95, "{share} %");
}

#[test]
fn branch_into_the_hole_faults_itself() {
    // mov ecx,100; top: lea rax,[rip+12]; call rax; dec ecx; jns top; ud2; nop; nop; nop; test ecx,ecx; jz into the hole; ret
    let code = [
        0xb9, 100, 0, 0, 0, 0x48, 0x8d, 0x05, 11, 0, 0, 0, 0xff, 0xd0, 0xff, 0xc9, 0x79, 0xf3, 0x0f, 0x0b,
        0x90, 0x90, 0x90, 0x85, 0xc9, 0x0f, 0x84, 0, 0, 0, 0x20, 0xc3,
    ];
    let ends = [2, 200].map(|threshold| {
        let (exception, m, _) = run(&code, threshold);
        (exception, m.cpu.regs, m.cpu.retired)
    });
    assert_eq!(ends[0], ends[1]);
    assert_eq!((ends[0].0, ends[0].1[RIP]), (Exception::GP0, NEAR_HOLE + CODE + 25));
}
