//! Known results.

use crate::layout::{BASE, CODE, DATA, selector};
use crate::{Case, End, Mode, Oracle, Outcome};

const CF: u64 = 1;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

fn run(case: &Case) -> Outcome {
    Oracle::new().unwrap().run(case).unwrap()
}

fn exception(vector: u8, error: u32, address: u64) -> End {
    End::Exception { vector, error, address }
}

fn vector(outcome: &Outcome) -> u8 {
    match outcome.end {
        End::Exception { vector, .. } => vector,
        other => panic!("{other:?}"),
    }
}

#[test]
fn add_gives_sum_and_flags() {
    let mut case = Case::new(Mode::Bits64, &[0x48, 0x01, 0xd8]);
    (case.gpr[0], case.gpr[3]) = (i64::MAX as u64, 1);
    let outcome = run(&case);
    assert_eq!(vector(&outcome), 3);
    assert!(outcome.completed());
    assert_eq!(outcome.rip, case.rip() + 4);
    assert_eq!(outcome.gpr[0], 1 << 63);
    assert_eq!(outcome.rflags & (CF | AF | ZF | SF | OF), AF | SF | OF);
    assert_eq!(outcome.segments[1], selector::SYSTEM_CODE64);
    assert!(outcome.memory.is_none());
}

#[test]
fn every_register_goes_in_and_comes_out() {
    let mut case = Case::new(Mode::Bits64, &[0x90]);
    case.gpr = std::array::from_fn(|i| 0x1111_1111_1111_1111 * (i as u64 + 1).min(15));
    case.rflags = 0x4_0cd5 | 0x202;
    (case.fs_base, case.gs_base) = (0x1234_5000, 0x7fff_0000_1000);
    for (i, zmm) in case.vectors.zmm.iter_mut().enumerate() {
        *zmm = std::array::from_fn(|j| (i * 8 + j) as u64 * 0x0101_0101_0101);
    }
    case.vectors.k = std::array::from_fn(|i| 0x8765_4321_0000_0000 | i as u64);
    case.vectors.st = std::array::from_fn(|i| [1 << 63 | i as u64, 0x3fff]);
    (case.vectors.ftw, case.vectors.fcw, case.vectors.fsw) = (0x7f, 0x27f, 0x3900);
    case.vectors.mxcsr = 0x9fc0;
    let outcome = run(&case);
    assert_eq!(outcome.gpr, case.gpr);
    assert_eq!(outcome.rflags, case.rflags);
    assert_eq!((outcome.fs_base, outcome.gs_base), (case.fs_base, case.gs_base));
    let lanes = match () {
        () if std::arch::is_x86_feature_detected!("avx512f") => 8,
        () if std::arch::is_x86_feature_detected!("avx") => 4,
        () => 2,
    };
    for i in 0..if lanes == 8 { 32 } else { 16 } {
        assert_eq!(outcome.vectors.zmm[i][..lanes], case.vectors.zmm[i][..lanes], "register {i}");
    }
    if lanes == 8 {
        assert_eq!(outcome.vectors.k, case.vectors.k);
    }
    assert_eq!(outcome.vectors.st, case.vectors.st);
    assert_eq!(
        (outcome.vectors.ftw, outcome.vectors.fcw, outcome.vectors.fsw, outcome.vectors.mxcsr),
        (case.vectors.ftw, case.vectors.fcw, case.vectors.fsw, case.vectors.mxcsr)
    );
}

#[test]
fn division_by_zero_gives_divide_error_at_the_instruction() {
    let outcome = run(&Case::new(Mode::Bits64, &[0xf7, 0xf1]));
    assert_eq!(vector(&outcome), 0);
    assert_eq!(outcome.rip, CODE + 0x800);
}

#[test]
fn ud2_gives_invalid_opcode() {
    for mode in Mode::ALL {
        let case = Case::new(mode, &[0x0f, 0x0b]);
        let outcome = run(&case);
        assert_eq!((vector(&outcome), outcome.rip), (6, case.rip()));
    }
}

#[test]
fn accesses_outside_the_pages_give_page_faults_with_address_and_code() {
    // mov [rbx], rax
    let store = |address: u64| {
        let mut case = Case::new(Mode::Bits64, &[0x48, 0x89, 0x03]);
        (case.gpr[0], case.gpr[3]) = (u64::MAX, address);
        run(&case)
    };
    assert_eq!(store(BASE + 0x3000).end, exception(14, 6, BASE + 0x3000));
    assert_eq!(store(DATA[2].address).end, exception(14, 7, DATA[2].address));
    let straddling = store(DATA[2].address - 4);
    assert_eq!(straddling.end, exception(14, 7, DATA[2].address));
    assert!(straddling.memory.is_none());
    assert_eq!(vector(&store(1 << 47)), 13);
    let written = store(DATA[0].address + 16).memory.unwrap();
    assert_eq!((written.offset, written.bytes), (16, vec![0xff; 8]));
    // jmp rbx to a page that is not executable
    let mut case = Case::new(Mode::Bits64, &[0xff, 0xe3]);
    case.gpr[3] = DATA[0].address;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.rip), (exception(14, 0x15, DATA[0].address), DATA[0].address));
}

