//! CPUID (SDM 2A; APM 3 appendix E).

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::cpuid::CpuidResult;
use ringfence_x86::{Cr4, Exception};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

impl Cpu {
    /// What CPUID answers now: the model's table, with what depends on the vCPU and its state filled in.
    pub fn cpuid_result(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let leaf = self.known_leaf(leaf);
        let indexed = matches!(leaf, 4 | 7 | 0xb | 0xd | 0x8000_001d);
        let mut result = self.cpuid.get(leaf, if indexed { subleaf } else { 0 });
        let (xsave, enabled) = (self.vector.xsave_layout(), self.vector.xcr0());
        match leaf {
            1 => {
                result.ebx = result.ebx & 0x00ff_ffff | self.apic_id() << 24;
                if self.cr4.contains(Cr4::OSXSAVE) {
                    result.ecx |= 1 << 27;
                }
                if !self.apic_enabled() {
                    result.edx &= !(1 << 9);
                }
            }
            0xb => {
                if !self.cpuid.contains(leaf, subleaf) {
                    // Beyond the last level only the subleaf's number comes back.
                    result.ecx = subleaf & 0xff;
                }
                result.edx = self.apic_id();
            }
            0xd => match subleaf {
                0 if result.eax != 0 => result.ebx = xsave.size(enabled) as u32,
                1 if result.eax != 0 => result.ebx = xsave.compacted_size(enabled) as u32,
                _ => {}
            },
            // On Intel processors SYSCALL is announced in 64-bit mode only (SDM 2A, CPUID).
            0x8000_0001 if self.features.is_intel() && !self.is_64bit() => result.edx &= !(1 << 11),
            0x8000_0001 if !self.features.is_intel() && !self.apic_enabled() => result.edx &= !(1 << 9),
            0x8000_001e => {
                result.eax = self.apic_id();
                result.ebx = self.apic_id() & 0xff;
            }
            _ => {}
        }
        result
    }

    /// The leaf that answers: where there is none, Intel processors give the highest basic one (SDM 2A, CPUID).
    fn known_leaf(&self, leaf: u32) -> u32 {
        let range = leaf & 0xffff_0000;
        let top = self.cpuid.get(range, 0).eax;
        let exists = matches!(range, 0 | 0x4000_0000 | 0x8000_0000) && leaf <= top;
        if exists || !self.features.is_intel() { leaf } else { self.cpuid.get(0, 0).eax }
    }
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let result = cpu.cpuid_result(cpu.regs[0] as u32, cpu.regs[1] as u32);
    let CpuidResult { eax, ebx, ecx, edx } = result;
    // RAX, RCX, RDX, RBX in encoding order.
    for (register, value) in [eax, ecx, edx, ebx].into_iter().enumerate() {
        cpu.regs[register] = u64::from(value);
    }
    cpu.leave_block = true;
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    (instruction.mnemonic() == Mnemonic::Cpuid).then_some(cpuid as Handler)
}
