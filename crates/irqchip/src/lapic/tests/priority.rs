use ringfence_engine::InterruptSink;

use super::*;

fn msi(bench: &Bench, cpu: u32, vector: u8) {
    bench.chip.send_msi(0xfee0_0000 | u64::from(cpu) << 12, u32::from(vector));
}

#[test]
fn highest_vector_comes_first_and_blocks_its_class() {
    let mut bench = Bench::new(1);
    for vector in [0x31, 0x45, 0x41] {
        msi(&bench, 0, vector);
    }
    let cpu = &mut bench.cpu[0];
    assert_eq!((cpu.read32(0x210), cpu.read32(0x220)), (1 << 17, 1 << 5 | 1 << 1));
    assert_eq!(cpu.drain(), [0x45]);
    assert_eq!((cpu.read32(0x0a0), cpu.read32(0x120)), (0x40, 1 << 5));
    cpu.eoi();
    assert_eq!(cpu.drain(), [0x41]);
    cpu.write32(0x0b0, 0);
    assert_eq!(cpu.drain(), [0x31]);
}

#[test]
fn higher_class_nests_in_a_lower_one() {
    let mut bench = Bench::new(1);
    msi(&bench, 0, 0x31);
    assert_eq!(bench.cpu[0].drain(), [0x31]);
    msi(&bench, 0, 0x51);
    assert_eq!(bench.cpu[0].drain(), [0x51]);
    assert_eq!(bench.cpu[0].read32(0x0a0), 0x50);
    bench.cpu[0].eoi();
    assert_eq!(bench.cpu[0].read32(0x0a0), 0x30);
}

#[test]
fn task_priority_holds_back_its_class_and_lower() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(0x80, 0x4f);
    msi(&bench, 0, 0x41);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    assert_eq!(bench.cpu[0].inbox().pending(), 0, "nothing to look at until something changes");
    assert_eq!((bench.cpu[0].cr8(), bench.cpu[0].read32(0x0a0)), (4, 0x4f));
    bench.cpu[0].set_cr8(3);
    assert_eq!(bench.cpu[0].inbox().pending(), pending::INTERRUPT);
    assert_eq!(bench.cpu[0].tpr(), 0x30);
    assert_eq!(bench.cpu[0].drain(), [0x41]);
}

#[test]
fn end_of_interrupt_raises_the_pending_bit_for_what_it_blocked() {
    let mut bench = Bench::new(1);
    msi(&bench, 0, 0x51);
    assert_eq!(bench.cpu[0].drain(), [0x51]);
    msi(&bench, 0, 0x52);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    assert_eq!(bench.cpu[0].inbox().pending(), 0);
    bench.cpu[0].eoi();
    assert_eq!(bench.cpu[0].inbox().pending(), pending::INTERRUPT);
    assert_eq!(bench.cpu[0].drain(), [0x52]);
}

#[test]
fn level_interrupt_goes_round_through_the_io_apic() {
    let mut bench = Bench::new(1);
    bench.chip.write_ioapic(0x00, 0x24);
    bench.chip.write_ioapic(0x10, 0x8041);
    bench.chip.set_gsi(10, true);
    let cpu = &mut bench.cpu[0];
    assert_eq!(cpu.drain(), [0x41]);
    assert_eq!(cpu.read32(0x1a0), 2, "TMR has it as level-triggered");
    assert!(!cpu.pv_eoi_possible());
    cpu.eoi();
    assert_eq!(cpu.drain(), [0x41]);
    bench.chip.set_gsi(10, false);
    cpu.eoi();
    assert_eq!(cpu.take(), None);
    msi(&bench, 0, 0x41);
    assert_eq!(bench.cpu[0].read32(0x1a0), 0);
}

#[test]
fn timer_gsi_reaches_pin_2_and_irq_0() {
    let mut bench = Bench::new(1);
    bench.chip.write_ioapic(0x00, 0x14);
    bench.chip.write_ioapic(0x10, 0x30);
    bench.chip.set_gsi(0, true);
    assert_eq!(bench.cpu[0].drain(), [0x30]);
    assert_eq!(bench.chip.with_pic(|pic| pic.state().master.irr), 1);
}

#[test]
fn pv_eoi_is_possible_only_for_a_lone_edge() {
    let mut bench = Bench::new(1);
    assert!(!bench.cpu[0].pv_eoi_possible());
    msi(&bench, 0, 0x31);
    assert_eq!(bench.cpu[0].drain(), [0x31]);
    assert!(bench.cpu[0].pv_eoi_possible());
    msi(&bench, 0, 0x30);
    assert!(!bench.cpu[0].pv_eoi_possible(), "another waits");
    msi(&bench, 0, 0x41);
    assert_eq!(bench.cpu[0].drain(), [0x41]);
    assert!(!bench.cpu[0].pv_eoi_possible());
}

#[test]
fn software_disabled_apic_takes_no_vectors_but_level_arrives_later() {
    let mut bench = Bench::cold(1);
    bench.chip.write_ioapic(0x00, 0x24);
    bench.chip.write_ioapic(0x10, 0x8041);
    bench.chip.set_gsi(10, true);
    msi(&bench, 0, 0x31);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    bench.cpu[0].write32(0xf0, 0x1ff);
    assert_eq!(bench.cpu[0].drain(), [0x41]);
}

