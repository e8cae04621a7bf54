//! The chip as the bus sees it, and arbitrary use of everything at once.

use std::sync::Arc;

use ringfence_engine::{AddressSpace, ClockMode, InterruptSink, VirtualClock};

use crate::{IrqChip, IrqChipConfig, IrqChipError, LocalApic};

fn chip(cpus: u32) -> (Arc<IrqChip>, Arc<VirtualClock>, Vec<LocalApic>) {
    let chip = IrqChip::new(IrqChipConfig { cpus, physical_bits: 46, x2apic: true, tsc_deadline: true });
    let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
    let cpus = (0..cpus).map(|id| chip.add_local_apic(id, Arc::clone(&clock)).unwrap()).collect();
    (chip, clock, cpus)
}

#[test]
fn local_apic_ids_are_unique_and_in_range() {
    let (chip, clock, _cpus) = chip(2);
    let taken = chip.add_local_apic(1, Arc::clone(&clock));
    assert_eq!(taken.err(), Some(IrqChipError::IdTaken(1)));
    let beyond = chip.add_local_apic(2, clock);
    assert_eq!(beyond.err(), Some(IrqChipError::IdOutOfRange { id: 2, cpus: 2 }));
    assert!(chip.inbox(1).is_some() && chip.inbox(2).is_none());
}

#[test]
fn placements_are_where_a_pc_has_them() {
    let (chip, ..) = chip(1);
    let list: Vec<(AddressSpace, u64, u64)> =
        chip.placements().iter().map(|p| (p.space, p.range.start.0, p.range.len)).collect();
    let expected = [
        (AddressSpace::Port, 0x20, 2),
        (AddressSpace::Port, 0xa0, 2),
        (AddressSpace::Port, 0x4d0, 2),
        (AddressSpace::Memory, 0xfec0_0000, 0x1000),
    ];
    assert_eq!(list, expected);
}

#[test]
fn registers_answer_through_the_placements() {
    let (chip, ..) = chip(1);
    let places = chip.placements();
    let read = |place: usize, offset: u64| {
        let mut data = [0xff; 4];
        let len = if place == 3 { 4 } else { 1 };
        places[place].device.read(offset, &mut data[..len]);
        u32::from_le_bytes(data) & if place == 3 { u32::MAX } else { 0xff }
    };
    places[0].device.write(1, &[0xfb]);
    places[1].device.write(1, &[0xfe]);
    places[2].device.write(0, &[0x20, 0x0c]);
    assert_eq!((read(0, 1), read(1, 1), read(2, 0), read(2, 1)), (0xfb, 0xfe, 0x20, 0x0c));
    places[3].device.write(0, &[1]);
    assert_eq!((read(3, 0), read(3, 0x10)), (1, 0x0017_0020));
    places[3].device.write(0, &[0x10, 0, 0, 0]);
    places[3].device.write(0x10, &[0x31, 0, 0, 0]);
    places[3].device.write(0x10, &[0x32]);
    assert_eq!(read(3, 0x10), 0x31, "a byte is no write to the data register");
    let mut wide = [0xff; 64];
    places[3].device.read(0xff8, &mut wide);
    places[0].device.read(1, &mut wide);
    places[0].device.write(1, &wide);
}

#[test]
fn reset_masks_everything_but_keeps_levels() {
    let (chip, _clock, mut cpus) = chip(1);
    let places = chip.placements();
    cpus[0].mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
    chip.set_gsi(10, true);
    places[3].device.write(0, &[0x24]);
    places[3].device.write(0x10, &0x8041_u32.to_le_bytes());
    chip.reset();
    cpus[0].reset();
    assert_eq!(cpus[0].pending_interrupt(), None);
    cpus[0].mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
    places[3].device.write(0, &[0x24]);
    places[3].device.write(0x10, &0x8041_u32.to_le_bytes());
    assert_eq!(cpus[0].pending_interrupt(), Some(crate::Interrupt::Fixed(0x41)));
}

/// Xorshift, so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Small numbers, single bits and noise.
    fn value(&mut self) -> u64 {
        let noise = self.next();
        match self.below(4) {
            0 => noise & 0xff,
            1 => noise & 0x3_ffff,
            2 => 1 << (noise & 63),
            _ => noise,
        }
    }
}

#[test]
fn arbitrary_use_never_panics_and_keeps_what_must_hold() {
    let (chip, clock, mut cpus) = chip(3);
    let places = chip.placements();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut taken = 0_u32;
    for step in 0..200_000_u32 {
        let cpu = random.below(3) as usize;
        let cpu = &mut cpus[cpu];
        let (offset, value) = (random.below(0x1000), random.value());
        let bytes = value.to_le_bytes();
        match random.below(14) {
            0 => cpu.mmio_write(offset, &bytes[..random.below(9) as usize]),
            1 | 2 => cpu.mmio_write(offset % 0x40 * 16, &bytes[..4]),
            3 => cpu.mmio_read(offset, &mut [0; 64][..random.below(65) as usize]),
            4 => drop(cpu.msr_write(0x800 + offset as u32 % 0x40, value & random.value())),
            5 => drop(cpu.msr_read(0x800 + offset as u32 % 0x100)),
            6 => {
                let mode = random.below(4) << 10;
                let _ = cpu.msr_write(0x1b, 0xfee0_0000 | mode);
                let _ = cpu.msr_write(0x6e0, clock.tsc() + value % 1000);
            }
            7 => places[random.below(3) as usize].device.write(offset & 1, &bytes[..1]),
            8 => places[random.below(4) as usize].device.read(offset & 0x3f, &mut [0; 8][..2]),
            9 => {
                places[3].device.write(0, &[0x10 + random.below(0x30) as u8]);
                places[3].device.write(0x10, &bytes[..4]);
                places[3].device.write(offset & 0xff, &bytes[..4]);
            }
            10 => chip.set_gsi(random.below(26) as u32, value & 1 != 0),
            11 => chip.send_msi(0xfee0_0000 | random.next() & 0xf_ffff, value as u32),
            12 => {
                let now = clock.now().after(value & 0xffff);
                clock.advance_to(now);
                cpu.run_timer(now);
                assert!(cpu.next_deadline() > now);
            }
            _ => {
                let events = (cpu.take_nmi(), cpu.take_init(), cpu.take_sipi());
                if events.1 {
                    cpu.init();
                }
                if let Some(interrupt) = cpu.pending_interrupt() {
                    assert_ne!(cpu.inbox().pending() & crate::pending::INTERRUPT, 0);
                    let vector = cpu.acknowledge();
                    if let crate::Interrupt::Fixed(expected) = interrupt {
                        assert_eq!(vector, expected);
                    }
                    taken += 1;
                    cpu.eoi();
                } else {
                    assert_eq!(cpu.inbox().pending() & crate::pending::INTERRUPT, 0);
                }
            }
        }
        if step % 1000 == 0 {
            cpus.iter().for_each(LocalApic::park);
            let saved = chip.save();
            chip.restore(&saved).unwrap();
            cpus.iter_mut().for_each(LocalApic::unpark);
            cpus.iter().for_each(LocalApic::park);
            assert_eq!(chip.save(), saved);
        }
    }
    assert!(taken > 500, "only {taken} interrupts were taken");
}
