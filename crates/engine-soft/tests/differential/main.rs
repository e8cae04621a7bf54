//! The interpreter against the host CPU: the same machine code from the same state, natively in a throw-away process
//! and interpreted, must end the same: registers, flags, memory, exception, error code and address. Flags that the
//! manuals leave undefined included.
//!
//! `RINGFENCE_SEED`, `RINGFENCE_CASES` and `RINGFENCE_SECONDS` choose another or a longer run;
//! `RINGFENCE_FORM` keeps to forms whose name contains it; `RINGFENCE_SHOWN` prints more of the differences in full.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compare;
mod liberties;
mod machine;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use machine::Machine;
use ringfence_oracle::generate::{Form, Generator, Options, Sample};
use ringfence_oracle::{Case, End, Mode, Oracle, Outcome, layout};

const SEED: u64 = 0x52_6967_6e67;
const CASES: u64 = 500_000;
/// Cases executed natively at a time.
const BATCH: usize = 4096;
/// Failures printed in full, unless `RINGFENCE_SHOWN` says otherwise; a form's first two are.
const SHOWN: usize = 25;
/// Forms listed under each heading.
const LISTED: usize = 60;
/// Percentage of the forms that the host can execute which the interpreter executes, too.
const COVERED_PERCENT: usize = 99;

/// What became of a form's cases.
#[derive(Default)]
struct Tally {
    cases: u64,
    /// Equal, and the code ran to its end (or was meant not to).
    executed: u64,
    /// Unequal because we raise #UD.
    missing: u64,
    /// Unequal otherwise.
    wrong: u64,
}

#[derive(Default)]
struct Run {
    forms: BTreeMap<(Mode, String), Tally>,
    cases: u64,
    faults: u64,
    /// Cases that did not end on the host, not even when run again: locked accesses over two cache lines, which some hosts hold back
    /// for many seconds. No single instruction hangs, so they say nothing.
    hung: u64,
    shown: usize,
    native: Duration,
    interpreted: Duration,
}

impl Run {
    fn judge(&mut self, sample: &Sample, host: &Outcome, machine: &mut Machine) {
        if host.end == End::Hung {
            self.hung += 1;
            return;
        }
        let started = Instant::now();
        let ours = machine.run(&sample.case);
        self.interpreted += started.elapsed();
        self.cases += 1;
        self.faults += u64::from(!host.completed());
        let name = (sample.form.mode, format!("{:?}", sample.form.code));
        let tally = self.forms.entry(name).or_default();
        tally.cases += 1;
        let differences = compare::differences(&sample.case, host, &ours, machine);
        let invalid = |end: End| matches!(end, End::Exception { vector: 6, .. });
        if differences.is_empty() {
            let raises = sample.form.code.mnemonic();
            use iced_x86::Mnemonic as M;
            let meant = matches!(raises, M::Ud0 | M::Ud1 | M::Ud2);
            tally.executed += u64::from(host.completed() || meant);
        } else if invalid(ours.end) {
            tally.missing += 1;
            // Says something only of a form that is known to work.
            if tally.executed > 0 && tally.missing <= 2 {
                self.show(sample, &differences);
            }
        } else {
            tally.wrong += 1;
            if tally.wrong <= 2 {
                self.show(sample, &differences);
            }
        }
    }

    fn show(&mut self, sample: &Sample, differences: &[String]) {
        let shown = std::env::var("RINGFENCE_SHOWN").ok().and_then(|text| text.parse().ok());
        if self.shown < shown.unwrap_or(SHOWN) {
            self.shown += 1;
            println!("{:?} {}", sample.form, compare::describe(&sample.case));
            differences.iter().for_each(|line| println!("    {line}"));
        }
    }
}

