//! What the translator must know of an instruction and what is the same for every instruction of its form: found out once for
//! each form that occurs.
//!
//! A form is the decoder library's code, and whether an operand is in memory. Between them they settle the kinds of all
//! operands, and which registers an operand can be. What depends on more is not kept: see [`Facts::effect`].

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::flags::{self, Effect};
use super::native::{Host, Kind, kind};
use super::rewrite::Roles;
use crate::interp::found::Found;
use crate::interp::op::{Op, register_number};
use crate::interp::patterns::{Pattern, table};
use crate::vector::pass::Passed;

/// What is known of a form.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) kind: Kind,
    /// Of a vector instruction executed as it is.
    pub(super) passed: Option<Passed>,
    /// The effect on flags; `None` if it depends on the operands.
    effect: Option<Effect>,
    /// Which operand is in memory, if one is.
    pub(super) memory: Option<u8>,
    /// That operand's bytes.
    pub(super) size: u16,
    /// That operand may be written.
    pub(super) stores: bool,
    /// Operands that may be written, one bit each.
    written: u8,
    /// General-purpose registers among them whose old value is of no use, one bit each.
    replaced: u8,
    /// Operands that are general-purpose registers, one bit each.
    general: u8,
    /// The second operand is a register: it takes [`Op::src`].
    second: bool,
    /// Where in the bytes its operands are, if they can be put in place there.
    pub(super) roles: Option<Roles>,
    /// General-purpose registers that may change without being operands, one bit each.
    pub(super) implied: u16,
}

impl Facts {
    /// Of what is left to its handler.
    pub(super) const INTERPRETED: Self = Self {
        kind: Kind::Interpreted,
        passed: None,
        effect: None,
        memory: None,
        size: 0,
        stores: false,
        written: 0,
        replaced: 0,
        general: 0,
        second: false,
        roles: None,
        implied: 0,
    };

    /// Whether it leaves all flags as they are if it raises an x87 exception that is not masked, whatever it does to them otherwise.
    pub(super) fn may_keep_flags(&self) -> bool {
        self.passed.is_some_and(|passed| passed.records)
    }

    fn new(instruction: &Instruction, host: &Host) -> Self {
        let (kind, passed) = kind(instruction, host);
        let memory = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
        // With operands that differ from each other and from what is implied: the library knows that XOR of a register with
        // itself does not read it.
        let mut example = *instruction;
        let mut general = 0;
        for n in 0..instruction.op_count() {
            if instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_gpr() {
                example.set_op_register(n, Register::R8 + n);
                general |= 1 << n;
            }
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&example);
        let written = (0..instruction.op_count())
            .filter(|&n| writes(info.op_access(n)))
            .fold(0, |written, n| written | 1 << n);
        // Narrower ones leave the rest of the register, and BSF and BSR of zero all of it.
        let keeps = matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr);
        let replaced = (0..instruction.op_count())
            .filter(|&n| !keeps && general >> n & 1 != 0 && instruction.op_register(n).size() >= 4)
            .filter(|&n| info.op_access(n) == OpAccess::Write)
            .fold(0, |replaced, n| replaced | 1 << n);
        let implied = info
            .used_registers()
            .iter()
            .filter(|used| writes(used.access()) && used.register().is_gpr())
            .map(|used| 1 << register_number(used.register().full_register()))
            // The example's own.
            .filter(|bit| bit & u16::from(general) << 8 == 0)
            // Whether the count is used is for a prefix to say, which is not part of the form.
            .fold(if kind.is_string() { COUNT } else { 0 }, |all, bit| all | bit);
        let stores =
            memory.is_some_and(|n| written >> n & 1 != 0) || instruction.mnemonic() == Mnemonic::Xchg;
        let effect = (!flags::depends_on_operands(instruction)).then(|| flags::effect(instruction));
        let size = instruction.memory_size().size() as u16;
        let second = instruction.op_count() > 1 && instruction.op1_kind() == OpKind::Register;
        Self {
            kind,
            passed,
            effect,
            memory: memory.map(|n| n as u8),
            size,
            stores,
            written,
            replaced,
            general,
            second,
            roles: if matches!(kind, Kind::Same | Kind::Vector) { Roles::of(instruction) } else { None },
            implied,
        }
    }

    /// The effect of one instruction of the form on flags.
    pub(super) fn effect(&self, instruction: &Instruction) -> Effect {
        self.effect.unwrap_or_else(|| flags::effect(instruction))
    }

    /// Whether operand `n` may be written.
    pub(super) fn writes(&self, n: u32) -> bool {
        self.written >> n & 1 != 0
    }

    /// Whether operand `n` is a general-purpose register that is written whole, whatever was in it.
    pub(super) fn replaces(&self, n: u32) -> bool {
        self.replaced >> n & 1 != 0
    }

    /// The number of the register that operand `n` is, in an instruction of the form.
    #[inline(always)]
    pub(super) fn register(&self, op: &Op, n: u32) -> u8 {
        match self.field_of(n) {
            0 => op.dst,
            1 => op.src,
            _ => op.third,
        }
    }

    /// Which of [`Op::dst`], [`Op::src`] and [`Op::third`] that is.
    #[inline(always)]
    fn field_of(&self, n: u32) -> usize {
        match n {
            0 => 0,
            1 => 1,
            2 if !self.second => 1,
            _ => 2,
        }
    }

    /// The operands that are general-purpose registers.
    pub(super) fn general(&self) -> impl Iterator<Item = u32> + use<> {
        let mut left = self.general;
        std::iter::from_fn(move || {
            let n = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            (n < u8::BITS).then_some(n)
        })
    }
}

