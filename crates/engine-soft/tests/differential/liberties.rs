//! What the manuals leave to the processor, and processors do in different ways.
//!
//! Where it is cheap the interpreter does what the host does. The rest, the order of faults above all, is listed here.

use std::sync::LazyLock;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use ringfence_oracle::{Case, End, Mode, Outcome, layout};

/// RF.
const RESUME: u64 = 1 << 16;
/// AC.
const ALIGNMENT: u64 = 1 << 18;
/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8d5;

/// What a case leaves open.
pub(crate) struct Liberties<'a> {
    case: &'a Case,
    host: &'a Outcome,
    instruction: Instruction,
}

impl<'a> Liberties<'a> {
    /// Those of `case`, which the host ended as `host`.
    pub(crate) fn new(case: &'a Case, host: &'a Outcome) -> Self {
        let mut decoder = Decoder::new(case.mode().bits(), case.code(), DecoderOptions::NONE);
        Self { case, host, instruction: decoder.decode() }
    }

    /// Whether processors are free to raise either of two different exceptions.
    pub(crate) fn either_will_do(&self, ours: End) -> bool {
        let (
            End::Exception { vector: host, address: at, .. },
            End::Exception { vector: ours, error, address },
        ) = (self.host.end, ours)
        else {
            return false;
        };
        let Self { case, instruction, .. } = self;
        // An instruction that is known to be invalid from the bytes in this page: whether the next page is fetched before
        // saying so is the processor's choice.
        let end = layout::CODE + layout::CODE_LEN as u64;
        let fetch = ours == 14 && error & 0x10 != 0 && address == end && case.code_address() < end;
        // Both operands of CMPS fault: which one is read first differs by operand size and repeat prefix.
        use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw};
        let compares = instruction.is_string_instruction()
            && matches!(instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq);
        // AMD's processors want the offset in FS or GS to be canonical by itself, before the base is added.
        let offset = host == 13 && wild_offset(case, instruction);
        // Fifteen bytes or more, and invalid.
        let long = matches!((host, ours), (13, 6) | (6, 13)) && is_invalid_without_prefixes(case);
        // A gather or scatter under the trap flag that faults after some elements: the host's trap comes first.
        let stepped = host == 1 && instruction.memory_index().is_vector_register();
        // A wide vector across the end of the lower half or of 4 GiB: processors that take it in two halves see the
        // missing page under the first one.
        let edge = if case.mode() == Mode::Bits64 { 1u64 << 47 } else { 1 << 32 };
        let wraps = host == 14 && matches!(ours, 12 | 13) && (edge - 64..edge).contains(&at);
        stepped
            || wraps
            || fetch && host == 6
            || long
            || compares && is_of_memory(host) && is_of_memory(ours)
            || offset
            || is_intel() && intel_order(instruction, case.rflags, (host, at), (ours, address))
    }

    /// Whether the interpreter rightly found a fault where the host went on, so that nothing else can be compared.
    ///
    /// An x87 store had an unmasked exception and did nothing, not even look at its address; or a masked operand wraps at
    /// 4 GiB, which AMD's processors forbid.
    pub(crate) fn goes_on(&self, ours: End) -> bool {
        const SUMMARY: u16 = 1 << 7;
        if !is_intel() || !is_memory_fault(ours) {
            return false;
        }
        let instruction = &self.instruction;
        // Behind the store, the next instruction may not be there to be fetched.
        let fetch = matches!(self.host.end, End::Exception { error, .. } if error & 0x10 != 0);
        let memory = is_memory_fault(self.host.end) && !fetch;
        let x87 = instruction.code().cpuid_features().contains(&CpuidFeature::FPU)
            || instruction.mnemonic() == Mnemonic::Fisttp;
        x87 && !memory && self.host.vectors.fsw & SUMMARY != 0
            || self.host.completed() && self.case.mode() != Mode::Bits64 && is_masked(instruction)
    }

    /// Whether memory is not compared: Intel's processors write the first part of ten bytes before they look at the rest,
    /// and a return address before they look at where the call goes.
    pub(crate) fn is_memory_free(&self) -> bool {
        let early = matches!(self.instruction.mnemonic(), Mnemonic::Fbstp | Mnemonic::Fstp | Mnemonic::Call);
        is_intel() && is_memory_fault(self.host.end) && early
    }

    fn is_repeated(&self) -> bool {
        self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix()
    }

    /// Bits of general register `n` that are not compared.
    pub(crate) fn registers(&self, n: usize) -> u64 {
        let repeated = self.instruction.is_string_instruction() && self.is_repeated();
        // Intel's processors clear the upper halves of RCX, RSI and RDI with 32-bit addresses though no element was done.
        let prefixed = || self.case.code().iter().take_while(|&&byte| byte != 0x0f).any(|&byte| byte == 0x67);
        if is_intel() && repeated && matches!(n, 1 | 6 | 7) && prefixed() { !0xffff_ffff } else { 0 }
    }

    /// Flags of MXCSR that are not compared.
    pub(crate) fn mxcsr(&self) -> u32 {
        use Mnemonic::{Dppd, Dpps, Vcvtps2ph, Vdppd, Vdpps};
        match self.instruction.mnemonic() {
            // Computed in two steps, which our flags (from the masked response) cannot tell apart.
            Dpps | Dppd | Vdpps | Vdppd => 0x3f,
            // With a store that faults it has reported its exceptions on Intel's processors.
            Vcvtps2ph if is_intel() && self.instruction.op0_kind() == OpKind::Memory => {
                let trap = matches!(self.host.end, End::Exception { vector: 19, .. });
                if trap || is_memory_fault(self.host.end) { 0x3f } else { 0 }
            }
            _ => 0,
        }
    }

    /// Flags that the manuals leave open, in a way that the interpreter does not follow.
    pub(crate) fn flags(&self) -> u64 {
        use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw, Scasb, Scasd, Scasq, Scasw};
        let Self { case, host, instruction } = self;
        // A repeated comparison that faults leaves the flags from before it, as SDM 2B (REP) says, or those of the last
        // comparison, as AMD's processors mostly have it.
        let compares =
            matches!(instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq);
        let repeated = self.is_repeated();
        // Between two iterations Intel's processors trap with RF set and the flags of a comparison not yet given.
        let stepped = repeated && is_intel() && matches!(host.end, End::Exception { vector: 1, .. });
        let resume = if stepped && instruction.is_string_instruction() { RESUME } else { 0 };
        let fault = matches!(host.end, End::Exception { vector: 12..=17, .. });
        if compares && repeated && (fault || stepped) && (host.rflags ^ case.rflags) & STATUS == 0 {
            return STATUS | resume;
        }
        // A gather or scatter that faults after some of its elements, with a trap pending: some processors push RF clear.
        if instruction.is_vsib() { RESUME } else { resume }
    }
}

