//! What follows an opcode of 64-bit and of 32-bit code, and what it is applied to: the opcode maps (SDM 2D A.3, APM 3 A), as far as
//! [`super::layout`] wants to know.

/// What an opcode says of what follows it and of what it is applied to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Class(u16);

impl Class {
    /// Left to the library.
    pub(super) const UNKNOWN: Self = Self(0);
    /// Nothing follows.
    pub(super) const PLAIN: Self = Self(1);
    /// A ModRM byte follows.
    pub(super) const MODRM: Self = Self(2);
    /// ModRM's field `reg` is a general-purpose register, any of which makes the same instruction.
    pub(super) const REG: Self = Self(4);
    /// So is ModRM's field `r/m` where it is a register.
    pub(super) const RM: Self = Self(8);
    /// `r/m` is the first operand, not the second.
    pub(super) const RM_FIRST: Self = Self(16);
    /// A constant of one byte follows.
    pub(super) const BYTE: Self = Self(32);
    /// One of two or four bytes.
    pub(super) const WORD: Self = Self(64);
    /// With REX.W, one of eight.
    pub(super) const QUAD: Self = Self(128);
    /// The constant makes no difference but for its value.
    pub(super) const FREE: Self = Self(256);
    /// It is how far to branch. With a prefix for the operand size, AMD's and Intel's processors differ.
    pub(super) const BRANCH: Self = Self(512);
    /// It follows only where ModRM's field `reg` is 0 or 1.
    pub(super) const TEST: Self = Self(1024);
    /// ModRM's field `reg` must be 0.
    pub(super) const ZERO: Self = Self(2048);
    /// All of ModRM makes a difference: the x87 unit records it.
    pub(super) const X87: Self = Self(4096);
    /// An address follows, of an operand in memory (32-bit code only: 64-bit code has eight bytes there).
    pub(super) const OFFSET: Self = Self(8192);
    pub(super) const PREFIX: Self = Self(0x8000);
    pub(super) const REX: Self = Self(0x8001);
    pub(super) const ESCAPE: Self = Self(0x8002);
    pub(super) const VEX: Self = Self(0x8003);

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[inline(always)]
    pub(super) const fn has(self, bits: Self) -> bool {
        self.0 & bits.0 != 0
    }

