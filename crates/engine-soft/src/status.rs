//! The arithmetic flags in the form in which the host delivers them.

use ringfence_x86::Rflags;

/// The six status flags: the high byte as LAHF loads AH (SF, ZF, AF, PF, CF in bits 7, 6, 4, 2, 0), the low
/// byte 1 if OF is set (SDM 2A, LAHF). Two instructions bring host flags into this form and two put them back,
/// where PUSHF and POPF take ten times as long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Status(pub u16);

impl Status {
    const CF: u16 = 1 << 8;
    const PF: u16 = 1 << 10;
    const AF: u16 = 1 << 12;
    const ZF: u16 = 1 << 14;
    const SF: u16 = 1 << 15;
    const OF: u16 = 1;
    const ALL: u16 = Self::CF | Self::PF | Self::AF | Self::ZF | Self::SF | Self::OF;

    /// From RFLAGS; other bits are ignored.
    pub const fn from_rflags(rflags: u64) -> Self {
        Self((((rflags & 0xd5) << 8) | ((rflags >> 11) & 1)) as u16)
    }

    /// As RFLAGS bits, all others clear.
    pub const fn to_rflags(self) -> u64 {
        ((self.0 as u64 >> 8) & 0xd5) | ((self.0 as u64 & 1) << 11)
    }

    /// Without the bits that are no flags (LAHF sets bit 1 of AH).
    pub const fn canonical(self) -> Self {
        Self(self.0 & Self::ALL)
    }

    /// Carry.
    pub const fn cf(self) -> bool {
        self.0 & Self::CF != 0
    }

    /// Parity.
    pub const fn pf(self) -> bool {
        self.0 & Self::PF != 0
    }

    /// Auxiliary carry.
    pub const fn af(self) -> bool {
        self.0 & Self::AF != 0
    }

    /// Zero.
    pub const fn zf(self) -> bool {
        self.0 & Self::ZF != 0
    }

    /// Sign.
    pub const fn sf(self) -> bool {
        self.0 & Self::SF != 0
    }

    /// Overflow.
    pub const fn of(self) -> bool {
        self.0 & Self::OF != 0
    }

    /// With the RFLAGS bits in `mask` replaced by those in `value`.
    pub const fn with(self, mask: Rflags, value: Rflags) -> Self {
        let rflags = (self.to_rflags() & !mask.bits()) | (value.bits() & mask.bits());
        Self::from_rflags(rflags)
    }

    /// Whether condition `cc` (the low four bits of Jcc, SETcc and CMOVcc opcodes) holds (SDM 1 B.1).
    #[inline(always)]
    pub const fn condition(self, cc: u8) -> bool {
        let holds = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rflags_round_trip_keeps_status_bits_and_drops_others() {
        for bits in 0..0x1000_u64 {
            let status = Status::from_rflags(bits);
            assert_eq!(status.to_rflags(), bits & Rflags::STATUS.bits());
            assert_eq!(status, status.canonical());
        }
    }

    #[test]
    fn odd_condition_is_the_opposite_of_the_even_one() {
        for bits in 0..0x1000_u64 {
            let status = Status::from_rflags(bits);
            for cc in (0..16).step_by(2) {
                assert_ne!(status.condition(cc), status.condition(cc + 1));
            }
        }
    }
}
