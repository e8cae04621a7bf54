use super::*;

const ENABLE: u64 = 0x800;
const X2APIC: u64 = 0x400;
const BASE: u64 = 0xfee0_0000;

#[test]
fn reset_values_are_those_of_the_manual() {
    let mut bench = Bench::cold(2);
    assert_eq!(bench.cpu[0].apic_base(), 0xfee0_0900);
    let cpu = &mut bench.cpu[1];
    assert_eq!((cpu.apic_base(), cpu.mmio_base()), (0xfee0_0800, Some(BASE)));
    let expected = [
        (0x20, 0x0100_0000),
        (0x30, 0x0005_0014),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, 0xffff_ffff),
        (0xf0, 0xff),
        (0x100, 0),
        (0x280, 0),
        (0x300, 0),
        (0x320, 0x1_0000),
        (0x330, 0x1_0000),
        (0x340, 0x1_0000),
        (0x350, 0x1_0000),
        (0x360, 0x1_0000),
        (0x370, 0x1_0000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(cpu.read32(offset), value, "{offset:#x}");
    }
    assert_eq!(bench.cpu[0].read32(0x350), 0x700, "the bootstrap processor starts in virtual wire mode");
}

#[test]
fn registers_keep_only_their_writable_bits() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    let expected = [
        (0x20, 0),
        (0x30, 0x0005_0014),
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, 0xffff_ffff),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
        (0xf0, 0x3ff),
    ];
    for (offset, value) in expected {
        cpu.write32(offset, u32::MAX);
        assert_eq!(cpu.read32(offset), value, "{offset:#x}");
    }
}

#[test]
fn software_disable_masks_the_vector_table() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    cpu.write32(0x320, 0x40);
    cpu.write32(0xf0, 0xff);
    assert_eq!(cpu.read32(0x320), 0x1_0040);
    cpu.write32(0x320, 0x41);
    assert_eq!(cpu.read32(0x320), 0x1_0041, "the mask cannot be removed");
}

#[test]
fn only_aligned_32_bit_writes_count_and_reads_may_be_narrow() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    cpu.mmio_write(0x80, &[0x20]);
    cpu.mmio_write(0x84, &[0x20, 0, 0, 0]);
    cpu.mmio_write(0x82, &[0x20, 0, 0, 0]);
    assert_eq!(cpu.tpr(), 0);
    cpu.mmio_write(0x80, &[0x20, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(cpu.tpr(), 0x20);
    let mut wide = [0xff; 8];
    cpu.mmio_read(0x30, &mut wide);
    assert_eq!(wide, [0x14, 0, 5, 0, 0, 0, 0, 0]);
    let mut byte = [0xff];
    cpu.mmio_read(0x32, &mut byte);
    assert_eq!(byte, [5]);
    let mut across = [0xff; 64];
    cpu.mmio_read(0xfd0, &mut across);
    assert_eq!(across, [0; 64]);
}

#[test]
fn apic_base_moves_between_modes_as_the_manual_allows() {
    // From which mode, to which, and whether that is allowed (SDM 3A figure 10-27).
    let cases = [
        (0, 0, true),
        (0, ENABLE, true),
        (0, ENABLE | X2APIC, false),
        (0, X2APIC, false),
        (ENABLE, 0, true),
        (ENABLE, ENABLE, true),
        (ENABLE, ENABLE | X2APIC, true),
        (ENABLE, X2APIC, false),
        (ENABLE | X2APIC, 0, true),
        (ENABLE | X2APIC, ENABLE, false),
        (ENABLE | X2APIC, ENABLE | X2APIC, true),
        (ENABLE | X2APIC, X2APIC, false),
    ];
    for (from, to, allowed) in cases {
        let mut bench = Bench::cold(2);
        let cpu = &mut bench.cpu[1];
        cpu.msr_write(0x1b, BASE | from).unwrap();
        assert_eq!(cpu.msr_write(0x1b, BASE | to).is_ok(), allowed, "{from:#x} to {to:#x}");
        assert_eq!(cpu.msr_read(0x1b), Ok(BASE | if allowed { to } else { from }));
    }
}

#[test]
fn apic_base_rejects_reserved_bits_and_moves_the_page() {
    let mut bench = Bench::cold(2);
    let cpu = &mut bench.cpu[1];
    for bit in (0..8).chain([9]).chain(39..64) {
        assert_eq!(cpu.msr_write(0x1b, BASE | ENABLE | 1 << bit), Err(MsrFault), "bit {bit}");
    }
    cpu.msr_write(0x1b, 0x12_3456_7000 | ENABLE).unwrap();
    assert_eq!(cpu.mmio_base(), Some(0x12_3456_7000));
    cpu.msr_write(0x1b, BASE | ENABLE | 0x100).unwrap();
    assert_eq!(cpu.apic_base(), BASE | ENABLE, "the bootstrap flag is not software's");
}

#[test]
fn disabling_forgets_the_registers() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    cpu.write32(0x80, 0x20);
    cpu.write32(0x300, 0x4_0041);
    cpu.msr_write(0x1b, BASE).unwrap();
    assert_eq!(cpu.mmio_base(), None);
    assert_eq!(cpu.read32(0x80), 0xffff_ffff);
    cpu.msr_write(0x1b, BASE | ENABLE).unwrap();
    assert_eq!((cpu.read32(0x80), cpu.read32(0xf0), cpu.read32(0x220)), (0, 0xff, 0));
}

