//! The sweep over all forms.

use std::collections::BTreeMap;

use iced_x86::{Code, Instruction, OpKind};

use super::generate::{Random, instance};
use super::native::{Native, NativeState};
use crate::vector::arena::Arena;
use crate::vector::call::Image;
use crate::vector::encode::slots;
use crate::vector::features::FeatureSet;
use crate::vector::form::{Execution, Form, Location, Outcome, Preparer};
use crate::vector::state::{Slots, VectorUnit};
use crate::vector::table;

/// Instances of each form.
const INSTANCES: u32 = 24;

/// A memory operand lies within these bytes, on a boundary of 64 or off it.
#[derive(Clone, Debug, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Buffer(pub(super) [u64; 24]);

pub(super) fn preparer() -> Preparer {
    Preparer::new(Arena::new(4 << 20).expect("code memory"), FeatureSet::host())
}

/// A random state; every exception masked.
pub(super) fn random_state(random: &mut Random) -> NativeState {
    let mut state = NativeState::default();
    let extended = FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F);
    let words = if extended { 8 } else { 4 };
    for (n, register) in state.zmm.iter_mut().enumerate() {
        if extended || n < 16 {
            register[..words].fill_with(|| random.operand());
        }
    }
    if extended {
        state.k.fill_with(|| match random.below(4) {
            0 => u64::MAX,
            1 => random.next() & random.next(),
            _ => random.next(),
        });
    }
    state.gpr.fill_with(|| random.operand());
    state.status = (random.next() as u16) & 0xd501 | 0x200;
    // Rounding, flush-to-zero, denormals-are-zeroes and old flags.
    state.mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
    random_x87(random, &mut state.image);
    state
}

