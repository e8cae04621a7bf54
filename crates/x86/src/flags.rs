//! The flags register (SDM 1 3.4.3).

use bitflags::bitflags;

bitflags! {
    /// RFLAGS. Bit 1 is always set in the architectural value; [`Rflags::FIXED`] holds it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Reserved, reads as one.
        const FIXED = 1 << 1;
        /// Parity of the low byte of the result.
        const PF = 1 << 2;
        /// Carry out of bit 3.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Single step.
        const TF = 1 << 8;
        /// Maskable interrupts enabled.
        const IF = 1 << 9;
        /// String instructions count down.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level, both bits.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: instruction breakpoints are ignored for one instruction.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, and access control for SMAP.
        const AC = 1 << 18;
        /// Virtual interrupt flag.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is available when software can toggle it.
        const ID = 1 << 21;

        /// The flags that arithmetic writes.
        const STATUS = 0x8d5;
        /// Every bit that software can change.
        const WRITABLE = 0x3f_7fd5;
    }
}

impl Rflags {
    /// The I/O privilege level, 0 to 3.
    pub const fn iopl(self) -> u8 {
        ((self.bits() >> 12) & 3) as u8
    }
}