/// RCX.
const COUNT: u16 = 1 << 1;

fn writes(access: OpAccess) -> bool {
    use OpAccess as O;
    matches!(access, O::Write | O::CondWrite | O::ReadWrite | O::ReadCondWrite)
}

/// What a code of the decoder library may be: with an operand in memory or without, masked, with an operand repeated.
const VARIANTS: usize = 8;

/// No form has been seen.
const UNKNOWN: u16 = u16::MAX;

/// What is known of the instructions of a pattern. All that an effect depends on is part of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    /// The pattern's number, or zero.
    pattern: u64,
    pub(super) facts: Facts,
    pub(super) effect: Effect,
    /// Of [`Op::dst`], [`Op::src`] and [`Op::third`]: all bits if it is an operand that is a general-purpose register, and all bits if
    /// that may be written; otherwise none.
    pub(super) fields: [[u32; 2]; 3],
}

impl Noted {
    fn new(pattern: u64, facts: Facts, effect: Effect) -> Self {
        let field = |field| {
            let operands = (0..4).filter(|&n| facts.general >> n & 1 != 0 && facts.field_of(n) == field);
            let mask = |there| if there { u32::MAX } else { 0 };
            [mask(operands.clone().count() != 0), mask({ operands }.any(|n| facts.writes(n)))]
        };
        Self { pattern, facts, effect, fields: [field(0), field(1), field(2)] }
    }
}

/// What is left to its handler: whatever it is, it finds the flags in the vCPU and leaves them there.
pub(super) static INTERPRETED: Noted = Noted {
    pattern: 0,
    facts: Facts::INTERPRETED,
    effect: Effect { reads: flags::ALL, changes: flags::ALL, kills: flags::ALL },
    fields: [[0; 2]; 3],
};

/// The forms seen so far.
pub(super) struct Forms {
    host: Host,
    /// Where in `facts` each form is.
    index: Box<[u16]>,
    facts: Vec<Facts>,
    /// By a pattern's place.
    noted: Box<[Noted; Pattern::PLACES]>,
    /// Of an instruction without a pattern.
    other: Noted,
}

impl std::fmt::Debug for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forms").field("host", &self.host).field("known", &self.facts.len()).finish()
    }
}

