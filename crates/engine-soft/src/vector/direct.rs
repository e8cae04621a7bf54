//! Which instructions are moves and bitwise operations simple enough to need no thunk. They are the commonest.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A vector register.
    Vector,
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
    source: Place,
    /// Bytes: 4, 8, 16, 32 or 64.
    size: u8,
    upper: Upper,
}

/// The instruction as a direct operation, if it is one.
pub(super) fn direct(instruction: &Instruction) -> Option<Direct> {
    if instruction.op_mask() != Register::None || instruction.is_broadcast() {
        return None;
    }
    let last = instruction.op_count().checked_sub(1)?;
    let place = |operand: u32| match instruction.op_kind(operand) {
        OpKind::Memory => Some(Place::Bounce),
        OpKind::Register => {
            let register = instruction.op_register(operand);
            if register.is_vector_register() {
                Some(Place::Vector)
            } else if register.is_gpr() {
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
    let size = u8::try_from(size).ok().filter(|size| matches!(size, 4 | 8 | 16 | 32 | 64))?;
    Some(Direct { operation, destination, source: second, size, upper })
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
        self.source
    }

    /// Bytes: 4, 8, 16, 32 or 64.
    pub(super) fn size(self) -> u8 {
        self.size
    }

    /// What becomes of the bits above.
    pub(super) fn upper(self) -> Upper {
        self.upper
    }
}