/// Whether an exception comes from an access to memory.
fn is_of_memory(vector: u8) -> bool {
    matches!(vector, 12..=14 | 17)
}

fn is_memory_fault(end: End) -> bool {
    matches!(end, End::Exception { vector, .. } if is_of_memory(vector))
}

/// The order in which Intel's processors look for faults, where it is not AMD's, which the interpreter follows.
fn intel_order(
    instruction: &Instruction,
    rflags: u64,
    (host, at): (u8, u64),
    (ours, address): (u8, u64),
) -> bool {
    // The alignment is checked before or after the segment and the page.
    let aligned = rflags & ALIGNMENT != 0 && (host == 17 || ours == 17);
    // With a mask the limit is checked for all of the operand before the page of the first element, or element by element.
    let mnemonic = instruction.mnemonic();
    let masked = is_masked(instruction);
    // The upper half of a store by bytes may be looked at first.
    let by_bytes = matches!(mnemonic, Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
        && (host != 14 || ours != 14 || at.wrapping_sub(address).wrapping_add(16) < 32);
    // The first bound may be found to be exceeded before the second is read.
    let bound = mnemonic == Mnemonic::Bound && host == 5;
    // The image of FXSAVE and FXRSTOR may be found misaligned before it is found beyond the segment.
    let image =
        matches!(mnemonic, Mnemonic::Fxsave | Mnemonic::Fxrstor | Mnemonic::Fxsave64 | Mnemonic::Fxrstor64)
            && matches!((host, ours), (12, 13) | (13, 12));
    // The conversion is done before the address of its result is looked at.
    let converted = mnemonic == Mnemonic::Vcvtps2ph && host == 19;
    is_of_memory(ours)
        && (bound || image || converted || is_of_memory(host) && (aligned || masked || by_bytes))
}

/// Whether only elements that a mask selects, or as many, are accessed.
fn is_masked(instruction: &Instruction) -> bool {
    use Mnemonic::{Vmaskmovpd, Vmaskmovps, Vpmaskmovd, Vpmaskmovq};
    let mnemonic = instruction.mnemonic();
    instruction.has_op_mask()
        || matches!(mnemonic, Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
        || format!("{mnemonic:?}").contains("ompress")
}

fn is_intel() -> bool {
    static INTEL: LazyLock<bool> =
        LazyLock::new(|| std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"ntel"));
    *INTEL
}

/// Whether the instruction would be invalid without the segment prefixes that make it so long.
fn is_invalid_without_prefixes(case: &Case) -> bool {
    let code = case.code();
    let start = code.iter().position(|&byte| byte != 0x2e).unwrap_or(0);
    let mut decoder = Decoder::new(case.mode().bits(), &code[start..], DecoderOptions::NONE);
    code.len() >= 15 && decoder.decode().is_invalid()
}

/// Whether a memory operand in FS or GS has an offset that is not canonical.
fn wild_offset(case: &Case, instruction: &Instruction) -> bool {
    let value = |register: Register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let full = register.full_register();
        let index = (full as usize).checked_sub(Register::RAX as usize)?;
        let value = *case.gpr.get(index)?;
        Some(if register.size() == 4 { value & 0xffff_ffff } else { value })
    };
    use Mnemonic::{Bt, Btc, Btr, Bts};
    // The bit number moves the address, too.
    let bit_string = matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc);
    matches!(instruction.memory_segment(), Register::FS | Register::GS)
        && (0..instruction.op_count()).any(|i| {
            let offset = instruction.virtual_address(i, 0, value);
            offset.is_some_and(|offset| bit_string || !ringfence_x86::paging::is_canonical(offset))
        })
}
