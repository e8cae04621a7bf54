//! The watchdog action table: how the guest works the machine's watchdog, as accesses to registers.
//!
//! Source: Microsoft, "Hardware Watchdog Timers Design Specification", 1.01, whose sections are cited here. Linux has a driver for
//! it (`wdat_wdt`), as Windows has.

use acpi_tables::sdt::Sdt;

use super::table;
use crate::Watchdog;

/// Actions ("Watchdog Action Table", table 3).
mod action {
    pub(super) const RESET: u8 = 0x01;
    pub(super) const QUERY_CURRENT_COUNTDOWN: u8 = 0x04;
    pub(super) const QUERY_COUNTDOWN: u8 = 0x05;
    pub(super) const SET_COUNTDOWN: u8 = 0x06;
    pub(super) const QUERY_RUNNING: u8 = 0x08;
    pub(super) const SET_RUNNING: u8 = 0x09;
    pub(super) const QUERY_STOPPED: u8 = 0x0a;
    pub(super) const SET_STOPPED: u8 = 0x0b;
    pub(super) const QUERY_STATUS: u8 = 0x20;
    pub(super) const SET_STATUS: u8 = 0x21;
}

/// Instructions (table 4).
mod instruction {
    pub(super) const READ_VALUE: u8 = 0;
    pub(super) const READ_COUNTDOWN: u8 = 1;
    pub(super) const WRITE_VALUE: u8 = 2;
    pub(super) const WRITE_COUNTDOWN: u8 = 3;
}

/// All bits of a register.
const ALL: u32 = 0xffff;
/// Flags of the table (table 2): the timer is there. It runs on in every sleeping state that this machine has.
const ENABLED: u8 = 1;

/// Builds the table.
pub(super) fn build(watchdog: &Watchdog) -> Sdt {
    let Watchdog { preset, left, control, status, .. } = *watchdog;
    let entries = [
        (action::RESET, instruction::WRITE_VALUE, left, 1, ALL),
        (action::QUERY_CURRENT_COUNTDOWN, instruction::READ_COUNTDOWN, left, 0, ALL),
        (action::QUERY_COUNTDOWN, instruction::READ_COUNTDOWN, preset, 0, ALL),
        (action::SET_COUNTDOWN, instruction::WRITE_COUNTDOWN, preset, 0, ALL),
        (action::QUERY_RUNNING, instruction::READ_VALUE, control, 1, 1),
        (action::SET_RUNNING, instruction::WRITE_VALUE, control, 1, 1),
        (action::QUERY_STOPPED, instruction::READ_VALUE, control, 0, 1),
        (action::SET_STOPPED, instruction::WRITE_VALUE, control, 0, 1),
        (action::QUERY_STATUS, instruction::READ_VALUE, status, 1, 1),
        (action::SET_STATUS, instruction::WRITE_VALUE, status, 0, 1),
    ];
    let mut wdat = table(b"WDAT", 1);
    let mut body = Vec::new();
    // Length of what follows the common header and comes before the entries.
    body.extend(32_u32.to_le_bytes());
    // No PCI function: segment, bus, device, function, and three bytes that mean nothing.
    body.extend([0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    body.extend(watchdog.period_ms.to_le_bytes());
    // Most and least counts.
    body.extend(ALL.to_le_bytes());
    body.extend(1_u32.to_le_bytes());
    body.extend([ENABLED, 0, 0, 0]);
    body.extend((entries.len() as u32).to_le_bytes());
    for (action, instruction, register, value, mask) in entries {
        body.extend([action, instruction, 0, 0]);
        // A generic address: I/O space, 16 bits from bit 0, accessed as words (ACPI 6.5 5.2.3.2).
        body.extend([1, 16, 0, 2]);
        body.extend(u64::from(watchdog.port + register).to_le_bytes());
        body.extend(u32::to_le_bytes(value));
        body.extend(mask.to_le_bytes());
    }
    wdat.append_slice(&body);
    wdat
}
