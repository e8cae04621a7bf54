//! A guest instruction prepared for execution.

use std::sync::Arc;

use iced_x86::{CodeSize, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind};

use super::arena::{Arena, Thunk};
use super::call;
use super::direct::{self, Direct};
use super::elements::{self, Elements};
use super::encode::{self, Host, Width, X87Use, result};
use super::features::FeatureSet;
use super::floating::uses_mxcsr;
use super::state::{Slots, VectorUnit, mxcsr};
use super::table::{self, Special, X87Kind};
use crate::landing;

/// What must be enabled for an instruction (SDM 2A 2.4 to 2.8: the #UD and #NM rows of the exception classes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// x87, FXSAVE, FXRSTOR: #NM if CR0.EM or CR0.TS.
    X87,
    /// WAIT: #NM if CR0.MP and CR0.TS.
    Wait,
    /// MMX: #UD if CR0.EM; #NM if CR0.TS.
    Mmx,
    /// Legacy SSE: #UD if CR0.EM or not CR4.OSFXSR; #NM if CR0.TS.
    Sse,
    /// VEX: #UD if not in protected mode, not CR4.OSXSAVE or not XCR0.SSE and XCR0.AVX; #NM if CR0.TS.
    Avx,
    /// EVEX and opmask instructions: as `Avx`, and #UD if the AVX-512 bits of XCR0 are not set.
    Avx512,
    /// XSAVE and its kin: #UD if not CR4.OSXSAVE; #NM if CR0.TS.
    Xsave,
    /// XGETBV, XSETBV: #UD if not CR4.OSXSAVE.
    Xcr,
}

/// What a CPU's control registers allow, kept up to date by the interpreter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enabled {
    faults: [Option<Denial>; 8],
}

/// The fault of an instruction that is not enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// #UD.
    Undefined,
    /// #NM.
    NotAvailable,
}

impl Enabled {
    /// From CR0, CR4 and XCR0. `virtual_8086`: RFLAGS.VM is set.
    pub fn new(cr0: u64, cr4: u64, xcr0: u64, virtual_8086: bool) -> Self {
        use ringfence_x86::{Cr0, Cr4, Xcr0};
        let cr0 = Cr0::from_bits_retain(cr0);
        let cr4 = Cr4::from_bits_retain(cr4);
        let xcr0 = Xcr0::from_bits_retain(xcr0);
        let switched = cr0.contains(Cr0::TS);
        let emulated = cr0.contains(Cr0::EM);
        let deny = |undefined: bool, not_available: bool| match (undefined, not_available) {
            (true, _) => Some(Denial::Undefined),
            (false, true) => Some(Denial::NotAvailable),
            _ => None,
        };
        let extended = cr4.contains(Cr4::OSXSAVE);
        let vex =
            extended && cr0.contains(Cr0::PE) && !virtual_8086 && xcr0.contains(Xcr0::SSE.union(Xcr0::AVX));
        let mut faults = [None; 8];
        faults[Requirement::X87 as usize] = deny(false, emulated || switched);
        faults[Requirement::Wait as usize] = deny(false, switched && cr0.contains(Cr0::MP));
        faults[Requirement::Mmx as usize] = deny(emulated, switched);
        faults[Requirement::Sse as usize] = deny(emulated || !cr4.contains(Cr4::OSFXSR), switched);
        faults[Requirement::Avx as usize] = deny(!vex, switched);
        faults[Requirement::Avx512 as usize] = deny(!vex || !xcr0.contains(Xcr0::AVX512), switched);
        faults[Requirement::Xsave as usize] = deny(!extended, switched);
        faults[Requirement::Xcr as usize] = deny(!extended, false);
        Self { faults }
    }

    /// The fault that an instruction with this requirement meets, if any.
    #[inline]
    pub fn fault(&self, requirement: Requirement) -> Option<Denial> {
        self.faults[requirement as usize]
    }
}

