//! Where in the bytes of an instruction of 64-bit or 32-bit code its parts are: enough to know one that has been seen before with other
//! registers, another address or another constant.
//!
//! What is left when those are taken away is the instruction's *pattern*, a number ([`Layout::pattern`]): two instructions of the
//! same pattern are of the same mode and differ in nothing but what [`Layout`] tells of each. What an opcode wants is in [`super::opcodes`]; the length follows from prefixes, opcode, ModRM and SIB (SDM 2A 2.1 to 2.3). Whatever is rare or has rules of its own has no
//! layout: it goes to the decoder library each time.

use super::opcodes::{Class, KEPT, KEPT_BYTE, ONE, ONE_NARROW, TWO, vex_class};

/// The bits of a prefix in a pattern; each of its own group excludes the others there.
#[inline(always)]
fn prefix_bits(byte: u8) -> (u64, u64) {
    match byte {
        0x66 => (pattern::OPERAND_SIZE, pattern::OPERAND_SIZE),
        0xf2 => (pattern::REPNE, pattern::REPEAT),
        0xf3 => (pattern::REP, pattern::REPEAT),
        0xf0 => (pattern::LOCK, pattern::LOCK),
        0x64 => (5 << pattern::SEGMENT, 7 << pattern::SEGMENT),
        0x65 => (6 << pattern::SEGMENT, 7 << pattern::SEGMENT),
        // ES, CS, SS and DS.
        _ => ((u64::from(byte >> 3 & 3) + 1) << pattern::SEGMENT, 7 << pattern::SEGMENT),
    }
}

/// Bits of a pattern, and where its fields start.
mod pattern {
    pub(super) const OPERAND_SIZE: u64 = 1;
    pub(super) const REPNE: u64 = 2;
    pub(super) const REP: u64 = 4;
    pub(super) const REPEAT: u64 = REPNE | REP;
    pub(super) const LOCK: u64 = 8;
    /// Three bits.
    pub(super) const SEGMENT: u32 = 4;
    /// There is a REX prefix: byte registers 4 to 7 are others with it.
    pub(super) const REX: u64 = 1 << 7;
    /// REX.W or VEX.W.
    pub(super) const WIDE: u64 = 1 << 8;
    /// An operand in memory by ModRM, or by its address alone.
    pub(super) const MEMORY: u64 = 1 << 9;
    /// It is of 32-bit code.
    pub(super) const NARROW: u64 = 1 << 10;
    /// Four bits each: ModRM's `reg` and `r/m`, with their bits of REX.
    pub(super) const REG: u32 = 12;
    pub(super) const RM: u32 = 16;
    /// Eight bits each.
    pub(super) const CONSTANT: u32 = 20;
    pub(super) const OPCODE: u32 = 28;
    /// Three bits: the map, from 4 on VEX's.
    pub(super) const MAP: u32 = 36;
    /// Seven bits: vvvv, L and pp of VEX.
    pub(super) const VEX: u32 = 40;
    /// Never zero.
    pub(super) const VALID: u64 = 1 << 63;
}

/// A memory operand's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Address {
    /// Base register, or [`Address::NONE`], or [`Address::RIP`].
    pub(super) base: u8,
    /// Index register, or [`Address::NONE`].
    pub(super) index: u8,
    /// Shift of the index.
    pub(super) scale: u8,
    pub(super) displacement: i32,
}

impl Address {
    pub(super) const RIP: u8 = super::op::RIP as u8;
    pub(super) const NONE: u8 = super::op::ZERO as u8;
}

/// An instruction's parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Everything of it that is not among the other fields.
    pub(super) pattern: u64,
    /// The opcode's class.
    class: Class,
    /// Bytes.
    pub(super) length: u8,
    /// ModRM's `reg` and `r/m`, with their bits of REX.
    pub(super) reg: u8,
    pub(super) rm: u8,
    /// Meaningful where [`Layout::in_memory`] says so.
    pub(super) address: Address,
    /// The constant behind everything else, and bytes that follow it.
    pub(super) constant: u64,
    /// Bytes of it.
    pub(super) constant_length: u8,
}