#[test]
fn illegal_vector_is_an_error_with_its_own_interrupt() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(0x370, 0xfe);
    msi(&bench, 0, 0x0f);
    assert_eq!(bench.cpu[0].drain(), [0xfe]);
    bench.cpu[0].eoi();
    assert_eq!(bench.cpu[0].read32(0x280), 0, "latched by a write");
    bench.cpu[0].write32(0x280, 0);
    assert_eq!(bench.cpu[0].read32(0x280), 0x40);
    bench.cpu[0].write32(0x280, 0);
    assert_eq!(bench.cpu[0].read32(0x280), 0);
    bench.cpu[0].read32(0x3d0);
    bench.cpu[0].write32(0x280, 0);
    assert_eq!(bench.cpu[0].read32(0x280), 0x80, "no such register");
}

/// Sets the 8259 pair up with vectors from 20H.
fn init_pic(chip: &IrqChip) {
    chip.with_pic(|pic| {
        for (controller, base, cascade) in [(0, 0x20, 4), (1, 0x28, 2)] {
            pic.write(controller, 0, 0x11);
            for word in [base, cascade, 1] {
                pic.write(controller, 1, word);
            }
        }
    });
}

#[test]
fn virtual_wire_carries_the_pic_vector() {
    let mut bench = Bench::cold(2);
    init_pic(&bench.chip);
    bench.chip.set_gsi(4, true);
    assert_eq!(bench.cpu[1].inbox().pending(), 0, "LINT0 leads nowhere there");
    assert_eq!(bench.cpu[0].pending_interrupt(), Some(Interrupt::External));
    assert_eq!(bench.cpu[0].acknowledge(), 0x24);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    assert_eq!(bench.cpu[0].inbox().pending(), 0);
    // Masking LINT0 closes the way, unmasking while INTR is high opens it.
    bench.cpu[0].write32(0xf0, 0x1ff);
    bench.cpu[0].write32(0x350, 0x1_0700);
    bench.chip.with_pic(|pic| pic.write(0, 0, 0x20));
    bench.chip.set_gsi(5, true);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    bench.cpu[0].write32(0x350, 0x700);
    assert_eq!(bench.cpu[0].take(), Some(0x25));
}

#[test]
fn disabled_apic_is_a_pin_for_the_pic() {
    let mut bench = Bench::cold(1);
    init_pic(&bench.chip);
    bench.cpu[0].msr_write(0x1b, 0xfee0_0100).unwrap();
    bench.chip.set_gsi(4, true);
    assert_eq!(bench.cpu[0].take(), Some(0x24));
    bench.chip.pulse_nmi_line();
    assert!(bench.cpu[0].take_nmi());
    assert!(!bench.cpu[0].take_nmi());
}

#[test]
fn request_withdrawn_before_acknowledge_is_spurious() {
    let mut bench = Bench::cold(1);
    init_pic(&bench.chip);
    bench.chip.with_pic(|pic| pic.write_elcr(0, 0x20));
    bench.chip.set_gsi(5, true);
    assert_eq!(bench.cpu[0].pending_interrupt(), Some(Interrupt::External));
    bench.chip.set_gsi(5, false);
    assert_eq!(bench.cpu[0].acknowledge(), 0xff, "nothing at all: the local APIC's own");
}

#[test]
fn lint0_as_fixed_edge_and_level() {
    let mut bench = Bench::new(1);
    init_pic(&bench.chip);
    bench.chip.with_pic(|pic| pic.write_elcr(0, 0x20));
    bench.cpu[0].write32(0x350, 0x61);
    bench.chip.set_gsi(5, true);
    assert_eq!(bench.cpu[0].take(), Some(0x61));
    assert_eq!(bench.cpu[0].take(), None);
    bench.cpu[0].write32(0x350, 0x8062);
    assert_eq!(bench.cpu[0].read32(0x350), 0xc062, "remote IRR");
    assert_eq!(bench.cpu[0].take(), Some(0x62));
    assert_eq!(bench.cpu[0].drain(), [0x62], "still high");
    bench.chip.set_gsi(5, false);
    bench.cpu[0].eoi();
    assert_eq!(bench.cpu[0].take(), None);
    assert_eq!(bench.cpu[0].read32(0x350), 0x8062);
}

#[test]
fn nmi_line_follows_lint1() {
    let mut bench = Bench::new(2);
    bench.chip.pulse_nmi_line();
    assert!(!bench.cpu[0].take_nmi(), "masked");
    bench.cpu[0].write32(0x360, 0x400);
    bench.chip.pulse_nmi_line();
    assert!(bench.cpu[0].take_nmi());
    assert!(!bench.cpu[1].take_nmi());
}

#[test]
fn ioapic_pin_0_carries_extint_messages() {
    let mut bench = Bench::new(2);
    init_pic(&bench.chip);
    bench.cpu[0].write32(0x350, 0x1_0700);
    bench.chip.write_ioapic(0x00, 0x11);
    bench.chip.write_ioapic(0x10, 0x0100_0000);
    bench.chip.write_ioapic(0x00, 0x10);
    bench.chip.write_ioapic(0x10, 0x0700);
    bench.chip.set_gsi(4, true);
    bench.chip.set_gsi(3, true);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    assert_eq!(bench.cpu[1].pending_interrupt(), Some(Interrupt::External));
    assert_eq!(bench.cpu[1].acknowledge(), 0x23);
    assert_eq!(bench.cpu[1].pending_interrupt(), None);
    bench.chip.with_pic(|pic| pic.write(0, 0, 0x20));
    assert_eq!(bench.cpu[1].acknowledge(), 0x24);
}

#[test]
fn performance_interrupt_masks_itself() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(0x340, 0x400);
    bench.cpu[0].local_interrupt(Lvt::Performance);
    assert!(bench.cpu[0].take_nmi());
    assert_eq!(bench.cpu[0].read32(0x340), 0x1_0400);
    bench.cpu[0].local_interrupt(Lvt::Performance);
    assert!(!bench.cpu[0].take_nmi());
}
