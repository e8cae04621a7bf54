//! Control registers, EFER and XCR0 (SDM 3A 2.5, 2.2.1, 2.6).

use bitflags::bitflags;

bitflags! {
    /// CR0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Cr0: u64 {
        /// Protected mode.
        const PE = 1 << 0;
        /// `wait` obeys TS.
        const MP = 1 << 1;
        /// x87 instructions raise #NM.
        const EM = 1 << 2;
        /// Task switched: the first use of vector state raises #NM.
        const TS = 1 << 3;
        /// Extension type, always one.
        const ET = 1 << 4;
        /// x87 errors raise #MF rather than an external interrupt.
        const NE = 1 << 5;
        /// Supervisor writes obey read-only pages.
        const WP = 1 << 16;
        /// Alignment checks are possible.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
    }

    /// CR4.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Cr4: u64 {
        /// Virtual-8086 extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// RDTSC only at CPL 0.
        const TSD = 1 << 2;
        /// Debugging extensions: DR4 and DR5 do not alias.
        const DE = 1 << 3;
        /// 4 MiB pages in 32-bit paging.
        const PSE = 1 << 4;
        /// Physical address extension.
        const PAE = 1 << 5;
        /// Machine check.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// RDPMC at any CPL.
        const PCE = 1 << 8;
        /// FXSAVE and SSE are supported by the operating system.
        const OSFXSR = 1 << 9;
        /// #XM is supported by the operating system.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// RDFSBASE and its kin.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE is supported by the operating system.
        const OSXSAVE = 1 << 18;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 21;
    }

    /// The extended-feature-enable register, MSR C000_0080.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Efer: u64 {
        /// SYSCALL and SYSRET.
        const SCE = 1 << 0;
        /// Long mode enable.
        const LME = 1 << 8;
        /// Long mode active (read-only).
        const LMA = 1 << 10;
        /// No-execute pages.
        const NXE = 1 << 11;
        /// FXSAVE leaves out the XMM registers at CPL 0 in 64-bit mode (APM 2 3.1.7).
        const FFXSR = 1 << 14;
        /// Automatic IBRS (APM 2 3.2.9).
        const AIBRSE = 1 << 21;
    }

    /// Extended control register 0: the state components that XSAVE manages (SDM 1 13.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Xcr0: u64 {
        /// x87.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// Upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// AVX-512 mask registers.
        const OPMASK = 1 << 5;
        /// Upper halves of ZMM0 to ZMM15.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16 to ZMM31.
        const HI16_ZMM = 1 << 7;
        /// The three AVX-512 components, which must be set together.
        const AVX512 = 7 << 5;
    }
}
