//! All devices together, as a machine would place them.

use std::sync::Arc;
use std::time::Duration;

use ringfence_engine::{AddressSpace, Bus, SavedState};
use ringfence_memory::GuestMemory;

use crate::device::lock;
use crate::rtc::RtcConfig;
use crate::serial::SerialOutput;
use crate::testing::{Bench, Random, Requests};
use crate::{Device, SystemBus, platform};

struct Discard;

impl SerialOutput for Discard {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn on_room(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

struct Pc {
    bench: Bench,
    requests: Arc<Requests>,
    devices: Vec<Arc<dyn Device>>,
    bus: SystemBus,
}

fn pc() -> Pc {
    let bench = Bench::new();
    let requests = Arc::new(Requests::default());
    let power = || Arc::clone(&requests) as Arc<dyn crate::PowerControl>;
    let clock = || Arc::clone(&bench.clock);
    let memory = Arc::new(GuestMemory::flat(1 << 20).unwrap());
    let config =
        RtcConfig { wall_clock: Duration::from_secs(1), memory_below_4g: 1 << 20, memory_above_4g: 0 };
    let serial =
        |i: usize| crate::serial::Serial::new(i, bench.irq(platform::SERIAL_IRQS[i]), Arc::new(Discard));
    let devices: Vec<Arc<dyn Device>> = vec![
        crate::pit::Pit::new(clock(), &bench.timers, bench.irq(platform::PIT_IRQ)),
        crate::rtc::Rtc::new(clock(), &bench.timers, bench.irq(platform::RTC_IRQ), config),
        serial(0),
        serial(1),
        crate::i8042::I8042::new(bench.irq(platform::I8042_IRQ), Arc::clone(&memory), power()),
        crate::port92::Port92::new(Arc::clone(&memory), power()),
        crate::acpi_pm::AcpiPm::new(clock(), &bench.timers, bench.irq(platform::SCI_IRQ), power()),
        crate::pci::PciHost::new(crate::pci::PciBus::new(), power()),
        crate::fw_cfg::FwCfg::new(crate::fw_cfg::FwCfgItems::new(), memory),
        crate::pvpanic::PvPanic::new(power()),
        crate::debug_exit::DebugExit::new(0xf4, power()),
        crate::watchdog::Watchdog::new(clock(), &bench.timers, || ()),
    ];
    let placements = devices.iter().flat_map(|device| Arc::clone(device).placements());
    let bus = SystemBus::new(placements.chain(crate::bus::delay_ports())).unwrap();
    Pc { bench, requests, devices, bus }
}

#[test]
fn all_devices_answer_where_the_platform_says() {
    let pc = pc();
    let taken: Vec<(u64, u64)> =
        pc.bus.placements(AddressSpace::Port).iter().map(|p| (p.range.start.0, p.range.len)).collect();
    let expected = [
        (0x40, 4),
        (0x60, 1),
        (0x61, 1),
        (0x64, 1),
        (0x70, 2),
        (0x80, 1),
        (0x92, 1),
        (0xb2, 2),
        (0xed, 1),
        (0xf4, 4),
        (0x2f8, 8),
        (0x3f8, 8),
        (0x505, 1),
        (0x510, 12),
        (0x600, 0x40),
        (0x660, 8),
        (0xcf8, 8),
    ];
    assert_eq!(taken, expected);
}

#[test]
fn saved_sections_have_names_of_their_own() {
    let pc = pc();
    let saved: Vec<SavedState> = pc.devices.iter().map(|device| device.save()).collect();
    let mut names: Vec<&str> = saved.iter().map(|section| section.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), pc.devices.len());
    for (i, device) in pc.devices.iter().enumerate() {
        let json = serde_json::to_string(&saved[i]).unwrap();
        device.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(device.save(), saved[i]);
        assert!(device.restore(&saved[(i + 1) % saved.len()]).is_err(), "another device's section");
        let newer = SavedState { version: saved[i].version + 1, ..saved[i].clone() };
        assert!(device.restore(&newer).is_err());
    }
}

/// Runs the same random port accesses on two machines in step: nothing panics or hangs, and as nothing looks at
/// the host's clock, both say the same.
#[test]
fn same_accesses_give_the_same_answers_in_counted_mode() {
    let machines = [pc(), pc()];
    let ranges = machines[0].bus.placements(AddressSpace::Port);
    let mut random = Random::new(20);
    for _ in 0..100_000 {
        let range = &ranges[random.below(ranges.len() as u64) as usize].range;
        let port = (range.start.0 + random.below(range.len + 3)).saturating_sub(1) as u16;
        let len = 1 << random.below(3);
        let value = random.next().to_le_bytes();
        let write = random.below(2) == 0;
        let pass = if random.below(10) == 0 { random.below(20_000_000) } else { random.below(2_000) };
        let mut answers = machines.iter().map(|pc| {
            let mut data = value;
            if write {
                pc.bus.port_write(port, &data[..len]);
            } else {
                pc.bus.port_read(port, &mut data[..len]);
            }
            pc.bench.run_for(pass);
            let mut log = lock(&pc.bench.wires.log);
            (data, log.levels, std::mem::take(&mut log.edges), pc.requests.take())
        });
        assert_eq!(answers.next(), answers.next(), "{port:#x}");
    }
}
