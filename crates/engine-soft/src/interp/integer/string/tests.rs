//! Work by the page against work by the element, which is the definition.

use ringfence_memory::GuestAddress;
use ringfence_x86::{Exception, Rflags};

use super::{RCX, RDI, RSI};
use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at};
use crate::mmu::tlb::Class;

/// Where the operands lie; the pages before and behind are absent.
const AREA: std::ops::Range<u64> = 0x3_0000..0x3_4000;

fn lab() -> Lab {
    let mut lab = Lab::long();
    for page in [AREA.start - 0x1000, AREA.end] {
        lab.put(at::TABLES + 0x3000 + 8 * (page >> 12), 0_u64);
    }
    lab
}

/// A lab in which each access is looked at on its own: a data breakpoint is armed, somewhere else.
fn slow_lab() -> Lab {
    let mut lab = lab();
    lab.m.cpu.dr[0] = 0x7000_0000;
    lab.m.cpu.dr7 = 1 | 1 << 16;
    lab.m.cpu.update_class();
    assert_eq!(lab.m.cpu.class, Class::Slow);
    lab
}

/// Executes one instruction to its end or fault: outcome and executions.
fn finish(lab: &mut Lab, bytes: &[u8]) -> (Result<(), Exception>, u32) {
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.code(bytes);
    for executions in 1.. {
        let outcome = lab.m.step();
        if outcome.is_err() || lab.m.cpu.regs[RIP] != at::CODE {
            return (outcome, executions);
        }
    }
    unreachable!()
}

#[test]
fn work_by_the_page_does_what_work_by_the_element_does() {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let mut labs = [lab(), slow_lab()];
    let (mut faults, mut several) = (0, 0);
    for round in 0..3000 {
        // MOVS, CMPS, STOS, LODS, SCAS, of every size.
        let opcode = [0xa4, 0xa6, 0xaa, 0xac, 0xae][next(5) as usize];
        let mut code = vec![];
        code.extend([None, Some(0xf3), Some(0xf3), Some(0xf2)][next(4) as usize]);
        let size = next(4);
        code.extend([None, Some(0x66), None, Some(0x48)][size as usize]);
        code.push(opcode | u8::from(size != 0));
        // Long runs of one value, and places where they end.
        let mut bytes = vec![next(2) as u8; (AREA.end - AREA.start) as usize];
        for _ in 0..next(6) {
            let at = next(bytes.len() as u64) as usize;
            bytes[at] = next(3) as u8;
        }
        let place = |n: u64| AREA.start + n;
        let rsi = place(next(0x4000));
        // Often close by, so that they overlap.
        let rdi = if next(2) == 0 { place(next(0x4000)) } else { (rsi + next(40)).saturating_sub(20) };
        let count = if next(2) == 0 { next(40) } else { next(0x2400) };
        let rax = [0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, next(u64::MAX)][next(4) as usize];
        let backwards = next(8) == 0;
        let status = next(2) * 0x8d5;
        let ends = labs.each_mut().map(|lab| {
            lab.memory.write_bytes(GuestAddress(AREA.start), &bytes).unwrap();
            lab.m.cpu.set_rflags(status | 2);
            lab.m.cpu.flags.set(Rflags::DF, backwards);
            (lab.m.cpu.regs[RSI], lab.m.cpu.regs[RDI], lab.m.cpu.regs[RCX]) = (rsi, rdi, count);
            lab.m.cpu.regs[0] = rax;
            lab.m.cpu.fault_address = 0;
            let before = lab.m.cpu.retired;
            let outcome = finish(lab, &code);
            let mut after = vec![0; bytes.len()];
            lab.memory.read_bytes(GuestAddress(AREA.start), &mut after).unwrap();
            let cpu = &lab.m.cpu;
            (outcome, cpu.regs, cpu.rflags(), cpu.retired - before, cpu.fault_address, after)
        });
        let [fast, slow] = &ends;
        let what = format!("round {round}: {code:x?}, {rsi:#x}, {rdi:#x}, {count}, {rax:#x}, {backwards}");
        assert_eq!(
            (&fast.0, fast.1, fast.2, fast.3, fast.4),
            (&slow.0, slow.1, slow.2, slow.3, slow.4),
            "{what}"
        );
        assert!(fast.5 == slow.5, "memory differs: {what}");
        faults += u32::from(fast.0.0.is_err());
        several += u32::from(fast.0.1 > 1);
    }
    assert!(faults > 100 && several > 100, "{faults} faults, {several} in several steps");
}

/// Run by hand: nanoseconds for each instruction over 4096 bytes, and for a single one of a page's end.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let cases: [(&str, &[u8], u64); 9] = [
        ("rep movsb", &[0xf3, 0xa4], 4096),
        ("rep movsq", &[0xf3, 0x48, 0xa5], 512),
        ("rep stosb", &[0xf3, 0xaa], 4096),
        ("rep stosq", &[0xf3, 0x48, 0xab], 512),
        ("repe cmpsb", &[0xf3, 0xa6], 4096),
        ("repne scasb", &[0xf2, 0xae], 4096),
        ("rep lodsb", &[0xf3, 0xac], 4096),
        ("movsq", &[0x48, 0xa5], 1),
        ("rep movsb of 32", &[0xf3, 0xa4], 32),
    ];
    for (name, code, count) in cases {
        let mut lab = lab();
        lab.code(code);
        const ROUNDS: u32 = 5000;
        let start = std::time::Instant::now();
        for _ in 0..ROUNDS {
            let cpu = &mut lab.m.cpu;
            (cpu.regs[RSI], cpu.regs[RDI], cpu.regs[RCX]) = (AREA.start, AREA.start + 0x2000, count);
            (cpu.regs[0], cpu.regs[RIP]) = (1, at::CODE);
            lab.m.step().unwrap();
        }
        println!("{name}: {} ns", start.elapsed().as_nanos() / u128::from(ROUNDS));
    }
}