/// How many bytes are looked at: more than an instruction has, so that a number can be read wherever it may start.
pub(crate) const LOOKED_AT: usize = 24;

/// Eight bytes at a place, the lowest first.
#[inline(always)]
fn number(bytes: &[u8; LOOKED_AT], at: usize) -> u64 {
    let at = at & 15;
    bytes.get(at..at + 8).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Layout {
    /// Of the instruction of 64-bit code, or of 32-bit code if `NARROW`, that starts with these bytes. `None` for one that the tables leave out, or that is too long; not everything
    /// that has a layout is an instruction.
    #[inline(always)]
    pub(super) fn of<const NARROW: bool>(bytes: &[u8; LOOKED_AT]) -> Option<Self> {
        let one = if NARROW { &ONE_NARROW } else { &ONE };
        let mut at = 0;
        let mut pattern = pattern::VALID | if NARROW { pattern::NARROW } else { 0 };
        let mut opcode = bytes[0];
        let mut class = one[usize::from(opcode)];
        let (mut rex, mut map) = (0, 0);
        if class.leads() {
            while class == Class::PREFIX {
                let (bits, group) = prefix_bits(opcode);
                // Of two from the same group, the decoders' rules are left to them.
                if pattern & group != 0 {
                    return None;
                }
                pattern |= bits;
                at += 1;
                opcode = bytes[at];
                class = one[usize::from(opcode)];
            }
            if class == Class::REX {
                rex = opcode;
                pattern |= pattern::REX;
                at += 1;
                opcode = bytes[at];
                class = one[usize::from(opcode)];
                // Something between REX and the opcode takes it away.
                if class == Class::REX || class == Class::PREFIX || class == Class::VEX {
                    return None;
                }
            }
            if class == Class::ESCAPE {
                at += 1;
                opcode = bytes[at];
                (class, map) = (TWO[usize::from(opcode)], 1);
                if class == Class::ESCAPE {
                    (class, map) = if opcode == 0x38 { (KEPT, 2) } else { (KEPT_BYTE, 3) };
                    at += 1;
                    opcode = bytes[at];
                }
            } else if class == Class::VEX {
                // Other prefixes are not allowed before it.
                if pattern & (pattern::OPERAND_SIZE | pattern::REPEAT | pattern::LOCK) != 0 {
                    return None;
                }
                let first = bytes[at + 1];
                // LDS and LES with an operand in memory; and bits without a meaning in VEX.
                if NARROW && (first < 0xc0 || opcode == 0xc4 && first & 0x20 == 0) {
                    return None;
                }
                let (selected, last) = if opcode == 0xc5 {
                    (rex, at) = (!first >> 5 & 4, at + 2);
                    (1, first & 0x7f)
                } else {
                    let second = bytes[at + 2];
                    (rex, at) = (!first >> 5 & 7 | second >> 4 & 8, at + 3);
                    (first & 0x1f, second & 0x7f)
                };
                opcode = bytes[at];
                class = vex_class(selected, opcode);
                map = 4 | u64::from(selected & 3);
                pattern |= u64::from(last) << pattern::VEX;
            }
        }
        if class == Class::UNKNOWN || class.leads() {
            return None;
        }
        at += 1;
        pattern |= u64::from(opcode) << pattern::OPCODE | map << pattern::MAP;
        if rex & 8 != 0 {
            pattern |= pattern::WIDE;
        }
        let mut layout = Self {
            pattern,
            class,
            length: 0,
            reg: 0,
            rm: 0,
            address: Address::default(),
            constant: 0,
            constant_length: 0,
        };
        let mut constant = class.has(Class::BYTE.and(Class::WORD));
        if class.has(Class::MODRM) {
            let modrm = bytes[at & 15];
            at += 1;
            layout.reg = modrm >> 3 & 7 | (rex & 4) << 1;
            layout.rm = modrm & 7 | (rex & 1) << 3;
            if modrm < 0xc0 {
                layout.pattern |= pattern::MEMORY;
                (layout.address, at) = address::<NARROW>(bytes, at, modrm, rex);
            } else if !class.has(Class::RM) {
                layout.pattern |= u64::from(layout.rm) << pattern::RM;
            }
            if class.has(Class::X87) {
                layout.pattern |= u64::from(modrm) << pattern::CONSTANT;
            }
            if !class.has(Class::REG) {
                layout.pattern |= u64::from(layout.reg) << pattern::REG;
            }
            if class.has(Class::TEST.and(Class::ZERO)) {
                if class.has(Class::ZERO) && layout.reg & 7 != 0 {
                    return None;
                }
                constant = layout.reg & 7 < 2;
            }
        } else {
            // Some have a register in the opcode.
            layout.pattern |= u64::from(rex & 7) << pattern::RM;
        }
        if NARROW && class.has(Class::OFFSET) {
            layout.pattern |= pattern::MEMORY;
            let displacement = number(bytes, at) as i32;
            layout.address = Address { base: Address::NONE, index: Address::NONE, scale: 0, displacement };
            at += 4;
        }
        if constant {
            layout.constant = number(bytes, at);
            let narrow = pattern & pattern::OPERAND_SIZE != 0;
            if class.has(Class::BRANCH) && narrow {
                return None;
            }
            let length = match () {
                () if class.has(Class::BYTE) => 1,
                () if class.has(Class::QUAD) && rex & 8 != 0 => 8,
                () if narrow && rex & 8 == 0 => 2,
                () => 4,
            };
            layout.constant_length = length;
            if !class.has(Class::FREE.and(Class::BRANCH)) {
                layout.pattern |= (layout.constant & 0xff) << pattern::CONSTANT;
            }
            at += usize::from(length);
        }
        layout.length = at as u8;
        (at <= 15).then_some(layout)
    }

    /// Whether it is an instruction of 32-bit code.
    pub(super) fn is_narrow(&self) -> bool {
        self.pattern & pattern::NARROW != 0
    }

    /// Whether an operand is in memory, by ModRM or by its address alone.
    #[inline(always)]
    pub(super) fn in_memory(&self) -> bool {
        self.pattern & pattern::MEMORY != 0
    }

    /// Whether there is a REX prefix.
    pub(super) fn has_rex(&self) -> bool {
        self.pattern & pattern::REX != 0
    }

    /// The operand that is the register in ModRM's `reg`, if any would do.
    pub(super) fn free_reg(&self) -> Option<u32> {
        self.class.has(Class::REG).then(|| u32::from(self.class.has(Class::RM_FIRST)))
    }

    /// Likewise in `r/m`.
    pub(super) fn free_rm(&self) -> Option<u32> {
        let free = self.class.has(Class::RM) && !self.in_memory();
        free.then(|| u32::from(!self.class.has(Class::RM_FIRST)))
    }

    /// Whether any constant would do.
    pub(super) fn free_constant(&self) -> bool {
        self.constant_length != 0 && self.class.has(Class::FREE.and(Class::BRANCH))
    }
}

/// The memory operand of a ModRM byte, and where what follows it starts.
#[inline(always)]
fn address<const NARROW: bool>(bytes: &[u8; LOOKED_AT], at: usize, modrm: u8, rex: u8) -> (Address, usize) {
    let mut at = at;
    let (mode, mut low) = (modrm >> 6, modrm & 7);
    let mut address = Address { base: 0, index: Address::NONE, scale: 0, displacement: 0 };
    let by_sib = low == 4;
    if by_sib {
        let sib = bytes[at & 15];
        at += 1;
        low = sib & 7;
        let index = sib >> 3 & 7 | (rex & 2) << 2;
        if index != 4 {
            address.index = index;
        }
        address.scale = sib >> 6;
    }
    address.base = low | (rex & 1) << 3;
    let displacement = number(bytes, at) as u32;
    match mode {
        0 if low == 5 => {
            address.base = if by_sib || NARROW { Address::NONE } else { Address::RIP };
            (address.displacement, at) = (displacement as i32, at + 4);
        }
        0 => {}
        1 => (address.displacement, at) = (i32::from(displacement as i8), at + 1),
        _ => (address.displacement, at) = (displacement as i32, at + 4),
    }
    (address, at)
}
