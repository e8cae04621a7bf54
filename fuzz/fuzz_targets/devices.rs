//! A guest may do anything to the bus: devices and interrupt controllers take any access at any time, without a panic.
//!
//! Input is a list of operations of eight bytes: kind, size, address (two bytes), value (four bytes). Some write to memory, for the one of these
//! devices that has access to it, and tell it where.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ringfence_devices::fw_cfg::FwCfgItems;
use ringfence_devices::rtc::{Rtc, RtcConfig};
use ringfence_devices::serial::{Serial, SerialOutput};
use ringfence_devices::{Device, PowerControl, PowerEvent, SystemBus, bus, platform};
use ringfence_engine::{Bus, ClockMode, InterruptSink, IrqLine, TimerQueue, VirtualClock, VirtualTime};
use ringfence_fuzz::note_transfers;
use ringfence_irqchip::{IrqChip, IrqChipConfig, LocalApic};
use ringfence_memory::{GuestAddress, GuestMemory};

struct Discard;

impl SerialOutput for Discard {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn on_room(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

struct Ignore;

impl PowerControl for Ignore {
    fn request(&self, _: PowerEvent) {}
}

struct Pc {
    clock: Arc<VirtualClock>,
    timers: Arc<TimerQueue>,
    chip: Arc<IrqChip>,
    apic: LocalApic,
    memory: Arc<GuestMemory>,
    bus: SystemBus,
}

/// The ports of fw_cfg's access to memory, both halves of an address, and where that writes its answers.
const FW_CFG_DMA: [u16; 2] = [0x514, 0x518];

fn pc() -> Pc {
    let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
    let timers = Arc::new(TimerQueue::default());
    let chip = IrqChip::new(IrqChipConfig { cpus: 1, physical_bits: 40, x2apic: true, tsc_deadline: true });
    let apic = chip.add_local_apic(0, Arc::clone(&clock)).expect("the first local APIC");
    let memory = Arc::new(GuestMemory::flat(1 << 20).expect("1 MiB of memory"));
    let power = || Arc::new(Ignore) as Arc<dyn PowerControl>;
    let irq = |gsi| IrqLine::new(Arc::clone(&chip) as Arc<dyn InterruptSink>, gsi);
    let time = || Arc::clone(&clock);
    let rtc = RtcConfig { wall_clock: Duration::from_secs(1), memory_below_4g: 1 << 20, memory_above_4g: 0 };
    let mut items = FwCfgItems::new();
    items.add_file("etc/fuzz", vec![0x5a; 300]).expect("a name that can be");
    let devices: Vec<Arc<dyn Device>> = vec![
        ringfence_devices::pit::Pit::new(time(), &timers, irq(platform::PIT_IRQ)),
        Rtc::new(time(), &timers, irq(platform::RTC_IRQ), rtc),
        Serial::new(0, irq(platform::SERIAL_IRQS[0]), Arc::new(Discard)),
        Serial::new(1, irq(platform::SERIAL_IRQS[1]), Arc::new(Discard)),
        ringfence_devices::i8042::I8042::new(irq(platform::I8042_IRQ), Arc::clone(&memory), power()),
        ringfence_devices::port92::Port92::new(Arc::clone(&memory), power()),
        ringfence_devices::acpi_pm::AcpiPm::new(time(), &timers, irq(platform::SCI_IRQ), power()),
        ringfence_devices::pci::PciHost::new(ringfence_devices::pci::PciBus::new(), power()),
        ringfence_devices::fw_cfg::FwCfg::new(items, Arc::clone(&memory)),
        ringfence_devices::pvpanic::PvPanic::new(power()),
        ringfence_devices::watchdog::Watchdog::new(time(), &timers, || ()),
        ringfence_devices::debug_exit::DebugExit::new(0xf4, power()),
    ];
    let placements = devices.into_iter().flat_map(Device::placements).chain(chip.placements());
    let bus = SystemBus::new(placements.chain(bus::delay_ports())).expect("devices do not overlap");
    Pc { clock, timers, chip, apic, memory, bus }
}

fuzz_target!(|data: &[u8]| {
    let (mut pc, mut transfers) = (pc(), 0);
    for operation in data.chunks_exact(8).take(512) {
        let [kind, size, a0, a1, v @ ..] = operation else { continue };
        let address = u16::from_le_bytes([*a0, *a1]);
        let size = [1, 2, 4, 8][usize::from(size & 3)];
        let mut value = [0; 8];
        value[..4].copy_from_slice(v);
        let number = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        let port_size = size.min(4);
        match kind % 11 {
            0 => pc.bus.port_write(address, &value[..port_size]),
            1 => pc.bus.port_read(address, &mut value[..port_size]),
            2 => pc.bus.memory_write(GuestAddress(0xfec0_0000 + u64::from(address)), &value[..size]),
            3 => pc.bus.memory_read(GuestAddress(0xfec0_0000 + u64::from(address)), &mut value[..size]),
            4 => pc.apic.mmio_write(u64::from(address & 0xfff), &value[..size]),
            5 => pc.apic.mmio_read(u64::from(address & 0xfff), &mut value[..size]),
            6 => {
                let msr = [0x1b, 0x6e0, 0x800 + u32::from(address & 0xff)][usize::from(a1 % 3)];
                let _ = pc.apic.msr_write(msr, u64::from(number) << (a1 & 31));
            }
            7 => {
                pc.clock.advance_to(VirtualTime(pc.clock.now().0 + u64::from(number >> 4)));
                pc.timers.run_due(pc.clock.now());
                pc.apic.run_timer(pc.clock.now());
                if pc.apic.pending_interrupt().is_some() {
                    pc.apic.acknowledge();
                }
            }
            8 => pc.chip.send_msi(0xfee0_0000 | u64::from(address), number),
            9 => {
                pc.memory.write_bytes(GuestAddress(u64::from(address)), &value[..size]).expect("it is in RAM")
            }
            // A request: select and read, so many bytes, to there; and its address.
            _ => {
                let at = GuestAddress(u64::from(address));
                let (select, command) = (u32::from(value[0]) << 16, u32::from(value[1] & 0x1f));
                let target = u64::from(value[2]) << 12 | u64::from(value[3]);
                let request = [
                    &(select | command).to_be_bytes()[..],
                    &u32::from(value[3]).to_be_bytes(),
                    &target.to_be_bytes(),
                ];
                pc.memory.write_bytes(at, &request.concat()).expect("it is in RAM");
                pc.bus.port_write(FW_CFG_DMA[0], &[0; 4]);
                pc.bus.port_write(FW_CFG_DMA[1], &u32::from(address).to_be_bytes());
                let answer = pc.memory.read::<u32>(at).expect("it is in RAM");
                transfers += u64::from(answer == 0);
            }
        }
    }
    note_transfers("fw_cfg", transfers);
});
