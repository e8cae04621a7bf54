//! Which forms of instructions have no host code.

use std::collections::BTreeSet;

use iced_x86::{Decoder, DecoderOptions, Mnemonic as M};
use ringfence_oracle::{Mode, Oracle, generate::Generator};

use super::super::native::{Host, Kind, kind};

/// Unprivileged instructions of 64-bit code that have none, in some or all of their forms. What programs execute often must not be
/// here.
const INTERPRETED: &[M] = &[
    // Undefined, or not used as what they are.
    M::INVALID,
    M::Ud0,
    M::Ud1,
    M::Ud2,
    M::Int3,
    // Stack operations of 16 bits, and frames.
    M::Push,
    M::Pop,
    M::Pushf,
    M::Popf,
    M::Enter,
    M::Leave,
    // Segments.
    M::Mov,
    M::Lfs,
    M::Lgs,
    M::Lss,
    M::Lar,
    M::Lsl,
    M::Verr,
    M::Verw,
    M::Wrfsbase,
    M::Wrgsbase,
    // Strings and tables.
    // By undefined results: bit numbers beyond a word in memory, rotations through the carry, half a register's bytes.
    M::Bt,
    M::Btc,
    M::Btr,
    M::Bts,
    M::Rcl,
    M::Rcr,
    // State, and what depends on the caches.
    M::Fninit,
    M::Fnsave,
    M::Frstor,
    M::Fnstenv,
    M::Fldenv,
    M::Fxsave,
    M::Fxsave64,
    M::Fxrstor,
    M::Fxrstor64,
];

#[test]
fn forms_without_host_code_are_those_known() {
    let oracle = Oracle::new().unwrap();
    let mut generator = Generator::new(1, &oracle);
    generator.retain(|form| form.mode == Mode::Bits64);
    let host = Host::detect();
    let (mut unknown, mut known) = (BTreeSet::new(), BTreeSet::new());
    // Enough for each form to come with registers and with an operand in memory.
    for _ in 0..generator.forms().len() * 40 {
        let case = generator.sample().case;
        let code = &case.code[..case.code_len.into()];
        let instruction = Decoder::with_ip(64, code, 0x1000, DecoderOptions::NONE).decode();
        if kind(&instruction, &host).0 == Kind::Interpreted {
            let name = format!("{:?}: {instruction}", instruction.mnemonic());
            let of = if INTERPRETED.contains(&instruction.mnemonic()) { &mut known } else { &mut unknown };
            of.insert(name);
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(known.len() > 20, "{known:#?}");
}