#[test]
fn interpreter_agrees_with_the_host_cpu() {
    let options = Options::from_environment(SEED, CASES);
    println!("seed {:#x}", options.seed);
    let mut oracle = Oracle::new().unwrap();
    for mode in Mode::ALL {
        if let Err(reason) = oracle.supports(mode) {
            println!("skipped: {mode:?}: {reason}");
        }
    }
    let mut generator = Generator::new(options.seed, &oracle);
    let wanted = std::env::var("RINGFENCE_FORM").unwrap_or_default();
    generator.retain(|form| format!("{:?}", form.code).contains(&wanted));
    let mut machine = Machine::new();
    let mut run = Run::default();
    let started = Instant::now();
    while run.cases < options.cases && options.time.is_none_or(|limit| started.elapsed() < limit) {
        let count = (options.cases - run.cases).min(BATCH as u64);
        let samples: Vec<Sample> = (0..count).map(|_| generator.sample()).collect();
        let cases: Vec<_> = samples.iter().map(|sample| sample.case.clone()).collect();
        let before = Instant::now();
        let outcomes = oracle.run_all(&cases).unwrap();
        run.native += before.elapsed();
        for (sample, outcome) in samples.iter().zip(&outcomes) {
            run.judge(sample, outcome, &mut machine);
        }
    }
    let filtered = !wanted.is_empty();
    judge_run(&run, generator.forms(), started.elapsed(), filtered);
}

/// Prints what was covered, and fails if anything is wrong or too little was done.
fn judge_run(run: &Run, forms: &[Form], elapsed: Duration, filtered: bool) {
    println!(
        "{} cases in {elapsed:.1?} (native {:.1?}, interpreted {:.1?}), {} of them faults",
        run.cases, run.native, run.interpreted, run.faults
    );
    println!("held back by the host: {} cases", run.hung);
    assert!(run.hung <= 3 + run.cases / 100_000, "too many cases hang on the host");
    let executed = |form: &&Form| {
        run.forms.get(&(form.mode, format!("{:?}", form.code))).is_some_and(|tally| tally.executed > 0)
    };
    let covered = forms.iter().filter(executed).count();
    println!("forms covered {covered} of {}", forms.len());
    let uncovered = forms.iter().filter(|form| !executed(form));
    uncovered
        .take(LISTED)
        .for_each(|form| println!("  not covered: {:?} in {} bits", form.code, form.mode.bits()));
    let list = |title: &str, count: fn(&Tally) -> u64| {
        let bad: Vec<_> = run.forms.iter().filter(|(_, tally)| count(tally) > 0).collect();
        println!("{title}: {} forms", bad.len());
        for ((mode, form), tally) in bad.iter().take(LISTED) {
            println!("  {form} in {} bits: {} of {} cases", mode.bits(), count(tally), tally.cases);
        }
        bad.len()
    };
    list("raise #UD always", |tally| if tally.executed == 0 { tally.missing } else { 0 });
    let partly =
        list("raise #UD in some cases only", |tally| if tally.executed == 0 { 0 } else { tally.missing });
    let wrong = list("wrong", |tally| tally.wrong);
    assert_eq!((wrong, partly), (0, 0), "the interpreter and the host CPU differ, see above");
    if !filtered {
        assert!(run.faults * 10 >= run.cases, "too few faults among the cases");
        assert!(covered * 100 >= forms.len() * COVERED_PERCENT, "forms covered {covered} of {}", forms.len());
    }
}

/// A comparison that finds nothing must have been able to find something.
#[test]
fn tampered_results_are_noticed() {
    // mov %rax, (%rbx)
    let mut case = Case::new(Mode::Bits64, &[0x48, 0x89, 0x03]);
    (case.gpr[0], case.gpr[3]) = (u64::MAX, layout::DATA[0].address);
    let host = Oracle::new().unwrap().run(&case).unwrap();
    let mut machine = Machine::new();
    let ours = machine.run(&case);
    let differ =
        |host: &Outcome, machine: &Machine| !compare::differences(&case, host, &ours, machine).is_empty();
    assert!(!differ(&host, &machine));
    type Tamper = fn(&mut Outcome);
    let tampers: [Tamper; 6] = [
        |host| host.gpr[15] ^= 1 << 63,
        |host| host.rip += 1,
        |host| host.rflags ^= 1 << 11,
        |host| host.segments[3] = 0x2b,
        |host| host.end = End::Exception { vector: 14, error: 4, address: 8 },
        |host| host.memory = None,
    ];
    for tamper in tampers {
        let mut other = host.clone();
        tamper(&mut other);
        assert!(differ(&other, &machine), "{other:?}");
    }
    machine.after[0x3fff] ^= 1;
    assert!(differ(&host, &machine));
}
