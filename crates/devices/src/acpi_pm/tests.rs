use super::*;
use crate::platform::{PM_TIMER_PORT, PM1A_CONTROL_PORT};
use crate::testing::{Bench, Requests, poke, read8, read16, read32, write8};
use crate::{Device, SystemBus};
use ringfence_engine::Bus;

const ENABLE: u64 = 2;
const CONTROL: u64 = (PM1A_CONTROL_PORT - ACPI_PORT) as u64;
const TIMER: u64 = (PM_TIMER_PORT - ACPI_PORT) as u64;
const GPE_ENABLE: u64 = GPE0 + 4;

struct Fixture {
    bench: Bench,
    requests: Arc<Requests>,
    pm: Arc<AcpiPm>,
    bus: SystemBus,
}

fn fixture() -> Fixture {
    let bench = Bench::new();
    let requests = Arc::new(Requests::default());
    let pm = AcpiPm::new(Arc::clone(&bench.clock), &bench.timers, bench.irq(9), Arc::clone(&requests) as _);
    let bus = SystemBus::new(Arc::clone(&pm).placements()).unwrap();
    Fixture { bench, requests, pm, bus }
}

impl Fixture {
    fn enable_acpi(&self) {
        self.bus.port_write(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
    }

    fn write16(&self, offset: u64, value: u16) {
        self.pm.write(offset, &value.to_le_bytes());
    }
}

#[test]
fn smi_command_turns_acpi_on_and_off() {
    let f = fixture();
    assert_eq!(read16(&*f.pm, CONTROL), 0);
    f.enable_acpi();
    assert_eq!(read16(&*f.pm, CONTROL), 1);
    f.write16(CONTROL, 0);
    assert_eq!(read16(&*f.pm, CONTROL), 1, "SCI_EN is not for the control register to change");
    f.bus.port_write(SMI_COMMAND_PORT, &[ACPI_DISABLE]);
    assert_eq!(read16(&*f.pm, CONTROL), 0);
}

#[test]
fn power_button_interrupts_until_its_status_is_cleared() {
    let f = fixture();
    f.enable_acpi();
    f.pm.press_power_button();
    assert!(!f.bench.level(9), "not enabled yet");
    f.write16(ENABLE, event::POWER_BUTTON);
    assert!(f.bench.level(9));
    assert_eq!(read16(&*f.pm, 0), event::POWER_BUTTON);
    f.write16(0, event::SLEEP_BUTTON);
    assert!(f.bench.level(9), "another bit was cleared");
    write8(&*f.pm, 1, (event::POWER_BUTTON >> 8) as u8);
    assert!(!f.bench.level(9));
    assert_eq!(read16(&*f.pm, 0), 0);
}

#[test]
fn no_interrupt_in_legacy_mode() {
    let f = fixture();
    f.write16(ENABLE, event::POWER_BUTTON);
    f.pm.press_power_button();
    assert!(!f.bench.level(9));
    f.enable_acpi();
    assert!(f.bench.level(9));
}

#[test]
fn sleep_enable_with_type_of_s5_powers_off() {
    let f = fixture();
    f.write16(CONTROL, u16::from(S5_SLEEP_TYPE) << 10);
    f.write16(CONTROL, control::SLEEP_ENABLE | 1 << 10);
    assert_eq!(f.requests.take(), []);
    f.write16(CONTROL, control::SLEEP_ENABLE | u16::from(S5_SLEEP_TYPE) << 10);
    assert_eq!(f.requests.take(), [PowerEvent::PowerOff]);
    assert_eq!(read16(&*f.pm, CONTROL) & control::SLEEP_ENABLE, 0, "reads as zero");
}

#[test]
fn timer_counts_3579545_in_a_second() {
    let f = fixture();
    f.bench.run_to(1_000_000_000);
    assert_eq!(read32(&*f.pm, TIMER), 3_579_545);
    let bytes: Vec<u8> = (0..4).map(|i| read8(&*f.pm, TIMER + i)).collect();
    assert_eq!(bytes, 3_579_545_u32.to_le_bytes());
    f.bench.run_to(3_600_000_000_000);
    assert_eq!(read32(&*f.pm, TIMER), (3_579_545_u64 * 3600) as u32);
}

#[test]
fn timer_interrupts_each_time_its_top_bit_changes() {
    let f = fixture();
    f.enable_acpi();
    f.write16(ENABLE, event::TIMER);
    let flip = |n: u64| ((n << 31) * 1_000_000_000).div_ceil(3_579_545);
    f.bench.run_to(flip(1) + 10);
    assert_eq!(f.bench.edges(9), [flip(1)]);
    assert_eq!(read16(&*f.pm, 0), event::TIMER);
    f.write16(0, event::TIMER);
    assert!(!f.bench.level(9));
    f.bench.run_to(flip(2) + 10);
    assert_eq!(f.bench.edges(9), [flip(2)]);
}

#[test]
fn timer_status_is_set_without_being_enabled() {
    let f = fixture();
    f.bench.oversleep_to(700_000_000_000);
    assert_eq!(read16(&*f.pm, 0), event::TIMER);
    f.write16(0, event::TIMER);
    assert_eq!(read16(&*f.pm, 0), 0);
}

#[test]
fn general_purpose_event_raises_the_interrupt() {
    let f = fixture();
    f.enable_acpi();
    f.pm.raise_gpe(9);
    f.pm.raise_gpe(32);
    assert_eq!(read32(&*f.pm, GPE0), 1 << 9);
    assert!(!f.bench.level(9));
    write8(&*f.pm, GPE_ENABLE + 1, 2);
    assert!(f.bench.level(9));
    write8(&*f.pm, GPE0 + 1, 2);
    assert!(!f.bench.level(9));
}

#[test]
fn restored_state_drives_the_interrupt_again() {
    let f = fixture();
    f.enable_acpi();
    f.write16(ENABLE, event::POWER_BUTTON);
    f.pm.press_power_button();
    let saved = f.pm.save();
    f.pm.reset();
    assert!(!f.bench.level(9));
    assert_eq!(read16(&*f.pm, CONTROL), 0);
    f.pm.restore(&saved).unwrap();
    assert!(f.bench.level(9));
}

#[test]
fn random_accesses_leave_a_working_device() {
    let f = fixture();
    poke(&*f.pm, 0x40, &f.bench, 6);
    f.pm.reset();
    f.enable_acpi();
    assert_eq!(read16(&*f.pm, CONTROL), 1);
}
