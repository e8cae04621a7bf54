//! MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: programs with known results. Random ones are among vector and MMX instructions.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Each of them, of the first register selected by the second, and its operand's bytes.
const FORMS: [(Emit, usize); 4] = [
    (|a| a.maskmovdqu(xmm1, xmm2), 16),
    (|a| a.vmaskmovdqu(xmm1, xmm2), 16),
    (|a| a.vmaskmovdqu(xmm9, xmm10), 16),
    (|a| a.maskmovq(mm1, mm2), 8),
];

/// A loop of one, 100 times at RDI, and UD2 behind it; the registers in all widths hold bytes 1 to 16, and a mask of every third byte.
fn prepared(emit: Emit) -> (Interpreter, Jit) {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut top = a.create_label();
    a.movq(mm1, qword_ptr(rbx)).unwrap();
    a.movq(mm2, qword_ptr(rbx + 16)).unwrap();
    a.set_label(&mut top).unwrap();
    emit(&mut a).unwrap();
    a.add(rdi, 1).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(top).unwrap();
    a.emms().unwrap();
    a.ud2().unwrap();
    let code = a.assemble(CODE).unwrap();
    let mut m = machine();
    allow_vectors(&mut m.cpu, 7);
    m.cpu.memory.write_bytes(GuestAddress(CODE), &code).unwrap();
    let (data, mask) = bytes_and_mask();
    m.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
    m.cpu.memory.write_bytes(GuestAddress(DATA + 16), &mask).unwrap();
    let words =
        |bytes: [u8; 16]| bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect::<Vec<_>>();
    let mut state = m.cpu.vector.unit.vector_state();
    for (register, bytes) in [(1, data), (2, mask), (9, data), (10, mask)] {
        state.zmm[register][..2].copy_from_slice(&words(bytes));
    }
    m.cpu.vector.unit.set_vector_state(&state);
    let jit = Jit::new(Options { threshold: 1, profile: true, ..OPTIONS }, &m.cpu.code).unwrap();
    m.cpu.regs[3] = DATA;
    (m, jit)
}

fn bytes_and_mask() -> ([u8; 16], [u8; 16]) {
    (std::array::from_fn(|i| i as u8 + 1), std::array::from_fn(|i| if i % 3 == 1 { 0x80 } else { 0x7f }))
}

/// Runs it at an address; the exception that ends it.
fn run(m: &mut Interpreter, jit: &mut Jit, at: u64) -> Exception {
    (m.cpu.regs[RIP], m.cpu.regs[1], m.cpu.regs[7]) = (CODE, 100, at);
    let exception = until_fault(m, jit);
    m.cpu.vector.unit.park();
    exception
}

#[test]
fn bytes_selected_are_stored_without_a_handler() {
    for (emit, size) in FORMS {
        let (mut m, mut jit) = prepared(emit);
        let (data, mask) = bytes_and_mask();
        let mut expected = vec![0; 128];
        for lap in 0..100 {
            (0..size).filter(|&i| mask[i] & 0x80 != 0).for_each(|i| expected[lap + i] = data[i]);
        }
        for round in 0..4 {
            let at = DATA + 0x1000 + 0x200 * round;
            assert_eq!(run(&mut m, &mut jit, at), Exception::UD);
            assert_eq!(bytes(&m, at, 128), expected);
        }
        let handed: u64 = crate::jit::handed(&m.cpu).iter().map(|(_, count)| count).sum();
        assert!(handed < 12, "{:?}", crate::jit::handed(&m.cpu));
        assert!(jit.executed * 100 > m.cpu.retired * 95);
    }
}

#[test]
fn operand_that_is_not_writable_in_part_faults_and_stores_nothing() {
    // The page behind is not present; that after it can be read only.
    for (emit, size) in FORMS {
        let (mut m, mut jit) = prepared(emit);
        for _ in 0..3 {
            let last = DATA + 0x4000 - size as u64;
            assert_eq!(run(&mut m, &mut jit, last - 20).vector, ringfence_x86::Vector::PageFault);
            assert_eq!((m.cpu.regs[7], m.cpu.fault_address), (last + 1, DATA + 0x4000));
            // What the one before has stored there.
            let (data, mask) = bytes_and_mask();
            let behind = if mask[size - 1] & 0x80 != 0 { data[size - 1] } else { 0 };
            assert_eq!(bytes(&m, DATA + 0x3fff, 1), [behind]);
            let fault = run(&mut m, &mut jit, DATA + 0x5000);
            assert_eq!((fault.vector, fault.error_code), (ringfence_x86::Vector::PageFault, 3));
            assert_eq!((m.cpu.regs[7], m.cpu.regs[1]), (DATA + 0x5000, 100));
        }
    }
}
