//! Local APIC, I/O APIC, 8259 pair and MSI routing.
