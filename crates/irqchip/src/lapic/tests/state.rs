use ringfence_engine::{InterruptSink, SavedState, StateError};

use super::*;

/// A machine in the middle of everything: interrupts requested and in service, timers running.
fn busy() -> Bench {
    let mut bench = Bench::new(3);
    bench.pass(1000);
    for vector in [0x31, 0x51, 0x52] {
        bench.chip.send_msi(0xfee0_0000, vector);
    }
    assert_eq!(bench.cpu[0].acknowledge(), 0x52);
    bench.chip.write_ioapic(0x00, 0x24);
    bench.chip.write_ioapic(0x10, 0x8061);
    bench.chip.set_gsi(10, true);
    bench.cpu[0].write32(0x3e0, 0xb);
    bench.cpu[0].write32(0x320, 0x2_0071);
    bench.cpu[0].write32(0x380, 1000);
    bench.cpu[1].write32(0x320, 0x4_0072);
    bench.cpu[1].msr_write(0x6e0, 1700).unwrap();
    let base = bench.cpu[2].apic_base();
    bench.cpu[2].msr_write(0x1b, base | 0x400).unwrap();
    bench.cpu[0].write32(0x310, 0x0100_0000);
    bench.cpu[0].write32(0x300, 0x4400);
    bench.cpu[0].write32(0x310, 0x0200_0000);
    bench.cpu[0].write32(0x300, 0x4500);
    bench.cpu[0].write32(0x300, 0x0699);
    bench.pass(300);
    bench
}

fn park(bench: &Bench) -> Vec<SavedState> {
    bench.cpu.iter().for_each(LocalApic::park);
    bench.chip.save()
}

/// What happens from here on, as text.
fn future(bench: &mut Bench) -> Vec<String> {
    let mut log = Vec::new();
    for _ in 0..12 {
        bench.pass(100);
        let now = bench.clock.now().0;
        for (index, cpu) in bench.cpu.iter_mut().enumerate() {
            let (nmi, init, sipi) = (cpu.take_nmi(), cpu.take_init(), cpu.take_sipi());
            log.push(format!("{now} {index} {nmi} {init} {sipi:?} {:?} {:?}", cpu.drain(), cpu.state()));
            cpu.eoi();
        }
    }
    log
}

#[test]
fn restored_machine_goes_on_as_the_saved_one() {
    let mut first = busy();
    let sections = park(&first);
    let names: Vec<&str> = sections.iter().map(|section| &*section.name).collect();
    assert_eq!(names, ["pic", "ioapic", "lapic.0", "lapic.1", "lapic.2"]);
    let mut second = Bench::cold(3);
    second.clock.advance_to(first.clock.now());
    second.chip.restore(&sections).unwrap();
    assert_eq!(second.chip.save(), sections, "saving again before the vCPUs run gives the same");
    second.cpu.iter_mut().for_each(LocalApic::unpark);
    assert_eq!(park(&second), sections);
    let log = future(&mut second);
    assert_eq!(log, future(&mut first));
    assert!(log.iter().any(|line| line.contains("Some(153)")), "the start-up IPI was there");
}

#[test]
fn restored_timer_keeps_its_distance_on_a_clock_of_another_time() {
    let first = busy();
    let sections = park(&first);
    let mut second = Bench::cold(3);
    second.clock.advance_to(VirtualTime(500_000));
    second.chip.restore(&sections).unwrap();
    second.cpu.iter_mut().for_each(LocalApic::unpark);
    assert_eq!(second.cpu[0].next_deadline(), VirtualTime(500_000 + 700));
}

#[test]
fn bad_sections_are_refused_and_change_nothing() {
    let sections = park(&busy());
    let bench = Bench::new(3);
    let before = park(&bench);
    let missing: Vec<SavedState> = sections[..4].to_vec();
    assert!(matches!(bench.chip.restore(&missing), Err(StateError::Invalid { .. })));
    let spoil = |index: usize, field: &str, value: serde_json::Value| {
        let mut sections = sections.clone();
        sections[index].fields[field] = value;
        sections
    };
    let cases = [
        spoil(0, "master", "x".into()),
        spoil(1, "redirection", vec![0; 23].into()),
        spoil(2, "id", 7.into()),
        spoil(2, "apic_base", 0x400.into()),
        spoil(2, "apic_base", u64::MAX.into()),
        spoil(2, "irr", vec![1, 0, 0, 0, 0, 0, 0, 0].into()),
        spoil(2, "remaining_ns", (1_u64 << 40).into()),
        spoil(3, "tpr", 256.into()),
    ];
    for case in cases {
        assert!(bench.chip.restore(&case).is_err());
    }
    let mut newer = sections.clone();
    newer[1].version = 2;
    assert!(matches!(bench.chip.restore(&newer), Err(StateError::TooNew { .. })));
    assert_eq!(bench.chip.save(), before);
}

#[test]
fn register_page_for_kvm_carries_the_registers() {
    let mut bench = busy();
    for cpu in &mut bench.cpu {
        let state = cpu.state();
        let page = state.to_kvm_page();
        let mut copy = LapicState {
            apic_base: state.apic_base,
            tsc_deadline: state.tsc_deadline,
            errors: state.errors,
            nmi: state.nmi,
            init: state.init,
            sipi: state.sipi,
            ..LapicState::reset(state.id)
        };
        copy.load_kvm_page(&page).unwrap();
        assert_eq!(copy, state);
        if cpu.mmio_base().is_some() {
            for offset in (0x20..0x400).step_by(16).filter(|offset| ![0x90, 0xb0, 0xc0].contains(offset)) {
                let at = offset as usize;
                let word = u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
                assert_eq!(word, cpu.read32(offset), "{offset:#x}");
            }
        }
        copy.id = 9;
        assert!(matches!(copy.load_kvm_page(&page), Err(PageError::WrongId { expected: 9, .. })));
    }
}

#[test]
fn reset_parks_so_that_an_older_restore_is_not_taken_over() {
    let mut bench = busy();
    let sections = park(&bench);
    bench.chip.restore(&sections).unwrap();
    bench.cpu[0].reset();
    bench.cpu[0].unpark();
    assert_eq!(bench.cpu[0].state(), LapicState::reset(0));
}
