//! What one vCPU needs to execute vector instructions: its registers, and its prepared instructions.

use iced_x86::{CpuidFeature, Instruction, OpKind, Register, RoundingControl};
use ringfence_engine::CpuState;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::{Cr0, Cr4, Xcr0};

use super::arena::{Arena, ArenaError};
use super::call;
use super::features::FeatureSet;
use super::form::{Enabled, Form, Location, Outcome, Preparer, Refusal};
use super::state::{Slots, VectorUnit};
use super::xsave::XsaveLayout;
use crate::hash::QuickMap;

/// Bytes of code memory of a vCPU: room for every form with common immediates. Only what is used is committed.
const CODE_MEMORY: usize = 4 << 20;

/// Most prepared instructions kept. Ordinary software needs a few thousand; what comes after is prepared anew each time
/// it runs, so that a guest that runs through all immediate operands uses up time and not memory.
const MAX_FORMS: usize = 32 * 1024;

/// What tells prepared instructions apart: everything but which registers they name and where their memory operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    code: u16,
    /// Of each operand: nothing, a kind of register, or the very register for those of x87 and MMX.
    operands: [Register; 4],
    marks: u8,
    rounding: RoundingControl,
    immediates: [u8; 2],
}

impl Key {
    fn new(instruction: &Instruction, bytes: &[u8]) -> Self {
        let operand = |operand| {
            if operand >= instruction.op_count() || instruction.op_kind(operand) != OpKind::Register {
                return Register::None;
            }
            let register = instruction.op_register(operand);
            match register {
                r if r.is_xmm() => Register::XMM0,
                r if r.is_ymm() => Register::YMM0,
                r if r.is_zmm() => Register::ZMM0,
                r if r.is_k() => Register::K0,
                r if r.is_gpr64() => Register::RAX,
                r if r.is_gpr() => Register::EAX,
                other => other,
            }
        };
        let immediate = |kind, value| {
            if (0..instruction.op_count()).any(|o| instruction.op_kind(o) == kind) { value } else { 0 }
        };
        let marks = u8::from(instruction.zeroing_masking())
            | u8::from(instruction.is_broadcast()) << 1
            | u8::from(instruction.suppress_all_exceptions()) << 2
            | u8::from(instruction.op_mask() != Register::None) << 3
            | u8::from(instruction.has_lock_prefix()) << 4
            | u8::from(super::form::wants_64bit_mode(instruction, bytes)) << 5;
        Self {
            code: instruction.code() as u16,
            operands: std::array::from_fn(|i| operand(i as u32)),
            marks,
            rounding: instruction.rounding_control(),
            immediates: [
                immediate(OpKind::Immediate8, instruction.immediate8()),
                immediate(OpKind::Immediate8_2nd, instruction.immediate8_2nd()),
            ],
        }
    }
}

/// Vector state of a vCPU and the instructions prepared for it.
#[derive(Debug)]
pub struct Vector {
    /// The registers.
    pub unit: VectorUnit,
    preparer: Preparer,
    forms: Vec<Form>,
    index: QuickMap<Key, u32>,
    enabled: Enabled,
    control: (Cr0, Cr4, bool),
    xcr0: u64,
    layout: XsaveLayout,
    /// XGETBV takes ECX = 1.
    shows_in_use: bool,
}

impl Vector {
    /// For a CPU that announces what `cpuid` says.
    ///
    /// # Errors
    /// When the host refuses memory for code.
    pub fn new(cpuid: &CpuidTable) -> Result<Self, ArenaError> {
        let ask = |leaf, subleaf| cpuid.get(leaf, subleaf);
        let features = FeatureSet::from_cpuid(ask);
        let misaligned_sse =
            cpuid.get(0x8000_0001, 0).ecx >> 7 & 1 != 0 && call::host_cpuid(0x8000_0001, 0).ecx >> 7 & 1 != 0;
        Ok(Self {
            unit: VectorUnit::new(misaligned_sse),
            preparer: Preparer::new(Arena::new(CODE_MEMORY)?, features),
            forms: Vec::new(),
            index: QuickMap::default(),
            enabled: Enabled::new(Cr0::empty().bits(), 0, 1, false),
            control: (Cr0::empty(), Cr4::empty(), false),
            xcr0: Xcr0::X87.bits(),
            layout: XsaveLayout::from_cpuid(ask),
            shows_in_use: cpuid.get(0xd, 1).eax >> 2 & 1 != 0,
        })
    }