/// The memory operand of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Which operand it is.
    pub operand: u8,
    /// Bytes.
    pub size: u16,
    /// Whether it is read before the instruction runs.
    pub read: bool,
    /// Whether it is written afterwards.
    pub write: bool,
    /// Address must be a multiple of this (1: any), else #GP.
    pub alignment: u8,
    /// The alignment rule is waived by MXCSR.MM.
    pub waivable: bool,
    /// With alignment checking on, the address must be a multiple of this, else #AC.
    pub checked_alignment: u8,
    /// So many bytes are looked at before the rest; 0: all at once.
    pub first_part: u8,
    /// A masked store that wants all of the operand writable.
    pub probes_whole: bool,
    /// Which parts are accessed.
    pub elements: Elements,
}

/// Why there is no form for an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not an instruction of this module.
    Foreign,
    /// #UD: the CPU does not offer it, or nobody put it in the table.
    Undefined,
}

/// How a form is executed.
#[derive(Clone, Debug)]
pub enum Execution {
    /// On the register file, in Rust.
    Direct(Direct),
    /// On the host CPU.
    Thunk(Thunk),
    /// By rules of its own; the caller must know them. The thunk, where there is one, is the instruction without
    /// what makes it special.
    Special(Special),
}

/// A prepared instruction, whatever its vector, opmask and general registers and wherever its memory operand are.
#[derive(Clone, Debug)]
pub struct Form {
    /// How it runs.
    pub execution: Execution,
    /// What must be enabled.
    pub requirement: Requirement,
    /// The memory operand that is read before and written after, if there is one.
    pub memory: Option<Memory>,
    /// General-purpose operands: to be copied to the unit before execution.
    pub general: u8,
    /// Which of them, bit by bit, to be copied back.
    pub general_stored: u8,
    /// Status flags go in and come out.
    pub status: bool,
    /// Obeys MXCSR.
    mxcsr: bool,
    /// Uses MMX or x87 registers.
    x87: Option<X87Kind>,
}

impl Form {
    /// An instruction of the x87 unit or of MMX.
    pub(super) fn is_x87(&self) -> bool {
        self.x87.is_some()
    }

    /// Checks for a pending x87 exception before anything else.
    pub(super) fn waits(&self) -> bool {
        self.x87.is_some_and(|kind| kind != X87Kind::Control)
    }

    /// Changes more than memory, so a store must be known to succeed before it runs.
    pub(super) fn commits_before_store(&self) -> bool {
        self.mxcsr || self.x87.is_some()
    }
}

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done: store the memory operand and the general registers.
    Done,
    /// Done, but the memory operand is not to be written (an x87 store that met an unmasked exception).
    DoneWithoutStore,
    /// A SIMD exception is due (#XM, or #UD without CR4.OSXMMEXCPT); nothing was written but MXCSR's flags.
    SimdException,
    /// An x87 exception was pending: #MF (or the external error signal without CR0.NE); nothing was done.
    X87Pending,
}

/// Prepares instructions for one CPU.
#[derive(Clone, Debug)]
pub struct Preparer {
    arena: Arc<Arena>,
    features: FeatureSet,
    host: Host,
}

impl Preparer {
    /// For a CPU that offers `features`, as far as the host has them.
    pub fn new(arena: Arc<Arena>, features: FeatureSet) -> Self {
        let host_features = FeatureSet::host();
        let width = if host_features.contains(iced_x86::CpuidFeature::AVX512F) {
            Width::Zmm
        } else if host_features.contains(iced_x86::CpuidFeature::AVX) {
            Width::Ymm
        } else {
            Width::Xmm
        };
        let wide_masks = host_features.contains(iced_x86::CpuidFeature::AVX512BW);
        Self { arena, features: features.intersection(host_features), host: Host { width, wide_masks } }
    }

    /// The features that can be executed.
    pub fn features(&self) -> FeatureSet {
        self.features
    }

    /// Bytes of code memory taken and in all.
    pub fn arena_usage(&self) -> (usize, usize) {
        self.arena.usage()
    }