#[test]
fn x2apic_without_the_feature_is_reserved() {
    let config = IrqChipConfig { cpus: 1, physical_bits: 39, x2apic: false, tsc_deadline: false };
    let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
    let mut cpu = IrqChip::new(config).add_local_apic(0, clock).unwrap();
    assert_eq!(cpu.msr_write(0x1b, BASE | ENABLE | X2APIC), Err(MsrFault));
    assert_eq!((cpu.msr_read(0x6e0), cpu.msr_write(0x6e0, 1)), (Err(MsrFault), Err(MsrFault)));
}

#[test]
fn x2apic_registers_fault_outside_the_mode() {
    let mut bench = Bench::new(1);
    for index in 0x800..=0x8ff {
        assert_eq!(bench.cpu[0].msr_read(index), Err(MsrFault));
        assert_eq!(bench.cpu[0].msr_write(index, 0), Err(MsrFault));
    }
}

#[test]
fn x2apic_registers_can_be_read_and_written_as_the_table_says() {
    const READ_ONLY: [u32; 6] = [0x802, 0x803, 0x80a, 0x80d, 0x839, 0x810];
    const READ_WRITE: [u32; 13] =
        [0x808, 0x80f, 0x828, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e, 0x808];
    const WRITE_ONLY: [u32; 2] = [0x80b, 0x83f];
    let mut bench = Bench::x2apic(1);
    let cpu = &mut bench.cpu[0];
    for index in 0x800..=0x8ff {
        let bits = (0x810..=0x827).contains(&index);
        let reads = READ_ONLY.contains(&index) || READ_WRITE.contains(&index) || bits;
        let writes = WRITE_ONLY.contains(&index) || READ_WRITE.contains(&index);
        assert_eq!(cpu.msr_read(index).is_ok(), reads, "read {index:#x}");
        assert_eq!(cpu.msr_write(index, 0).is_ok(), writes, "write {index:#x}");
    }
}

#[test]
fn x2apic_reserved_bits_fault_and_change_nothing() {
    let cases = [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 0x400),
        (0x80f, 0x1000),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
        (0x832, 1 << 8),
        (0x832, 1 << 19),
        (0x835, 1 << 11),
        (0x837, 1 << 10),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ];
    let mut bench = Bench::x2apic(1);
    let cpu = &mut bench.cpu[0];
    let before = cpu.state();
    for (index, value) in cases {
        assert_eq!(cpu.msr_write(index, value), Err(MsrFault), "{index:#x} {value:#x}");
    }
    assert_eq!(cpu.state(), before);
}

#[test]
fn x2apic_icr_is_one_64_bit_register() {
    let mut bench = Bench::x2apic(2);
    bench.cpu[0].msr_write(0x830, 1 << 32 | 0x4041).unwrap();
    assert_eq!(bench.cpu[0].msr_read(0x830), Ok(1 << 32 | 0x4041));
    assert_eq!(bench.cpu[1].drain(), [0x41]);
    bench.cpu[1].msr_write(0x80b, 0).unwrap();
    assert_eq!(bench.cpu[1].msr_read(0x812), Ok(0));
    assert_eq!((bench.cpu[1].msr_read(0x802), bench.cpu[1].mmio_base()), (Ok(1), None));
}

#[test]
fn init_keeps_the_mode_and_reset_does_not() {
    let mut bench = Bench::x2apic(2);
    let cpu = &mut bench.cpu[1];
    cpu.msr_write(0x808, 0x20).unwrap();
    cpu.init();
    assert_eq!((cpu.msr_read(0x808), cpu.apic_base()), (Ok(0), BASE | ENABLE | X2APIC));
    cpu.reset();
    assert_eq!(cpu.apic_base(), BASE | ENABLE);
}
