//! The PC's map: which ports and interrupt lines the devices of this crate answer to.
//!
//! The ACPI tables must describe exactly these. Legacy addresses are those of the IBM PC/AT; the ACPI block and
//! fw_cfg are where the widespread virtual PCs have them.

use ringfence_memory::GuestRange;

/// First of the four ports of the 8254 timer.
pub const PIT_PORT: u16 = 0x40;
/// System control port B: gate and output of timer channel 2, the speaker.
pub const SYSTEM_CONTROL_B_PORT: u16 = 0x61;
/// Interrupt line of timer channel 0 (the MADT's override leads it to I/O APIC input 2).
pub const PIT_IRQ: u32 = 0;

/// Data port of the keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Interrupt line of the keyboard.
pub const I8042_IRQ: u32 = 1;

/// Index port of the real-time clock; data is at the next port.
pub const RTC_PORT: u16 = 0x70;
/// Interrupt line of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// CMOS index of the century, for the FADT's CENTURY field.
pub const RTC_CENTURY: u8 = 0x32;

/// Power-on self-test codes, and a way to wait about a microsecond.
pub const POST_PORT: u16 = 0x80;
/// The port that Linux waits with where 0x80 is taken.
pub const DELAY_PORT: u16 = 0xed;
/// System control port A: fast A20 gate and fast reset.
pub const SYSTEM_CONTROL_A_PORT: u16 = 0x92;

/// FADT SMI_CMD; the next port is its scratch register.
pub const SMI_COMMAND_PORT: u16 = 0xb2;
/// FADT ACPI_ENABLE: the value that hands power management to the operating system.
pub const ACPI_ENABLE: u8 = 0xf1;
/// FADT ACPI_DISABLE: the value that takes it back.
pub const ACPI_DISABLE: u8 = 0xf0;

/// First port of the ACPI register block.
pub const ACPI_PORT: u16 = 0x600;
/// Length of the ACPI register block, for the DSDT to reserve.
pub const ACPI_PORT_COUNT: u16 = 0x40;
/// PM1a event block: 2 bytes status, 2 bytes enable.
pub const PM1A_EVENT_PORT: u16 = ACPI_PORT;
/// Length of the PM1a event block.
pub const PM1_EVENT_LEN: u8 = 4;
/// PM1a control block.
pub const PM1A_CONTROL_PORT: u16 = ACPI_PORT + 4;
/// Length of the PM1a control block.
pub const PM1_CONTROL_LEN: u8 = 2;
/// Power-management timer: 4 bytes, 32 bits wide (FADT flag TMR_VAL_EXT is to be set).
pub const PM_TIMER_PORT: u16 = ACPI_PORT + 8;
/// Length of the power-management timer.
pub const PM_TIMER_LEN: u8 = 4;
/// Frequency of the power-management timer in Hz (ACPI 6.5 4.8.3.3).
pub const PM_TIMER_HZ: u32 = 3_579_545;
/// General-purpose event block 0: status bytes, then as many enable bytes.
pub const GPE0_PORT: u16 = ACPI_PORT + 0x20;
/// Length of general-purpose event block 0: 32 events.
pub const GPE0_LEN: u8 = 8;
/// Interrupt line of ACPI events: level-triggered, active high (the MADT needs an override for it).
pub const SCI_IRQ: u32 = 9;
/// SLP_TYP of `\_S5`: soft off.
pub const S5_SLEEP_TYPE: u8 = 5;

/// Reset control register, FADT RESET_REG (inside the PCI configuration ports, 1-byte accesses only).
pub const RESET_PORT: u16 = 0xcf9;
/// FADT RESET_VALUE.
pub const RESET_VALUE: u8 = 0x06;

/// Where configuration space lies in memory: 256 buses of 1 MiB (the MCFG table, and reserved in the memory map).
pub const PCI_ECAM: GuestRange = GuestRange::new(0xc000_0000, 0x1000_0000);
/// Where the base addresses of PCI devices can be below 4 GiB; above, they can be anywhere.
pub const PCI_WINDOW: GuestRange = GuestRange::new(0xd000_0000, 0x2ec0_0000);
/// First of the four global system interrupts that carry the pins of PCI devices: device `n`'s INTA is at this
/// plus `n` modulo 4. Level-triggered.
pub const PCI_INTERRUPT_BASE: u32 = 16;
/// First of the eight PCI configuration ports.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;

/// First ports of the serial ports.
pub const SERIAL_PORTS: [u16; 2] = [0x3f8, 0x2f8];
/// Interrupt lines of the serial ports.
pub const SERIAL_IRQS: [u32; 2] = [4, 3];

/// First port of fw_cfg.
pub const FW_CFG_PORT: u16 = 0x510;
/// How many ports fw_cfg has.
pub const FW_CFG_PORT_COUNT: u16 = 12;

/// Port of pvpanic (ACPI device `QEMU0001`).
pub const PVPANIC_PORT: u16 = 0x505;

/// First of the eight ports of the watchdog, which the WDAT describes.
pub const WATCHDOG_PORT: u16 = 0x660;
