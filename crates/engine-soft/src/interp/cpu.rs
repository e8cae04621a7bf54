//! The state of one vCPU as the interpreter keeps it.

use std::sync::Arc;

use ringfence_engine::{Activity, Bus, EngineError, VirtualClock};
use ringfence_irqchip::LocalApic;
use ringfence_memory::{GuestMemory, Scalar};
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::segment::{DescriptorTable, Segment, attribute};
use ringfence_x86::{Cr0, Cr4, Efer, Rflags, SegmentRegister};

use super::features::Features;
use super::handlers::Handlers;
use super::msrs::Msrs;
use super::op::RIP;
use super::patterns::Patterns;
use super::system::System;
use super::system::apic_hooks::ApicTap;
use super::window::Window;
use crate::code::{CodeMap, StaleCode};
use crate::mmu::tlb::{Class, Tlb};
use crate::mmu::track::Tracker;
use crate::mmu::walk::{Context, Rights};
use crate::status::Status;
use crate::vector::Vector;

/// What the vCPU's code segment makes of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit operands and addresses by default.
    Bits16 = 0,
    /// 32-bit.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        16 << self as u32
    }
}

/// One vCPU. Fields are public to the instruction families; what depends on what is said at each.
///
/// Translated code points at `regs` and reaches what it needs most at short distances: the fields before and behind stay
/// where they are.
#[repr(C)]
pub struct Cpu {
    /// What translated code keeps here.
    pub(crate) translated: crate::jit::State,
    /// What to add to an offset: the segment's base, or zero where 64-bit mode ignores it.
    pub(crate) bases: [u64; 6],
    /// The arithmetic flags.
    pub status: Status,
    /// General-purpose registers, then [`RIP`], then a register that stays zero.
    pub regs: [u64; 18],
    /// RFLAGS without the arithmetic flags. Read the whole by [`Cpu::rflags`].
    pub flags: Rflags,
    /// ES, CS, SS, DS, FS, GS. After a change of CS or SS call [`Cpu::update_mode`], after any change
    /// [`Cpu::update_segment`].
    pub segments: [Segment; 6],
    /// Whether each segment spans all 4 GiB from 0: bit 0 readable, bit 1 writable.
    pub(crate) flat: [u8; 6],
    /// Likewise, wherever it starts. Of CS and SS, it is of no use to anybody.
    pub(crate) spans: [u8; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0. After a change call [`Cpu::update_mode`] and flush the TLB.
    pub cr0: Cr0,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4. After a change call [`Cpu::update_mode`] and flush the TLB.
    pub cr4: Cr4,
    /// EFER. After a change call [`Cpu::update_mode`] and flush the TLB.
    pub efer: Efer,
    /// PAE page-directory pointers as loaded with CR3.
    pub pdpte: [u64; 4],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// The model-specific registers that are mere storage, by number.
    pub msrs: Msrs,
    /// Current privilege level.
    pub cpl: u8,
    /// What code bytes mean; kept by [`Cpu::update_mode`].
    pub code_size: CodeSize,
    /// What the stack pointer is masked with; kept by [`Cpu::update_mode`].
    pub stack_mask: u64,
    /// Whose tables explicit data accesses use; kept by [`Cpu::update_mode`].
    pub class: Class,
    /// Soft TLB.
    pub tlb: Tlb,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Devices.
    pub bus: Arc<dyn Bus>,
    /// Time.
    pub clock: Arc<VirtualClock>,
    /// Which pages hold decoded code.
    pub code: Arc<CodeMap>,
    /// Code of ours that has become stale.
    pub stale: Arc<StaleCode>,
    /// Linear address of the page fault being raised; CR2 takes it on delivery.
    pub fault_address: u64,
    /// Leave the block after this instruction.
    pub leave_block: bool,
    /// Interrupts are held off until after the next instruction (STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// NMIs are held off until IRET.
    pub nmi_masked: bool,
    /// Executing, halted, waiting.
    pub activity: Activity,
    /// Instructions retired.
    pub retired: u64,
    /// Nanoseconds of counted time that passed without instructions: halted periods.
    pub(super) idle: u64,
    /// Bits in a physical address.
    pub physical_bits: u32,
    /// Vector and x87 registers, and XCR0.
    pub vector: Vector,
    /// What CPUID says, apart from what depends on the vCPU's state.
    pub cpuid: Arc<CpuidTable>,
    /// What the CPU model offers.
    pub features: Arc<Features>,
    /// Handlers of forms that have been decoded.
    pub(super) handlers: Handlers,
    /// Operations by pattern.
    pub(super) patterns: Patterns,
    /// Bytes of the code that is being decoded.
    pub(super) window: Option<Box<Window>>,
    /// The local APIC.
    pub apic: Option<LocalApic>,
    /// Who listens to what goes on between vCPU and local APIC, or stands in for it.
    pub(crate) apic_tap: Option<Arc<dyn ApicTap>>,
    /// Notes which pages are written to, if a tool wants to know.
    pub(crate) tracker: Option<Box<Tracker>>,
    /// What system instructions keep.
    pub(crate) system: System,
    /// Data breakpoints that the instruction under way has hit, as DR6 bits 0 to 3.
    pub breakpoints_hit: u64,
    /// What translated gathers and scatters keep here.
    pub(crate) lanes: crate::jit::Lanes,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("rip", &format_args!("{:#x}", self.regs[RIP]))
            .field("cpl", &self.cpl)
            .field("code_size", &self.code_size)
            .finish_non_exhaustive()
    }
}

