//! The commonest moves and bitwise operations, done on the register file without a thunk.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::encode::Gpr;
use super::state::Registers;

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A vector register.
    Vector(u8),
    /// The memory operand's stand-in.
    Bounce,
    /// The one general-purpose operand.
    General,
}

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Move,
    And,
    AndNot,
    Or,
    Xor,
}

/// What becomes of the destination's bits above the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upper {
    Keep,
    ClearTo128,
    Clear,
}

/// An instruction of this kind, ready to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    operation: Operation,
    destination: Place,
    sources: [Place; 2],
    /// Bytes: 4, 8, 16, 32 or 64.
    size: u8,
    upper: Upper,
}

/// The instruction as a direct operation, if it is one, and its general-purpose operand.
pub(super) fn direct(instruction: &Instruction) -> Option<(Direct, Option<Gpr>)> {
    if instruction.op_mask() != Register::None || instruction.is_broadcast() {
        return None;
    }
    let legacy = instruction.code().encoding() == EncodingKind::Legacy;
    let last = instruction.op_count().checked_sub(1)?;
    let mut gpr = None;
    let mut place = |operand: u32| match instruction.op_kind(operand) {
        OpKind::Memory => Some(Place::Bounce),
        OpKind::Register => {
            let register = instruction.op_register(operand);
            if register.is_vector_register() {
                Some(Place::Vector(register.number() as u8))
            } else if register.is_gpr() && gpr.is_none() {
                gpr = Some(Gpr { number: register.number() as u8, written: operand == 0 });
                Some(Place::General)
            } else {
                None
            }
        }
        _ => None,
    };
    let full = (0..=last)
        .filter(|&o| instruction.op_kind(o) == OpKind::Register)
        .map(|o| instruction.op_register(o).size())
        .max()?;
    let memory = instruction.op_kind(last) == OpKind::Memory;
    let (operation, size, upper) = match instruction.mnemonic() {
        Mnemonic::Movaps
        | Mnemonic::Movups
        | Mnemonic::Movapd
        | Mnemonic::Movupd
        | Mnemonic::Movdqa
        | Mnemonic::Movdqu
        | Mnemonic::Lddqu
        | Mnemonic::Movntdqa
        | Mnemonic::Movntdq
        | Mnemonic::Movntps
        | Mnemonic::Movntpd => (Operation::Move, 16, Upper::Keep),
        Mnemonic::Vmovaps
        | Mnemonic::Vmovups
        | Mnemonic::Vmovapd
        | Mnemonic::Vmovupd
        | Mnemonic::Vmovdqa
        | Mnemonic::Vmovdqu
        | Mnemonic::Vmovdqa32
        | Mnemonic::Vmovdqa64
        | Mnemonic::Vmovdqu8
        | Mnemonic::Vmovdqu16
        | Mnemonic::Vmovdqu32
        | Mnemonic::Vmovdqu64
        | Mnemonic::Vlddqu
        | Mnemonic::Vmovntdqa
        | Mnemonic::Vmovntdq
        | Mnemonic::Vmovntps
        | Mnemonic::Vmovntpd => (Operation::Move, full, Upper::Clear),
        Mnemonic::Movq => (Operation::Move, 8, Upper::ClearTo128),
        Mnemonic::Vmovq => (Operation::Move, 8, Upper::Clear),
        Mnemonic::Movd => (Operation::Move, 4, Upper::ClearTo128),
        Mnemonic::Vmovd => (Operation::Move, 4, Upper::Clear),
        Mnemonic::Movss if last == 1 => {
            (Operation::Move, 4, if memory { Upper::ClearTo128 } else { Upper::Keep })
        }
        Mnemonic::Movsd if last == 1 => {
            (Operation::Move, 8, if memory { Upper::ClearTo128 } else { Upper::Keep })
        }
        // The three-operand register form merges and is left to the host.
        Mnemonic::Vmovss if last == 1 => (Operation::Move, 4, Upper::Clear),
        Mnemonic::Vmovsd if last == 1 => (Operation::Move, 8, Upper::Clear),
        Mnemonic::Pxor | Mnemonic::Xorps | Mnemonic::Xorpd => (Operation::Xor, 16, Upper::Keep),
        Mnemonic::Por | Mnemonic::Orps | Mnemonic::Orpd => (Operation::Or, 16, Upper::Keep),
        Mnemonic::Pand | Mnemonic::Andps | Mnemonic::Andpd => (Operation::And, 16, Upper::Keep),
        Mnemonic::Pandn | Mnemonic::Andnps | Mnemonic::Andnpd => (Operation::AndNot, 16, Upper::Keep),
        Mnemonic::Vpxor | Mnemonic::Vpxord | Mnemonic::Vpxorq | Mnemonic::Vxorps | Mnemonic::Vxorpd => {
            (Operation::Xor, full, Upper::Clear)
        }
        Mnemonic::Vpor | Mnemonic::Vpord | Mnemonic::Vporq | Mnemonic::Vorps | Mnemonic::Vorpd => {
            (Operation::Or, full, Upper::Clear)
        }
        Mnemonic::Vpand | Mnemonic::Vpandd | Mnemonic::Vpandq | Mnemonic::Vandps | Mnemonic::Vandpd => {
            (Operation::And, full, Upper::Clear)
        }
        Mnemonic::Vpandn | Mnemonic::Vpandnd | Mnemonic::Vpandnq | Mnemonic::Vandnps | Mnemonic::Vandnpd => {
            (Operation::AndNot, full, Upper::Clear)
        }
        _ => return None,
    };
    let destination = place(0)?;
    let second = place(last)?;
    let first = if operation == Operation::Move {
        second
    } else if legacy {
        destination
    } else {
        place(1)?
    };
    let size = u8::try_from(size).ok().filter(|size| matches!(size, 4 | 8 | 16 | 32 | 64))?;
    Some((Direct { operation, destination, sources: [first, second], size, upper }, gpr))
}

