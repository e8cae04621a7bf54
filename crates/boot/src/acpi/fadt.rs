//! The fixed ACPI description table: ACPI's own registers (ACPI 6.5 5.2.9).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::PlatformDescription;

/// IA-PC boot architecture flags (ACPI 6.5 table 5.11).
mod boot_arch {
    /// There are user-visible devices on the ISA bus.
    pub(super) const LEGACY_DEVICES: u16 = 1 << 0;
    /// There is an i8042.
    pub(super) const I8042: u16 = 1 << 1;
    /// There is no VGA: do not probe for it.
    pub(super) const NO_VGA: u16 = 1 << 2;
}

fn port(address: u16, bytes: u8) -> GAS {
    let access = match bytes {
        2 => AccessSize::WordAccess,
        4 => AccessSize::DwordAccess,
        _ => AccessSize::ByteAccess,
    };
    GAS::new(AddressSpace::SystemIo, bytes.saturating_mul(8), 0, access, address.into())
}

pub(super) fn build(platform: &PlatformDescription, dsdt: u32, facs: u32) -> Vec<u8> {
    let p = platform;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is fixed hardware, for which the flag is clear; there is no sleep button.
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    if p.pm_timer_32bit {
        fadt = fadt.flag(Flags::TmrValExt);
    }
    // The 32-bit fields for old systems and the 64-bit ones hold the same; the FACS must be given once only.
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.firmware_ctrl = facs.into();
    fadt.sci_int = u16::from(p.sci_irq).into();
    if let Some((smi, enable, disable)) = p.smi_command {
        fadt.smi_cmd = u32::from(smi).into();
        (fadt.acpi_enable, fadt.acpi_disable) = (enable, disable);
    }
    fadt.pm1a_evt_blk = u32::from(p.pm1a_event).into();
    fadt.pm1a_cnt_blk = u32::from(p.pm1a_control).into();
    fadt.pm_tmr_blk = u32::from(p.pm_timer).into();
    fadt.gpe0_blk = u32::from(p.gpe0).into();
    (fadt.pm1_evt_len, fadt.pm1_cnt_len, fadt.pm_tmr_len) = (4, 2, 4);
    fadt.gpe0_blk_len = p.gpe0_len;
    fadt.x_pm1a_evt_blk = port(p.pm1a_event, 4);
    fadt.x_pm1a_evt_blk.access_size = AccessSize::WordAccess;
    fadt.x_pm1a_cnt_blk = port(p.pm1a_control, 2);
    fadt.x_pm_tmr_blk = port(p.pm_timer, 4);
    fadt.x_gpe0_blk = port(p.gpe0, p.gpe0_len);
    fadt.x_gpe0_blk.access_size = AccessSize::ByteAccess;
    // Latencies above these bounds mean that C2 and C3 do not exist (ACPI 6.5 5.2.9).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = p.century;
    let mut arch = boot_arch::LEGACY_DEVICES;
    if p.keyboard {
        arch |= boot_arch::I8042;
    }
    if !p.vga {
        arch |= boot_arch::NO_VGA;
    }
    fadt.iapc_boot_arch = arch.into();
    fadt.reset_reg = port(p.reset_port, 1);
    fadt.reset_value = p.reset_value;
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}
