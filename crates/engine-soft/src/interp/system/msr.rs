//! RDMSR and WRMSR (SDM 4 chapter 2; APM 2 appendix A). An MSR that is not here raises #GP(0).

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::cpuid::ARCH_CAPABILITIES;
use ringfence_x86::cpuid::Output::{Ebx, Ecx, Edx};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Cr0, Efer, Exception, SegmentRegister, msr};

use super::{kvm, mtrr};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

/// On which processors an MSR exists.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Every,
    Intel,
    Amd,
}

/// An MSR that holds what was written to it.
struct Row {
    first: u32,
    last: u32,
    on: On,
    /// After power-on.
    reset: u64,
    /// What can be written; other bits raise #GP(0).
    writable: u64,
}

const fn row(number: u32, on: On, reset: u64, writable: u64) -> Row {
    Row { first: number, last: number, on, reset, writable }
}

const fn rows(first: u32, last: u32, on: On) -> Row {
    Row { first, last, on, reset: 0, writable: 0 }
}

const PLATFORM_INFO: u32 = 0xce;
const DEBUG_CONTROL: u32 = 0x1d9;
/// BTS and PEBS are unavailable; fast strings are on.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Fast strings, thermal control, enhanced SpeedStep.
const MISC_ENABLE_WRITABLE: u64 = MISC_ENABLE_RESET | 1 << 3 | 1 << 16;
/// FEATURE_CONTROL: locked, nothing enabled.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// HWCR: the TSC counts at the P0 frequency, which kernels check where the TSC is invariant.
const HWCR_RESET: u64 = 1 << 24;
/// DE_CFG: LFENCE serializes.
const DE_CFG_RESET: u64 = 1 << 1;

/// Those without rules of their own. Rows without writable bits take a write of their own value, which is how kernels
/// write back what they read.
const ROWS: &[Row] = &[
    row(msr::PLATFORM_ID, On::Intel, 0, 0),
    row(msr::FEATURE_CONTROL, On::Intel, FEATURE_CONTROL_LOCKED, 0),
    row(PLATFORM_INFO, On::Intel, 0, 0),
    row(msr::MTRR_CAPABILITY, On::Every, mtrr::CAPABILITY, 0),
    row(msr::SYSENTER_CS, On::Every, 0, 0xffff_ffff),
    row(msr::MCG_CAP, On::Every, 0, 0),
    row(msr::MCG_STATUS, On::Every, 0, 7),
    row(msr::MISC_ENABLE, On::Intel, MISC_ENABLE_RESET, MISC_ENABLE_WRITABLE),
    row(DEBUG_CONTROL, On::Every, 0, 0),
    // Last-branch records, which are never taken.
    rows(0x1db, 0x1de, On::Every),
    row(msr::XSS, On::Every, 0, 0),
    row(msr::STAR, On::Every, 0, u64::MAX),
    row(msr::FMASK, On::Every, 0, 0xffff_ffff),
    row(msr::AMD_SYSCFG, On::Amd, 0, 0),
    row(msr::AMD_HWCR, On::Amd, HWCR_RESET, 0x7fff_ffff),
    // Performance counters of the K7 (event selectors, counters).
    rows(0xc001_0000, 0xc001_0007, On::Amd),
    // TOP_MEM, TOP_MEM2.
    row(0xc001_001a, On::Amd, 0, 0),
    row(0xc001_001d, On::Amd, 0, 0),
    // NB_CFG: kernels turn on extended configuration cycles by port (bit 46).
    row(0xc001_001f, On::Amd, 0, 1 << 46),
    // Interrupt pending message, MMIO configuration base.
    row(0xc001_0055, On::Amd, 0, 0),
    row(0xc001_0058, On::Amd, 0, 0),
    // TSEG base and mask, VM_CR, VM_HSAVE_PA.
    rows(0xc001_0112, 0xc001_0114, On::Amd),
    row(0xc001_0117, On::Amd, 0, 0),
    // LS_CFG, IC_CFG, DC_CFG, BU_CFG; BU_CFG2; EX_CFG.
    rows(0xc001_1020, 0xc001_1023, On::Amd),
    row(msr::AMD_DE_CFG, On::Amd, DE_CFG_RESET, DE_CFG_RESET | 1 << 9),
    row(0xc001_102a, On::Amd, 0, 0),
    row(0xc001_102c, On::Amd, 0, 0),
];

/// The microcode revision that kernels find: the same for every model of a vendor.
const INTEL_MICROCODE: u64 = 1 << 32;
const AMD_MICROCODE: u64 = 0x0100_0065;

/// SPEC_CTRL: IBRS, and BHI_DIS_S where CPUID leaf 7, subleaf 2 has BHI_CTRL. PRED_CMD: IBPB.
const IBRS: u64 = 1;
const BHI_DIS_S: u64 = 1 << 10;
const IBPB: u64 = 1;

fn canonical(value: u64) -> Result<u64, Exception> {
    if is_canonical(value) { Ok(value) } else { Err(Exception::GP0) }
}

/// Whether an MSR holds a canonical address.
fn is_address(number: u32) -> bool {
    matches!(number, msr::SYSENTER_ESP | msr::SYSENTER_EIP | msr::LSTAR | msr::CSTAR | msr::KERNEL_GS_BASE)
}

