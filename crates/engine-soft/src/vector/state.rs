//! The guest's vector registers, MXCSR and x87 unit, laid out for thunks to address.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use ringfence_engine::{VectorState, X87State};

use super::call::{self, Image};
use super::pass::X87;
use super::xsave::Saved;

/// MXCSR after reset (SDM 1 10.2.3), and the one Rust code runs with.
pub const MXCSR_DEFAULT: u32 = 0x1f80;

/// Bits of MXCSR.
pub(crate) mod mxcsr {
    /// Sticky exception flags: IE, DE, ZE, OE, UE, PE.
    pub(crate) const FLAGS: u32 = 0x3f;
    /// Exception masks.
    pub(crate) const MASKS: u32 = 0x1f80;
    /// AMD's misaligned exception mask (APM 1 4.2.2).
    pub(crate) const MM: u32 = 0x2_0000;
}

/// What thunks address, relative to one base register. Everything here is the guest's, or scratch.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Registers {
    /// ZMM0 to ZMM31.
    pub(super) zmm: [[u64; 8]; 32],
    /// Stands in for the memory operand. Aligned to its size.
    pub(super) bounce: [u64; 8],
    /// K0 to K7.
    pub(super) k: [u64; 8],
    /// General-purpose operands, copied in and out by the caller.
    pub(super) gpr: [u64; 6],
    /// The guest's MXCSR.
    pub(super) mxcsr: u32,
    /// What to compute with: the guest's controls, no flag set.
    pub(super) mxcsr_run: u32,
    /// What it became.
    pub(super) mxcsr_out: u32,
    /// The flags whose exception is not masked.
    pub(super) mxcsr_unmasked: u32,
    /// What Rust code runs with.
    pub(super) mxcsr_host: u32,
    /// Status flags in, as LAHF and SETO deliver them (see [`crate::status::Status`]).
    pub(super) status: u16,
    /// Status flags out, meaningful once the instruction has completed.
    pub(super) status_out: u16,
}

impl Registers {
    pub(super) fn boxed() -> Box<Self> {
        let mut registers = Box::new(Self {
            zmm: [[0; 8]; 32],
            bounce: [0; 8],
            k: [0; 8],
            gpr: [0; 6],
            mxcsr: 0,
            mxcsr_run: 0,
            mxcsr_out: 0,
            mxcsr_unmasked: 0,
            mxcsr_host: MXCSR_DEFAULT,
            status: 0,
            status_out: 0,
        });
        registers.set_mxcsr(MXCSR_DEFAULT);
        registers
    }

    /// Loads MXCSR and what is derived from it. The caller has checked reserved bits.
    /// Translated code does the same ([`crate::jit`], LDMXCSR).
    pub(super) fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value;
        self.mxcsr_unmasked = (!value & mxcsr::MASKS) >> 7;
        self.mxcsr_run = value & 0xffff & !mxcsr::FLAGS;
    }
}

/// The register numbers of one instruction: five vector or opmask registers, then three general registers. Thunks are
/// given it, so that one serves every choice of registers; they mask what they take from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Slots([u8; 8]);

impl Slots {
    /// Slots of vector and opmask registers.
    pub(super) const REGISTERS: usize = 5;
    /// Slots of general registers.
    pub(super) const GENERAL: usize = 3;

    /// From the form in which an operation carries them.
    #[inline(always)]
    pub fn unpack(packed: u64) -> Self {
        Self(packed.to_le_bytes())
    }

    /// As eight bytes, for an operation to carry.
    pub fn pack(self) -> u64 {
        u64::from_le_bytes(self.0)
    }

    /// The vector or opmask register in a slot.
    #[inline(always)]
    pub(super) fn register(self, slot: u8) -> usize {
        usize::from(self.0[usize::from(slot) % Self::REGISTERS])
    }

    /// The general register in a slot.
    #[inline(always)]
    pub(super) fn general(self, slot: usize) -> usize {
        usize::from(self.0[Self::REGISTERS + slot % Self::GENERAL] & 15)
    }

    pub(super) fn set_register(&mut self, slot: usize, number: usize) {
        self.0[slot % Self::REGISTERS] = number as u8;
    }

    pub(super) fn set_general(&mut self, slot: usize, number: usize) {
        self.0[Self::REGISTERS + slot % Self::GENERAL] = number as u8;
    }
}

/// The x87 unit's record of its last instruction that is not a control instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// Opcode: the low three bits of the first byte, then the ModRM byte.
    pub fop: u16,
    /// Instruction pointer.
    pub fip: u64,
    /// Data pointer.
    pub fdp: u64,
    /// Code segment selector.
    pub fcs: u16,
    /// Data segment selector.
    pub fds: u16,
}

