//! Cases by the hundred thousand, from the decoder's own table of instruction forms.
//!
//! Each form that a native process can execute gets its turn, in every mode it exists in, with operands that are
//! random or at the edges of their range, registers aimed at memory that is there, not there, read-only, misaligned
//! or across a page boundary, prefixes allowed and forbidden. The same seed gives the same cases on hosts with the
//! same features.

mod address;
mod encode;
mod forms;
mod operands;
mod options;
mod state;

#[cfg(test)]
mod tests;

use iced_x86::{Code, EncodingKind};

pub use forms::{Form, is_suitable, runnable};
pub use options::Options;

use crate::case::{Case, Mode};
use crate::random::Random;
use crate::{Oracle, layout};

/// A generated case.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The case.
    pub case: Case,
    /// What it executes first; [`Code::INVALID`] if that is no instruction.
    pub form: Form,
}

/// Makes cases.
#[derive(Debug)]
pub struct Generator {
    random: Random,
    forms: Vec<Form>,
    /// Indices in `forms`, those of more interest several times.
    schedule: Vec<u32>,
    position: usize,
    failed: Vec<Form>,
}

impl Generator {
    /// Makes cases of every form that `oracle`'s host can execute, from a seed.
    pub fn new(seed: u64, oracle: &Oracle) -> Self {
        let modes = Mode::ALL.into_iter().filter(|&mode| oracle.supports(mode).is_ok());
        let forms: Vec<Form> = modes.flat_map(|mode| runnable(mode, oracle.has_fsgsbase())).collect();
        let mut generator =
            Self { random: Random::new(seed), forms, schedule: Vec::new(), position: 0, failed: Vec::new() };
        generator.plan();
        generator
    }

    /// Keeps to the forms that `wanted` chooses.
    pub fn retain(&mut self, wanted: impl FnMut(&Form) -> bool) {
        self.forms.retain(wanted);
        self.plan();
    }

    fn plan(&mut self) {
        self.schedule.clear();
        for (index, form) in self.forms.iter().enumerate() {
            self.schedule.extend(std::iter::repeat_n(index as u32, weight(*form)));
        }
        for i in (1..self.schedule.len()).rev() {
            self.schedule.swap(i, self.random.below(i as u64 + 1) as usize);
        }
    }

    /// Every form that gets its turn.
    pub fn forms(&self) -> &[Form] {
        &self.forms
    }

    /// Forms for which no encoding was found; a defect of the generator.
    pub fn failed(&self) -> &[Form] {
        &self.failed
    }

    /// The next case.
    ///
    /// # Panics
    /// If there is no form to choose from.
    pub fn sample(&mut self) -> Sample {
        loop {
            let form = self.forms[self.schedule[self.position % self.schedule.len()] as usize];
            self.position += 1;
            if let Some(sample) = make(&mut self.random, form) {
                return sample;
            }
            if !self.failed.contains(&form) {
                self.failed.push(form);
            }
        }
    }
}

/// How often a form gets its turn in a round: integer forms have the most to go wrong.
fn weight(form: Form) -> usize {
    let vector = form.code.op_code().encoding() != EncodingKind::Legacy;
    let integer = form.code.cpuid_features().iter().all(|feature| {
        use iced_x86::CpuidFeature as F;
        matches!(
            feature,
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV | F::CX8
        )
    });
    match (vector, integer, form.mode) {
        (true, _, Mode::Bits64) => 2,
        (true, ..) => 1,
        (_, true, Mode::Bits64) => 12,
        (_, true, _) => 8,
        _ => 4,
    }
}

fn make(random: &mut Random, form: Form) -> Option<Sample> {
    let Form { code, mode } = form;
    let mut case = Case::new(mode, &[]);
    case.code_offset = match random.below(100) {
        // Not entirely in the pages, or just so, or across both: where exactly depends on the length.
        0..3 => 0x2000 - 1 - random.below(12) as u16,
        3..6 => 0x1000 - 1 - random.below(12) as u16,
        _ => 0x400 + random.below(0xa00) as u16,
    };
    let ip = case.rip();
    let mut encoded = encode::encode(random, code, mode, ip)?;
    if random.chance(7) {
        encoded = encode::disturb(random, encoded, mode, ip);
    }
    state::fill(random, &mut case, &encoded.instruction);
    operands::arrange(random, &mut case, &mut encoded);
    // Displacements were changed, which cannot make it another instruction.
    case.set_code(encoded.bytes.get());
    debug_assert!(layout::CODE_LEN >= usize::from(case.code_offset));
    let code = if encoded.instruction.is_invalid() { Code::INVALID } else { encoded.instruction.code() };
    Some(Sample { case, form: Form { mode, code } })
}