    /// Prepares an instruction that was decoded from `bytes`.
    ///
    /// # Errors
    /// [`Refusal::Foreign`] for an instruction that is none of this module's business, [`Refusal::Undefined`]
    /// where it raises #UD.
    pub fn prepare(&self, instruction: &Instruction, bytes: &[u8]) -> Result<Form, Refusal> {
        if !table::concerns(instruction) {
            return Err(Refusal::Foreign);
        }
        let mnemonic = instruction.mnemonic();
        let wait = mnemonic == Mnemonic::Wait;
        if instruction.has_lock_prefix()
            || wants_64bit_mode(instruction, bytes)
            || !(wait || self.features.contains_all(instruction.code().cpuid_features()))
        {
            return Err(Refusal::Undefined);
        }
        let special = table::special(instruction);
        let x87 = is_x87(instruction);
        let mmx = names_mmx(instruction) || mnemonic == Mnemonic::Emms;
        let mut form = Form {
            execution: Execution::Special(special.unwrap_or(Special::Wait)),
            requirement: requirement(instruction, special, x87, mmx),
            memory: memory(instruction, special),
            general: 0,
            general_stored: 0,
            status: false,
            mxcsr: uses_mxcsr(mnemonic),
            x87: match (x87, mmx) {
                (true, _) => Some(table::x87_kind(mnemonic)),
                (false, true) => Some(X87Kind::WaitingControl),
                _ => None,
            },
        };
        if special.is_some() {
            return Ok(form);
        }
        if !x87
            && !mmx
            && let Some(direct) = direct::direct(instruction)
        {
            form.execution = Execution::Direct(direct);
            return Ok(form);
        }
        let stores = form.memory.is_some_and(|memory| memory.write);
        let uses = X87Use {
            check_before: form.x87.is_some_and(|kind| kind != X87Kind::Control),
            report_after: x87
                && form.x87 == Some(X87Kind::Operation)
                && (stores || !VectorUnit::tracks_all()),
        };
        let encoded =
            encode::thunk(instruction, self.host, form.mxcsr, uses).map_err(|_| Refusal::Undefined)?;
        form.execution = Execution::Thunk(self.arena.thunk(&encoded.code));
        form.status = encoded.status;
        (form.general, form.general_stored) = encoded.general;
        Ok(form)
    }
}

/// Where an x87 operation stands, for its pointers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// Code segment selector.
    pub cs: u16,
    /// Instruction pointer.
    pub ip: u64,
    /// Opcode, as FOP has it.
    pub opcode: u16,
    /// Selector and offset of the memory operand.
    pub data: Option<(u16, u64)>,
}

impl VectorUnit {
    fn tracks_all() -> bool {
        let quirks = super::state::Quirks::host();
        quirks.tracks_opcode && quirks.tracks_data
    }

    /// Which bytes of a memory operand an instruction is about to access: bit `i` for byte `i`.
    #[inline]
    pub fn touched(&self, memory: &Memory, slots: Slots) -> u64 {
        memory.elements.bytes(&self.registers, slots, memory.size)
    }

    /// Runs a form that has a thunk on the unit, with the registers in `slots`. The memory operand, if read, is in
    /// [`VectorUnit::bounce_mut`]; general operands and status flags have been copied in. `location` is of interest to
    /// x87 operations only. Any other form does nothing here.
    #[inline]
    pub fn run(&mut self, form: &Form, slots: Slots, location: Location) -> Outcome {
        match &form.execution {
            Execution::Thunk(thunk) if !form.mxcsr && form.x87.is_none() => {
                call::call(thunk, &mut self.registers, &slots);
                Outcome::Done
            }
            Execution::Thunk(thunk) => self.run_checked(form, thunk, slots, location),
            Execution::Direct(_) | Execution::Special(_) => Outcome::Done,
        }
    }

