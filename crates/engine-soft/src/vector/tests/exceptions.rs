//! SIMD and x87 exceptions that are not masked.

use iced_x86::{Code, Instruction};

use super::forms::{Buffer, difference, load, place, preparer, random_state, run};
use super::generate::{Random, instance, text};
use super::native::Native;
use crate::vector::encode::slots;
use crate::vector::features::FeatureSet;
use crate::vector::floating::uses_mxcsr;
use crate::vector::form::Outcome;
use crate::vector::state::VectorUnit;
use crate::vector::table;

/// Instances of each form that obeys MXCSR.
const INSTANCES: u32 = 12;

#[test]
fn unmasked_simd_exception_leaves_flags_and_registers_as_the_host_does() {
    let seed = 0x5eed_0003;
    let mut random = Random::new(seed);
    let preparer = preparer();
    let native = Native::new(FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F));
    let mut unit = VectorUnit::new(false);
    let (mut cases, mut raised) = (0, 0);
    let mut failures = Vec::new();
    for code in Code::values() {
        let table = code.op_code();
        let mut probe = Instruction::default();
        probe.set_code(code);
        if !table.is_instruction()
            || !table.mode64()
            || !preparer.features().contains_all(code.cpuid_features())
            || !table::concerns(&probe)
            || !uses_mxcsr(code.mnemonic())
        {
            continue;
        }
        for _ in 0..INSTANCES {
            let Some((instruction, bytes)) = instance(code, &mut random) else { continue };
            let Ok(form) = preparer.prepare(&instruction, &bytes) else { continue };
            let mut state = random_state(&mut random);
            // No flag is set whose exception is not masked; both kinds of old flags occur.
            let masks = random.next() as u32 & 0x3f;
            state.mxcsr = state.mxcsr & 0xe040 | masks << 7 | random.next() as u32 & masks;
            state.image.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
            let mut buffer = Buffer([0; 24]);
            buffer.0.fill_with(|| random.operand());
            let offset = place(&instruction, &form, &mut random, &mut state, &buffer);
            let before = buffer.clone();
            let mut expected = state.clone();
            let trapped = native.run_trapping(&bytes, &mut expected);
            let mut memory: Vec<u8> = before.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            load(&mut unit, &state);
            let slots = slots(&instruction).expect("few registers");
            let outcome = run(&mut unit, &form, slots, &mut state, &mut memory[offset.unwrap_or(64)..]);
            cases += 1;
            raised += u32::from(trapped);
            let written: Vec<u8> = buffer.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            let wrong = if trapped != (outcome == Outcome::SimdException) {
                Some(format!("host {}, unit {outcome:?}", if trapped { "traps" } else { "does not trap" }))
            } else if written != memory {
                Some("memory differs".to_owned())
            } else {
                difference(&expected, &mut unit, &state)
            };
            if let Some(wrong) = wrong {
                failures.push(format!("{code:?} {bytes:02x?} `{}`: {wrong}", text(&instruction)));
                break;
            }
        }
    }
    unit.park();
    println!("{cases} cases with unmasked exceptions, {raised} raised one; seed {seed:#x}");
    assert!(raised > 500, "{raised} of {cases} cases raised an exception");
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn instruction_that_does_not_obey_mxcsr_raises_no_simd_exception() {
    let mut random = Random::new(0x5eed_0008);
    let preparer = preparer();
    let native = Native::new(FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F));
    let mut cases = 0;
    for code in Code::values() {
        let table = code.op_code();
        let mut probe = Instruction::default();
        probe.set_code(code);
        let ours = table.is_instruction() && table.mode64() && table::concerns(&probe);
        if !ours || table::special(&probe).is_some() || table.fwait() || uses_mxcsr(code.mnemonic()) {
            continue;
        }
        for _ in 0..INSTANCES {
            let Some((instruction, bytes)) = instance(code, &mut random) else { continue };
            let Ok(form) = preparer.prepare(&instruction, &bytes) else { continue };
            let mut state = random_state(&mut random);
            state.mxcsr &= 0xe040;
            state.image.0[0..4].copy_from_slice(&0x37fu32.to_le_bytes());
            let mut buffer = Buffer([0; 24]);
            buffer.0.fill_with(|| random.operand());
            place(&instruction, &form, &mut random, &mut state, &buffer);
            let raised = native.run_trapping(&bytes, &mut state);
            assert!(!raised, "{code:?} {bytes:02x?} `{}`", text(&instruction));
            cases += 1;
        }
    }
    assert!(cases > 5000, "{cases}");
}