#[test]
fn code_at_the_end_of_its_pages_faults_at_the_next() {
    let mut case = Case::new(Mode::Bits64, &[0x48, 0xff, 0xc0]);
    case.code_offset = 0x1ffd;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.gpr[0]), (exception(14, 0x14, CODE + 0x2000), 1));
    case.code_offset = 0x1ffe;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.gpr[0]), (exception(14, 0x14, CODE + 0x2000), 0));
    assert_eq!(outcome.rip, CODE + 0x1ffe);
}

#[test]
fn decimal_adjust_runs_in_legacy_modes_only() {
    for (mode, vector_expected, result) in
        [(Mode::Bits64, 6, 0x2a), (Mode::Bits32, 3, 0x30), (Mode::Bits16, 3, 0x30)]
    {
        // daa
        let mut case = Case::new(mode, &[0x27]);
        case.gpr[0] = 0x2a;
        let outcome = run(&case);
        assert_eq!((vector(&outcome), outcome.gpr[0]), (vector_expected, result), "{mode:?}");
    }
    // aaa
    let mut case = Case::new(Mode::Bits32, &[0x37]);
    case.gpr[0] = 0x0b;
    let outcome = run(&case);
    assert_eq!(outcome.gpr[0], 0x0101);
    assert_eq!(outcome.rflags & (CF | AF), CF | AF);
}

#[test]
fn sixteen_bit_code_pushes_through_its_stack_segment() {
    // push ax
    let mut case = Case::new(Mode::Bits16, &[0x50]);
    (case.gpr[0], case.gpr[4]) = (0xabcd, 0xffff_5010);
    let outcome = run(&case);
    assert_eq!(outcome.gpr[4] as u32, 0xffff_500e);
    let change = outcome.memory.unwrap();
    assert_eq!((change.offset, &change.bytes[6..]), (0x1008, &[0xcd, 0xab][..]));
    // A word at offset 0xffff is beyond the limit of DS.
    let mut case = Case::new(Mode::Bits16, &[0x8b, 0x07]);
    case.gpr[3] = 0xffff;
    assert_eq!(run(&case).end, exception(13, 0, 0));
}

#[test]
fn misaligned_access_with_ac_gives_alignment_check() {
    let mut case = Case::new(Mode::Bits64, &[0x8b, 0x03]);
    case.gpr[3] = DATA[0].address + 1;
    case.rflags |= 1 << 18;
    assert_eq!(vector(&run(&case)), 17);
}

#[test]
fn single_step_traps_after_one_instruction() {
    let mut case = Case::new(Mode::Bits64, &[0xff, 0xc0, 0xff, 0xc0]);
    case.rflags |= 1 << 8;
    let outcome = run(&case);
    assert_eq!((vector(&outcome), outcome.gpr[0], outcome.rip), (1, 1, case.rip() + 2));
}

#[test]
fn system_calls_are_stopped() {
    let mut case = Case::new(Mode::Bits64, &[0x0f, 0x05]);
    case.gpr[0] = 39;
    assert_eq!(run(&case).end, End::SystemCall);
    let mut case = Case::new(Mode::Bits32, &[0xcd, 0x80]);
    case.gpr[0] = 20;
    assert_eq!(run(&case).end, End::SystemCall);
}

#[test]
fn a_hang_is_caught_and_the_next_case_runs() {
    let hang = Case::new(Mode::Bits64, &[0xeb, 0xfe]);
    let fine = Case::new(Mode::Bits64, &[0x90]);
    let ends: Vec<End> =
        Oracle::new().unwrap().run_all(&[fine.clone(), hang, fine]).unwrap().iter().map(|o| o.end).collect();
    assert_eq!(ends, [exception(3, 0, 0), End::Hung, exception(3, 0, 0)]);
}

#[test]
fn a_case_that_kills_the_child_is_lost_and_the_next_runs() {
    // A data segment that cannot be loaded faults in the handler itself.
    let mut fatal = Case::new(Mode::Bits32, &[0x90]);
    fatal.segments[3] = selector::NOT_PRESENT;
    let fine = Case::new(Mode::Bits64, &[0x90]);
    let ends: Vec<End> =
        Oracle::new().unwrap().run_all(&[fatal, fine]).unwrap().iter().map(|o| o.end).collect();
    assert_eq!(ends, [End::Lost, exception(3, 0, 0)]);
}
