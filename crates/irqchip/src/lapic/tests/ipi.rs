use std::sync::atomic::{AtomicU32, Ordering};

use ringfence_engine::InterruptSink;

use super::*;

/// Sends an IPI in xAPIC mode.
fn send(bench: &mut Bench, from: usize, destination: u8, low: u32) {
    bench.cpu[from].write32(0x310, u32::from(destination) << 24);
    bench.cpu[from].write32(0x300, low);
}

/// Which local APICs got `vector`; takes it there.
fn receivers(bench: &mut Bench, vector: u8) -> Vec<usize> {
    let got = |(index, cpu): (usize, &mut LocalApic)| (cpu.take() == Some(vector)).then_some(index);
    bench.cpu.iter_mut().enumerate().filter_map(got).collect()
}

#[test]
fn physical_destination_and_shorthands_choose_receivers() {
    let mut bench = Bench::new(4);
    let cases: [(u8, u32, &[usize]); 7] = [
        (2, 0x0_4041, &[2]),
        (9, 0x0_4041, &[]),
        (0xff, 0x0_4041, &[0, 1, 2, 3]),
        (0, 0x4_4041, &[1]),
        (0, 0x8_4041, &[0, 1, 2, 3]),
        (0, 0xc_4041, &[0, 2, 3]),
        (0xff, 0x0_c041, &[0, 1, 2, 3]),
    ];
    for (destination, low, expected) in cases {
        send(&mut bench, 1, destination, low);
        assert_eq!(receivers(&mut bench, 0x41), expected, "{destination:#x} {low:#x}");
    }
    assert_eq!(bench.cpu[1].read32(0x300), 0x0_c041);
    assert_eq!(bench.cpu[1].read32(0x310), 0xff00_0000);
}

#[test]
fn flat_logical_destination_is_a_set_of_bits() {
    let mut bench = Bench::new(4);
    for (index, cpu) in bench.cpu.iter_mut().enumerate() {
        cpu.write32(0x0d0, 1 << (24 + index));
    }
    for (mda, expected) in [(0x5_u8, &[0, 2][..]), (0x8, &[3]), (0x10, &[]), (0xff, &[0, 1, 2, 3])] {
        send(&mut bench, 0, mda, 0x4841);
        assert_eq!(receivers(&mut bench, 0x41), expected, "{mda:#x}");
    }
}

#[test]
fn cluster_logical_destination_needs_the_same_cluster() {
    let mut bench = Bench::new(4);
    for (index, cpu) in bench.cpu.iter_mut().enumerate() {
        cpu.write32(0x0e0, 0x0fff_ffff);
        assert_eq!(cpu.read32(0x0e0), 0x0fff_ffff);
        cpu.write32(0x0d0, (((index as u32) / 2) << 4 | 1 << (index % 2)) << 24);
    }
    for (mda, expected) in [(0x03_u8, &[0, 1][..]), (0x12, &[3]), (0x23, &[]), (0xff, &[0, 1, 2, 3])] {
        send(&mut bench, 0, mda, 0x4841);
        assert_eq!(receivers(&mut bench, 0x41), expected, "{mda:#x}");
    }
}

#[test]
fn lowest_priority_goes_to_one_and_shuns_the_busy() {
    let mut bench = Bench::new(4);
    for cpu in [0, 1, 3] {
        bench.cpu[cpu].set_tpr(0x20);
    }
    for _ in 0..8 {
        send(&mut bench, 0, 0xff, 0x4141);
        assert_eq!(receivers(&mut bench, 0x41), [2]);
    }
    bench.cpu[2].set_tpr(0x20);
    let mut served = [0; 4];
    for _ in 0..8 {
        send(&mut bench, 0, 0xff, 0x4141);
        let one = receivers(&mut bench, 0x41);
        assert_eq!(one.len(), 1);
        served[one[0]] += 1;
    }
    assert_eq!(served, [2, 2, 2, 2], "equals take turns");
}

#[test]
fn msi_reaches_logical_and_lowest_priority_targets() {
    let mut bench = Bench::new(3);
    for (index, cpu) in bench.cpu.iter_mut().enumerate() {
        cpu.write32(0x0d0, 1 << (24 + index));
    }
    bench.chip.send_msi(0xfee0_6004, 0x0041);
    assert_eq!(receivers(&mut bench, 0x41), [1, 2]);
    bench.chip.send_msi(0xfee0_600c, 0x0041);
    assert_eq!(receivers(&mut bench, 0x41).len(), 1, "redirection hint");
    bench.chip.send_msi(0xfee0_1000, 0x0400);
    let nmi: Vec<bool> = bench.cpu.iter_mut().map(LocalApic::take_nmi).collect();
    assert_eq!(nmi, [false, true, false]);
}