    /// Follows CR0, CR4 and RFLAGS.VM.
    pub fn set_control(&mut self, cr0: Cr0, cr4: Cr4, virtual_8086: bool) {
        if self.control != (cr0, cr4, virtual_8086) {
            self.control = (cr0, cr4, virtual_8086);
            self.update();
        }
    }

    fn update(&mut self) {
        let (cr0, cr4, virtual_8086) = self.control;
        self.enabled = Enabled::new(cr0.bits(), cr4.bits(), self.xcr0, virtual_8086);
    }

    /// What the control registers allow.
    #[inline]
    pub fn enabled(&self) -> &Enabled {
        &self.enabled
    }

    /// XCR0.
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Loads XCR0; `false`, and nothing happens, for a value that XSETBV refuses.
    #[must_use]
    pub fn set_xcr0(&mut self, value: u64) -> bool {
        let accepted = self.layout.accepts(value);
        if accepted {
            self.xcr0 = value;
            self.update();
        }
        accepted
    }

    /// The layout of XSAVE images, for CPUID leaf 0xD.
    pub fn xsave_layout(&self) -> &XsaveLayout {
        &self.layout
    }

    /// Whether XGETBV shows the components in use.
    pub(super) fn shows_in_use(&self) -> bool {
        self.shows_in_use
    }

    /// Whether an extension is offered.
    pub(super) fn offers(&self, feature: CpuidFeature) -> bool {
        self.preparer.features().contains(feature)
    }

    /// Takes over vector and x87 registers, MXCSR and XCR0.
    ///
    /// # Errors
    /// A sentence saying what no CPU of this model can be in.
    pub fn load(&mut self, state: &CpuState) -> Result<(), String> {
        if state.xcr0 == Xcr0::X87.bits() {
            // The value after power-on, which is all that a CPU without XSAVE can have.
            self.xcr0 = state.xcr0;
            self.update();
        } else if !self.set_xcr0(state.xcr0) {
            return Err(format!("XCR0 {:#x} is not possible on this CPU model", state.xcr0));
        }
        self.unit.set_vector_state(&state.vector);
        self.unit.set_x87(&state.x87);
        Ok(())
    }

    /// Fills in vector and x87 registers, MXCSR and XCR0. The unit is parked.
    pub fn save(&self, state: &mut CpuState) {
        state.xcr0 = self.xcr0;
        state.vector = self.unit.vector_state();
        state.x87 = self.unit.x87();
    }

    /// After power-on. INIT leaves all of this alone (SDM 3A table 9-1).
    pub fn reset(&mut self) {
        let state = CpuState::default();
        self.unit.set_vector_state(&state.vector);
        self.unit.set_x87(&state.x87);
        self.xcr0 = state.xcr0;
        self.update();
    }

    /// Prepares an instruction, or finds it prepared: its index among the forms.
    pub(super) fn prepare(&mut self, instruction: &Instruction, bytes: &[u8]) -> Result<Found, Refusal> {
        let key = Key::new(instruction, bytes);
        if let Some(&index) = self.index.get(&key) {
            return Ok(Found::Kept(index));
        }
        let form = self.preparer.prepare(instruction, bytes)?;
        if self.forms.len() >= MAX_FORMS {
            return Ok(Found::NoRoom(Box::new(form)));
        }
        let index = self.forms.len() as u32;
        self.forms.push(form);
        self.index.insert(key, index);
        Ok(Found::Kept(index))
    }

    /// No further form is kept.
    #[cfg(test)]
    pub(super) fn is_full(&self) -> bool {
        self.forms.len() >= MAX_FORMS
    }

    /// A prepared instruction. Its index stays valid for ever.
    #[inline(always)]
    pub(super) fn form(&self, index: u32) -> &Form {
        &self.forms[index as usize]
    }

    /// Runs a prepared instruction on the unit.
    #[inline(always)]
    pub(super) fn run(&mut self, index: u32, slots: Slots, location: Location) -> Outcome {
        self.unit.run(&self.forms[index as usize], slots, location)
    }
}

/// A prepared instruction.
pub(super) enum Found {
    /// One that is kept, by index.
    Kept(u32),
    /// One for which there is no room.
    NoRoom(Box<Form>),
}