    /// Not an opcode.
    #[inline(always)]
    pub(super) const fn leads(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

pub(super) type Map = [Class; 256];

/// Operands in a register and in ModRM's `r/m`, as most have them.
const REG_RM: Class = Class::MODRM.and(Class::REG).and(Class::RM);
const RM_REG: Class = REG_RM.and(Class::RM_FIRST);
/// ModRM's `reg` tells what to do with `r/m`.
const GROUP: Class = Class::MODRM.and(Class::RM).and(Class::RM_FIRST);
const BYTE_FREE: Class = Class::BYTE.and(Class::FREE);
const WORD_FREE: Class = Class::WORD.and(Class::FREE);
/// Vector instructions, and all that are not looked at closely.
pub(super) const KEPT: Class = Class::MODRM;
pub(super) const KEPT_BYTE: Class = Class::MODRM.and(Class::BYTE);

const fn put(map: &mut Map, first: usize, last: usize, class: Class) {
    let mut opcode = first;
    while opcode <= last {
        map[opcode] = class;
        opcode += 1;
    }
}

/// The map of opcodes of one byte.
pub(super) static ONE: Map = {
    let mut map = [Class::UNKNOWN; 256];
    let mut row = 0;
    while row < 0x40 {
        put(&mut map, row, row + 1, RM_REG);
        put(&mut map, row + 2, row + 3, REG_RM);
        map[row + 4] = Class::PLAIN.and(BYTE_FREE);
        map[row + 5] = Class::PLAIN.and(WORD_FREE);
        row += 8;
    }
    map[0x0f] = Class::ESCAPE;
    put(&mut map, 0x40, 0x4f, Class::REX);
    put(&mut map, 0x50, 0x5f, Class::PLAIN);
    map[0x63] = REG_RM;
    map[0x68] = Class::PLAIN.and(WORD_FREE);
    map[0x69] = REG_RM.and(WORD_FREE);
    map[0x6a] = Class::PLAIN.and(BYTE_FREE);
    map[0x6b] = REG_RM.and(BYTE_FREE);
    put(&mut map, 0x6c, 0x6f, Class::PLAIN);
    put(&mut map, 0x70, 0x7f, Class::BYTE.and(Class::BRANCH));
    map[0x80] = GROUP.and(BYTE_FREE);
    map[0x81] = GROUP.and(WORD_FREE);
    map[0x83] = GROUP.and(BYTE_FREE);
    put(&mut map, 0x84, 0x89, RM_REG);
    put(&mut map, 0x8a, 0x8b, REG_RM);
    map[0x8c] = KEPT;
    map[0x8d] = REG_RM;
    map[0x8e] = KEPT;
    put(&mut map, 0x90, 0x99, Class::PLAIN);
    put(&mut map, 0x9b, 0x9f, Class::PLAIN);
    put(&mut map, 0xa4, 0xa7, Class::PLAIN);
    map[0xa8] = Class::PLAIN.and(BYTE_FREE);
    map[0xa9] = Class::PLAIN.and(WORD_FREE);
    put(&mut map, 0xaa, 0xaf, Class::PLAIN);
    put(&mut map, 0xb0, 0xb7, Class::PLAIN.and(BYTE_FREE));
    put(&mut map, 0xb8, 0xbf, Class::PLAIN.and(WORD_FREE).and(Class::QUAD));
    put(&mut map, 0xc0, 0xc1, GROUP.and(Class::BYTE));
    map[0xc3] = Class::PLAIN;
    put(&mut map, 0xc4, 0xc5, Class::VEX);
    map[0xc6] = GROUP.and(BYTE_FREE).and(Class::ZERO);
    map[0xc7] = GROUP.and(WORD_FREE).and(Class::ZERO);
    map[0xc9] = Class::PLAIN;
    map[0xcc] = Class::PLAIN;
    put(&mut map, 0xd0, 0xd3, GROUP);
    put(&mut map, 0xd8, 0xdf, KEPT.and(Class::X87));
    put(&mut map, 0xe0, 0xe3, Class::BYTE.and(Class::BRANCH));
    put(&mut map, 0xe8, 0xe9, Class::WORD.and(Class::BRANCH));
    map[0xeb] = Class::BYTE.and(Class::BRANCH);
    put(&mut map, 0xec, 0xef, Class::PLAIN);
    put(&mut map, 0xf4, 0xf5, Class::PLAIN);
    map[0xf6] = GROUP.and(BYTE_FREE).and(Class::TEST);
    map[0xf7] = GROUP.and(WORD_FREE).and(Class::TEST);
    put(&mut map, 0xf8, 0xfd, Class::PLAIN);
    put(&mut map, 0xfe, 0xff, GROUP);
    let prefixes = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0xf0, 0xf2, 0xf3];
    let mut i = 0;
    while i < prefixes.len() {
        map[prefixes[i]] = Class::PREFIX;
        i += 1;
    }
    // The address size; and what is no instruction of 64-bit code.
    let nothing = [0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x67];
    let mut i = 0;
    while i < nothing.len() {
        map[nothing[i]] = Class::UNKNOWN;
        i += 1;
    }
    map
};

/// The map of opcodes of one byte in 32-bit code. In place of REX there are INC and DEC; what else there is only here is rare.
pub(super) static ONE_NARROW: Map = {
    let mut map = ONE;
    put(&mut map, 0x40, 0x4f, Class::PLAIN);
    put(&mut map, 0x60, 0x61, Class::PLAIN);
    // ARPL.
    map[0x63] = Class::UNKNOWN;
    put(&mut map, 0xa0, 0xa3, Class::OFFSET);
    map
};

/// Of two bytes, the first 0x0f.
pub(super) static TWO: Map = {
    let mut map = [Class::UNKNOWN; 256];
    put(&mut map, 0x00, 0x03, KEPT);
    put(&mut map, 0x05, 0x09, Class::PLAIN);
    map[0x0b] = Class::PLAIN;
    map[0x0d] = KEPT;
    put(&mut map, 0x10, 0x19, KEPT);
    put(&mut map, 0x1c, 0x1f, KEPT);
    put(&mut map, 0x28, 0x2f, KEPT);
    put(&mut map, 0x30, 0x33, Class::PLAIN);
    put(&mut map, 0x40, 0x4f, REG_RM);
    put(&mut map, 0x50, 0x6f, KEPT);
    put(&mut map, 0x70, 0x73, KEPT_BYTE);
    put(&mut map, 0x74, 0x76, KEPT);
    map[0x77] = Class::PLAIN;
    put(&mut map, 0x7c, 0x7f, KEPT);
    put(&mut map, 0x80, 0x8f, Class::WORD.and(Class::BRANCH));
    put(&mut map, 0x90, 0x9f, GROUP);
    map[0xa2] = Class::PLAIN;
    map[0xa3] = RM_REG;
    map[0xa4] = RM_REG.and(Class::BYTE);
    map[0xa5] = RM_REG;
    map[0xab] = RM_REG;
    map[0xac] = RM_REG.and(Class::BYTE);
    map[0xad] = RM_REG;
    map[0xae] = KEPT;
    map[0xaf] = REG_RM;
    put(&mut map, 0xb0, 0xb1, RM_REG);
    map[0xb3] = RM_REG;
    put(&mut map, 0xb6, 0xb8, REG_RM);
    map[0xba] = GROUP.and(Class::BYTE);
    map[0xbb] = RM_REG;
    put(&mut map, 0xbc, 0xbf, REG_RM);
    put(&mut map, 0xc0, 0xc1, RM_REG);
    map[0xc2] = KEPT_BYTE;
    map[0xc3] = RM_REG;
    put(&mut map, 0xc4, 0xc6, KEPT_BYTE);
    map[0xc7] = KEPT;
    put(&mut map, 0xc8, 0xcf, Class::PLAIN);
    put(&mut map, 0xd0, 0xfe, KEPT);
    put(&mut map, 0x38, 0x38, Class::ESCAPE);
    put(&mut map, 0x3a, 0x3a, Class::ESCAPE);
    map
};

/// What follows the opcodes of a map of VEX. Gathers have registers in their addresses.
#[inline(always)]
pub(super) fn vex_class(map: u8, opcode: u8) -> Class {
    match (map, opcode) {
        (1, 0x77) => Class::PLAIN,
        (1, 0x70..=0x73 | 0xc2 | 0xc4..=0xc6) | (3, _) => KEPT_BYTE,
        (2, 0x90..=0x93) => Class::UNKNOWN,
        (1 | 2, _) => KEPT,
        _ => Class::UNKNOWN,
    }
}

impl std::fmt::Debug for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Class({:#x})", self.0)
    }
}