impl Cpu {
    fn row(&self, number: u32) -> Option<&'static Row> {
        let vendor = if self.features.is_intel() { On::Intel } else { On::Amd };
        ROWS.iter()
            .find(|row| (row.first..=row.last).contains(&number) && (row.on == On::Every || row.on == vendor))
    }

    fn has_tsc_aux(&self) -> bool {
        self.cpuid.bit(0x8000_0001, 0, Edx, 27) || self.cpuid.bit(7, 0, Ecx, 22)
    }

    fn has_spec_ctrl(&self) -> bool {
        self.cpuid.bit(7, 0, Edx, 26)
    }

    fn spec_ctrl_bits(&self) -> u64 {
        IBRS | if self.cpuid.bit(7, 2, Edx, 4) { BHI_DIS_S } else { 0 }
    }

    /// Reads an MSR, as RDMSR does at CPL 0.
    ///
    /// # Errors
    /// #GP(0) if the model does not have it.
    pub fn read_msr(&mut self, number: u32) -> Result<u64, Exception> {
        Ok(match number {
            msr::TSC => self.guest_tsc(),
            msr::TSC_ADJUST if self.cpuid.bit(7, 0, Ebx, 1) => self.tsc_offset(),
            msr::EFER => self.efer.bits(),
            msr::FS_BASE => self.segment(SegmentRegister::Fs).base,
            msr::GS_BASE => self.segment(SegmentRegister::Gs).base,
            msr::TSC_AUX if self.has_tsc_aux() => self.stored_msr(number),
            msr::ARCH_CAPABILITIES if self.cpuid.bit(7, 0, Edx, 29) => ARCH_CAPABILITIES,
            msr::SPEC_CTRL if self.has_spec_ctrl() => self.stored_msr(number),
            msr::BIOS_UPDATE_SIGNATURE if self.features.is_intel() => INTEL_MICROCODE,
            msr::BIOS_UPDATE_SIGNATURE => AMD_MICROCODE,
            _ if is_address(number) => self.stored_msr(number),
            _ if mtrr::is_memory_type_msr(number) => self.read_memory_type_msr(number),
            _ if kvm::is_kvm_msr(number) => self.stored_msr(number),
            _ if Self::is_apic_msr(number) => self.apic_msr_read(number)?,
            _ => {
                let row = self.row(number).ok_or(Exception::GP0)?;
                self.msrs.get(number).unwrap_or(row.reset)
            }
        })
    }

    /// Writes an MSR, as WRMSR does at CPL 0.
    ///
    /// # Errors
    /// #GP(0) if the model does not have it or it cannot hold the value.
    pub fn write_msr(&mut self, number: u32, value: u64) -> Result<(), Exception> {
        match number {
            msr::TSC => {
                let ahead = value.wrapping_sub(self.guest_tsc());
                self.set_tsc_offset(self.tsc_offset().wrapping_add(ahead));
            }
            msr::TSC_ADJUST if self.cpuid.bit(7, 0, Ebx, 1) => self.set_tsc_offset(value),
            msr::EFER => self.write_efer(value)?,
            msr::FS_BASE => self.set_segment_base(SegmentRegister::Fs, canonical(value)?),
            msr::GS_BASE => self.set_segment_base(SegmentRegister::Gs, canonical(value)?),
            msr::PRED_CMD if self.has_spec_ctrl() && value & !IBPB == 0 => {}
            // Loading microcode is refused silently, as under KVM; kernels write zero before they read the revision.
            msr::BIOS_UPDATE_SIGNATURE => {}
            _ if Self::is_apic_msr(number) => self.apic_msr_write(number, value)?,
            _ if kvm::is_kvm_msr(number) => self.write_kvm_msr(number, value)?,
            _ => {
                self.check_stored_msr(number, value)?;
                self.msrs.insert(number, value);
            }
        }
        Ok(())
    }

    /// Whether an MSR that is mere storage exists and can hold a value.
    ///
    /// # Errors
    /// #GP(0) if not.
    pub(in crate::interp) fn check_stored_msr(&self, number: u32, value: u64) -> Result<(), Exception> {
        let good = match number {
            msr::TSC_AUX => self.has_tsc_aux() && value >> 32 == 0,
            msr::SPEC_CTRL => self.has_spec_ctrl() && value & !self.spec_ctrl_bits() == 0,
            msr::TSC_ADJUST => self.cpuid.bit(7, 0, Ebx, 1),
            _ if is_address(number) => is_canonical(value),
            _ if mtrr::is_memory_type_msr(number) => return self.check_memory_type_msr(number, value),
            _ if kvm::is_kvm_msr(number) => return self.check_kvm_msr(number, value),
            _ => self.row(number).is_some_and(|row| (value ^ row.reset) & !row.writable == 0),
        };
        if good { Ok(()) } else { Err(Exception::GP0) }
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.msrs.insert(msr::TSC_ADJUST, offset);
        self.publish_tsc_offset();
        self.refresh_kvmclock();
        self.leave_block = true;
    }

    /// EFER: LME cannot change while paging is on, LMA follows on its own (SDM 3A 9.8.5).
    fn write_efer(&mut self, value: u64) -> Result<(), Exception> {
        let new = Efer::from_bits_retain(value);
        if value & !self.features.efer().bits() != 0 {
            return Err(Exception::GP0);
        }
        if self.cr0.contains(Cr0::PG) && (self.efer ^ new).contains(Efer::LME) {
            return Err(Exception::GP0);
        }
        let nxe = (self.efer ^ new).contains(Efer::NXE);
        self.efer = new & !Efer::LMA | self.efer & Efer::LMA;
        if nxe {
            self.tlb.flush();
        }
        self.update_mode();
        Ok(())
    }
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let value = cpu.read_msr(cpu.regs[1] as u32)?;
    cpu.set_edx_eax(value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    cpu.write_msr(cpu.regs[1] as u32, cpu.edx_eax())?;
    cpu.leave_block = true;
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Rdmsr => Some(rdmsr),
        Mnemonic::Wrmsr => Some(wrmsr),
        _ => None,
    }
}
