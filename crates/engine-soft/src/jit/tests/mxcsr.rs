//! LDMXCSR.

use super::*;

/// `ldmxcsr [rbx]` and `vldmxcsr [rbx]`.
const FORMS: [&[u8]; 2] = [&[0x0f, 0xae, 0x13, 0x0f, 0x0b], &[0xc5, 0xf8, 0xae, 0x13, 0x0f, 0x0b]];

/// What MXCSR and what goes with it became, the exception, and whether the handler was called.
fn load(value: u32, code: &[u8], threshold: u8) -> (String, Exception, bool) {
    let mut m = machine();
    allow_vectors(&mut m.cpu, 7);
    let mut jit = Jit::new(Options { threshold, profile: true, ..OPTIONS }, &m.cpu.code).unwrap();
    m.cpu.memory.write_bytes(GuestAddress(CODE), code).unwrap();
    let handed = |m: &Interpreter| -> u64 {
        let forms = super::super::handed(&m.cpu);
        let loads = forms.iter().filter(|(form, _)| form.to_lowercase().contains("ldmxcsr"));
        loads.map(|(_, count)| count).sum()
    };
    let (mut before, mut end) = (0, None);
    // The first finds no page in the soft TLB.
    for value in [0x1f80, 0x1f80, 0x1f80, value] {
        m.cpu.memory.write(GuestAddress(DATA + 0x7fe), value).unwrap();
        (m.cpu.regs[3], m.cpu.regs[RIP]) = (DATA + 0x7fe, CODE);
        before = handed(&m);
        end = Some(until_fault(&mut m, &mut jit));
    }
    (m.cpu.vector.unit.show_mxcsr(), end.unwrap(), handed(&m) != before)
}

#[test]
fn controls_are_loaded_as_in_the_interpreter() {
    for code in FORMS {
        if code[0] == 0xc5 && !is_x86_feature_detected!("avx") {
            continue;
        }
        for value in [0, 0x1f80, 0x1fbf, 0xffff, 0x8040, 0x7f80, 0x1f00, 0x1_1f80, 0x2_1f80, 0x8000_0000] {
            let (found, end, handed) = load(value, code, 1);
            let (expected, fault, _) = load(value, code, 200);
            assert_eq!((found, end), (expected, fault), "{value:#x}");
            assert_eq!(handed, value > 0xffff, "{value:#x}");
        }
    }
}
