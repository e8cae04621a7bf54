//! No run ends between STI and the instruction behind it, unless the interrupt shadow is known.

use ringfence_memory::GuestAddress;

use super::*;

/// What is between STI and the end of the loop, where the address behind STI is a branch's target too: `behind: dec ecx; jnz behind;
/// jmp top`, in one page or with STI at the end of one.
fn code(distance: usize) -> Vec<u8> {
    // top: mov ecx,2; cli; nops; sti
    let mut code = vec![0xb9, 2, 0, 0, 0, 0xfa];
    code.resize(code.len() + distance, 0x90);
    code.push(0xfb);
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xe9]);
    code.extend_from_slice(&(-(code.len() as i32 + 4)).to_le_bytes());
    code
}

#[test]
fn run_that_ends_behind_sti_knows_of_the_shadow() {
    let mut ended_there = 0;
    for (start, distance) in [(CODE, 3), (CODE + 0xf00, 0xf9), (CODE, 60), (CODE, 61), (CODE, 62)] {
        let code = code(distance);
        let behind = start + 7 + distance as u64;
        let mut m = machine();
        m.cpu.memory.write_bytes(GuestAddress(start), &code).unwrap();
        m.cpu.regs[RIP] = start;
        let mut jit = Jit::new(Options { threshold: 1, code_size: 1 << 20, ..OPTIONS }, &m.cpu.code).unwrap();
        for limit in (1..200).cycle().take(3000) {
            if m.cpu.steps_singly() {
                m.single_step().unwrap();
            } else {
                jit.run(&mut m, limit).unwrap();
            }
            // There either from STI or from the loop's end, which has counted.
            let fresh = m.cpu.regs[RIP] == behind && m.cpu.regs[1] == 2;
            assert_eq!(m.cpu.interrupt_shadow, fresh, "{distance} bytes, limit {limit}");
            ended_there += u32::from(fresh);
        }
        assert!(jit.cache.sizes.regions > 0);
    }
    assert!(ended_there > 100, "{ended_there}");
}