fn random_x87(random: &mut Random, image: &mut Image) {
    // Any exception may be unmasked, but none is pending: ES and B are clear.
    let masks = if random.chance(60) { 0x3f } else { random.next() as u16 & 0x3f };
    let fcw = 0x40 | masks | (random.next() as u16) & 0xf00;
    let fsw = (random.next() as u16) & (0x7f40 | masks);
    image.0[0..2].copy_from_slice(&fcw.to_le_bytes());
    image.0[2..4].copy_from_slice(&fsw.to_le_bytes());
    image.0[4] = if random.chance(70) { 0x7f } else { random.next() as u8 };
    for i in 0..8 {
        let at = 32 + 16 * i;
        let significand = if random.chance(90) { random.operand() | 1 << 63 } else { random.operand() };
        let exponent = match random.below(8) {
            0 => 0,
            1 => 0x7fff,
            2 => random.next() as u16,
            _ => 0x3fff - 32 + random.below(64) as u16,
        } | (random.next() as u16) & 0x8000;
        image.0[at..at + 8].copy_from_slice(&significand.to_le_bytes());
        image.0[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
}

/// The unit in the state that native execution starts from.
pub(super) fn load(unit: &mut VectorUnit, state: &NativeState) {
    unit.registers.zmm = state.zmm;
    unit.registers.k = state.k;
    unit.registers.set_mxcsr(state.mxcsr);
    unit.image_mut().0 = state.image.0;
    unit.image_mut().0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
}

/// Runs a form on the unit as the interpreter does, memory and general registers included.
pub(super) fn run(
    unit: &mut VectorUnit,
    form: &Form,
    slots: Slots,
    state: &mut NativeState,
    memory: &mut [u8],
) -> Outcome {
    for slot in 0..usize::from(form.general) {
        unit.registers.gpr[slot] = state.gpr[slots.general(slot)];
    }
    unit.registers.status = state.status;
    let mut bounce = [0u8; 64];
    let touched = form.memory.map_or(0, |m| unit.touched(&m, slots));
    let touched = |i: &usize| touched >> i & 1 != 0;
    if let Some(m) = form.memory
        && m.read
    {
        (0..64).filter(touched).for_each(|i| bounce[i] = memory[i]);
    }
    for (word, bytes) in unit.registers.bounce.iter_mut().zip(bounce.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    let outcome = unit.run(form, slots, Location::default());
    if outcome != Outcome::Done {
        return outcome;
    }
    if form.memory.is_some_and(|m| m.write) {
        for (bytes, word) in bounce.chunks_exact_mut(8).zip(unit.registers.bounce) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        (0..64).filter(touched).for_each(|i| memory[i] = bounce[i]);
    }
    for slot in (0..3).filter(|slot| form.general_stored >> slot & 1 != 0) {
        state.gpr[slots.general(slot)] = unit.registers.gpr[slot];
    }
    if form.status {
        state.status = unit.registers.status_out;
    }
    outcome
}

/// Points the instruction's base register at the buffer: aligned if it must be, else anywhere.
pub(super) fn place(
    instruction: &Instruction,
    form: &Form,
    random: &mut Random,
    state: &mut NativeState,
    buffer: &Buffer,
) -> Option<usize> {
    let memory = form.memory?;
    let offset = if memory.alignment > 1 || random.chance(50) { 64 } else { 32 + random.below(64) as usize };
    let address = buffer.0.as_ptr() as u64 + offset as u64;
    state.gpr[3] = address.wrapping_sub(instruction.memory_displacement64());
    Some(offset)
}

/// What differs between two states, in words.
pub(super) fn difference(
    expected: &NativeState,
    unit: &mut VectorUnit,
    state: &NativeState,
) -> Option<String> {
    for n in 0..32 {
        if expected.zmm[n] != unit.registers.zmm[n] {
            return Some(format!("zmm{n}: host {:x?}, unit {:x?}", expected.zmm[n], unit.registers.zmm[n]));
        }
    }
    for n in 0..16 {
        if n != 4 && expected.gpr[n] != state.gpr[n] {
            return Some(format!("gpr {n}: host {:x}, unit {:x}", expected.gpr[n], state.gpr[n]));
        }
    }
    if expected.k != unit.registers.k {
        return Some(format!("k: host {:x?}, unit {:x?}", expected.k, unit.registers.k));
    }
    if expected.status & 0xd501 != state.status & 0xd501 {
        return Some(format!("flags: host {:x}, unit {:x}", expected.status, state.status));
    }
    if expected.mxcsr != unit.mxcsr() {
        return Some(format!("mxcsr: host {:x}, unit {:x}", expected.mxcsr, unit.mxcsr()));
    }
    let image = unit.image();
    for range in [0..5, 32..160] {
        if expected.image.0[range.clone()] != image.0[range.clone()] {
            return Some(format!(
                "x87: host {:x?}, unit {:x?}",
                &expected.image.0[range.clone()],
                &image.0[range]
            ));
        }
    }
    None
}

#[test]
fn every_form_does_what_the_host_does() {
    let seed = 0x5eed_0002;
    let mut random = Random::new(seed);
    let preparer = preparer();
    let native = Native::new(FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F));
    let mut unit = VectorUnit::new(false);
    let (mut covered, mut all, mut direct, mut cases) = (0, 0, 0, 0);
    let mut missed: BTreeMap<String, String> = BTreeMap::new();
    let mut failures = Vec::new();
    for code in Code::values() {
        let table = code.op_code();
        if !table.is_instruction()
            || !table.mode64()
            || !preparer.features().contains_all(code.cpuid_features())
        {
            continue;
        }
        let mut probe = Instruction::default();
        probe.set_code(code);
        if !table::concerns(&probe) || table::special(&probe).is_some() || table.fwait() {
            continue;
        }
        all += 1;
        let mut done = false;
        let mut reason = "no instance".to_owned();
        for _ in 0..INSTANCES {
            let Some((instruction, bytes)) = instance(code, &mut random) else { continue };
            let form = match preparer.prepare(&instruction, &bytes) {
                Ok(form) => form,
                Err(refusal) => {
                    reason = format!("{refusal:?}");
                    continue;
                }
            };
            let has_memory = (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory);
            assert_eq!(has_memory, form.memory.is_some(), "{code:?}");
            if matches!(form.execution, Execution::Direct(_)) {
                // Without a thunk: that is the interpreter's test.
                direct += 1;
                done = true;
                continue;
            }
            let slots = slots(&instruction).expect("few registers");
            let mut state = random_state(&mut random);
            let mut buffer = Buffer([0; 24]);
            buffer.0.fill_with(|| random.operand());
            let offset = place(&instruction, &form, &mut random, &mut state, &buffer);
            let mut expected = state.clone();
            let before = buffer.clone();
            native.run(&bytes, &mut expected);
            let mut memory: Vec<u8> = before.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            load(&mut unit, &state);
            let outcome = run(&mut unit, &form, slots, &mut state, &mut memory[offset.unwrap_or(64)..]);
            cases += 1;
            done = true;
            let written: Vec<u8> = buffer.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            let wrong = if !matches!(outcome, Outcome::Done | Outcome::DoneWithoutStore) {
                Some(format!("{outcome:?}"))
            } else if written != memory {
                Some(format!("memory at {offset:?}: host {written:x?}, unit {memory:x?}"))
            } else {
                difference(&expected, &mut unit, &state)
            };
            if let Some(wrong) = wrong {
                failures.push(format!(
                    "{code:?} {bytes:02x?} `{}`: {wrong}",
                    super::generate::text(&instruction)
                ));
                break;
            }
        }
        if done {
            covered += 1;
        } else {
            missed.insert(format!("{code:?}"), reason);
        }
    }
    unit.park();
    println!(
        "vector forms covered: {covered} of {all}; {cases} cases and {direct} without a thunk; seed {seed:#x}"
    );
    println!("thunk memory used: {} bytes", preparer.arena_usage().0);
    for (code, reason) in &missed {
        println!("  not covered: {code} ({reason})");
    }
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
    assert!(covered * 100 >= all * 98, "covered {covered} of {all}");
}