/// What a vCPU is connected to.
#[derive(Clone)]
pub struct Connections {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Devices.
    pub bus: Arc<dyn Bus>,
    /// Time.
    pub clock: Arc<VirtualClock>,
    /// Which pages hold decoded code.
    pub code: Arc<CodeMap>,
    /// What CPUID says.
    pub cpuid: Arc<CpuidTable>,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connections").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Cpu {
    /// A vCPU in the state after power-on.
    ///
    /// # Errors
    /// [`EngineError::Host`] where no memory for thunks can be had.
    pub fn new(connections: Connections) -> Result<Self, EngineError> {
        let Connections { memory, bus, clock, code, cpuid } = connections;
        let vector = Vector::new(&cpuid).map_err(|error| EngineError::Host {
            what: "memory for generated code",
            source: std::io::Error::other(error),
        })?;
        let features = Arc::new(Features::new(&cpuid));
        let stale = code.register();
        let state = ringfence_engine::CpuState::default();
        let mut cpu = Self {
            regs: [0; 18],
            status: Status::default(),
            flags: Rflags::FIXED,
            segments: state.segments,
            bases: [0; 6],
            flat: [0; 6],
            spans: [0; 6],
            ldtr: state.ldtr,
            tr: state.tr,
            gdtr: state.gdtr,
            idtr: state.idtr,
            cr0: Cr0::from_bits_retain(state.cr0),
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            efer: Efer::empty(),
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: state.dr6,
            dr7: state.dr7,
            msrs: Msrs::default(),
            cpl: 0,
            code_size: CodeSize::Bits16,
            stack_mask: 0xffff,
            class: Class::KernelAc,
            tlb: Tlb::new(),
            memory,
            bus,
            clock,
            code,
            stale,
            fault_address: 0,
            leave_block: false,
            interrupt_shadow: false,
            nmi_masked: false,
            activity: Activity::Active,
            retired: 0,
            idle: 0,
            physical_bits: features.physical_bits(),
            vector,
            cpuid,
            features,
            handlers: Handlers::default(),
            patterns: Patterns::default(),
            window: None,
            apic: None,
            apic_tap: None,
            tracker: None,
            system: System::default(),
            breakpoints_hit: 0,
            lanes: crate::jit::Lanes::new(),
            translated: crate::jit::State::new(),
        };
        cpu.regs[RIP] = state.rip;
        cpu.update_mode();
        Ok(cpu)
    }

    /// RFLAGS as software sees it.
    pub fn rflags(&self) -> u64 {
        (self.flags.bits() & !Rflags::STATUS.bits()) | self.status.to_rflags() | Rflags::FIXED.bits()
    }

    /// Sets every flag. The caller has masked what may not change.
    pub fn set_rflags(&mut self, value: u64) {
        self.status = Status::from_rflags(value);
        self.flags = Rflags::from_bits_truncate(value & !Rflags::STATUS.bits()) | Rflags::FIXED;
        self.update_class();
    }

    /// Long mode is active.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// 64-bit code is running (not compatibility mode).
    #[inline(always)]
    pub fn is_64bit(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }

    /// Real mode or virtual-8086 mode: selectors are paragraph numbers.
    pub fn real_or_virtual(&self) -> bool {
        !self.cr0.contains(Cr0::PE) || self.flags.contains(Rflags::VM)
    }

    /// Protected mode (any kind but virtual-8086).
    pub fn protected(&self) -> bool {
        !self.real_or_virtual()
    }

    /// A segment register.
    pub fn segment(&self, register: SegmentRegister) -> &Segment {
        &self.segments[register as usize]
    }

