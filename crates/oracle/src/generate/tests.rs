//! The generator keeps its promises.

use std::collections::HashMap;
use std::time::Instant;

use super::{Form, Generator};
use crate::{Case, End, Mode, Oracle};

#[test]
fn same_seed_gives_same_cases() {
    let oracle = Oracle::new().unwrap();
    let (mut a, mut b) = (Generator::new(7, &oracle), Generator::new(7, &oracle));
    for _ in 0..2000 {
        let (a, b) = (a.sample(), b.sample());
        assert_eq!((a.case.code(), a.case.gpr, a.form), (b.case.code(), b.case.gpr, b.form));
    }
}

#[test]
fn every_form_gets_an_encoding_and_a_tenth_of_the_cases_fault() {
    let mut oracle = Oracle::new().unwrap();
    for mode in Mode::ALL {
        if let Err(reason) = oracle.supports(mode) {
            println!("skipped {mode:?}: {reason}");
        }
    }
    let mut generator = Generator::new(1, &oracle);
    let start = Instant::now();
    let samples: Vec<_> = (0..60_000).map(|_| generator.sample()).collect();
    let generated = start.elapsed();
    let cases: Vec<_> = samples.iter().map(|sample| sample.case.clone()).collect();
    let start = Instant::now();
    let outcomes = oracle.run_all(&cases).unwrap();
    println!("generated in {generated:?}, run in {:?}", start.elapsed());
    println!("{} forms, not encoded: {:?}", generator.forms().len(), generator.failed());
    assert!(generator.failed().is_empty());
    assert!(generator.forms().len() > 2000);

    let mut ends: HashMap<String, u64> = HashMap::new();
    let mut completed: HashMap<Form, u64> = HashMap::new();
    let mut unfinished = Vec::new();
    for (sample, outcome) in samples.iter().zip(&outcomes) {
        let name = match outcome.end {
            End::Exception { vector, .. } => format!("vector {vector}"),
            other => {
                unfinished.push((sample.form, other, sample.case.code().to_vec()));
                format!("{other:?}")
            }
        };
        *ends.entry(name).or_default() += 1;
        *completed.entry(sample.form).or_default() += u64::from(outcome.completed());
    }
    println!("{ends:?}");
    let never: Vec<_> = completed.iter().filter(|&(_, &count)| count == 0).map(|(form, _)| form).collect();
    println!("{} forms never completed", never.len());
    assert!(unfinished.is_empty(), "{unfinished:x?}");
    let faults = outcomes.iter().filter(|outcome| !outcome.completed()).count();
    assert!(faults * 10 >= outcomes.len() && faults * 3 <= outcomes.len(), "{faults} faults");
    for vector in [0, 6, 12, 13, 14, 17] {
        assert!(ends.contains_key(&format!("vector {vector}")), "no vector {vector}");
    }
}

/// What a case puts into a register that the host lacks would come back as zero and pass for a difference.
#[test]
fn vector_registers_of_every_case_reach_the_host() {
    let mut oracle = Oracle::new().unwrap();
    let mut generator = Generator::new(3, &oracle);
    let samples: Vec<_> = (0..20_000).map(|_| generator.sample()).collect();
    let idle = |case: &Case| {
        let mut case = case.clone();
        case.set_code(&[0x90]);
        case
    };
    let cases: Vec<_> = samples.iter().map(|sample| idle(&sample.case)).collect();
    let outcomes = oracle.run_all(&cases).unwrap();
    for ((sample, case), outcome) in samples.iter().zip(&cases).zip(&outcomes) {
        assert!(matches!(outcome.end, End::Exception { .. }), "{:?}", outcome.end);
        assert_eq!(outcome.vectors.zmm, case.vectors.zmm, "{:?}", sample.form);
        assert_eq!(outcome.vectors.k, case.vectors.k, "{:?}", sample.form);
    }
}

#[test]
fn same_case_gives_same_outcome_again() {
    let mut oracle = Oracle::new().unwrap();
    let mut generator = Generator::new(2, &oracle);
    let samples: Vec<_> = (0..20_000).map(|_| generator.sample()).collect();
    let mut cases: Vec<_> = samples.iter().map(|sample| sample.case.clone()).collect();
    let first = oracle.run_all(&cases).unwrap();
    // After other cases than before.
    cases.reverse();
    let mut second = oracle.run_all(&cases).unwrap();
    second.reverse();
    for (i, (a, b)) in first.iter().zip(&second).enumerate() {
        let same = (a.end, a.gpr, a.rip, a.rflags, a.segments, &a.memory, &a.vectors)
            == (b.end, b.gpr, b.rip, b.rflags, b.segments, &b.memory, &b.vectors);
        assert!(same, "{:?}\n{a:x?}\n{b:x?}", samples[i].form);
    }
}
