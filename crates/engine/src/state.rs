//! The architectural state of a CPU, the same for every engine.

use std::collections::BTreeMap;

use ringfence_x86::Rflags;
use ringfence_x86::segment::{DescriptorTable, Segment, Selector, attribute};
use serde::{Deserialize, Serialize};

/// Everything that software on one CPU can observe, apart from the local APIC (a section of its own).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// General-purpose registers, in encoding order.
    pub gpr: [u64; 16],
    /// Address of the next instruction within CS.
    pub rip: u64,
    /// Flags; bit 1 set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, in encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// The other model-specific registers, by number.
    pub msrs: BTreeMap<u32, u64>,
    /// Vector registers.
    pub vector: VectorState,
    /// x87 and MMX.
    pub x87: X87State,
    /// Interrupts are held off for one instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// NMIs are held off until IRET.
    pub nmi_masked: bool,
    /// What the CPU is doing.
    pub activity: Activity,
}

/// What a CPU is doing (SDM 3C 24.4.2 has the same list).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executing.
    Active,
    /// In HLT.
    Halted,
    /// An application processor before its start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Vector registers and their control.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VectorState {
    /// ZMM0 to ZMM31 as little-endian quadwords; XMM and YMM are their low parts.
    pub zmm: [[u64; 8]; 32],
    /// Opmask registers.
    pub k: [u64; 8],
    /// MXCSR.
    pub mxcsr: u32,
}

/// The x87 unit in the layout of FXSAVE (SDM 1 10.5.1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct X87State {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: one bit a physical register, set when it is not empty.
    pub ftw: u8,
    /// Last opcode, 11 bits.
    pub fop: u16,
    /// Last instruction pointer (64-bit form).
    pub fip: u64,
    /// Last data pointer (64-bit form).
    pub fdp: u64,
    /// Code segment of the last instruction (32-bit form).
    pub fcs: u16,
    /// Data segment of the last operand (32-bit form).
    pub fds: u16,
    /// ST(0) to ST(7): the significand, then sign and exponent in the low 16 bits.
    pub st: [[u64; 2]; 8],
}

impl Default for VectorState {
    fn default() -> Self {
        Self { zmm: [[0; 8]; 32], k: [0; 8], mxcsr: 0x1f80 }
    }
}

impl Default for X87State {
    /// After power-on (not after FNINIT, whose control word is 037F; SDM 3A table 9-1).
    fn default() -> Self {
        Self { fcw: 0x40, fsw: 0, ftw: 0xff, fop: 0, fip: 0, fdp: 0, fcs: 0, fds: 0, st: [[0; 2]; 8] }
    }
}

impl Default for CpuState {
    /// The state after power-on or reset (SDM 3A table 9-1).
    fn default() -> Self {
        let mut segments = [Segment::real_mode(0); 6];
        segments[1] = Segment {
            selector: Selector(0xf000),
            base: 0xffff_0000,
            limit: 0xffff,
            attributes: 0x13 | attribute::CODE | attribute::PRESENT,
        };
        let system = |kind| Segment {
            selector: Selector(0),
            base: 0,
            limit: 0xffff,
            attributes: attribute::PRESENT | kind,
        };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: Rflags::FIXED.bits(),
            segments,
            ldtr: system(2),
            tr: system(11),
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            msrs: BTreeMap::new(),
            vector: VectorState::default(),
            x87: X87State::default(),
            interrupt_shadow: false,
            nmi_masked: false,
            activity: Activity::Active,
        }
    }
}