/// How the host's x87 unit records pointers. A guest sees its own addresses, recorded the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quirks {
    /// The opcode is recorded by every instruction, not only by one with an unmasked exception.
    pub tracks_opcode: bool,
    /// Likewise the data pointer (CPUID 7 EBX bit 6 clear).
    pub tracks_data: bool,
    /// Segment selectors are recorded (CPUID 7 EBX bit 13 clear).
    pub tracks_selectors: bool,
    /// FXSAVE stores the pointers though no exception is pending (Intel).
    pub saves_always: bool,
    /// FXSAVE then stores zeroes in their place rather than leaving memory alone (AMD, CPUID 8000_0008 EBX bit 2).
    pub saves_zeroes: bool,
    /// FXRSTOR loads the pointers though no exception is pending.
    pub restores_always: bool,
    /// How many bits of a 64-bit instruction pointer FXRSTOR and XRSTOR keep: those of a linear address, 48 or 57, and the
    /// upper ones become copies of the highest of them; or 64.
    pub instruction_pointer_bits: u32,
    /// Likewise of a data pointer.
    pub data_pointer_bits: u32,
}

impl Quirks {
    /// Finds out by running a few x87 instructions. Call it when no guest's x87 state is in the host's registers.
    fn probe() -> Self {
        let (environment, image, restored) = call::probe_pointers();
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let saved = word(&image.0, 8);
        Self {
            tracks_opcode: word(&environment, 16) >> 16 & 0x7ff != 0,
            tracks_data: word(&environment, 20) != 0,
            tracks_selectors: word(&environment, 16) & 0xffff != 0,
            saves_always: saved != 0 && saved != !0,
            saves_zeroes: saved == 0,
            restores_always: word(&restored, 12) == 0x1234,
            instruction_pointer_bits: Self::probe_pointer_bits(8),
            data_pointer_bits: Self::probe_pointer_bits(16),
        }
    }

    /// Of the pointer at an offset in the image.
    fn probe_pointer_bits(at: usize) -> u32 {
        /// Canonical in neither width.
        const POINTER: u64 = 1 << 56 | 1 << 47 | 0x1234;
        // Invalid operation, unmasked and raised: with an exception pending every processor loads and saves pointers.
        let mut image = Image::default();
        image.0[0] &= !1;
        image.0[2..4].copy_from_slice(&0x8081u16.to_le_bytes());
        image.0[at..at + 8].copy_from_slice(&POINTER.to_le_bytes());
        call::fxrstor(&image);
        call::fxsave(&mut image);
        call::fninit();
        let shown = image.0[at..at + 8].iter().rev().fold(0, |pointer, &byte| pointer << 8 | u64::from(byte));
        [48, 57].into_iter().find(|&bits| sign_extend(POINTER, bits) == shown).unwrap_or(u64::BITS)
    }

    /// The host's, found out once.
    pub fn host() -> Self {
        static QUIRKS: std::sync::OnceLock<Quirks> = std::sync::OnceLock::new();
        *QUIRKS.get_or_init(Self::probe)
    }
}

/// The low `bits` of a value (1 to 64), the highest of them copied upwards.
pub(super) fn sign_extend(value: u64, bits: u32) -> u64 {
    let unused = u64::BITS - bits;
    ((value << unused) as i64 >> unused) as u64
}

/// The exceptions' masks in the x87 control word.
const EXCEPTIONS: u16 = 0x3f;

thread_local! {
    /// The unit whose x87 state is in this thread's x87 registers; zero for none.
    static OWNER: Cell<u64> = const { Cell::new(0) };
}

/// The vector and x87 state of one vCPU, in the form in which instructions run on it.
///
/// x87 and MMX state is loaded into the host's registers by the first instruction that needs it and stays there
/// until [`VectorUnit::park`], which must be called before the thread runs another vCPU and before the vCPU goes
/// to another thread: at the end of every `run`. Rust code does not touch those registers.
#[derive(Debug)]
pub struct VectorUnit {
    id: u64,
    /// Everything but x87.
    pub(super) registers: Box<Registers>,
    /// The x87 state when it is not live.
    image: Image,
    live: bool,
    /// While it is: every x87 exception is masked, and none is pending.
    masked: bool,
    /// Kept by hand, so that no host address shows.
    pub(super) pointers: Pointers,
    pub(super) quirks: Quirks,
    mxcsr_mask: u32,
    /// Memory for the next image.
    spare: Option<Saved>,
}