impl Forms {
    /// None seen, on a host.
    pub(super) fn new(host: Host) -> Self {
        let index = vec![UNKNOWN; VARIANTS * Code::values().len()].into_boxed_slice();
        Self { host, index, facts: Vec::new(), noted: table(INTERPRETED), other: INTERPRETED }
    }

    /// What is known of an instruction's form, and the effect on flags of the instruction.
    #[inline(always)]
    pub(super) fn of(&mut self, found: &Found<'_>) -> &Noted {
        if let Some(Pattern { number, place }) = found.pattern {
            let place = usize::from(place) % Pattern::PLACES;
            if self.noted[place].pattern != number {
                self.noted[place] = self.look_up(number, found);
            }
            return &self.noted[place];
        }
        self.other = self.look_up(0, found);
        &self.other
    }

    #[inline(never)]
    fn look_up(&mut self, pattern: u64, found: &Found<'_>) -> Noted {
        let instruction = found.instruction();
        let facts = self.of_instruction(&instruction);
        Noted::new(pattern, facts, facts.effect(&instruction))
    }

    /// What is known of an instruction's form.
    pub(super) fn of_instruction(&mut self, instruction: &Instruction) -> Facts {
        // Operands that there are not are none in memory.
        let memory = instruction.op0_kind() == OpKind::Memory
            || instruction.op1_kind() == OpKind::Memory
            || instruction.op2_kind() == OpKind::Memory
            || instruction.op3_kind() == OpKind::Memory;
        let variant = usize::from(memory)
            | usize::from(instruction.op_mask() != Register::None) << 1
            | usize::from(instruction.is_broadcast()) << 2;
        let index = &mut self.index[VARIANTS * instruction.code() as usize + variant];
        if *index == UNKNOWN {
            *index = self.facts.len() as u16;
            self.facts.push(Facts::new(instruction, &self.host));
        }
        self.facts[usize::from(*index)]
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::interp::handlers::tests::bytes;

    /// What the library says of one instruction: registers that it may change, and whether it may store.
    fn told(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> (u16, bool) {
        let info = factory.info(instruction);
        let changes = info
            .used_registers()
            .iter()
            .filter(|used| writes(used.access()) && used.register().is_gpr())
            .fold(0, |all, used| all | 1 << register_number(used.register().full_register()));
        let memory = (0..instruction.op_count()).filter(|&n| instruction.op_kind(n) == OpKind::Memory);
        let stores = { memory }.any(|n| writes(info.op_access(n)));
        (changes, stores || instruction.mnemonic() == Mnemonic::Xchg)
    }

    #[test]
    fn facts_of_a_form_hold_for_each_instruction_of_it() {
        let host = Host::detect();
        let mut forms = Forms::new(host);
        let mut factory = InstructionInfoFactory::new();
        let mut native = 0;
        for seed in 0..400_000 {
            let bytes = bytes(seed);
            let instruction = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
            if instruction.is_invalid() {
                continue;
            }
            let facts = forms.of_instruction(&instruction);
            assert_eq!((facts.kind, facts.passed), kind(&instruction, &host), "{bytes:x?}");
            assert_eq!(facts.effect(&instruction), flags::effect(&instruction), "{bytes:x?}");
            if facts.kind == Kind::Interpreted {
                continue;
            }
            native += 1;
            let mut changes = facts.implied;
            for n in facts.general().filter(|&n| facts.writes(n)) {
                changes |= 1 << register_number(instruction.op_register(n).full_register());
            }
            let (mut told, stores) = told(&mut factory, &instruction);
            told |= if facts.kind.is_string() { COUNT } else { 0 };
            assert_eq!((changes, facts.stores), (told, stores), "{bytes:x?}");
            assert_eq!(usize::from(facts.size), instruction.memory_size().size());
        }
        assert!(native > 50_000 && forms.facts.len() > 900, "{native} of {} forms", forms.facts.len());
    }
}