#[test]
fn x2apic_ipis_use_wide_destinations() {
    let mut bench = Bench::x2apic(20);
    let send = |bench: &mut Bench, icr: u64| bench.cpu[3].msr_write(0x830, icr).unwrap();
    send(&mut bench, 17 << 32 | 0x41);
    assert_eq!(receivers(&mut bench, 0x41), [17]);
    assert_eq!(bench.cpu[17].msr_read(0x80d), Ok(1 << 16 | 2));
    send(&mut bench, 0x0001_000a << 32 | 0x841);
    assert_eq!(receivers(&mut bench, 0x41), [17, 19]);
    send(&mut bench, 0xff << 32 | 0x41);
    assert_eq!(receivers(&mut bench, 0x41), Vec::<usize>::new(), "255 is nobody with 32 bits");
    send(&mut bench, 0xffff_ffff << 32 | 0x41);
    assert_eq!(receivers(&mut bench, 0x41).len(), 20);
    bench.cpu[5].msr_write(0x83f, 0x52).unwrap();
    assert_eq!(receivers(&mut bench, 0x52), [5]);
    // From devices 8 bits still say everybody.
    bench.chip.send_msi(0xfeef_f000, 0x41);
    assert_eq!(receivers(&mut bench, 0x41).len(), 20);
}

#[test]
fn nmi_reaches_its_target_once() {
    let mut bench = Bench::new(2);
    send(&mut bench, 0, 1, 0x4400);
    send(&mut bench, 0, 1, 0x4400);
    assert_eq!(bench.cpu[1].inbox().pending(), pending::NMI);
    assert!(bench.cpu[1].take_nmi());
    assert!(!bench.cpu[1].take_nmi());
}

#[test]
fn init_then_start_up_wakes_a_processor_as_linux_does() {
    let mut bench = Bench::new(2);
    // INIT assert, INIT de-assert, start-up twice.
    send(&mut bench, 0, 1, 0x0_c500);
    send(&mut bench, 0, 1, 0x0_8500);
    send(&mut bench, 0, 1, 0x0_0699);
    send(&mut bench, 0, 1, 0x0_0677);
    assert_eq!(bench.cpu[1].inbox().pending() & pending::ALWAYS, pending::INIT | pending::SIPI);
    assert!(bench.cpu[1].take_init());
    bench.cpu[1].init();
    assert_eq!(bench.cpu[1].take_sipi(), Some(0x99), "the first counts");
    assert_eq!(bench.cpu[1].take_sipi(), None);
    assert!(!bench.cpu[1].take_init());
    assert_eq!(bench.cpu[1].read32(0xf0), 0xff, "registers are reset");
}

#[test]
fn init_makes_an_earlier_start_up_void() {
    let mut bench = Bench::new(2);
    send(&mut bench, 0, 1, 0x0699);
    send(&mut bench, 0, 1, 0x4500);
    assert!(bench.cpu[1].take_init());
    assert_eq!(bench.cpu[1].take_sipi(), None);
}

#[test]
fn illegal_vector_is_not_sent() {
    let mut bench = Bench::new(2);
    send(&mut bench, 0, 1, 0x4005);
    bench.cpu[0].write32(0x280, 0);
    assert_eq!(bench.cpu[0].read32(0x280), 0x20);
    assert_eq!(bench.cpu[1].pending_interrupt(), None);
    bench.cpu[1].write32(0x280, 0);
    assert_eq!(bench.cpu[1].read32(0x280), 0);
}

#[test]
fn waker_runs_when_a_pending_bit_becomes_set_and_not_for_oneself() {
    let mut bench = Bench::new(2);
    let counts: Vec<Arc<AtomicU32>> = bench
        .cpu
        .iter()
        .map(|cpu| {
            let count = Arc::new(AtomicU32::new(0));
            let counter = Arc::clone(&count);
            cpu.inbox().set_waker(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            count
        })
        .collect();
    send(&mut bench, 0, 0, 0x8_4041);
    send(&mut bench, 0, 0, 0x8_4042);
    let woken =
        |counts: &[Arc<AtomicU32>]| counts.iter().map(|c| c.load(Ordering::Relaxed)).collect::<Vec<_>>();
    assert_eq!(woken(&counts), [0, 1]);
    assert_eq!(bench.cpu[1].drain(), [0x42]);
    bench.chip.send_msi(0xfee0_1000, 0x51);
    assert_eq!(woken(&counts), [0, 2]);
}

/// Four threads post 64 vectors each, again and again, and wait until the owner has taken them; the owner
/// looks only when the pending word tells it to.
#[test]
fn posts_from_many_threads_are_never_overlooked() {
    const ROUNDS: u32 = 500;
    let mut bench = Bench::new(1);
    let taken: Arc<Vec<AtomicU32>> = Arc::new((0..256).map(|_| AtomicU32::new(0)).collect());
    let mut cpu = bench.cpu.remove(0);
    let chip = &bench.chip;
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let taken = Arc::clone(&taken);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    let vector = 0x40 + thread * 0x30 + round % 0x30;
                    let before = taken[vector as usize].load(Ordering::SeqCst);
                    chip.send_msi(0xfee0_0000, vector);
                    while taken[vector as usize].load(Ordering::SeqCst) == before {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let mut left = 4 * ROUNDS;
        while left > 0 {
            if cpu.inbox().pending() == 0 {
                std::thread::yield_now();
                continue;
            }
            if let Some(Interrupt::Fixed(expected)) = cpu.pending_interrupt() {
                let vector = cpu.acknowledge();
                assert!(vector >= expected, "only a higher one may have come in between");
                cpu.eoi();
                taken[usize::from(vector)].fetch_add(1, Ordering::SeqCst);
                left -= 1;
            }
        }
    });
    assert_eq!(cpu.pending_interrupt(), None);
}
