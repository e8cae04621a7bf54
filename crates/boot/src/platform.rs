//! The machine as its firmware tables describe it.

use ringfence_memory::GuestRange;

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First of its eight I/O ports.
    pub port: u16,
    /// Its ISA interrupt.
    pub irq: u8,
}

/// A range of addresses that the PCI host bridge decodes for its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryWindow {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
}

/// What the tables tell of the machine's devices. The defaults are this project's own machine.
///
/// The ACPI registers are not hardware-reduced: a PM1 event and control block, a PM timer and a GPE block.
#[derive(Clone, Debug)]
pub struct PlatformDescription {
    /// PM1a event block: status at +0, enable at +2, 16 bits each.
    pub pm1a_event: u16,
    /// PM1a control block, 16 bits.
    pub pm1a_control: u16,
    /// PM timer, 32 bits at 3.579545 MHz.
    pub pm_timer: u16,
    /// Whether the PM timer counts 32 bits rather than 24.
    pub pm_timer_32bit: bool,
    /// GPE block 0.
    pub gpe0: u16,
    /// Bytes in GPE block 0; the first half is status, the second enable.
    pub gpe0_len: u8,
    /// The value of `SLP_TYP` that means S5, soft off.
    pub s5_sleep_type: u8,
    /// The ISA interrupt of the SCI, delivered level-triggered, active high.
    pub sci_irq: u8,
    /// The SMI command port, and the values that turn ACPI mode on and off. Without it ACPI mode must always be
    /// on: PM1 control reads with `SCI_EN` set (ACPI 6.5 4.8.2.5).
    pub smi_command: Option<(u16, u8, u8)>,
    /// Reset register, an I/O port.
    pub reset_port: u16,
    /// The value that resets.
    pub reset_value: u8,
    /// RTC and CMOS index port; the data port follows.
    pub rtc_port: u16,
    /// The RTC's ISA interrupt.
    pub rtc_irq: u8,
    /// The CMOS byte that holds the century; 0 if none does.
    pub century: u8,
    /// An i8042 at ports 60 and 64, with a keyboard on IRQ 1.
    pub keyboard: bool,
    /// A PS/2 mouse on the i8042, IRQ 12.
    pub mouse: bool,
    /// Whether the machine has a VGA adapter.
    pub vga: bool,
    /// The serial ports, COM1 first; at most four.
    pub serial: Vec<SerialPort>,
    /// Whether there is an 8259 pair beside the I/O APIC.
    pub legacy_pics: bool,
    /// The local APICs' address.
    pub local_apic: u32,
    /// The I/O APIC's address. Its 24 inputs are the global system interrupts 0 to 23.
    pub io_apic: u32,
    /// The I/O APIC's identifier.
    pub io_apic_id: u8,
    /// The first of four consecutive global system interrupts that carry PCI's INTA to INTD, level-triggered.
    /// See [`pci_interrupt`].
    pub pci_interrupt_base: u8,
    /// Where the configuration space of PCI buses 0 to 255 lies, 1 MiB for each (ECAM), if it is in memory at all.
    pub pci_ecam: Option<MemoryWindow>,
    /// Where PCI devices may lie below 4 GiB.
    pub pci_window: MemoryWindow,
    /// Where 64-bit PCI devices may lie. `None` puts 64 GiB at the next multiple of 64 GiB above RAM, which
    /// leaves room for more memory between.
    pub pci_window_64: Option<MemoryWindow>,
    /// First of the twelve ports of `fw_cfg`, if there is one.
    pub fw_cfg: Option<u16>,
    /// The port of pvpanic, if there is one.
    pub pvpanic: Option<u16>,
    /// The watchdog, if there is one.
    pub watchdog: Option<Watchdog>,
    /// The VM generation ID, which changes whenever a machine is a copy of another: a guest that has seen another value
    /// renews its random numbers. `None` offers none.
    pub generation_id: Option<[u8; 16]>,
    /// I/O ports that belong to the platform and are kept from PCI devices, as first port and number: ACPI
    /// registers, and room for hotplug.
    pub reserved_ports: Vec<(u16, u8)>,
    /// The machine's UUID for SMBIOS, in the order in which it is written.
    pub uuid: [u8; 16],
}

/// A watchdog with four registers of two bytes in the I/O space: what its timer is set to, what of that is left (a write starts it
/// afresh), control (bit 0: it runs), and status (bit 0: it was neglected; cleared by writing 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchdog {
    /// The first of its ports.
    pub port: u16,
    /// Milliseconds that the timer counts by.
    pub period_ms: u32,
    /// Offset of what the timer is set to.
    pub preset: u16,
    /// Offset of what is left.
    pub left: u16,
    /// Offset of control.
    pub control: u16,
    /// Offset of status.
    pub status: u16,
}

impl Default for PlatformDescription {
    fn default() -> Self {
        Self {
            pm1a_event: 0x600,
            pm1a_control: 0x604,
            pm_timer: 0x608,
            pm_timer_32bit: true,
            gpe0: 0x620,
            gpe0_len: 8,
            s5_sleep_type: 5,
            sci_irq: 9,
            smi_command: Some((0xb2, 0xf1, 0xf0)),
            reset_port: 0xcf9,
            reset_value: 0x06,
            rtc_port: 0x70,
            rtc_irq: 8,
            century: 0x32,
            keyboard: true,
            mouse: false,
            vga: false,
            serial: vec![SerialPort { port: 0x3f8, irq: 4 }, SerialPort { port: 0x2f8, irq: 3 }],
            legacy_pics: true,
            local_apic: 0xfee0_0000,
            io_apic: 0xfec0_0000,
            io_apic_id: 0,
            pci_interrupt_base: 16,
            pci_ecam: Some(MemoryWindow { start: 0xc000_0000, last: 0xcfff_ffff }),
            pci_window: MemoryWindow { start: 0xd000_0000, last: 0xfebf_ffff },
            pci_window_64: None,
            fw_cfg: Some(0x510),
            pvpanic: Some(0x505),
            watchdog: None,
            generation_id: None,
            reserved_ports: vec![(0x600, 0x40), (0xae00, 0x20)],
            uuid: [0; 16],
        }
    }
}

impl PlatformDescription {
    /// The window for 64-bit PCI devices on a machine with this RAM.
    pub(crate) fn pci_window_64(&self, ram: &[GuestRange]) -> MemoryWindow {
        const GRAIN: u64 = 64 << 30;
        let end = ram.iter().map(GuestRange::end).max().unwrap_or(0);
        let start = end.max(1).next_multiple_of(GRAIN);
        self.pci_window_64.unwrap_or(MemoryWindow { start, last: start + (GRAIN - 1) })
    }
}

/// The global system interrupt of a PCI device's pin (0 for INTA to 3 for INTD), by the usual swizzle: devices
/// next to each other use different ones.
pub const fn pci_interrupt(platform: &PlatformDescription, slot: u8, pin: u8) -> u8 {
    platform.pci_interrupt_base.saturating_add(slot.wrapping_add(pin) & 3)
}
