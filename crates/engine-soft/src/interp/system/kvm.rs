//! KVM's paravirtual interface, as its documentation describes it (Linux `Documentation/virt/kvm/x86/msr.rst` and
//! `hypercalls.rst`): the clock, end of interrupt in memory, and hypercalls (of which there are none).

use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::{Instruction, Mnemonic};
use ringfence_engine::{ClockMode, VirtualClock};
use ringfence_memory::GuestAddress;
use ringfence_x86::{Exception, msr};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

/// Answer to a hypercall that does not exist.
const KVM_ENOSYS: i64 = 1000;
/// Answer to a hypercall from outside CPL 0.
const EPERM: i64 = 1;

/// Low bit of SYSTEM_TIME and PV_EOI_EN.
const ENABLED: u64 = 1;
/// The clock's flag: no vCPU ever sees time go back.
const TSC_STABLE: u8 = 1;

/// Whether an MSR is one of KVM's that exist.
pub(super) fn is_kvm_msr(number: u32) -> bool {
    matches!(
        number,
        msr::KVM_WALL_CLOCK_OLD
            | msr::KVM_SYSTEM_TIME_OLD
            | msr::KVM_WALL_CLOCK
            | msr::KVM_SYSTEM_TIME
            | msr::KVM_PV_EOI_EN
    )
}

/// How to turn TSC ticks into nanoseconds: `((ticks << shift) * multiplier) >> 32`, a negative shift being one to the
/// right. The multiplier is at least 2^31, for precision.
pub fn tsc_scale(tsc_khz: u32) -> (u32, i8) {
    let khz = u128::from(tsc_khz.max(1));
    // Nanoseconds per tick with 64 fractional bits; below one million of them, so it fits.
    let ratio = (1_000_000_u128 << 64) / khz;
    let top = 127 - ratio.leading_zeros() as i32;
    // The multiplier is ratio / 2^(32 + shift) and has its highest bit at 31.
    let shift = top - 63;
    let multiplier = ratio >> (32 + shift);
    (multiplier as u32, shift as i8)
}

impl Cpu {
    /// Whether one of KVM's MSRs can hold a value.
    pub(super) fn check_kvm_msr(&self, number: u32, value: u64) -> Result<(), Exception> {
        // The structure must be aligned to four bytes; bit 0 enables it, and bit 1 means nothing.
        let good = match number {
            msr::KVM_PV_EOI_EN | msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_OLD => value & 2 == 0,
            _ => value & 3 == 0,
        };
        if good { Ok(()) } else { Err(Exception::GP0) }
    }

    pub(super) fn write_kvm_msr(&mut self, number: u32, value: u64) -> Result<(), Exception> {
        self.check_kvm_msr(number, value)?;
        match number {
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_OLD => self.write_wall_clock(value),
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_OLD => {
                // One clock under two numbers.
                self.msrs.insert(msr::KVM_SYSTEM_TIME, value);
                self.msrs.insert(msr::KVM_SYSTEM_TIME_OLD, value);
                self.refresh_kvmclock();
                return Ok(());
            }
            _ => {}
        }
        self.msrs.insert(number, value);
        Ok(())
    }

    /// Wall-clock time at which the machine's clock was zero.
    fn write_wall_clock(&self, address: u64) {
        let now = self.clock.now().0;
        let nanoseconds = match self.clock.mode() {
            ClockMode::Counted => VirtualClock::COUNTED_EPOCH.as_nanos(),
            ClockMode::Host => {
                let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                wall.as_nanos().saturating_sub(u128::from(now))
            }
        };
        let seconds = (nanoseconds / 1_000_000_000) as u32;
        let rest = (nanoseconds % 1_000_000_000) as u32;
        let mut body = [0; 8];
        body[..4].copy_from_slice(&seconds.to_le_bytes());
        body[4..].copy_from_slice(&rest.to_le_bytes());
        self.publish(GuestAddress(address), &body);
    }

    /// Writes the vCPU's clock page anew, if it has one: after its MSR was written, the TSC was set, or a saved state
    /// was loaded.
    ///
    /// The page says that the clock was zero when the TSC was [`Cpu::tsc_offset`], which is the same instant on every
    /// vCPU, so that they all compute the same time.
    pub fn refresh_kvmclock(&self) {
        let value = self.stored_msr(msr::KVM_SYSTEM_TIME);
        if value & ENABLED == 0 {
            return;
        }
        let (multiplier, shift) = tsc_scale(self.clock.tsc_khz());
        let mut body = [0; 28];
        // Offsets count from the version: padding, TSC, nanoseconds, multiplier, shift, flags.
        body[4..12].copy_from_slice(&self.tsc_offset().to_le_bytes());
        body[20..24].copy_from_slice(&multiplier.to_le_bytes());
        body[24] = shift as u8;
        body[25] = TSC_STABLE;
        self.publish(GuestAddress(value & !ENABLED), &body);
    }

    /// Writes a structure whose first four bytes are a version: odd while the rest changes, and another one after it. A
    /// structure outside memory is not written.
    fn publish(&self, address: GuestAddress, body: &[u8]) {
        let Ok(old) = self.memory.read::<u32>(address) else { return };
        let odd = old.wrapping_add(1) | 1;
        let Some(at) = address.checked_add(4) else { return };
        // Each write is checked by itself; one that fails leaves a version that readers wait on, at a place that they
        // cannot have meant.
        let written = self
            .memory
            .write(address, odd)
            .and_then(|()| self.memory.write_bytes(at, body))
            .and_then(|()| self.memory.write(address, odd.wrapping_add(1)));
        drop(written);
    }

    fn pv_eoi_address(&self) -> Option<GuestAddress> {
        let value = self.stored_msr(msr::KVM_PV_EOI_EN);
        (value & ENABLED != 0).then_some(GuestAddress(value & !3))
    }

    /// Lets the guest end the interrupt just delivered by clearing a bit in memory. To be called after the delivery,
    /// where [`ringfence_irqchip::LocalApic::pv_eoi_possible`].
    pub fn pv_eoi_begin(&mut self) {
        let Some(address) = self.pv_eoi_address() else { return };
        if !self.apic_pv_eoi_possible() {
            return;
        }
        let Ok(old) = self.memory.read::<u8>(address) else { return };
        self.system.pv_eoi = self.memory.write(address, old | 1).is_ok();
    }

    /// Takes the offer back: ends the interrupt if the guest has cleared the bit, and clears it otherwise. To be called
    /// before the local APIC's state is looked at.
    pub fn pv_eoi_end(&mut self) {
        if !std::mem::take(&mut self.system.pv_eoi) {
            return;
        }
        let Some(address) = self.pv_eoi_address() else { return };
        let Ok(old) = self.memory.read::<u8>(address) else { return };
        if old & 1 == 0 {
            if let Some(apic) = &mut self.apic {
                apic.eoi();
            }
        } else {
            // The byte was written a moment ago, so it can be written again.
            drop(self.memory.write(address, old & !1));
        }
    }
}

fn hypercall(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let answer = if cpu.cpl == 0 { -KVM_ENOSYS } else { -EPERM } as u64;
    cpu.regs[0] = if cpu.is_64bit() { answer } else { answer & 0xffff_ffff };
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    matches!(instruction.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall).then_some(hypercall as Handler)
}