impl VectorUnit {
    /// A unit in its reset state. `misaligned_sse`: the CPU has AMD's misaligned SSE mode, so MXCSR.MM is writable.
    pub fn new(misaligned_sse: bool) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut unit = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            registers: Registers::boxed(),
            image: Image::default(),
            live: false,
            masked: false,
            pointers: Pointers::default(),
            quirks: Quirks::host(),
            mxcsr_mask: 0xffff | if misaligned_sse { mxcsr::MM } else { 0 },
            spare: None,
        };
        unit.set_x87(&X87State::default());
        unit
    }

    /// An image with no part written yet: in memory that has been given back, if there is some, whose bytes are any.
    pub(super) fn blank(&mut self) -> Saved {
        let mut saved = self.spare.take().unwrap_or_default();
        saved.parts.clear();
        saved
    }

    /// Gives an image's memory back.
    pub(super) fn give_back(&mut self, saved: Saved) {
        self.spare = Some(saved);
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        self.registers.mxcsr
    }

    /// MXCSR and all that follows from it.
    #[cfg(test)]
    pub(crate) fn show_mxcsr(&self) -> String {
        let Registers { mxcsr, mxcsr_run, mxcsr_unmasked, .. } = &*self.registers;
        format!("{mxcsr:x} {mxcsr_run:x} {mxcsr_unmasked:x}")
    }

    /// The writable bits of MXCSR, as FXSAVE reports them.
    pub fn mxcsr_mask(&self) -> u32 {
        self.mxcsr_mask
    }

    /// Loads MXCSR; `false`, and nothing happens, if a reserved bit is set (#GP).
    #[must_use]
    pub fn set_mxcsr(&mut self, value: u32) -> bool {
        let valid = value & !self.mxcsr_mask == 0;
        if valid {
            self.registers.set_mxcsr(value);
        }
        valid
    }

    /// The x87 unit records as a processor of another kind would.
    #[cfg(test)]
    pub(crate) fn set_quirks(&mut self, quirks: Quirks) {
        self.quirks = quirks;
    }

    /// The x87 unit's pointers.
    pub fn pointers(&self) -> Pointers {
        self.pointers
    }

    /// The low 128 bits of a vector register (0 to 31).
    pub fn xmm(&self, number: usize) -> u128 {
        let [low, high, ..] = self.registers.zmm[number & 31];
        u128::from(low) | u128::from(high) << 64
    }

    /// The memory operand's stand-in: an instruction's source is put here before it runs.
    pub fn bounce(&self) -> &[u64; 8] {
        &self.registers.bounce
    }

    /// Likewise, to fill it.
    pub fn bounce_mut(&mut self) -> &mut [u64; 8] {
        &mut self.registers.bounce
    }

    /// Brings the x87 state into the host's registers.
    #[inline]
    pub(super) fn ensure_live(&mut self) {
        if !self.live {
            self.make_live();
        }
        debug_assert_eq!(OWNER.get(), self.id, "x87 state was not parked before the vCPU changed threads");
    }

    #[cold]
    fn make_live(&mut self) {
        debug_assert_eq!(OWNER.get(), 0, "another vCPU's x87 state was not parked on this thread");
        call::fxrstor(&self.image);
        self.live = true;
        self.control_loaded(u16::from_le_bytes([self.image.0[0], self.image.0[1]]));
        OWNER.set(self.id);
    }

    /// The unit, which is live, has a new control word.
    pub(super) fn control_loaded(&mut self, control: u16) {
        self.masked = control & EXCEPTIONS == EXCEPTIONS && !self.x87_pending();
    }

    /// Whether x87 and MMX instructions may be executed as they are, if they are enabled.
    #[inline(always)]
    pub(super) fn passes(&self) -> X87 {
        // Where selectors are not recorded, an operation makes them zero. They are nearly always.
        let selectors = self.quirks.tracks_selectors
            || self.pointers.fcs == 0 && (self.pointers.fds == 0 || !self.quirks.tracks_data);
        match self.live {
            false => X87::Away,
            true if !selectors => X87::Refused,
            true if self.masked => X87::Ready,
            true if self.x87_pending() => X87::Refused,
            true => X87::Unmasked,
        }
    }

    /// Takes the x87 state out of the host's registers. See the type's description.
    pub fn park(&mut self) {
        if self.live {
            call::fxsave(&mut self.image);
            call::fninit();
            self.live = false;
            OWNER.set(0);
        }
    }

    /// The x87 image, up to date; the state stays live.
    pub(super) fn image(&mut self) -> &Image {
        if self.live {
            call::fxsave(&mut self.image);
        }
        &self.image
    }

    /// The x87 image to be changed; the next x87 instruction loads it.
    pub(super) fn image_mut(&mut self) -> &mut Image {
        self.park();
        &mut self.image
    }

    /// The vector registers, opmasks and MXCSR.
    pub fn vector_state(&self) -> VectorState {
        VectorState { zmm: self.registers.zmm, k: self.registers.k, mxcsr: self.registers.mxcsr }
    }

    /// Whether another unit, parked as this one is, holds the same.
    pub(crate) fn same(&self, other: &Self) -> bool {
        debug_assert!(!self.live && !other.live, "units are parked before they are compared");
        let (a, b) = (&self.registers, &other.registers);
        let (x, y) = (&self.image.0, &other.image.0);
        // Control, status and tag words, and the registers; what lies between may be the host's.
        a.zmm == b.zmm
            && (a.k, a.mxcsr, self.pointers) == (b.k, b.mxcsr, other.pointers)
            && x[..5] == y[..5]
            && x[32..160] == y[32..160]
    }

    /// Loads the vector registers, opmasks and MXCSR (without its reserved bits).
    pub fn set_vector_state(&mut self, state: &VectorState) {
        self.registers.zmm = state.zmm;
        self.registers.k = state.k;
        self.registers.set_mxcsr(state.mxcsr & self.mxcsr_mask);
    }

    /// Whether a waiting instruction would raise #MF.
    pub fn x87_pending(&self) -> bool {
        let status = if self.live { call::fnstsw() } else { u16::from(self.image.0[2]) };
        status & 0x80 != 0
    }

    /// FNSTSW: the status word.
    pub fn x87_status(&self) -> u16 {
        if self.live { call::fnstsw() } else { u16::from_le_bytes([self.image.0[2], self.image.0[3]]) }
    }

    /// MXCSR.MM is set: unaligned operands are allowed where hardware would otherwise refuse them.
    #[inline]
    pub(super) fn misalignment_allowed(&self) -> bool {
        self.registers.mxcsr & mxcsr::MM != 0
    }

    /// Enters MMX mode (SDM 1 9.5.1): TOP is zero and every register valid.
    pub(super) fn enter_mmx(&mut self) {
        self.image_mut();
        super::environment::enter_mmx(&mut self.image);
    }

    /// An MMX register, in MMX mode.
    pub(super) fn mmx(&mut self, number: usize) -> u64 {
        let at = 32 + 16 * (number & 7);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.image().0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// The x87 unit, which must be parked.
    pub fn x87(&self) -> X87State {
        debug_assert!(!self.live, "the unit is parked at the end of every run");
        let pointers = self.pointers;
        let image = &self.image.0;
        let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        X87State {
            fcw: half(0),
            fsw: half(2),
            ftw: image[4],
            fop: pointers.fop,
            fip: pointers.fip,
            fdp: pointers.fdp,
            fcs: pointers.fcs,
            fds: pointers.fds,
            st: std::array::from_fn(|i| {
                let at = 32 + 16 * i;
                let mut low = [0; 8];
                low.copy_from_slice(&image[at..at + 8]);
                [u64::from_le_bytes(low), u64::from(half(at + 8))]
            }),
        }
    }

    /// Loads the x87 unit. ES and B follow from the flags and masks.
    pub fn set_x87(&mut self, state: &X87State) {
        self.pointers = Pointers {
            fop: state.fop & 0x7ff,
            fip: state.fip,
            fdp: state.fdp,
            fcs: state.fcs,
            fds: state.fds,
        };
        let mut image = Image::default();
        image.0[0..2].copy_from_slice(&state.fcw.to_le_bytes());
        image.0[2..4].copy_from_slice(&state.fsw.to_le_bytes());
        image.0[4] = state.ftw;
        for (i, [significand, sign_exponent]) in state.st.iter().enumerate() {
            let at = 32 + 16 * i;
            image.0[at..at + 8].copy_from_slice(&significand.to_le_bytes());
            image.0[at + 8..at + 10].copy_from_slice(&sign_exponent.to_le_bytes()[..2]);
        }
        super::environment::settle(&mut image);
        *self.image_mut() = image;
    }
}

impl Drop for VectorUnit {
    fn drop(&mut self) {
        if self.live && OWNER.get() == self.id {
            call::fninit();
            OWNER.set(0);
        }
    }
}