    /// Recomputes everything that follows from CR0, CR4, EFER, CS, SS, CPL and the flags.
    pub fn update_mode(&mut self) {
        let cs = self.segment(SegmentRegister::Cs);
        self.code_size = if self.long_mode() && cs.has(attribute::LONG) {
            CodeSize::Bits64
        } else if cs.has(attribute::DB) {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.stack_mask = if self.is_64bit() {
            u64::MAX
        } else if self.segment(SegmentRegister::Ss).has(attribute::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        for register in SegmentRegister::ALL {
            self.update_segment(register);
        }
        self.update_class();
        self.vector.set_control(self.cr0, self.cr4, self.flags.contains(Rflags::VM));
        self.leave_block = true;
    }

    /// As [`Cpu::update_mode`] where 64-bit code has given way to 64-bit code by other CS, SS and CPL, and nothing else has changed: modes, the
    /// bases of other segments and what the vector unit may do are the same.
    pub fn update_privilege(&mut self) {
        self.update_segment(SegmentRegister::Cs);
        self.update_segment(SegmentRegister::Ss);
        self.update_class();
        self.leave_block = true;
    }

    /// Recomputes what follows from one segment register.
    pub fn update_segment(&mut self, register: SegmentRegister) {
        let segment = self.segments[register as usize];
        let ignored = self.is_64bit() && !matches!(register, SegmentRegister::Fs | SegmentRegister::Gs);
        self.bases[register as usize] = if ignored { 0 } else { segment.base };
        let whole = segment.limit == u32::MAX && segment.has(attribute::PRESENT) && !segment.is_expand_down();
        let spans =
            if whole { u8::from(segment.is_readable()) | u8::from(segment.is_writable()) << 1 } else { 0 };
        self.spans[register as usize] = spans;
        self.flat[register as usize] = if segment.base == 0 { spans } else { 0 };
    }

    /// Recomputes whose soft-TLB tables data accesses use: follows CPL, AC, SMAP, AM and DR7.
    pub fn update_class(&mut self) {
        let alignment = self.alignment_checked();
        self.class = if alignment || self.data_breakpoints_armed() {
            Class::Slow
        } else {
            Self::class_of(self.explicit_rights(), self.cpl)
        };
        self.select_tables();
    }

    fn class_of(rights: Rights, cpl: u8) -> Class {
        match (cpl == 3, rights.smap_open) {
            (true, _) => Class::User,
            (false, false) => Class::Kernel,
            (false, true) => Class::KernelAc,
        }
    }

    /// Alignment checking is on: CPL 3, CR0.AM and EFLAGS.AC (SDM 3A 6.15, interrupt 17).
    pub fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.cr0.contains(Cr0::AM) && self.flags.contains(Rflags::AC)
    }

    /// DR7 enables a breakpoint on data or I/O.
    pub fn data_breakpoints_armed(&self) -> bool {
        (0..4).any(|i| self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 != 0)
    }

    /// Rights of an access that an instruction makes on its own behalf.
    pub fn explicit_rights(&self) -> Rights {
        Rights {
            user: self.cpl == 3,
            smap_open: !self.cr4.contains(Cr4::SMAP) || self.flags.contains(Rflags::AC),
        }
    }

    /// Rights of an access that the processor makes to descriptor tables and task-state segments
    /// (SDM 3A 4.6.1: supervisor-mode whatever the CPL; AC does not open user pages).
    pub fn implicit_rights(&self) -> Rights {
        Rights { user: false, smap_open: !self.cr4.contains(Cr4::SMAP) }
    }

    /// Whose tables such an access uses.
    pub(crate) fn implicit_class(&self) -> Class {
        Self::class_of(self.implicit_rights(), 0)
    }

    /// What page walks depend on.
    pub fn walk_context(&self) -> Context {
        Context {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            pdpte: self.pdpte,
            physical_bits: self.physical_bits,
        }
    }

    /// Sets CPL and what follows from it.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.update_class();
    }

    /// Reads a general-purpose register; byte registers 16 to 19 are AH, CH, DH, BH.
    #[inline(always)]
    pub fn reg<T: Scalar>(&self, index: u8) -> T {
        if T::SIZE == 1 && index >= 16 {
            return T::truncate(self.regs[usize::from(index - 16) & 3] >> 8);
        }
        T::truncate(self.regs[usize::from(index)])
    }

    /// Writes a general-purpose register: 32-bit writes clear the upper half, smaller ones keep the rest.
    #[inline(always)]
    pub fn set_reg<T: Scalar>(&mut self, index: u8, value: T) {
        let value = value.widen();
        if T::SIZE == 1 && index >= 16 {
            let register = &mut self.regs[usize::from(index - 16) & 3];
            *register = *register & !0xff00 | value << 8;
            return;
        }
        let register = &mut self.regs[usize::from(index)];
        *register = match T::SIZE {
            1 => *register & !0xff | value,
            2 => *register & !0xffff | value,
            _ => value,
        };
    }

    /// The offset of the next instruction in CS.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[RIP]
    }
}