impl Direct {
    /// What is computed.
    pub(super) fn operation(self) -> Operation {
        self.operation
    }

    /// Where the result goes.
    pub(super) fn destination(self) -> Place {
        self.destination
    }

    /// Where the last operand comes from.
    pub(super) fn source(self) -> Place {
        self.sources[1]
    }

    /// Bytes: 4, 8, 16, 32 or 64.
    pub(super) fn size(self) -> u8 {
        self.size
    }

    /// What becomes of the bits above.
    pub(super) fn upper(self) -> Upper {
        self.upper
    }

    /// Runs it.
    #[inline]
    pub(super) fn run(self, registers: &mut Registers) {
        match self.size {
            4 => self.short(registers, 0xffff_ffff),
            8 => self.short(registers, u64::MAX),
            16 => self.wide::<2>(registers),
            32 => self.wide::<4>(registers),
            _ => self.wide::<8>(registers),
        }
    }

    #[inline]
    fn short(self, registers: &mut Registers, mask: u64) {
        let value = mask
            & match self.sources[1] {
                Place::Vector(n) => registers.zmm[usize::from(n) & 31][0],
                Place::Bounce => registers.bounce[0],
                Place::General => registers.gpr[0],
            };
        match self.destination {
            Place::Vector(n) => {
                let register = &mut registers.zmm[usize::from(n) & 31];
                match self.upper {
                    Upper::Keep => register[0] = register[0] & !mask | value,
                    Upper::ClearTo128 => [register[0], register[1]] = [value, 0],
                    Upper::Clear => *register = [value, 0, 0, 0, 0, 0, 0, 0],
                }
            }
            Place::Bounce => registers.bounce[0] = value,
            Place::General => registers.gpr[0] = value,
        }
    }

    #[inline]
    fn wide<const WORDS: usize>(self, registers: &mut Registers) {
        let [a, b] = self.sources.map(|place| {
            let from = match place {
                Place::Vector(n) => &registers.zmm[usize::from(n) & 31],
                _ => &registers.bounce,
            };
            std::array::from_fn::<u64, WORDS, _>(|i| from[i])
        });
        let result: [u64; WORDS] = match self.operation {
            Operation::Move => b,
            Operation::And => std::array::from_fn(|i| a[i] & b[i]),
            Operation::AndNot => std::array::from_fn(|i| !a[i] & b[i]),
            Operation::Or => std::array::from_fn(|i| a[i] | b[i]),
            Operation::Xor => std::array::from_fn(|i| a[i] ^ b[i]),
        };
        let to = match self.destination {
            Place::Vector(n) => &mut registers.zmm[usize::from(n) & 31],
            _ => &mut registers.bounce,
        };
        to[..WORDS].copy_from_slice(&result);
        if self.upper == Upper::Clear {
            to[WORDS..].fill(0);
        }
    }
}