    fn run_checked(&mut self, form: &Form, thunk: &Thunk, slots: Slots, location: Location) -> Outcome {
        if form.x87.is_some() {
            self.ensure_live();
        }
        let status = if form.mxcsr && self.registers.mxcsr_unmasked != 0 {
            landing::with(thunk.landing(), || call::call(thunk, &mut self.registers, &slots))
        } else {
            call::call(thunk, &mut self.registers, &slots)
        };
        if status & result::X87_PENDING != 0 {
            return Outcome::X87Pending;
        }
        if form.mxcsr {
            self.registers.mxcsr |= self.registers.mxcsr_out & mxcsr::FLAGS;
            if status & result::SIMD != 0 {
                return Outcome::SimdException;
            }
        }
        if form.x87 == Some(X87Kind::LoadControl) {
            self.control_loaded(self.registers.bounce[0] as u16);
        }
        if form.x87 == Some(X87Kind::Operation) {
            let raised = status & result::X87_ERROR != 0;
            self.record(raised, location);
            if raised && form.memory.is_some_and(|memory| memory.write) && !self.stores_despite_exception() {
                return Outcome::DoneWithoutStore;
            }
        }
        Outcome::Done
    }

    /// Whether an x87 store whose exception is unmasked wrote memory all the same: only if it was inexactness.
    #[cold]
    fn stores_despite_exception(&mut self) -> bool {
        let image = self.image();
        let raised = image.0[2] & !image.0[0] & 0x3f;
        raised & 0x1f == 0
    }

    /// Records an x87 operation that has raised an exception, which is pending now.
    pub(crate) fn x87_raised(&mut self, at: Location) {
        self.record(true, at);
    }

    /// Records an x87 operation's pointers as the host does.
    #[inline]
    fn record(&mut self, raised: bool, at: Location) {
        let quirks = self.quirks;
        let selector = |selector: u16| if quirks.tracks_selectors { selector } else { 0 };
        self.pointers.fip = at.ip;
        self.pointers.fcs = selector(at.cs);
        if quirks.tracks_opcode || raised {
            self.pointers.fop = at.opcode;
        }
        if let Some((segment, offset)) = at.data
            && (quirks.tracks_data || raised)
        {
            self.pointers.fds = selector(segment);
            self.pointers.fdp = offset;
        }
    }
}

/// VPINSRQ and VPEXTRQ, which the decoder takes for the doubleword form outside 64-bit mode, as Intel's processors do: AMD's
/// do not know them there.
pub(super) fn wants_64bit_mode(instruction: &Instruction, bytes: &[u8]) -> bool {
    use iced_x86::Code::{VEX_Vpextrd_rm32_xmm_imm8, VEX_Vpinsrd_xmm_xmm_rm32_imm8};
    let at = bytes.iter().position(|&byte| byte == 0xc4);
    let wide = at.and_then(|at| bytes.get(at + 2)).is_some_and(|byte| byte & 0x80 != 0);
    let code = instruction.code();
    wide && table::host_is_amd()
        && instruction.code_size() != CodeSize::Code64
        && matches!(code, VEX_Vpextrd_rm32_xmm_imm8 | VEX_Vpinsrd_xmm_xmm_rm32_imm8)
}

/// Whether the instruction is of the x87 unit proper (FXSAVE and MMX are not).
pub(super) fn is_x87(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature;
    instruction.mnemonic() == Mnemonic::Wait
        || instruction
            .code()
            .cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

/// Whether an operand is an MMX register, or could have been one: CVTPI2PS and CVTPI2PD enter MMX mode with a
/// memory operand too.
pub(super) fn names_mmx(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd)
        || (0..instruction.op_count())
            .any(|o| instruction.op_kind(o) == OpKind::Register && instruction.op_register(o).is_mm())
}

fn names_vector(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|o| {
        instruction.op_kind(o) == OpKind::Register && instruction.op_register(o).is_vector_register()
    })
}

fn requirement(instruction: &Instruction, special: Option<Special>, x87: bool, mmx: bool) -> Requirement {
    match special {
        Some(Special::Wait) => return Requirement::Wait,
        Some(Special::Fxsave | Special::Fxrstor) => return Requirement::X87,
        Some(Special::Xgetbv | Special::Xsetbv) => return Requirement::Xcr,
        Some(
            Special::Xsave
            | Special::Xsaveopt
            | Special::Xsavec
            | Special::Xsaves
            | Special::Xrstor
            | Special::Xrstors,
        ) => return Requirement::Xsave,
        _ => {}
    }
    let masks = (0..instruction.op_count())
        .any(|o| instruction.op_kind(o) == OpKind::Register && instruction.op_register(o).is_k());
    match instruction.code().encoding() {
        EncodingKind::EVEX => Requirement::Avx512,
        EncodingKind::VEX if masks => Requirement::Avx512,
        EncodingKind::VEX => Requirement::Avx,
        _ if x87 => Requirement::X87,
        _ if mmx && !names_vector(instruction) => Requirement::Mmx,
        _ => Requirement::Sse,
    }
}

/// The memory operand. Special forms with accesses of their own have none here, but LDMXCSR and STMXCSR do.
fn memory(instruction: &Instruction, special: Option<Special>) -> Option<Memory> {
    if !matches!(special, None | Some(Special::LoadMxcsr | Special::StoreMxcsr)) {
        return None;
    }
    let operand = (0..instruction.op_count()).find(|&o| instruction.op_kind(o) == OpKind::Memory)?;
    let size = instruction.memory_size().size();
    if size == 0 || size > 64 {
        return None;
    }
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let access = factory.info(instruction).op_access(operand);
    let mnemonic = instruction.mnemonic();
    let demands = table::demands_alignment(mnemonic) && size >= 16;
    let elements = elements::elements(instruction, size);
    let probes_whole = elements != Elements::Whole && elements::probes_whole(mnemonic);
    Some(Memory {
        operand: operand as u8,
        size: size as u16,
        read: matches!(
            access,
            OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        ),
        write: matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        ),
        alignment: operand_alignment(instruction, size),
        waivable: !demands,
        checked_alignment: if probes_whole {
            wide_alignment(size)
        } else {
            checked_alignment(mnemonic, size, elements)
        },
        first_part: if size == 10 { 8 } else { 0 },
        probes_whole,
        elements,
    })
}

/// What the address of a memory operand of `size` bytes must be a multiple of, else #GP; 1 for anything.
pub(super) fn operand_alignment(instruction: &Instruction, size: usize) -> u8 {
    let mnemonic = instruction.mnemonic();
    let legacy = instruction.code().encoding() == EncodingKind::Legacy;
    let demands = table::demands_alignment(mnemonic) && size >= 16;
    let aligned = demands || legacy && size == 16 && !table::tolerates_misalignment(mnemonic);
    if aligned { size as u8 } else { 1 }
}

/// The alignment that alignment checking wants of an operand of `size` bytes that is accessed as a whole. The manuals leave
/// it open for 16 bytes and more (SDM 2A, MOVUPS): AMD's processors want 16, Intel's none.
pub(super) fn wide_alignment(size: usize) -> u8 {
    if size <= 8 || table::host_is_amd() { size.min(16) as u8 } else { 1 }
}

/// The alignment that alignment checking wants: the operand's own, or on AMD's processors that of an element where each is
/// accessed by itself. VMASKMOV is not checked.
fn checked_alignment(mnemonic: Mnemonic, size: usize, elements: Elements) -> u8 {
    match elements {
        Elements::Whole if size == 10 => 8,
        _ if !table::host_is_amd() => match mnemonic {
            Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph => 1,
            _ => wide_alignment(size),
        },
        Elements::Masked { mask: elements::Mask::Signs(_), .. } => 1,
        Elements::Masked { size, .. } | Elements::Packed { size, .. } | Elements::Repeated { size, .. } => {
            size
        }
        Elements::Whole => wide_alignment(size),
    }
}

/// The eleven bits that an x87 instruction leaves in FOP: the low bits of its first byte, then the second. Zero if it is
/// of another unit.
pub(super) fn x87_opcode(instruction: &Instruction, bytes: &[u8]) -> u16 {
    if !is_x87(instruction) {
        return 0;
    }
    let prefix = |byte: &u8| {
        matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || instruction.code_size() == CodeSize::Code64 && matches!(byte, 0x40..=0x4f)
    };
    let mut rest = bytes.iter().skip_while(|byte| prefix(byte));
    match (rest.next(), rest.next()) {
        (Some(&first), Some(&second)) => u16::from(first & 7) << 8 | u16::from(second),
        _ => 0,
    }
}
